"""The command line of the load generator: `python -m bench.load`."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench import load
from bench.frames import frame
from bench.plan import KEYS, OPS, QUANTILES, READS, Plan
from bench.servers import cpu_s, memory_bytes, pid_at

TARGETS = ("leader", "any", "follower")
BUSY_PERCENT = 85.0
KEYS_MAX = 10_000_000
ASK_TIMEOUT_S = 5.0


def ask(address: str, patience_s: float = ASK_TIMEOUT_S, **request: Any) -> dict[str, Any]:
    """One request to a ddb node, and its reply. Raises OSError or ValueError."""
    host, _, port = address.rpartition(":")
    address_of = (host.strip("[]"), int(port))
    with socket.create_connection(address_of, patience_s) as connection, connection.makefile("rb") as stream:
        connection.sendall(frame(json.dumps(request).encode()))
        reply: dict[str, Any] = json.loads(stream.read(int(stream.readline()) + 1))
        return reply


def members(server: str) -> tuple[str, tuple[str, ...]]:
    """The address of the leader, and of all members, as `server` knows them. Raises OSError, RuntimeError."""
    try:
        status = ask(server, op="status")
        everybody = tuple(str(member["address"]) for member in status["members"])
        return str(status["leader"]["address"]), everybody
    except (ValueError, LookupError, TypeError):
        raise RuntimeError("it knows no leader") from None


def targets(server: str, target: str) -> tuple[str, ...]:
    """Where the clients connect, of the cluster that `server` belongs to. Raises OSError, RuntimeError."""
    leader, everybody = members(server)
    others = tuple(address for address in everybody if address != leader)
    if target == "follower" and not others:
        raise RuntimeError("it has no follower")
    return {"leader": (leader,), "any": (leader, *others), "follower": others}[target]


@contextlib.contextmanager
def watched(addresses: tuple[str, ...]) -> Iterator[dict[str, dict[str, float]]]:
    """What the servers took meanwhile, by address: per cent of a core, and MiB. Only of those on this machine, for there
    one can look.
    """
    shares: dict[str, dict[str, float]] = {}
    pids = {a: pid for a in addresses if (pid := pid_at(int(a.rpartition(":")[2]))) is not None}
    before, began = {address: cpu_s(pid) for address, pid in pids.items()}, time.monotonic()
    yield shares
    took_s = time.monotonic() - began
    for address, pid in pids.items():
        percent = round(100 * (cpu_s(pid) - before[address]) / took_s, 1)
        shares[address] = {"cpu_percent": percent, "memory_mib": round(memory_bytes(pid) / (1 << 20), 1)}


def warning(plan: Plan, figures: dict[str, Any]) -> str:
    """A sentence where the generator itself may be what was measured; else empty."""
    share = figures["load_cpu_percent"] / min(plan.processes, plan.clients)
    if share < BUSY_PERCENT:
        return ""
    return (
        f"the load generator took {share:.0f} % of a core a process: it may be what was measured; "
        f"see --processes {plan.processes + 1}"
    )


def line(plan: Plan, figures: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    what = plan.op if plan.op in ("put", "batch") else f"{plan.op} {plan.read}"
    latencies = "  ".join(
        f"{name} {figures[name + '_ms']:.2f}" for name in (*QUANTILES, "max") if figures[name + "_ms"] is not None
    )
    errors = ", ".join(f"{count} {code}" for code, count in sorted(figures["errors"].items())) or "none"
    rate = f"{figures['ops_per_s']:,.0f} ops/s"
    if plan.op == "batch":
        rate += f" of {plan.batch_keys} keys each"
    told = [
        f"{what}, {plan.clients} clients × {plan.pipeline}, {plan.value_bytes} B: {rate}; "
        f"ms: {latencies or 'no reply'}; errors: {errors}; "
        f"load cpu {figures['load_cpu_percent']:.0f} % {figures['load_memory_mib']:.0f} MiB"
    ]
    for address, share in sorted(figures.get("nodes", {}).items()):
        told.append(f"  {address}: cpu {share['cpu_percent']:.0f} % {share['memory_mib']:.0f} MiB")
    return "\n".join(told)


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.load", description=(load.__doc__ or "").split("\n")[0])
    p.add_argument("--server", required=True, help="HOST:PORT[,HOST:PORT…]; the clients are dealt out among them")
    p.add_argument("--target", choices=TARGETS, help="find these in the cluster of the first --server instead")
    p.add_argument("--clients", type=int, default=64, help="connections (default %(default)s)")
    p.add_argument("--op", choices=OPS, default="put")
    p.add_argument("--batch", type=int, default=100, metavar="KEYS", help="in one request of --op batch (%(default)s)")
    p.add_argument("--value-size", type=int, default=256, metavar="BYTES")
    p.add_argument("--seconds", type=float, default=5.0, help="measured, after the warm-up (default %(default)s)")
    p.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS")
    p.add_argument("--pipeline", type=int, default=1, help="requests of one client on their way (default %(default)s)")
    p.add_argument("--keys", type=int, default=10_000, help="different keys (default %(default)s)")
    p.add_argument("--distribution", choices=KEYS, default="uniform", help="of the keys (default %(default)s)")
    p.add_argument("--read", choices=READS, default="linearizable", help="what a get asks for")
    p.add_argument("--processes", type=int, default=1, help="to divide the load's own work among (default %(default)s)")
    p.add_argument("--no-fill", action="store_true", help="don't put every key before getting them")
    p.add_argument("--seed", type=int, default=1, help="of the keys' order and the value")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    least = min(a.clients, a.pipeline, a.keys, a.processes, a.batch)
    if least < 1 or a.keys > KEYS_MAX or a.value_size < 0 or a.seconds <= 0 or a.warm_up < 0:
        p.error("clients, pipeline, processes, batch, seconds and keys (at most ten million) must be positive")
    if a.op == "batch" and a.batch > a.keys:
        p.error("--batch can't be more than --keys")
    servers = tuple(a.server.split(","))
    if not all(s.rpartition(":")[2].isdecimal() for s in servers):
        p.error("--server takes HOST:PORT[,HOST:PORT…]")
    try:
        plan = Plan(
            targets(servers[0], a.target) if a.target else servers, a.clients, a.op, a.value_size, a.seconds, a.warm_up,
            a.pipeline, a.keys, a.read, a.processes, not a.no_fill, a.seed, a.batch, a.distribution,
        )  # fmt: skip
        nodes = members(servers[0])[1] if a.target else servers
        if plan.fill and plan.op in ("get", "mixed"):
            load.fill(plan)
        with watched(nodes) as shares:
            figures = load.run(replace(plan, fill=False)).summary()
    except (OSError, RuntimeError) as error:
        print(f"bench.load: {a.server}: {error}", file=sys.stderr)
        return 1
    figures["nodes"] = shares
    print(json.dumps(figures) if a.json else line(plan, figures))
    if said := warning(plan, figures):
        print(f"bench.load: {said}", file=sys.stderr)
    return 0 if figures["ops"] else 1
