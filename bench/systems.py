"""The databases that are measured: three servers each on this machine, started, found, added to, and ended alike.

Laws:

1. Every system is durable: nothing is answered before a majority has it on disk. That is the default of all three, and
   no setting here weakens it.
2. Every setting is the system's default, but for addresses and what a setting says beside it.
3. Data is under the directory that was given. On a tmpfs an fsync costs nothing and the figures mean nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from bench.options import ask
from bench.servers import READY_TIMEOUT_S, Server, free_ports, program, stop

REPOSITORY = Path(__file__).resolve().parent.parent
ASK_TIMEOUT_S = 5.0
ETCD_PLACES = ("/usr/bin/etcd", "/usr/local/bin/etcd")
ZOOKEEPER_JAR = Path("/usr/share/java/zookeeper.jar")
ZOOKEEPER_MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
HOW_TO_INSTALL = {
    "etcd": "`apt-get install etcd-server` of Debian 13 or later brings etcd 3.5 (Debian 12 has 3.4); or --etcd PATH",
    "zookeeper": "`apt-get install --no-install-recommends zookeeper` (Debian) brings it and Java",
}


class System(Protocol):
    """A cluster of one database. `nodes` are its servers; the clients connect to their addresses."""

    name: str
    dialect: str
    version: str
    nodes: list[Server]

    def start(self) -> None:
        """Start all, and wait until they serve. Raises RuntimeError, OSError."""

    def leader(self) -> Server | None:
        """The node that leads, once every node knows it; None before."""

    def add(self) -> Server:
        """Let one more node become a member, with an empty directory. It is not started yet."""

    def close(self) -> None:
        """End all of it."""


def await_leader(system: System) -> Server:
    """The leader, once there is one. Raises RuntimeError."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        if (leader := system.leader()) is not None:
            return leader
        for node in system.nodes:
            node.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{system.name} has had no leader for {READY_TIMEOUT_S:.0f} s")
        time.sleep(0.02)


class Ddb:
    """`python -m ddb.node` as it ships, and a registry; without one where there is one node."""

    dialect = "ddb"

    def __init__(self, directory: Path, count: int = 3, flags: tuple[str, ...] = (), name: str = "ddb") -> None:
        self.name = name
        self.version = ""
        self._directory = directory
        self._flags = flags
        self._registry = self._server("registry", "ddb.registry") if count > 1 else None
        self.nodes = [self._node(i + 1) for i in range(count)]

    def _server(self, name: str, module: str, *flags: str) -> Server:
        port = free_ports(1)[0]
        command = [
            sys.executable, "-m", module, "--port", str(port), "--data-dir", str(self._directory / name), *flags,
        ]  # fmt: skip
        return Server(name, command, self._directory, f"127.0.0.1:{port}", {"PYTHONPATH": str(REPOSITORY)})

    def _node(self, number: int) -> Server:
        where = ["--registry", self._registry.address] if self._registry else []
        return self._server(f"n{number}", "ddb.node", "--name", f"n{number}", *where, *self._flags)

    def start(self) -> None:
        """See System."""
        for server in [*([self._registry] if self._registry else []), *self.nodes]:
            server.start()
            server.await_line(r"listening on \S+:\d+")
        await_leader(self)
        self.version = ask(self.nodes[0].address, op="status")["version"]

    def leader(self) -> Server | None:
        """See System: once all are voters, too."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            replies = [ask(node.address, op="status") for node in self.nodes]
            leaders = {reply["leader"]["address"] for reply in replies}
            voters = [sum(member["role"] == "voter" for member in reply["members"]) for reply in replies]
            if len(leaders) == 1 and voters == [len(self.nodes)] * len(self.nodes):
                return next((node for node in self.nodes if node.address in leaders), None)
        return None

    def add(self) -> Server:
        """See System."""
        node = self._node(len(self.nodes) + 1)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        """See System."""
        stop([*self.nodes, *([self._registry] if self._registry else [])])


class Etcd:
    """etcd 3.4 or later. Its JSON gateway tells about the cluster; the load goes over gRPC (grpc.py)."""

    name = dialect = "etcd"

    def __init__(self, directory: Path, binary: str, count: int = 3) -> None:
        self._directory = directory
        self._binary = binary
        self.version = ""
        ports = free_ports(2 * count)
        self._peers = {f"n{i + 1}": f"http://127.0.0.1:{ports[2 * i]}" for i in range(count)}
        self._ids: dict[str, str] = {}
        self.nodes = [self._node(f"n{i + 1}", ports[2 * i + 1], "new") for i in range(count)]

    def _node(self, name: str, port: int, state: str) -> Server:
        url = f"http://127.0.0.1:{port}"
        command = [
            self._binary, "--name", name, "--data-dir", str(self._directory / name), "--log-level", "warn",
            "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", self._peers[name], "--initial-advertise-peer-urls", self._peers[name],
            "--initial-cluster", ",".join(f"{n}={u}" for n, u in self._peers.items()),
            "--initial-cluster-state", state,
        ]  # fmt: skip
        return Server(name, command, self._directory, f"127.0.0.1:{port}")

    def start(self) -> None:
        """See System."""
        for node in self.nodes:
            node.start()
        await_leader(self)
        self.version = _gateway(self.nodes[0].address, "maintenance/status")["version"]

    def leader(self) -> Server | None:
        """See System."""
        with contextlib.suppress(OSError, ValueError, LookupError, http.client.HTTPException):
            replies = [_gateway(node.address, "maintenance/status") for node in self.nodes]
            leaders = {reply["leader"] for reply in replies}
            ids = [reply["header"]["member_id"] for reply in replies]
            if len(leaders) == 1 and (leader := leaders.pop()) in ids:
                return self.nodes[ids.index(leader)]
        return None

    def add(self) -> Server:
        """See System."""
        name, (peer_port, port) = f"n{len(self.nodes) + 1}", free_ports(2)
        self._peers[name] = f"http://127.0.0.1:{peer_port}"
        self._announce(self._peers[name])
        node = self._node(name, port, "existing")
        self.nodes.append(node)
        return node

    def _announce(self, peer_url: str) -> None:
        """Tell of a new member, once the members let it in: they refuse while they have not long been connected."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                _gateway(self.nodes[0].address, "cluster/member/add", peerURLs=[peer_url])
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        """See System."""
        stop(self.nodes)


