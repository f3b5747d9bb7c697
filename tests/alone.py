"""One node alone, or one registry, as a process: what a test needs that is about a server and not about a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddb.client import Client, connect
from tests.harness import Cluster, NodeServer, RegistryServer, Server, wait


@contextmanager
def node_alone(directory: Path, *flags: str) -> Iterator[NodeServer]:
    """A node without a registry, which is a complete database, ready to serve; killed in the end."""
    node = NodeServer("n1", directory / "n1")
    node.flags = list(flags)
    try:
        node.start()
        wait_leading(node)
        yield node
    finally:
        node.kill()


@contextmanager
def registry_alone(directory: Path, *flags: str) -> Iterator[RegistryServer]:
    """A registry, ready to serve; killed in the end."""
    registry = RegistryServer("registry", directory / "registry")
    registry.flags = list(flags)
    try:
        registry.start()
        yield registry
    finally:
        registry.kill()


def emptied(cluster: Cluster) -> Iterator[Client]:
    """A client of `cluster`, where there is no key any more; for a fixture."""
    with connect(cluster.addresses) as client:
        while keys := [item.key for item in client.scan(keys_only=True, limit=10_000)]:
            client.batch([{"op": "delete", "key": key} for key in keys])
        yield client


def wait_leading(node: NodeServer) -> None:
    """Wait until `node`, which is alone, leads itself."""
    wait(lambda: node.role() == "leader", what="the node leads itself")


def memory_bytes(server: Server) -> int:
    """How much memory the process of `server` has in use now."""
    return _status_bytes(server, "VmRSS")


def memory_peak_bytes(server: Server) -> int:
    """The most that it ever had in use."""
    return _status_bytes(server, "VmHWM")


def _status_bytes(server: Server, field: str) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def cpu_s(server: Server) -> float:
    """How many seconds of processor time the process of `server` has used."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
