"""The registry's process: `python -m ddb.registry`.

It only composes: the decisions are roster.py's, the sockets server.py's. Its own part is to keep the roster's memory
on disk, and to say in the log who comes and goes.

Laws: the memory is durable before any reply that depends on it (written beside, fsynced, renamed, the directory
fsynced); where the disk refuses, the decision is taken back and the request fails. `kill -9` at any moment leaves
the old memory or the new one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ddb import __version__
from ddb.disk import Disk, OsDisk, fsync_directory, read_file, replace_durably
from ddb.errors import BadRequest, ReadOnly, StartupError
from ddb.http import Route
from ddb.roster import Memory, Roster, listed
from ddb.routes import registry_routes
from ddb.server import Limits, Loop, Server, Slot, raise_descriptor_limit
from ddb.settings import SettingsParser, seconds, whole
from ddb.wire import DIGITS_MAX, encode, format_address

log = logging.getLogger("ddb.registry")

STUCK_WARNING_S: Final = 10.0
DRAIN_S: Final = 1.0

Operation = Callable[[dict[str, Any]], dict[str, Any]]


class MemoryFile:
    """The file `registry.json` in the data directory, which one process at a time uses."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        """Make and lock `directory`. Raises StartupError where it can't be written, or is in use."""
        self.path = directory / "registry.json"
        self._disk = disk or OsDisk()
        self._lock: int | None = None
        try:
            self._disk.make_directory(directory)
            self._lock = self._disk.lock(directory / "lock")
        except BlockingIOError:
            raise StartupError(f"The data directory {directory} is in use by another process.") from None
        except OSError as error:
            raise StartupError(f"The data directory {directory} can't be used: {error.strerror}.") from error

    def load(self) -> Memory | None:
        """What was saved; None where nothing was. Raises StartupError where the file is damaged."""
        try:
            memory = Memory(**json.loads(read_file(self._disk, self.path)))
            if not isinstance(memory.cluster, (str, type(None))):
                raise ValueError("no cluster id")
            fsync_directory(self._disk, self.path.parent)  # the process before may have been killed before it did
            return memory
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            raise StartupError(
                f"{self.path} can't be read as the registry's memory ({error}); restore it, or remove it "
                "while the cluster's nodes are running: they tell the registry again."
            ) from error

    def save(self, memory: Memory) -> None:
        """Make `memory` durable. Raises OSError."""
        replace_durably(self._disk, self.path, encode(asdict(memory)) + b"\n")

    def close(self) -> None:
        """Let another process use the directory. May be called twice."""
        if self._lock is not None:
            self._disk.close(self._lock)
            self._lock = None


