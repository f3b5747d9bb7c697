"""`ddb up`: a registry and a cluster as real processes on this machine, to try and to watch.

Laws:

1. These are the same programs that run in production, each with its own process, port, directory and log: what one
   sees here is what the database does. A node that is killed stays dead until somebody starts it again.
2. All that `up` started ends with it, whether by Ctrl-C, SIGTERM or, on Linux, its own sudden death.
3. The directory is the cluster: the same directory again brings the same data.

Theory. Each child leads a session of its own, so that a Ctrl-C at the terminal reaches `up` alone, which then ends
the nodes together and the registry last, giving each the time to hand over and flush. Against a `kill -9`
of `up` itself nothing can run any more, so the kernel is asked beforehand: a child that called
`prctl(PR_SET_PDEATHSIG)` (Linux) gets a signal when its parent dies. It calls it in a few lines of Python that then
become the server (exec), not between fork and exec, where a process with threads can do next to nothing safely.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ddb import overview, wire
from ddb.errors import StartupError

NODES: Final = 3
LOOK_S: Final = 0.1
STOP_PATIENCE_S: Final = 10.0
_LISTENING = re.compile(rb"listening on (\S+:\d+)")
_NODE_DIRECTORY = re.compile(r"n([1-9][0-9]?)")

_DIE_WITH_PARENT: Final = """
import os, sys
number, parent, *command = sys.argv[1:]
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
except (ImportError, OSError, AttributeError):
    pass
if os.getppid() == int(parent):  # or it has died in between
    os.execv(command[0], command)
"""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What `ddb up` was told. `nodes` None: as many as the directory holds, else three. Port 0: any free ones.

    The servers of a `throwaway` cluster are killed in the end, frozen ones too, for nobody needs their data any more.
    """

    directory: Path
    nodes: int | None = None
    host: str = "127.0.0.1"
    port: int = 8050
    registry_port: int | None = None
    election: str | None = None
    ready_timeout_s: float = 30.0
    throwaway: bool = False


@dataclass(slots=True)
class Child:
    """One server process that `up` started."""

    name: str
    command: list[str]
    output: Path
    throwaway: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    address: str = ""
    output_start: int = 0
    mourned: bool = field(default=False)

    def said(self) -> bytes:
        """What it has logged since it started."""
        with self.output.open("rb") as log:
            log.seek(self.output_start)
            return log.read()

    def last_words(self) -> str:
        """The last line that it logged."""
        lines = self.said().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class _Stop(Exception):
    """Somebody asked `up` to end."""


def run(settings: Settings, say: Say, colour: bool = False) -> int:
    """Run the cluster until SIGINT or SIGTERM; `say` gets each line for the person. Returns the exit code.

    Raises StartupError where it can't run: a busy port, a directory that can't be written, a node that ends at once.
    """
    with _signals_as_exception():
        try:
            with cluster(settings, say) as children:
                for line in _welcome(settings, children, colour):
                    say(line)
                _watch(children, say)
        except _Stop:
            pass  # which is how it is meant to end
        say(f"Stopped. The data is in {settings.directory}; the same command goes on from there.")
    return 0


@contextlib.contextmanager
def cluster(settings: Settings, say: Say) -> Iterator[list[Child]]:
    """A registry and its nodes, in this order, running and ready; all are ended in the end. `say` gets what there is to
    say about that.

    Raises StartupError where it can't run: a busy port, a directory that can't be written, a node that ends at once.
    """
    count = _count(settings)
    _prepare_directory(settings.directory)
    _refuse_busy_ports(settings, count)
    children: list[Child] = []
    try:
        _start_all(settings, count, children)
        _await_ready(settings, children[1:])
        yield children
    finally:
        _end(children, say, kill=settings.throwaway)


def start_again(child: Child) -> None:
    """Start `child`, which has ended, again: the same directory, the same address. Does not wait for it."""
    child.command = _command_again(child)
    child.mourned = False
    _launch(child)


# --------------------------------------------------------------- before


def _count(settings: Settings) -> int:
    """How many nodes to run."""
    found = [int(m[1]) for p in _listing(settings.directory) if (m := _NODE_DIRECTORY.fullmatch(p.name)) and p.is_dir()]
    held = max(found, default=0)
    if settings.nodes is not None and settings.nodes < held:
        raise StartupError(
            f"{settings.directory} holds a cluster of {held} nodes, and fewer might not be a majority of it; "
            f"start them all, or give another --dir."
        )
    return settings.nodes or held or NODES


