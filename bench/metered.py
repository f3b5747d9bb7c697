"""A node that can tell where its processor time goes: `python -m bench.metered NODE'S ARGUMENTS`.

Laws: the program is `ddb.node` as it is: nothing in it is changed or wrapped, and until SIGUSR1 comes nothing happens. From
then to SIGUSR2 it looks now and then at what it is doing, and at how long each garbage collection takes, and then
writes what it saw to the file that DDB_BENCH_METER names.

Theory. To put a clock around each stage would cost more than many stages take: 0.3 µs, twice, for a function that takes
0.5. So this samples instead: after each so-and-so much processor time the system sends SIGPROF, and the stack of the moment
says which stage it was (`stage_of`). The shares of the samples, times the processor time that the kernel counted, is what
the stages took. Python runs the handler between two instructions of the main thread, so a system call counts to the function that
made it. SIGPROF goes by the time of all threads: while the log's writer works, the loop mostly waits, and a sample that
finds it waiting counts as nothing.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

INTERVAL_S = 0.001
VARIABLE = "DDB_BENCH_METER"
STAGES = (
    "receive", "decode", "propose", "log", "replicate", "apply", "read", "encode", "send", "wait", "other",
)  # fmt: skip

# Which stage a function belongs to: by file and qualified name, else by file alone. None: what called it decides.
BY_FUNCTION = {
    ("loop", "Loop.turn"): "wait",
    ("loop", "Loop.flush"): "send",
    ("loop", "Connection.flush"): "send",
    ("loop", "Connection._next_piece"): "send",
    ("loop", "Connection.send"): "send",
    ("loop", "Connection.mark_dirty"): "send",
    ("loop", "Loop.on_events"): "wait",
    ("loop", "Loop.post"): "log",
    ("loop", "Loop._wake"): "log",
    ("server", "ClientConnection.flush"): "send",
    ("server", "ClientConnection._collect"): "send",
    ("server", "ClientConnection.send"): "send",
    ("server", "ClientConnection.slot_done"): "encode",
    ("server", "ClientConnection._handle"): "decode",
    ("wire", "FrameBuffer.feed"): "receive",
    ("wire", "frame"): "encode",
    ("wire", "splice"): "encode",
    ("wire", "failure"): "encode",
    ("codec", "encode_batch"): "propose",
    ("codec", "encode_message"): "replicate",
    ("codec", "_encode_append"): "replicate",
    ("replica", "Replica.write"): "propose",
    ("replica", "Replica._route_writes"): "propose",
    ("replica", "Replica._propose"): "propose",
    ("replica", "Replica._take_writes"): "propose",
    ("replica", "Replica._save"): "log",
    ("replica", "Replica.saved"): "log",
    ("replica", "Replica._apply"): "apply",
    ("replica", "Replica._answer_writes"): "encode",
    ("replica", "Replica.read"): "read",
    ("replica", "Replica.read_stale"): "read",
    ("replica", "Replica._ask_for_reads"): "read",
    ("replica", "Replica._answer_reads"): "read",
    ("replica", "Replica._answer_deferred"): "read",
    ("replica", "Replica._answer_read"): "read",
    ("raft", "Raft.propose"): "propose",
    ("raft", "Raft.read"): "read",
    ("kv", "answer"): "read",
    ("node", "Node.received"): "replicate",
}
BY_FILE: dict[str, str | None] = {
    "loop": "receive",
    "server": "receive",
    "wire": None,
    "commands": "decode",
    "service": "decode",
    "codec": "decode",
    "slots": "encode",
    "replica": "replicate",
    "raft": "replicate",
    "raftlog": "replicate",
    "leadership": "replicate",
    "election": "replicate",
    "peers": "replicate",
    "log": "log",
    "record": "log",
    "segment": "log",
    "disk": "log",
    "kv": "apply",
    "store": None,
    "layers": None,
    "messages": None,
}
BELOW = {"wire": "decode", "store": "apply", "layers": "apply"}  # where nothing above decides


def stage_of(frame: FrameType | None) -> str:
    """The stage that a stack is in: that of the innermost function which decides."""
    fallback = "other"
    while frame is not None:
        code = frame.f_code
        name = os.path.basename(code.co_filename)[:-3]
        stage = BY_FUNCTION.get((name, code.co_qualname)) or BY_FILE.get(name)
        if stage is not None:
            return stage
        fallback = BELOW.get(name, fallback)
        frame = frame.f_back
    return fallback


class Meter:
    """Counts samples by stage, and the collector's pauses by generation, between SIGUSR1 and SIGUSR2."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: Counter[str] = Counter()
        self.pauses_s: dict[int, list[float]] = {}
        self._pause_began: float | None = None
        self._cpu_s = (0.0, 0.0)

    def install(self) -> None:
        """Listen for the signals."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        self.samples[stage_of(frame)] += 1

    def collected(self, phase: str, info: dict[str, int]) -> None:
        """What the collector calls before and after each of its runs."""
        now = time.perf_counter()
        if phase == "start":
            self._pause_began = now
        elif self._pause_began is not None:
            self.pauses_s.setdefault(info["generation"], []).append(now - self._pause_began)
            self._pause_began = None

    def _begin(self, number: int, frame: FrameType | None) -> None:
        self.samples.clear()
        self.pauses_s.clear()
        self._pause_began = None
        if self.collected not in gc.callbacks:
            gc.callbacks.append(self.collected)
        self._cpu_s = (time.thread_time(), time.process_time())
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def _end(self, number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if self.collected in gc.callbacks:
            gc.callbacks.remove(self.collected)
        seen: dict[str, Any] = {
            "samples": dict(self.samples),
            "pauses": {
                str(generation): {
                    "count": len(all_s),
                    "total_ms": round(1000 * sum(all_s), 3),
                    "max_ms": round(1000 * max(all_s), 3),
                }
                for generation, all_s in sorted(self.pauses_s.items())
            },
            "loop_s": time.thread_time() - self._cpu_s[0],
            "process_s": time.process_time() - self._cpu_s[1],
        }
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(seen))
        draft.replace(self.path)


def main() -> int:
    """Run the node, whose loop is on the main thread, where Python handles signals."""
    from ddb import node

    Meter(Path(os.environ[VARIABLE])).install()
    return node.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