class Registry:
    """The service behind the registry's port. `now` is a steady clock, in seconds."""

    def __init__(self, roster: Roster, file: MemoryFile, now: Callable[[], float] = time.monotonic) -> None:
        self.routes: Sequence[Route] = registry_routes()
        self._roster = roster
        self._file = file
        self._now = now
        self._began_s = now()
        self._warned_s = float("-inf")
        self._remembered: Memory | None = None  # what is on disk, as far as this process knows
        self._operations: dict[str, Operation] = {
            "register": self._register,
            "unregister": self._unregister,
            "nodes": self._nodes,
            "bootstrap": self._bootstrap,
            "status": self._status,
            "ping": lambda request: {"node": "registry", "time": time.time()},
            "ready": lambda request: {},
        }

    def request(self, request: dict[str, Any], slot: Slot) -> None:
        """See server.Service. Every operation is answered at once."""
        op = request.get("op")
        operation = self._operations.get(op) if type(op) is str else None
        if operation is None:
            raise BadRequest(f"`op` must be one of {', '.join(sorted(self._operations))}.")
        slot.reply(encode({"ok": True, **operation(request)}))

    def tick(self) -> None:
        """Look at the clock: forget the silent, and write down that this registry has listened for a cluster."""
        for node in self._roster.expire(self._now()):
            log.info("Forgot node %s (%s) at %s: silent for %g s", node.id, node.name, node.address, self._roster.ttl_s)
        if self._remembered is None and not self._roster.listening(self._now()):
            with contextlib.suppress(ReadOnly):
                self._remember()

    # -- operations

    def _register(self, request: dict[str, Any]) -> dict[str, Any]:
        before = self._roster.memory
        node, news = self._roster.register(request, self._now())
        self._remember(before)
        if news:
            log.info("Registered node %s at IP %s", node.id, node.address)
        return {"ttl": self._roster.ttl_s, **self._nodes(request)}

    def _unregister(self, request: dict[str, Any]) -> dict[str, Any]:
        id = request.get("id")
        if type(id) is not str:
            raise BadRequest("`id` must be the string under which the node registered.")
        node = self._roster.unregister(id)
        if node is not None:
            log.info("Forgot node %s (%s) at %s: it left", node.id, node.name, node.address)
        return {}

    def _nodes(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"nodes": listed(self._roster.nodes, self._now()), "cluster": self._roster.memory.cluster}

    def _bootstrap(self, request: dict[str, Any]) -> dict[str, Any]:
        before = self._roster.memory
        now_s = self._now()
        verdict = self._roster.bootstrap(request, now_s)
        self._remember(before)
        reply: dict[str, Any] = {
            "granted": verdict.granted,
            "cluster": self._roster.memory.cluster,
            "waiting": verdict.waiting,
        }
        if verdict.granted:
            log.info("Node %s may found the cluster %s", request["id"], reply["cluster"])
            if verdict.founders:
                reply["nodes"] = listed(verdict.founders, now_s)
        elif self._roster.stuck and now_s - self._warned_s >= STUCK_WARNING_S:
            self._warned_s = now_s
            log.warning(
                "The cluster %s was granted to node %s, which is not here. If its data is surely lost, stop the "
                "registry, remove %s, and start it again: another node will be granted a cluster.",
                self._roster.memory.cluster,
                self._roster.memory.founder,
                self._file.path,
            )
        return reply

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "role": "registry",
            "cluster": self._roster.memory.cluster,
            "nodes": len(self._roster.nodes),
            "ttl": self._roster.ttl_s,
            "uptime": round(self._now() - self._began_s, 3),
            "version": __version__,
        }

    def _remember(self, before: Memory | None = None) -> None:
        """Save what the roster decided, if it decided anything. Raises ReadOnly, with the decision taken back."""
        memory = self._roster.memory
        if memory == before:
            return
        try:
            self._file.save(memory)
            self._remembered = memory
        except OSError as error:
            if before is not None:
                self._roster.memory = before
            log.error("%s can't be written: %s", self._file.path, error.strerror)
            raise ReadOnly("The registry's disk refuses to write; free some space there, then try again.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the registry until SIGTERM or SIGINT; returns the exit code."""
    settings = _settings(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.set_int_max_str_digits(DIGITS_MAX)
    raise_descriptor_limit()
    try:
        with contextlib.ExitStack() as stack:
            loop = stack.enter_context(Loop())
            for number in (signal.SIGTERM, signal.SIGINT):  # `server` is there by the time the loop runs
                signal.signal(number, lambda *_: loop.post(lambda: server.drain(loop.stop, DRAIN_S)))
            file = MemoryFile(settings.data_dir)
            stack.callback(file.close)
            roster = Roster(file.load(), time.monotonic(), settings.ttl)
            registry = Registry(roster, file)
            limits = Limits(frame_bytes_max=settings.max_frame)
            server = Server(loop, registry, settings.host, settings.port, limits)
            stack.callback(server.close)
            log.info("registry listening on %s, data in %s", format_address(*server.address), settings.data_dir)
            if roster.memory.cluster is not None:
                log.info("remembers the cluster %s", roster.memory.cluster)
            loop.every(min(0.1, settings.ttl / 10), registry.tick)
            loop.run()
    except StartupError as error:
        sys.stderr.write(f"ddb-registry: {error.message}\n")
        return error.exit_code
    log.info("stopped")
    return 0


def _settings(arguments: Sequence[str] | None) -> Any:
    parser = SettingsParser(
        "DDB_REGISTRY",
        prog="ddb-registry",
        description="Tells the nodes of a cluster where the others are, and lets exactly one of them found it.",
        epilog="example:\n  ddb-registry --port 8080 --data-dir /var/lib/ddb-registry\n"
        "  ddb-node -ra 127.0.0.1:8080 --port 8050\n",
    )
    parser.setting("--host", type=str, default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.setting("--port", type=whole(0, 65535), default=8080, help="port, 0 for any free one (default 8080)")
    parser.setting(
        "--data-dir",
        type=Path,
        default=Path("ddb-data-registry"),
        help="where its memory is (default ddb-data-registry)",
    )
    parser.setting("--ttl", type=seconds(0.1, 3600), default=3.0, help="seconds until a silent node is forgotten (3)")
    parser.setting(
        "--max-frame", type=whole(1024, 64 << 20), default=16 << 20, help="bytes of the largest request (16 MiB)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
