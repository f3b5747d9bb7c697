"""Real clusters on loopback, for tests: processes that can be killed, frozen, wiped and started again.

Laws:

1. Nothing outlives its test. `Cluster` is a context manager; leaving it, even by an exception, kills by pid every
   process that it started, frozen ones included, and waits for each. An `atexit` hook does it for whom forgot.
2. Every port comes from the operating system: a process starts on port 0 the first time, says in its first log line
   which port it got, and keeps that port when it is started again, so that addresses survive a restart.
3. Nothing here imports the client: `ask` speaks frames by itself, so a broken client can't hide a broken server.
4. Waiting is for a condition with a time limit (`wait`), never for a span of time.

    with Cluster(tmp_path, 3) as cluster:
        leader = cluster.leader()
        leader.kill()
        cluster.client().put("city", "Oslo")
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ddb.client import Client

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent
LISTENING = re.compile(rb"listening on (\S+:\d+)")
START_TIMEOUT_S = 15.0

_running: set[Server] = set()


def environment(**extra: str) -> dict[str, str]:
    """The environment for a ddb process: this checkout first on the path, no DDB_… settings from outside."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DDB_")}
    return {**clean, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **extra}


def wait(condition: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
    """Call `condition` until it answers something true, and return that.

    An OSError or a LookupError counts as "not yet". Raises AssertionError naming `what` after `timeout_s`, in which a
    machine that stood still for a while (they do, where many share one) counts for a second at most.
    """
    waited_s = 0.0
    looked_at = time.monotonic()
    seen: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            seen = value
        except (OSError, LookupError) as error:
            seen = error
        if waited_s > timeout_s:
            raise AssertionError(f"not within {timeout_s} s: {what or 'the condition'} (last seen: {seen!r})")
        time.sleep(0.01)
        now = time.monotonic()
        waited_s += min(now - looked_at, 1.0)
        looked_at = now


def exchange(connection: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
    """Send one `request` as a frame over an open `connection` and return the reply."""
    payload = json.dumps(request).encode()
    connection.sendall(b"%d\n%b\n" % (len(payload), payload))
    return read_reply(connection)


def read_reply(connection: socket.socket) -> dict[str, Any]:
    """Read one frame from `connection`. Raises ConnectionError where the peer closed before it was whole."""
    received = b""
    while b"\n" not in received:
        received += _receive(connection)
    size, _, received = received.partition(b"\n")
    while len(received) < int(size) + 1:
        received += _receive(connection)
    assert len(received) == int(size) + 1, "the server sent more than one reply"
    reply: dict[str, Any] = json.loads(received)
    return reply


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def ask(address: str, timeout_s: float = 2.0, **request: Any) -> dict[str, Any]:
    """Connect to `address`, send one request (`op="get", key="k"`), return its reply. Raises OSError."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as connection:
        return exchange(connection, request)


class Server:
    """One server process, its log file, and the port it keeps. Subclasses say what its arguments are."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.log_path = directory.with_suffix(".out")
        self.address = ""
        self.flags: list[str] = []
        self.environment = environment()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def arguments(self) -> list[str]:
        """The module to run and its flags, without host and port."""
        raise NotImplementedError

    @property
    def host(self) -> str:
        """The address it listens on."""
        return self.address.rpartition(":")[0].strip("[]") or "127.0.0.1"

    @property
    def port(self) -> int:
        """The port it listens on; 0 before it has first started."""
        return int(self.address.rpartition(":")[2] or 0)

    @property
    def pid(self) -> int:
        """The process id of the last start."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has logged since its last start."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def spawn(self) -> None:
        """Start the process and return at once."""
        assert not self.alive, f"{self.name} runs already"
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        command = [sys.executable, "-m", *self.arguments(), "--host", self.host, "--port", str(self.port), *self.flags]
        with self.log_path.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                cwd=self.directory.parent,
                start_new_session=True,
            )
        _running.add(self)

    def wait_listening(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until its log says that it listens, and learn the address. Fails at once where the process ended."""

        def listening() -> bool:
            found = LISTENING.search(self.log.encode())
            if found:
                self.address = found[1].decode()
                return True
            assert self.alive, f"{self.name} ended instead of listening:\n{self.log}"
            return False

        wait(listening, timeout_s, f"{self.name} listens; its log:\n{self.log}")

    def start(self) -> None:
        """Start the process and wait until it listens."""
        self.spawn()
        self.wait_listening()

    def ask(self, timeout_s: float = 2.0, **request: Any) -> dict[str, Any]:
        """One request to this server, and its reply."""
        return ask(self.address, timeout_s, **request)

    def _signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        _running.discard(self)

    def stop_signal(self) -> None:
        """SIGSTOP: frozen, connections stay open."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT: goes on after `stop_signal`."""
        self._signal(signal.SIGCONT)

    def ask_to_leave(self) -> None:
        """SIGTERM, without waiting for the end."""
        self._signal(signal.SIGTERM)

    def term(self, timeout_s: float = 10.0) -> int:
        """SIGTERM, wait, return the exit status. Raises AssertionError where it does not leave."""
        self._signal(signal.SIGTERM)
        return self.wait_ended(timeout_s)

    def wait_ended(self, timeout_s: float = 10.0) -> int:
        """Wait until the process has ended by itself, and return its exit status."""
        process = self._process
        assert process is not None, f"{self.name} was never started"
        wait(lambda: process.poll() is not None, timeout_s, f"{self.name} ends; its log:\n{self.log}")
        _running.discard(self)
        return int(process.returncode)

    def restart(self) -> None:
        """kill -9 where it still runs, then start again: the same directory, the same port."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """kill -9 where it still runs, then delete its data directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __repr__(self) -> str:
        return f"{self.name} at {self.address or '-'} {f'pid {self.pid}' if self.alive else 'down'}"


class RegistryServer(Server):
    """The registry as a process."""

    def arguments(self) -> list[str]:
        return ["ddb.registry", "--data-dir", str(self.directory)]


class NodeServer(Server):
    """A node as a process, given the registry's address where there is one."""

    registry: RegistryServer | None = None

    def arguments(self) -> list[str]:
        arguments = ["ddb.node", "--name", self.name, "--data-dir", str(self.directory)]
        return arguments + (["-ra", self.registry.address] if self.registry else [])

    def status(self, timeout_s: float = 1.0) -> dict[str, Any]:
        """What `status` answers. Raises OSError where it can't be reached in time."""
        return self.ask(timeout_s, op="status")

    def role(self) -> str | None:
        """leader, follower, candidate, learner; None where it does not answer."""
        try:
            role: str | None = self.status(0.5).get("role")
        except OSError:
            return None
        return role


class Cluster:
    """A registry (unless `registry=False`) and `n` nodes n1, n2, … with data under `directory`.

    Every other keyword is a flag of each node: `Cluster(tmp_path, 3, election="raft", expect=3)`; True stands for a
    flag without a value, None for one to leave out. `hosts` names the nodes' addresses ("127.0.0.1" each when not given).
    Entering it starts everything and waits until it is ready.
    """

    def __init__(
        self,
        directory: Path,
        n: int = 3,
        *,
        registry: bool = True,
        hosts: list[str] | None = None,
        registry_flags: list[str] | None = None,
        **node_flags: object,
    ) -> None:
        self.directory = directory
        self.registry = RegistryServer("registry", directory / "registry") if registry else None
        if self.registry:
            self.registry.flags = registry_flags or []
        self.flags = list(_flags(node_flags))
        self.nodes: list[NodeServer] = []
        self._clients: list[Client] = []
        for position in range(n):
            self.new_node(host=hosts[position] if hosts else "127.0.0.1")

    def new_node(self, name: str | None = None, host: str = "127.0.0.1", **node_flags: object) -> NodeServer:
        """Another node of this cluster, not started yet."""
        name = name or f"n{len(self.nodes) + 1}"
        node = NodeServer(name, self.directory / name)
        node.address = f"{host}:0"
        node.registry = self.registry
        node.flags = [*self.flags, *_flags(node_flags)]
        self.nodes.append(node)
        return node

    # Life

    def start(self, ready: bool = True) -> Cluster:
        """Start the registry, then all nodes at the same instant; wait for one ready cluster unless `ready` is False."""
        if self.registry:
            self.registry.start()
        self.start_nodes()
        if ready:
            self.wait_ready()
        return self

    def start_nodes(self) -> None:
        """Start every node that does not run, all at the same instant, and wait until each listens."""
        started = [node for node in self.nodes if not node.alive]
        for node in started:
            node.spawn()
        for node in started:
            node.wait_listening()

    def close(self) -> None:
        """Kill all that runs. May be called twice."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        for server in self.servers:
            server.kill()

    def __enter__(self) -> Cluster:
        try:
            return self.start()
        except BaseException:
            self.print_logs()
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.print_logs()
        self.close()

    # Looking at it

    @property
    def servers(self) -> list[Server]:
        """The nodes, then the registry."""
        return [*self.nodes, *([self.registry] if self.registry else [])]

    @property
    def running(self) -> list[NodeServer]:
        """The nodes whose process runs."""
        return [node for node in self.nodes if node.alive]

    @property
    def addresses(self) -> str:
        """All nodes' addresses with commas, as `ddb.connect` takes them."""
        return ",".join(node.address for node in self.nodes if node.port)

    def statuses(self) -> dict[str, dict[str, Any]]:
        """`status` of every node that answers, by name."""
        found = {}
        for node in self.running:
            with contextlib.suppress(OSError):
                found[node.name] = node.status(0.5)
        return found

    def find_leader(self) -> NodeServer | None:
        """The node that says it leads in the highest term, now; None where none does."""
        leaders = [(s["term"], name) for name, s in self.statuses().items() if s.get("role") == "leader"]
        return self.node(max(leaders)[1]) if leaders else None

    def leader(self, timeout_s: float = 10.0) -> NodeServer:
        """Wait for a leader that a majority of the running nodes names, and return it."""

        def agreed() -> NodeServer | None:
            statuses = self.statuses()
            leader = self.find_leader()
            if leader is None:
                return None
            naming = [s for s in statuses.values() if (s.get("leader") or {}).get("name") == leader.name]
            return leader if 2 * len(naming) > len(self.running) else None

        found = self.wait(agreed, timeout_s, "a leader")
        assert found is not None
        return found

    def followers(self) -> list[NodeServer]:
        """The running nodes other than the leader."""
        leader = self.leader()
        return [node for node in self.running if node is not leader]

    def node(self, name: str) -> NodeServer:
        """The node called `name`."""
        return next(node for node in self.nodes if node.name == name)

    def wait(self, condition: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
        """As `wait` of this module."""
        return wait(condition, timeout_s, what)

    def wait_ready(self, timeout_s: float = 15.0, voters: int | None = None) -> NodeServer:
        """Wait until every running node answers, names the same leader, and sees `voters` voters (as many as run
        when not given). Returns the leader."""
        wanted = len(self.running) if voters is None else voters

        def ready() -> bool:
            statuses = self.statuses()
            if len(statuses) < len(self.running):
                return False
            leaders = {(s.get("leader") or {}).get("name") for s in statuses.values()}
            counts = {sum(m["role"] == "voter" for m in s.get("members", [])) for s in statuses.values()}
            return len(leaders) == 1 and None not in leaders and counts == {wanted}

        self.wait(ready, timeout_s, f"{wanted} voters under one leader")
        return self.leader()

    def wait_equal(self, timeout_s: float = 15.0) -> int:
        """Wait until every running node has applied the same index, and return it."""

        def applied() -> int:
            indexes = {s["log"]["applied"] for s in self.statuses().values()}
            return indexes.pop() if len(indexes) == 1 else 0

        return self.wait(applied, timeout_s, "all nodes applied the same index")

    # Using it

    def client(self, position: int | None = None, **options: Any) -> Client:
        """A client of node number `position` (from 0), or of all; closed with the cluster."""
        from ddb.client import connect

        servers = self.addresses if position is None else self.nodes[position].address
        client = connect(servers, **options)
        self._clients.append(client)
        return client

    def print_logs(self, lines: int = 60) -> None:
        """Print the end of every server's log: pytest shows it where the test failed."""
        for server in self.servers:
            print(f"--- {server!r}: {server.log_path}")
            print("\n".join(server.log.splitlines()[-lines:]))


def _flags(options: dict[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if value is None or value is False:
            continue
        yield "--" + name.replace("_", "-")
        if value is not True:
            yield str(value)


@atexit.register
def _kill_leftovers() -> None:
    for server in list(_running):
        server.kill()