def _listing(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StartupError(f"{directory} can't be used for data: {error.strerror}; give another --dir.") from None


def _prepare_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StartupError(f"{directory} can't be used for data: {error.strerror}; give another --dir.") from None


def _ports(settings: Settings, count: int) -> list[int]:
    """The registry's port, then the nodes'. 0 is any."""
    first = settings.port
    if first == 0:
        return [settings.registry_port or 0] + [0] * count
    registry = first - 1 if settings.registry_port is None else settings.registry_port
    ports = [registry, *range(first, first + count)]
    if ports[-1] > 65535 or registry in ports[1:]:
        raise StartupError(
            f"The nodes' ports would be {first} to {ports[-1]}, the registry's {registry}: choose others."
        )
    return ports


def _refuse_busy_ports(settings: Settings, count: int) -> None:
    for port in _ports(settings, count):
        try:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            with socket.create_server((settings.host, port), family=family):
                pass
        except OSError as error:
            where = wire.format_address(settings.host, port)
            raise StartupError(
                f"{where} can't be listened on ({(error.strerror or str(error)).lower()}); "
                "stop what uses it, or choose other ports with --port."
            ) from None


# ---------------------------------------------------------------- start


def _start_all(settings: Settings, count: int, children: list[Child]) -> None:
    """Start the registry, then the nodes; `children` grows as they start."""
    ports = _ports(settings, count)
    directory, host = settings.directory.resolve(), settings.host
    place = ["--host", host, "--data-dir"]
    registry = _spawn("registry", [*place, str(directory / "registry"), "--port", str(ports[0])], settings, children)
    deadline = time.monotonic() + settings.ready_timeout_s
    _await_address(registry, deadline)
    election = ["--election", settings.election] if settings.election else []
    fresh = not (directory / "n1").exists()
    for position, port in enumerate(ports[1:], 1):
        name = f"n{position}"
        flags = ["-ra", registry.address, "--name", name, *place, str(directory / name), "--port", str(port), *election]
        child = _spawn(name, flags, settings, children)
        if fresh and position == 1:
            _await_address(child, deadline)
            _await_leader(child, deadline)
    for child in children[1:]:
        _await_address(child, deadline)


def _await_leader(child: Child, deadline: float) -> None:
    """Wait until the first node of a new cluster leads it: so it is always n1 that begins, as the README says."""
    while child.process.poll() is None and time.monotonic() < deadline:
        if overview.ask(child.address).leads:
            return
        time.sleep(LOOK_S / 5)


def _spawn(name: str, flags: list[str], settings: Settings, children: list[Child]) -> Child:
    module = "ddb.registry" if name == "registry" else "ddb.node"
    command = [sys.executable, "-m", module, *flags]
    child = Child(name, command, settings.directory.resolve() / f"{name}.out", settings.throwaway)
    _launch(child)
    children.append(child)
    return child


def _launch(child: Child) -> None:
    with child.output.open("ab") as log:
        child.output_start = log.tell()
        child.process = subprocess.Popen(
            [*_dying_with_parent(signal.SIGKILL if child.throwaway else signal.SIGTERM), *child.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(),
            start_new_session=True,
        )


def _environment() -> dict[str, str]:
    """The caller's environment without DDB_… settings, which would override what `up` decides, and with this very
    package on the path, so that a bare checkout works from any directory."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DDB_")}
    package = str(Path(__file__).resolve().parent.parent)
    path = [package, *filter(None, [clean.get("PYTHONPATH")])]
    return {**clean, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _dying_with_parent(number: int) -> list[str]:
    """How a command must begin, so that the kernel sends it the signal `number` when this process dies. Where that can't
    be, not at all."""
    if not sys.platform.startswith("linux"):
        return []
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(int(number)), str(os.getpid())]


def _await_address(child: Child, deadline: float) -> None:
    """Wait until `child` says where it listens."""
    while child.process.poll() is None and time.monotonic() < deadline:
        found = _LISTENING.search(child.said())
        if found:
            child.address = found[1].decode()
            return
        time.sleep(LOOK_S / 5)
    raise StartupError(f"{child.name} did not start: {child.last_words()} (its log: {child.output})")


def _await_ready(settings: Settings, nodes: list[Child]) -> None:
    """Wait until all nodes are voters of one cluster that has a leader."""
    deadline = time.monotonic() + settings.ready_timeout_s
    while True:
        views = overview.ask_all([node.address for node in nodes])
        if overview.leader_of(views) is not None and all(_joined(view.status, len(nodes)) for view in views):
            return
        for node in nodes:
            if node.process.poll() is not None:
                raise StartupError(f"{node.name} ended early: {node.last_words()} (its log: {node.output})")
        if time.monotonic() > deadline:
            table = "\n".join(overview.status_table(views))
            raise StartupError(
                f"The cluster was not ready within {settings.ready_timeout_s:g} s; the logs are "
                f"{settings.directory}/*.out.\n{table}"
            )
        time.sleep(LOOK_S / 2)


def _joined(status: dict[str, Any] | None, wanted: int) -> bool:
    """Whether a node that answers `status` knows the leader and all `wanted` voters."""
    if status is None or status.get("leader") is None:
        return False
    voters = [member for member in status["members"] if member["role"] == "voter"]
    return len(voters) >= wanted


# -------------------------------------------------------------- running


def _welcome(settings: Settings, children: list[Child], colour: bool) -> Iterator[str]:
    """The table, and what to try next."""
    registry, *nodes = children
    views = overview.ask_all([node.address for node in nodes])
    leader = overview.leader_of(views)
    leading = next((node for node in nodes if leader and node.name == leader.name), nodes[0])
    yield from overview.status_table(views, colour)
    yield ""
    yield f"The registry is at {registry.address}; data and logs are in {settings.directory}."
    yield "In another terminal, try:"
    yield ""
    yield f"  export DDB_SERVER={','.join(node.address for node in nodes)}"
    ddb = _program()
    yield f"  {ddb} put city Oslo"
    yield f"  {ddb} get city"
    if len(nodes) >= 3:  # fewer are no majority without it
        yield f"  kill -9 {leading.process.pid}    # {leading.name}, the leader"
        yield f"  {ddb} get city"
    yield f"  {ddb} status"
    yield ""
    yield "Ctrl-C stops all of it."


def _program() -> str:
    """How this program was called, as one would type it again."""
    called = sys.argv[0]
    name = Path(called).name
    if name == "__main__.py":
        return f"{Path(sys.executable).name} -m ddb"
    return name if shutil.which(name) == called else shlex.quote(called)


def _watch(children: list[Child], say: Say) -> None:
    """Report each child that ends by itself, until a signal ends this."""
    while True:
        for child in children:
            status = child.process.poll()
            if status is not None and not child.mourned:
                child.mourned = True
                how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
                say(
                    f"{child.name} has ended {how}: {child.last_words()}"
                    if status > 0
                    else f"{child.name} has ended {how}."
                )
                say(f"  start it again with: {_restart_command(child)}")
        time.sleep(LOOK_S)


def _restart_command(child: Child) -> str:
    """A line for a shell that starts `child` again, on the same address."""
    package = Path(__file__).resolve().parent.parent
    here = "" if package == Path.cwd() else f"PYTHONPATH={shlex.quote(str(package))} "
    return here + shlex.join(_command_again(child))


def _command_again(child: Child) -> list[str]:
    """The command that starts `child` on the port that it got."""
    command = list(child.command)
    command[command.index("--port") + 1] = str(wire.parse_address(child.address)[1])
    return command


def _end(children: list[Child], say: Say, kill: bool) -> None:
    """Ask the nodes to end, then the registry; kill what has not ended in time, or all of it if `kill` says so. A second
    Ctrl-C kills at once."""
    running = [child for child in children if child.process.poll() is None]
    if not running:
        return
    with contextlib.suppress(OSError):  # who listened may have gone: `ddb up | head`
        say("Stopping …")
    nodes, registry = ([c for c in running if (c.name == "registry") is wanted] for wanted in (False, True))
    try:
        deadline = time.monotonic() + STOP_PATIENCE_S
        for part in () if kill else (nodes, registry):
            for child in part:
                child.process.terminate()
            for child in part:
                child.process.wait(max(0.1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, _Stop, KeyboardInterrupt):
        pass  # what remains is killed below; nothing acknowledged is lost by that
    for child in running:
        with contextlib.suppress(_Stop, KeyboardInterrupt):
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()


@contextlib.contextmanager
def _signals_as_exception() -> Iterator[None]:
    """While this lasts, SIGINT, SIGTERM and SIGHUP raise _Stop where the program is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except _Stop:
        pass  # one more of them, while all was ending already
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
