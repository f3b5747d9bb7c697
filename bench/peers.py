"""ddb beside etcd and ZooKeeper: the same work, in one run, in alternation; medians and ratios.

    python -m bench.peers --out results.json            # all of it: about a quarter of an hour
    python -m bench.peers --rounds 1 --seconds 1 --only put,get

Laws:

1. The same load generator measures all (load.py): the same loop, with the same number of connections and requests under
   way, on the same machine at the same time of day. Only the bytes on the wire differ: frames for ddb (frames.py), gRPC
   over HTTP/2 for etcd (grpc.py), jute for ZooKeeper (jute.py), each prepared beforehand.
2. All are durable, with their default settings (systems.py), three nodes each, on one disk.
3. All run the whole time, and each round does each work once with each of them, in an order that moves on by one a
   round. So whatever the machine does to one, it does to all; what the idle ones take is the same for all.
4. Before the first round each is put to work for a while, and that is not measured: Java compiles what has run often.
5. What is printed is the median over the rounds. Every single figure is in the result's JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import goals, limits, machine, outages, prototype
from bench.cluster import measure, table, targets
from bench.load import fill, run
from bench.plan import Plan
from bench.servers import commanded
from bench.systems import HOW_TO_INSTALL, Ddb, Etcd, System, ZooKeeper, await_leader, find_etcd, has_zookeeper

CLIENTS = {
    "ddb": "frames over a raw socket (bench/frames.py)",
    "etcd": "gRPC over HTTP/2 over a raw socket (bench/grpc.py), one call a connection at a time",
    "zookeeper": "jute over a raw socket (bench/jute.py); a linearizable get is sync and getData, sent together",
}
SYSTEMS = ("ddb", "etcd", "zookeeper")
PARTS = ("limits", "put", "get", "stale", "failover", "million")
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of load. `to` is where the clients connect; what only ddb has, `alone` tells."""

    op: str
    clients: int
    read: str = "linearizable"
    to: str = "leader"
    pipeline: int = 1
    alone: bool = False

    @property
    def name(self) -> str:
        """What it is, for people and as a key."""
        what = {"put": "put", "batch": "batch of 100 puts"}.get(self.op, f"{self.read} get")
        ways = f" × {self.pipeline} pipelined" if self.pipeline > 1 else ""
        where = "" if self.to == "leader" else ", any node" if self.to == "any" else ", at a follower"
        return f"{what}, {self.clients} client{'s'[: self.clients > 1]}{ways}{where}"

    @property
    def part(self) -> str:
        """Which of `PARTS` it belongs to."""
        return "stale" if self.read == "stale" else "get" if self.op == "get" else "put"


WORKS = (
    Work("put", 1),
    Work("put", 16),
    Work("put", 64),
    Work("put", 256),
    Work("put", 64, pipeline=16, alone=True),
    Work("batch", 16, alone=True),
    Work("get", 1),
    Work("get", 64),
    Work("get", 256),
    Work("get", 64, to="follower"),
    Work("get", 256, to="follower"),
    Work("get", 64, read="stale", to="any"),
)