def _gateway(address: str, path: str, **body: Any) -> dict[str, Any]:
    """One call over etcd's JSON gateway. Raises OSError, ValueError, HTTPException."""
    connection = http.client.HTTPConnection(address, timeout=ASK_TIMEOUT_S)
    try:
        connection.request("POST", f"/v3/{path}", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        reply: dict[str, Any] = json.loads(response.read())
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"etcd at {address} says of {path}: {reply}")
        return reply
    finally:
        connection.close()


class ZooKeeper:
    """ZooKeeper 3.6 or later, from Debian's jar. Its four-letter words tell about the cluster."""

    name, dialect = "ZooKeeper", "zookeeper"

    def __init__(self, directory: Path, count: int = 3) -> None:
        self._directory = directory
        self.version = ""
        ports = free_ports(3 * count)
        quorum = [f"server.{i + 1}=127.0.0.1:{ports[3 * i]}:{ports[3 * i + 1]}" for i in range(count)]
        self.nodes = [self._node(i + 1, ports[3 * i + 2], quorum) for i in range(count)]

    def _node(self, number: int, port: int, quorum: list[str]) -> Server:
        name = f"n{number}"
        data = self._directory / name
        data.mkdir(parents=True)
        (data / "myid").write_text(f"{number}\n")
        config = self._directory / f"{name}.cfg"
        settings = [
            "tickTime=2000", "initLimit=10", "syncLimit=5",  # as in the example of the package
            f"dataDir={data}", f"clientPort={port}", "clientPortAddress=127.0.0.1", "admin.enableServer=false",
            "maxClientCnxns=0",  # its default, 60, is less than is measured
            "4lw.commands.whitelist=srvr",
            *quorum,
        ]  # fmt: skip
        config.write_text("\n".join(settings) + "\n")
        command = [
            shutil.which("java") or "java", "-Xmx1000m",  # what its own script gives it
            "-Dzookeeper.jmx.log4j.disable=true", "-cp", f"{self._directory}:{ZOOKEEPER_JAR}", ZOOKEEPER_MAIN, str(config),
        ]  # fmt: skip
        return Server(name, command, self._directory, f"127.0.0.1:{port}")

    def start(self) -> None:
        """See System."""
        for node in self.nodes:
            node.start()
        await_leader(self)
        found = re.search(r"version: ([\d.]+)", _four_letters(self.nodes[0].address, b"srvr"))
        self.version = found[1] if found else "?"

    def leader(self) -> Server | None:
        """See System."""
        with contextlib.suppress(OSError):
            said = [_four_letters(node.address, b"srvr") for node in self.nodes]
            modes = [found[1] if (found := re.search(r"Mode: (\w+)", text)) else "" for text in said]
            if modes.count("leader") == 1 and modes.count("follower") == len(modes) - 1:
                return self.nodes[modes.index("leader")]
        return None

    def add(self) -> Server:
        """See System."""
        raise RuntimeError("ZooKeeper's members are in its configuration: none is added here")

    def close(self) -> None:
        """See System."""
        stop(self.nodes)


def _four_letters(address: str, word: bytes) -> str:
    """What a ZooKeeper server answers to one of its four-letter words. Raises OSError."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), ASK_TIMEOUT_S) as connection:
        connection.sendall(word)
        with connection.makefile("rb") as stream:
            return stream.read().decode(errors="replace")


def find_etcd(given: str | None) -> str | None:
    """Where etcd is: what was `given`, or where its package puts it; None where it is not installed."""
    if given is not None:
        return given if os.access(given, os.X_OK) else None
    return program("etcd", *ETCD_PLACES)


def has_zookeeper() -> bool:
    """Whether ZooKeeper's package is installed."""
    return ZOOKEEPER_JAR.exists() and shutil.which("java") is not None
