"""A registry and some nodes in a temporary directory, the load on their leader, one table.

    python -m bench.cluster --nodes 3 --clients 1,16,64,256 --ops put,get,stale

Law: what is measured is what ships: `python -m ddb.registry` and `python -m ddb.node` as they are, each a process with
its own directory and every setting at its default. All are ended by pid, whatever happens.

Theory. One row is one kind of request at one number of clients. Beside the throughput and the latencies stands what
each process took of a core in those seconds (from /proc, where there is one): on a small machine the cores are what
runs out, and the figure tells whose work to make cheaper. The file system under the directory decides what an fsync
costs: `--dir` says where it is, and a tmpfs measures no disk at all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.load import fill, run
from bench.plan import KEYS, Plan
from bench.servers import Server, commanded
from bench.systems import Ddb, System, await_leader

OPS = {
    "put": ("put", "linearizable"),
    "get": ("get", "linearizable"),
    "stale": ("get", "stale"),
    "mixed": ("mixed", "linearizable"),
    "batch": ("batch", "linearizable"),
}
TARGETS = ("leader", "follower", "any")
COLUMNS = (
    "op", "clients", "ops/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "max ms", "errors", "leader", "others", "load",
    "MiB",
)  # fmt: skip


def measure(plan: Plan, leader: Server, nodes: Sequence[Server]) -> dict[str, Any]:
    """The figures of one row: those of `bench.load`, and what the nodes took: shares of a core, and memory."""
    before, began = {node.name: node.cpu_s() for node in nodes}, time.monotonic()
    figures = run(plan).summary()
    span_s = time.monotonic() - began
    shares = {node.name: round(100 * (node.cpu_s() - before[node.name]) / span_s) for node in nodes}
    return {
        **figures,
        "op": "stale" if plan.op == "get" and plan.read == "stale" else plan.op,
        "clients": plan.clients,
        "pipeline": plan.pipeline,
        "value_bytes": plan.value_bytes,
        "keys": plan.keys,
        "leader_cpu_percent": shares.pop(leader.name),
        "other_cpu_percent": list(shares.values()),
        "memory_mib": [round(node.memory_bytes() / (1 << 20)) for node in nodes],
        "private_mib": [round(node.private_bytes() / (1 << 20)) for node in nodes],
    }


def targets(to: str, leader: Server, nodes: Sequence[Server]) -> tuple[str, ...]:
    """The addresses that the clients connect to."""
    others = tuple(node.address for node in nodes if node is not leader)
    return {"leader": (leader.address,), "follower": others or (leader.address,), "any": (leader.address, *others)}[to]


def row(figures: dict[str, Any]) -> tuple[str, ...]:
    """The figures as the cells of `COLUMNS`."""

    def ms(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:.2f}"

    clients = str(figures["clients"]) if figures["pipeline"] == 1 else f"{figures['clients']} × {figures['pipeline']}"
    return (
        figures["op"], clients, f"{figures['ops_per_s']:,.0f}", ms("p50_ms"), ms("p95_ms"), ms("p99_ms"),
        ms("p99.9_ms"), ms("max_ms"), str(sum(figures["errors"].values())), f"{figures['leader_cpu_percent']} %",
        " ".join(map(str, figures["other_cpu_percent"])) + " %" if figures["other_cpu_percent"] else "-",
        f"{figures['load_cpu_percent']:.0f} %", " ".join(map(str, figures["memory_mib"])),
    )  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Aligned columns that are a Markdown table too; the first `left` of them begin at the left."""
    widths = [max(len(cells[i]) for cells in (columns, *rows)) for i in range(len(columns))]

    def shown(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(aligned) + " |"

    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([shown(columns), f"|{rule}|", *map(shown, rows)])


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.cluster", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--nodes", type=int, default=3)
    p.add_argument("--ops", default="put,get,stale", help=f"of {', '.join(OPS)} (default %(default)s)")
    p.add_argument("--clients", default="1,16,64,256", help="a row for each number (default %(default)s)")
    p.add_argument("--pipeline", type=int, default=1)
    p.add_argument("--batch", type=int, default=100, metavar="KEYS", help="in one request of batch (%(default)s)")
    p.add_argument("--value-size", type=int, default=256, metavar="BYTES")
    p.add_argument("--keys", type=int, default=10_000)
    p.add_argument("--distribution", choices=KEYS, default="uniform", help="of the keys (default %(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="a row (default %(default)s)")
    p.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS")
    p.add_argument("--processes", type=int, default=1, help="of the load generator")
    p.add_argument("--to", choices=TARGETS, default="leader", help="where the clients connect")
    p.add_argument("--dir", type=Path, help="where the nodes keep their data (default: a temporary directory)")
    p.add_argument("--node-flag", action="append", default=[], metavar="FLAG", help="given to each node; repeatable")
    p.add_argument("--json", action="store_true", help="print one JSON object a row instead of the table")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    ops, clients = a.ops.split(","), [int(n) for n in a.clients.split(",") if n.isdecimal()]
    if a.nodes < 1 or not clients or 0 in clients or not set(ops) <= set(OPS):
        p.error(f"--nodes is at least 1, --clients numbers like 1,64, --ops of {', '.join(OPS)}")
    if a.dir:
        a.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="ddb-bench-", dir=a.dir))
    base = Plan(
        (), value_bytes=a.value_size, seconds=a.seconds, warm_up_s=a.warm_up, pipeline=a.pipeline, keys=a.keys,
        processes=a.processes, fill=False, batch_keys=min(a.batch, a.keys), distribution=a.distribution,
    )  # fmt: skip
    system: System = Ddb(directory, a.nodes, tuple(a.node_flag))
    rows = []
    try:
        system.start()
        if set(ops) - {"put", "batch"}:
            fill(replace(base, servers=(await_leader(system).address,)))
        for op, count in [(op, count) for op in ops for count in clients]:
            kind, read = OPS[op]
            leader = await_leader(system)
            plan = replace(base, servers=targets(a.to, leader, system.nodes), clients=count, op=kind, read=read)
            figures = measure(plan, leader, system.nodes)
            rows.append(row(figures))
            print(json.dumps(figures) if a.json else f"{op}, {count} clients: {figures['ops_per_s']:,.0f}/s",
                  file=sys.stdout if a.json else sys.stderr, flush=True)  # fmt: skip
        if not a.json:
            print(table(COLUMNS, rows))
    except (OSError, RuntimeError) as error:
        print(f"bench.cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        system.close()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(commanded(main))