def one_follower(work: Work, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Where to connect: "at a follower" means at one of them."""
    return addresses[:1] if work.to == "follower" else addresses


def rehearse(systems: Sequence[System], base: Plan, seconds: float, say: Callable[[str], None]) -> None:
    """Put every system to work, for so long on puts and for so long on gets."""
    for system in systems:
        for op in ("put", "get") if seconds else ():
            say(f"rehearsal: {system.name}, {op}")
            servers = tuple(node.address for node in system.nodes)
            plan = replace(base, servers=servers, op=op, seconds=seconds, warm_up_s=0.0, dialect=system.dialect)
            if not run(plan).latencies_s:
                raise RuntimeError(f"{system.name} has answered nothing")


def rounds(
    systems: Sequence[System], works: Sequence[Work], base: Plan, count: int, say: Callable[[str], None],
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Measure each work `count` times with each system, in alternation. `rows` gets the figures of each."""
    for i in range(count):
        turn = [*systems[i % len(systems) :], *systems[: i % len(systems)]]
        for work in works:
            for system in turn:
                if work.alone and system.dialect != "ddb":
                    continue
                leader = await_leader(system)
                servers = one_follower(work, targets(work.to, leader, system.nodes))
                plan = replace(
                    base, servers=servers, clients=work.clients, op=work.op, read=work.read, pipeline=work.pipeline,
                    dialect=system.dialect, seed=base.seed + i,
                )  # fmt: skip
                figures = measure(plan, leader, system.nodes)
                rows.append({**figures, "work": work.name, "system": system.name, "round": i + 1})
                p50 = "-" if figures["p50_ms"] is None else f"{figures['p50_ms']:.2f}"
                failed = sum(figures["errors"].values())
                say(
                    f"round {i + 1}/{count}  {work.name}: {system.name} {figures['ops_per_s']:,.0f}/s, p50 {p50} ms"
                    + (f", {failed} errors {figures['errors']}" if failed else "")
                )


def failovers(
    systems: Sequence[System], base: Plan, count: int, say: Callable[[str], None], gaps: dict[str, list[float]]
) -> None:
    """Kill each system's leader `count` times, in alternation. `gaps` gets the seconds, by system."""
    for i in range(count):
        for system in systems:
            gap_s = outages.failover_s(system, replace(base, dialect=system.dialect))
            gaps.setdefault(system.name, []).append(gap_s)
            say(f"failover {i + 1}/{count}: {system.name} {gap_s * 1000:,.0f} ms")


@contextlib.contextmanager
def running(makers: dict[str, Callable[[Path], System]], parent: Path | None) -> Iterator[list[System]]:
    """The systems, started, each in a directory of its own; gone afterwards, and their data too."""
    directory = Path(tempfile.mkdtemp(prefix="ddb-peers-", dir=parent))
    systems: list[System] = []
    try:
        for name, make in makers.items():
            (directory / name).mkdir()
            systems.append(make(directory / name))
            systems[-1].start()
        yield systems
    finally:
        for system in systems:
            system.close()
        shutil.rmtree(directory, ignore_errors=True)


def medians(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """The median of each figure, by (work, system)."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["work"], row["system"]), []).append(row)
    wanted = ("ops_per_s", "p50_ms", "p95_ms", "p99_ms", "p99.9_ms", "max_ms", "load_cpu_percent")
    return {
        key: {name: median(row[name] or 0.0 for row in group) for name in wanted}
        | {"errors": sum(sum(row["errors"].values()) for row in group)}
        for key, group in groups.items()
    }


def comparison(rows: Sequence[dict[str, Any]], systems: Sequence[str]) -> str:
    """The table: each system's throughput and latencies, and ddb's as multiples of the others'."""
    middle = medians(rows)
    others = [name for name in systems if name != "ddb"]
    columns = ["work", *[f"{s}: ops/s (p50 / p99 ms)" for s in systems]]
    columns += [f"of {s}: ops/s, p50, p99" for s in others]
    lines = []
    for work in dict.fromkeys(row["work"] for row in rows):
        cells = [work]
        own = middle.get((work, "ddb"))
        for system in systems:
            m = middle.get((work, system))
            cells.append(f"{m['ops_per_s']:,.0f} ({m['p50_ms']:.2f} / {m['p99_ms']:.1f})" if m else "-")
        for system in others:
            m = middle.get((work, system))
            cells.append(" ".join(_times(own, m, n) for n in ("ops_per_s", "p50_ms", "p99_ms")) if m and own else "-")
        lines.append(cells)
    return table(columns, lines, left=1)


def _times(own: dict[str, float], other: dict[str, float], name: str) -> str:
    return f"{own[name] / other[name]:.2f}×" if other[name] else "-"


def failover_table(gaps: dict[str, list[float]]) -> str:
    """The gaps: median, least, most, and ddb's median as a share of the others'."""
    own = median(gaps["ddb"]) if gaps.get("ddb") else None
    lines = [
        [
            name, f"{median(values) * 1000:,.0f}", f"{min(values) * 1000:,.0f}", f"{max(values) * 1000:,.0f}",
            str(len(values)), f"1/{median(values) / own:.1f}" if own and name != "ddb" else "-",
        ]
        for name, values in gaps.items() if values
    ]  # fmt: skip
    return table(("leader killed", "median ms", "least", "most", "times", "ddb's share"), lines, left=1)


def growth_table(figures: dict[str, dict[str, Any]]) -> str:
    """What a million keys cost, a column for each system."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("loaded in, s", lambda f: f"{f['load_s']:.1f}"),
        ("memory of the largest node, MiB", lambda f: f"{max(f['memory_mib']):,}"),
        ("… of that not pages of its files, MiB", lambda f: f"{max(f['private_mib']):,}"),
        ("… after a restart, MiB", lambda f: f"{max(f['memory_restarted_mib']):,}"),
        ("disk of the largest node, MiB", lambda f: f"{max(f['disk_mib']):,}"),
        ("follower killed: linearizable read after, s", lambda f: f"{f['restart_s']:.2f}"),
        ("all killed: linearizable read after, s", lambda f: f"{f['restart_all_s']:.2f}"),
        ("new empty node: linearizable read after, s", lambda f: f"{f['join_s']:.2f}"),
    ]
    keys = next(iter(figures.values()))["keys"]
    return table(
        (f"{keys:,} keys", *figures), [[name, *(show(f) for f in figures.values())] for name, show in rows], left=1
    )


def goals_of(result: dict[str, Any]) -> goals.Found:
    """The figures of a result on which there may be goals."""
    return goals.values(medians(result["rows"]), result["failover"], result["million"], result["limits"])


def show(result: dict[str, Any]) -> str:
    """All tables of a result, as Markdown."""
    parts = [machine.sentence(result["machine"])]
    parts.append("\n".join(f"- {s['name']} {s['version']}: {s['client']}" for s in result["systems"]))
    names = [s["name"] for s in result["systems"]]
    if result["rows"]:
        parts.append(comparison(result["rows"], names))
        parts.append(busiest(result["rows"]))
    if result["failover"]:
        parts.append(failover_table(result["failover"]))
    if result["million"]:
        parts.append(growth_table(result["million"]))
    if result["limits"]:
        parts.append(limits.show(result["limits"]))
        if result["rows"]:
            own = {w: m for (w, s), m in medians(result["rows"]).items() if s == "ddb"}
            parts.append(limits.shares(result["limits"], own))
            parts.append(prototype.show(result["limits"], own))
    return "\n\n".join(part for part in parts if part)


def busiest(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence on how near the generator came to being what was measured."""
    row = max(rows, key=lambda r: r["load_cpu_percent"])
    return (
        f"The load generator took {row['load_cpu_percent']:.0f} % of a core at most "
        f"({row['work']}, {row['system']}); {sum(sum(r['errors'].values()) for r in rows)} operations failed."
    )


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--systems", default=",".join(SYSTEMS), help="(default %(default)s; what is missing is left out)")
    p.add_argument("--etcd", metavar="PATH", help="etcd's program, where it is not on the PATH")
    p.add_argument("--only", default=",".join(PARTS), help="parts to do, of %(default)s")
    p.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    p.add_argument("--seconds", type=float, default=3.0, help="each work a round (default %(default)s)")
    p.add_argument("--warm-up", type=float, default=0.5, metavar="SECONDS", help="(default %(default)s)")
    p.add_argument(
        "--rehearsal", type=float, default=5.0, metavar="SECONDS", help="of each twice (default %(default)s)"
    )
    p.add_argument("--failovers", type=int, default=10, help="(default %(default)s)")
    p.add_argument("--keys", type=int, default=10_000, help="in use (default %(default)s)")
    p.add_argument("--million", type=int, default=MILLION, metavar="KEYS", help="to load (default %(default)s)")
    p.add_argument("--value-size", type=int, default=256, metavar="BYTES")
    p.add_argument("--dir", type=Path, help="on the disk to be measured (default: a temporary directory)")
    p.add_argument("--out", type=Path, help="write every figure there, as JSON")
    p.add_argument("--show", type=Path, metavar="FILE", help="print the tables of such a file, and measure nothing")
    return p


def makers(wanted: Sequence[str], etcd: str | None, say: Callable[[str], None]) -> dict[str, Callable[[Path], System]]:
    """How to make each of the systems that are here; it is said how to get the others."""
    found: dict[str, Callable[[Path], System]] = {}
    for name in wanted:
        binary = find_etcd(etcd) if name == "etcd" else None
        if name == "ddb":
            found[name] = Ddb
        elif name == "etcd" and binary:
            found[name] = lambda directory, binary=binary: Etcd(directory, binary)  # type: ignore[misc]
        elif name == "zookeeper" and has_zookeeper():
            found[name] = ZooKeeper
        else:
            say(f"{name} is not installed, so it is left out: {HOW_TO_INSTALL[name]}")
    return found


def _measure_all(
    a: argparse.Namespace, parts: Sequence[str], say: Callable[[str], None], result: dict[str, Any]
) -> None:
    """Do all that was asked for, in the order of `PARTS`; `result` grows, so what was measured before a failure is kept."""
    here = a.dir or Path(tempfile.gettempdir())
    base = Plan(
        (), value_bytes=a.value_size, seconds=a.seconds, warm_up_s=a.warm_up, keys=a.keys, fill=False,
        batch_keys=min(100, a.keys),
    )  # fmt: skip
    found = makers(a.systems.split(","), a.etcd, say) if set(parts) != {"limits"} else {}
    works = [work for work in WORKS if work.part in parts]
    if "limits" in parts:
        result["limits"] = limits.measure(here, min(a.seconds, 3.0), say)
    if works or "failover" in parts:
        with running(found, a.dir) as systems:
            result["systems"] = [{"name": s.name, "version": s.version, "client": CLIENTS[s.dialect]} for s in systems]
            for system in systems:
                fill(replace(base, servers=(await_leader(system).address,), dialect=system.dialect))
            if works:
                rehearse(systems, base, a.rehearsal, say)
            rounds(systems, works, base, a.rounds, say, result["rows"])
            if "failover" in parts:
                failovers(systems, base, a.failovers, say, result["failover"])
    if "million" in parts:
        for name in [n for n in found if n != "zookeeper"]:
            with running({name: found[name]}, a.dir) as (system,):
                plan = replace(base, keys=a.million, dialect=system.dialect)
                result["million"][system.name] = outages.growth(system, plan, say)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    parts = a.only.split(",")
    if not set(parts) <= set(PARTS) or not set(a.systems.split(",")) <= set(SYSTEMS):
        p.error(f"--only takes {', '.join(PARTS)}; --systems takes {', '.join(SYSTEMS)}")
    if min(a.rounds, a.failovers, a.keys, a.million) < 1 or a.seconds <= 0 or a.rehearsal < 0:
        p.error("rounds, failovers, keys and seconds must be positive")
    command = " ".join(["python -m bench.peers", *(sys.argv[1:] if arguments is None else arguments)])
    result: dict[str, Any] = {
        "machine": {}, "command": command, "systems": [], "rows": [], "failover": {}, "million": {}, "limits": {},
    }  # fmt: skip
    code = 0
    try:
        if a.show:
            shown = json.loads(a.show.read_text())
            print(f"{show(shown)}\n\n{goals.show(goals_of(shown))}")
            return 0
        if a.dir:
            a.dir.mkdir(parents=True, exist_ok=True)
        result["machine"] = machine.facts(a.dir or Path(tempfile.gettempdir()))
        _measure_all(a, parts, lambda text: print(text, file=sys.stderr, flush=True), result)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    if a.out and result["machine"]:
        a.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["machine"]:
        print(f"{show(result)}\n\n{goals.show(goals_of(result))}")
    return code


if __name__ == "__main__":
    sys.exit(commanded(main))
