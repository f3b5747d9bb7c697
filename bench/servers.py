"""Processes of servers: how they are started, what they take of the machine, and that all of them end.

Laws: what is started here ends here, by its pid, whatever happens: also where the command itself is asked to end (`commanded`). A figure
of the machine is read from /proc; where there is none it is 0, and shown as unknown.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

READY_TIMEOUT_S = 60.0
STOP_PATIENCE_S = 10.0
LOOK_S = 0.01
PORTS = range(12_000, 32_000)
ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OF_SIGNAL = 128  # as POSIX shells have it


@dataclass(slots=True)
class Server:
    """One server process: how to start it, where it listens, and what it has cost so far."""

    name: str
    command: Sequence[str]
    directory: Path
    address: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def log(self) -> Path:
        """What it says."""
        return self.directory / f"{self.name}.out"

    def start(self) -> None:
        """Start it, for the first time or again; its log goes on. Raises OSError."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("DDB_", "ETCD_"))}
        with self.log.open("ab") as output, _ending.put_off():  # or it might be started, and nobody know of it
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env={**clean, **self.environment},
            )
            _ending.started.append(self.process)

    def await_line(self, pattern: str) -> re.Match[str]:
        """Wait until it has said a line with `pattern`. Raises RuntimeError."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (found := re.search(pattern, self.said())):
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not get ready:\n{self.said()[-2000:]}")
            time.sleep(LOOK_S)
        return found

    def said(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def check(self) -> None:
        """Raise RuntimeError if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended:\n{self.said()[-2000:]}")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def cpu_s(self) -> float:
        """The processor time it has used, in seconds."""
        return cpu_s(self.process.pid)

    def memory_bytes(self) -> int:
        """What it holds of the machine's memory now, the files that it has mapped included (its resident set)."""
        return memory_bytes(self.process.pid)

    def private_bytes(self) -> int:
        """The same without the files, whose pages the system can have back."""
        return memory_bytes(self.process.pid, "RssAnon")

    def disk_bytes(self) -> int:
        """What its directory takes of the disk."""
        return sum(p.stat().st_blocks * 512 for p in (self.directory / self.name).rglob("*") if p.is_file())


class _Ending:
    """Whether this process was asked to end, and what must end with it."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self.asked: int | None = None
        self._busy = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal came: it interrupts, now or as soon as a start is done."""
        self.asked = number
        if not self._busy:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """A block that is not interrupted."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self.asked is not None:
            raise KeyboardInterrupt

    def end_all(self) -> None:
        """Kill what is left."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()


_ending = _Ending()


def commanded(main: Callable[[], int]) -> int:
    """Carry out a command's `main`; returns its exit code, or 128 + N where signal N ended it.

    Each of ASKED_TO_END interrupts it as Ctrl-C does, so that it can end its servers and remove their data. Where a second
    one keeps it from that, they are killed.
    """
    before = {n: signal.signal(n, _ending.ask) for n in ASKED_TO_END if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        code = main()
    except KeyboardInterrupt:
        code = 1
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        _ending.end_all()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if _ending.asked is None else OF_SIGNAL + _ending.asked


def cpu_s(pid: int) -> float:
    """The processor time that process `pid` has used, in seconds; 0 where the system doesn't tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int, kind: str = "VmRSS") -> int:
    """What process `pid` holds of the machine's memory, by the line `kind` of its status; 0 where not told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{kind}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def own_memory_bytes() -> int:
    """The most that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak << 10


def pid_at(port: int) -> int | None:
    """The process that listens on `port` of this machine, where it can be told."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        rows = [line.split() for line in lines]
        inodes |= {f"socket:[{r[9]}]" for r in rows if r[3] == "0A" and int(r[1].rpartition(":")[2], 16) == port}
    for path in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        try:
            if os.readlink(path) in inodes:
                return int(path.parts[2])
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
    return None


def stop(servers: Iterable[Server]) -> None:
    """Ask all to end, and kill those that don't."""
    started = [server for server in servers if hasattr(server, "process")]
    for server in started:
        server.process.terminate()
    deadline = time.monotonic() + STOP_PATIENCE_S
    for server in started:
        try:
            server.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            server.kill()


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on now.

    They are below those that systems give to outgoing connections, or one of these might have taken the port when a
    server that was killed comes back to it.
    """
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports from {PORTS.start} to {PORTS.stop}")


def program(name: str, *places: str) -> str | None:
    """Where the program `name` is: in `places`, else on the PATH."""
    return next((place for place in places if os.access(place, os.X_OK)), shutil.which(name))
