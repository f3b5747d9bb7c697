"""What a client sees when a leader is killed, when a node comes back, and when a new one is added.

Laws: a node is killed with SIGKILL, so it can say nothing more. What counts is what a client sees, from the last write that
was acknowledged before to the first one after, or from the start of a process to the first linearizable read that it
answers; not what a log says. All databases are asked by the same code.

Theory. After the leader's death nobody knows who will be next, so both others are asked at the same time, each over
and over: a request that fails is sent again after 2 ms, one that hangs is given up after 100 ms, for some servers
keep a request for seconds that they got while there was no leader.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench import dialect
from bench.dialect import Dialect
from bench.load import fill
from bench.plan import Plan
from bench.servers import Server
from bench.systems import System, await_leader

WRITING_S = 0.3
HANGS_S = 0.1
AGAIN_S = 0.002
GIVE_UP_S = 180.0  # a million keys may be on their way to a new node, on a busy machine
SETTLE_S = 3.0
RECEIVE_BYTES = 1 << 16

Make = Callable[[Dialect], bytes]


class Asker:
    """One connection that waits for each reply. A context manager."""

    def __init__(self, plan: Plan, address: str, timeout_s: float) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._dialect = dialect.new(plan)
        self._rest = b""
        try:
            self._dialect.greet(self._socket)
        except OSError:
            self._socket.close()
            raise

    def ask(self, make: Make) -> str:
        """Send one request and await its reply: "" or its error's code. Raises OSError."""
        self._socket.sendall(make(self._dialect))
        while True:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionError("the server hung up")
            found, self._rest = self._dialect.outcomes(self._rest + data)
            if found:
                return found[0]

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def put(d: Dialect) -> bytes:
    """A write."""
    return d.put(0)


def get(d: Dialect) -> bytes:
    """A read."""
    return d.get(0)


class _Probe(threading.Thread):
    """Asks one server over and over until somebody has got an answer."""

    def __init__(self, plan: Plan, address: str, make: Make, done: threading.Event, again_s: float) -> None:
        super().__init__(daemon=True)
        self._plan, self._address, self._make, self._done, self._again_s = plan, address, make, done, again_s
        self.answered_at: float | None = None

    def run(self) -> None:
        while not self._done.is_set():
            try:
                with Asker(self._plan, self._address, HANGS_S) as asker:
                    while not self._done.is_set():
                        if not asker.ask(self._make):
                            self.answered_at = time.perf_counter()
                            self._done.set()
                            return
                        time.sleep(self._again_s)
            except OSError:
                time.sleep(self._again_s)


def first_answer(plan: Plan, addresses: Sequence[str], make: Make, again_s: float = AGAIN_S) -> float:
    """When the first of `addresses` has answered a request, on `time.perf_counter`'s clock. Raises RuntimeError."""
    done = threading.Event()
    probes = [_Probe(plan, address, make, done, again_s) for address in addresses]
    for probe in probes:
        probe.start()
    answered = done.wait(GIVE_UP_S)
    done.set()
    for probe in probes:
        probe.join()
    if not answered:
        raise RuntimeError(f"nobody has answered for {GIVE_UP_S:.0f} s")
    return min(probe.answered_at for probe in probes if probe.answered_at is not None)


def failover_s(system: System, plan: Plan) -> float:
    """Kill the leader under a writer; return the time from the last write acknowledged before to the first one after.

    The node is started again, and all are well when this returns. Raises RuntimeError.
    """
    leader = await_leader(system)
    others = [node.address for node in system.nodes if node is not leader]
    last_at = time.perf_counter()
    with Asker(plan, leader.address, GIVE_UP_S) as writer:
        until = last_at + WRITING_S
        while last_at < until:
            if not writer.ask(put):
                last_at = time.perf_counter()
        leader.process.kill()
        try:
            while not writer.ask(put):  # what it has answered before it died counts
                last_at = time.perf_counter()
        except OSError:
            pass
        gap_s = first_answer(plan, others, put) - last_at
    leader.process.wait()
    leader.start()
    await_leader(system)
    return gap_s


def _ready_s(plan: Plan, node: Server, begin: Callable[[], object]) -> float:
    """From `begin()` to the first linearizable read that `node` answers, in seconds."""
    began = time.perf_counter()
    begin()
    return first_answer(plan, [node.address], get) - began


def growth(system: System, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Load `plan.keys` keys, and tell what they cost and how long nodes then take to come. Raises RuntimeError."""
    leader = await_leader(system)
    plan = replace(plan, servers=(leader.address,))
    began = time.perf_counter()
    fill(plan)
    load_s = time.perf_counter() - began
    say(f"{system.name}: {plan.keys:,} keys in {load_s:.1f} s")
    time.sleep(SETTLE_S)  # for what they do behind the writes
    figures: dict[str, Any] = {
        "keys": plan.keys,
        "load_s": load_s,
        "memory_mib": [round(node.memory_bytes() / (1 << 20)) for node in system.nodes],
        "private_mib": [round(node.private_bytes() / (1 << 20)) for node in system.nodes],
        "disk_mib": [round(node.disk_bytes() / (1 << 20)) for node in system.nodes],
    }
    follower = next(node for node in system.nodes if node is not await_leader(system))
    follower.kill()
    figures["restart_s"] = _ready_s(plan, follower, follower.start)
    say(f"{system.name}: a killed follower is ready again in {figures['restart_s']:.2f} s")
    await_leader(system)
    for node in system.nodes:
        node.process.kill()
    for node in system.nodes:
        node.process.wait()
    began = time.perf_counter()
    for node in system.nodes:
        node.start()
    figures["restart_all_s"] = first_answer(plan, [node.address for node in system.nodes], get) - began
    say(f"{system.name}: all, killed at once, are ready again in {figures['restart_all_s']:.2f} s")
    await_leader(system)
    time.sleep(SETTLE_S)
    figures["memory_restarted_mib"] = [round(node.memory_bytes() / (1 << 20)) for node in system.nodes]
    newcomer = system.add()
    figures["join_s"] = _ready_s(plan, newcomer, newcomer.start)
    say(f"{system.name}: a new, empty node has answered a linearizable read after {figures['join_s']:.2f} s")
    return figures
