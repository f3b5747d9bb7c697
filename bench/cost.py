"""Where a node's time goes: microseconds and system calls for each operation, by stage, on the leader and on a follower.

    python -m bench.cost                          # put and get, alone, from 64 clients, and pipelined; batches of 100 puts
    python -m bench.cost --works put:64:1,get:64:1 --seconds 5

Laws: the nodes run `ddb.node` as it is (metered.py says how it is watched); the system calls are counted in a run of its own, for
to count them slows everything down (strace, where it is installed).

Reading it. All is processor time, divided by the operations that the whole cluster answered meanwhile: what waits costs
nothing here. `wait` is the loop's call of the selector and its own turning; `log thread` is what the other threads took,
nearly all of it the log's write and fdatasync. A follower's share of a put includes its part of each batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.cluster import table
from bench.load import fill, run
from bench.metered import STAGES, VARIABLE
from bench.plan import Plan
from bench.servers import Server, commanded
from bench.systems import Ddb, await_leader

WORKS = "put:1:1,put:64:1,put:64:16,batch:16:1,get:1:1,get:64:1,get:64:16"
STRACE_S = 1.5
PATIENCE_S = 10.0
CALLS_SHOWN = 8
_STRACE_LINE = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)


class Metered(Ddb):
    """A cluster whose nodes can be watched."""

    def _node(self, number: int) -> Server:
        node = super()._node(number)
        command = ["bench.metered" if part == "ddb.node" else part for part in node.command]
        environment = {**node.environment, VARIABLE: str(self.meter(node))}
        return replace_server(node, command, environment)

    def meter(self, node: Server) -> Path:
        """The file where `node` writes what it saw."""
        return node.directory / f"{node.name}.meter"


def replace_server(server: Server, command: list[str], environment: dict[str, str]) -> Server:
    """The same server, started differently."""
    return Server(server.name, command, server.directory, server.address, environment)


@contextlib.contextmanager
def watched(system: Metered, nodes: list[Server]) -> Iterator[dict[str, dict[str, Any]]]:
    """Sample `nodes` meanwhile; the dictionary holds what each saw, by name, afterwards. Raises RuntimeError."""
    seen: dict[str, dict[str, Any]] = {}
    for node in nodes:
        system.meter(node).unlink(missing_ok=True)
        node.process.send_signal(signal.SIGUSR1)
    yield seen
    for node in nodes:
        node.process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + PATIENCE_S
    for node in nodes:
        while not system.meter(node).exists():
            node.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{node.name} did not tell what it saw")
            time.sleep(0.01)
        seen[node.name] = json.loads(system.meter(node).read_text())


def stages(seen: dict[str, Any], operations: int) -> dict[str, float]:
    """Microseconds an operation, by stage, from what one node saw."""
    samples = {stage: seen["samples"].get(stage, 0) for stage in STAGES}
    total = sum(samples.values()) or 1
    loop_us = 1e6 * seen["loop_s"] / max(1, operations)
    figures = {stage: loop_us * count / total for stage, count in samples.items()}
    figures["loop, all"] = loop_us
    figures["log thread"] = 1e6 * max(0.0, seen["process_s"] - seen["loop_s"]) / max(1, operations)
    return figures


def system_calls(plan: Plan, nodes: list[Server]) -> dict[str, dict[str, float]]:
    """System calls for each operation, by node and name; of a short run of its own. Empty without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return {}
    tracers = []
    for node in nodes:
        out = node.directory / f"{node.name}.strace"
        out.unlink(missing_ok=True)
        command = [strace, "-f", "-c", "-o", str(out), "-p", str(node.process.pid)]
        tracers.append((node, out, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
    try:
        time.sleep(0.3)  # until it is attached there is nothing to see it by
        operations = len(run(replace(plan, seconds=STRACE_S, warm_up_s=0.0)).latencies_s)
    finally:
        for _, _, tracer in tracers:
            tracer.send_signal(signal.SIGINT)
            try:
                tracer.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                tracer.kill()
                tracer.wait()
    found = {}
    for node, out, _ in tracers:
        counts = {name: int(count) for count, name in _STRACE_LINE.findall(out.read_text()) if name != "total"}
        if counts and operations:
            found[node.name] = {name: count / operations for name, count in counts.items()}
    return found


def measure(system: Metered, plan: Plan) -> dict[str, Any]:
    """One work: what it costs the leader and one follower."""
    leader = await_leader(system)
    follower = next(node for node in system.nodes if node is not leader)
    both = [leader, follower]
    plan = replace(plan, servers=(leader.address,))
    run(replace(plan, seconds=0.3))  # whoever comes first pays for what is made once
    with watched(system, both) as seen:
        result = run(replace(plan, warm_up_s=0.0))
    operations = len(result.latencies_s)
    calls = system_calls(plan, both)
    names = {"leader": leader.name, "follower": follower.name}
    return {
        "op": plan.op, "clients": plan.clients, "pipeline": plan.pipeline,
        "ops_per_s": result.summary()["ops_per_s"], "errors": dict(result.errors),
        "stages_us": {role: stages(seen[name], operations) for role, name in names.items()},
        "samples": {role: sum(seen[name]["samples"].values()) for role, name in names.items()},
        "system_calls": {role: calls[name] for role, name in names.items() if name in calls},
    }  # fmt: skip


def head(row: dict[str, Any], role: str) -> str:
    """What stands over a column."""
    ways = f" × {row['pipeline']}" if row["pipeline"] > 1 else ""
    return f"{row['op']} {row['clients']}{ways}, {role}"


def show(rows: list[dict[str, Any]]) -> str:
    """The tables: microseconds, then system calls, a column for each work and role."""
    if not rows:
        return ""
    heads = [head(r, role) for r in rows for role in ("leader", "follower")]
    columns = [r["stages_us"][role] for r in rows for role in ("leader", "follower")]
    lines = [[name, *(f"{c[name]:.1f}" for c in columns)] for name in (*STAGES, "loop, all", "log thread")]
    lines.append(["ops/s, while watched", *(f"{r['ops_per_s']:,.0f}" for r in rows for _ in range(2))])
    parts = [table(["µs an operation", *heads], lines, left=1)]
    calls = [r["system_calls"].get(role, {}) for r in rows for role in ("leader", "follower")]
    if any(calls):
        total = {name: sum(c.get(name, 0.0) for c in calls) for name in {name for c in calls for name in c}}
        most = sorted(total, key=lambda name: -total[name])[:CALLS_SHOWN]
        lines = [[name, *(f"{c.get(name, 0.0):.2f}" for c in calls)] for name in most]
        lines.append(["all", *(f"{sum(c.values()):.2f}" for c in calls)])
        parts.append(table(["system calls an operation", *heads], lines, left=1))
    else:
        parts.append("System calls are counted where strace is installed.")
    return "\n\n".join(parts)


def works(text: str) -> list[tuple[str, int, int]]:
    """`OP:CLIENTS:PIPELINE,…` taken apart. Raises argparse.ArgumentTypeError."""
    found = re.findall(r"(put|batch|get):([1-9]\d{0,3}):([1-9]\d{0,2})(?:,|$)", text)
    if ",".join(":".join(parts) for parts in found) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not like {WORKS}")
    return [(op, int(clients), int(pipeline)) for op, clients, pipeline in found]


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.cost", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--works", type=works, default=works(WORKS), help=f"OP:CLIENTS:PIPELINE,… (default {WORKS})")
    p.add_argument("--seconds", type=float, default=4.0, help="each (default %(default)s)")
    p.add_argument("--value-size", type=int, default=256, metavar="BYTES")
    p.add_argument("--keys", type=int, default=10_000)
    p.add_argument("--dir", type=Path, help="on the disk to be measured (default: a temporary directory)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    if a.seconds <= 0 or a.keys < 1 or a.value_size < 0:
        p.error("--seconds and --keys must be positive")
    if a.dir:
        a.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="ddb-cost-", dir=a.dir))
    system = Metered(directory)
    rows = []
    try:
        system.start()
        base = Plan(
            (await_leader(system).address,), value_bytes=a.value_size, seconds=a.seconds, warm_up_s=0.0, keys=a.keys,
            fill=False,
        )  # fmt: skip
        fill(base)
        for op, clients, pipeline in a.works:
            print(f"{op}, {clients} clients × {pipeline}", file=sys.stderr, flush=True)
            rows.append(measure(system, replace(base, op=op, clients=clients, pipeline=pipeline)))
    except (OSError, RuntimeError) as error:
        print(f"bench.cost: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        system.close()
        facts = machine.facts(directory)
        shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps({"machine": facts, "cost": rows}) if a.json else f"{machine.sentence(facts)}\n\n{show(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(commanded(main))
