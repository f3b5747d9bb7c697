"""What grows faster than the work: ddb alone, one thing changed at a time.

    python -m bench.growth --out growth.json                     # all of it: ten minutes
    python -m bench.growth --only keys --keys 10000,1000000

Law: one thing changes, all else stays at the default: three nodes, 64 clients, 256 bytes, ten thousand keys. A fresh cluster
for each size of the data and each number of nodes.

Theory. `cache` is about memory: a node keeps rows that are on disk in a cache of 256 MiB, so with ten times as much data it
should hold no more than with as much as fits. Values are of 4 KiB there, so that the keys, whose filter takes memory of its
own, are few; one node is enough, for each holds all. What counts is its private memory, for the pages of its files
are the system's to take back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bench import machine
from bench.cluster import measure, table
from bench.load import fill
from bench.plan import Plan
from bench.servers import commanded
from bench.systems import Ddb, await_leader

PARTS = {
    "keys": "10000,100000,1000000,5000000",
    "values": "16,256,4096,65536,1048576",
    "nodes": "1,3,5,7",
    "clients": "1,4,16,64,256,1024",
    "batches": "1,10,100,1000",
    "cache": "1,10",
}
OPS = (("put", "linearizable"), ("get", "linearizable"))
DATA_BYTES_MAX = 64 << 20  # of different values in use, where these are large
CLIENTS_OF_LARGE = 16
LARGE_BYTES = 65_536
CACHE_BYTES = 256 << 20  # what a node's store has for rows that are on disk, too
CACHED_VALUE_BYTES = 4096

Say = Callable[[str], None]
SomeDdb = TypeVar("SomeDdb", bound=Ddb)


@contextmanager
def started(make: Callable[[Path], SomeDdb], parent: Path | None) -> Iterator[SomeDdb]:
    """The cluster that `make` makes in a new directory, started; both are gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="ddb-growth-", dir=parent))
    system = make(directory)
    try:
        system.start()
        yield system
    finally:
        system.close()
        shutil.rmtree(directory, ignore_errors=True)


def cluster(nodes: int, parent: Path | None, flags: tuple[str, ...] = ()) -> AbstractContextManager[Ddb]:
    """A cluster of so many nodes with these `flags`, gone afterwards."""
    return started(lambda directory: Ddb(directory, nodes, flags), parent)


class Study:
    """Collects rows: what was changed, to what, and the figures."""

    def __init__(self, base: Plan, parent: Path | None, rounds: int, say: Say) -> None:
        self.base, self.parent, self.rounds, self.say = base, parent, rounds, say
        self.rows: list[dict[str, Any]] = []

    def row(self, system: Ddb, plan: Plan, part: str, at: int) -> None:
        """Measure one point, `rounds` times."""
        for _ in range(self.rounds):
            leader = await_leader(system)
            figures = measure(replace(plan, servers=(leader.address,)), leader, system.nodes)
            self.rows.append({"part": part, "at": at, **figures})
            failed = sum(figures["errors"].values())
            self.say(
                f"{part} {at:,}: {plan.op} {figures['ops_per_s']:,.0f}/s" + (f", {failed} errors" if failed else "")
            )

    def ops(self, system: Ddb, plan: Plan, part: str, at: int) -> None:
        """Fill, then measure puts and gets at one point."""
        fill(replace(plan, servers=(await_leader(system).address,)))
        for op, read in OPS:
            self.row(system, replace(plan, op=op, read=read), part, at)

    def keys(self, sizes: Sequence[int]) -> None:
        """More keys."""
        for size in sizes:
            with cluster(3, self.parent) as system:
                self.ops(system, replace(self.base, keys=size), "keys", size)

    def values(self, sizes: Sequence[int]) -> None:
        """Larger values; of large ones, fewer keys and fewer clients."""
        for size in sizes:
            keys = max(1, min(self.base.keys, DATA_BYTES_MAX // max(1, size)))
            clients = min(self.base.clients, CLIENTS_OF_LARGE) if size >= LARGE_BYTES else self.base.clients
            with cluster(3, self.parent) as system:
                self.ops(system, replace(self.base, value_bytes=size, keys=keys, clients=clients), "values", size)

    def nodes(self, sizes: Sequence[int]) -> None:
        """More nodes."""
        for size in sizes:
            with cluster(size, self.parent) as system:
                self.ops(system, self.base, "nodes", size)

    def clients(self, sizes: Sequence[int]) -> None:
        """More connections."""
        with cluster(3, self.parent) as system:
            for size in sizes:
                self.ops(system, replace(self.base, clients=size), "clients", size)

    def batches(self, sizes: Sequence[int]) -> None:
        """More puts in one request."""
        with cluster(3, self.parent) as system:
            for size in sizes:
                keys = max(self.base.keys, size)
                plan = replace(self.base, op="batch", batch_keys=size, clients=16, keys=keys)
                self.row(system, plan, "batches", size)

    def cache(self, sizes: Sequence[int]) -> None:
        """Data of so many times the cache, on one node."""
        for size in sizes:
            keys = size * CACHE_BYTES // CACHED_VALUE_BYTES
            with cluster(1, self.parent) as system:
                self.ops(system, replace(self.base, keys=keys, value_bytes=CACHED_VALUE_BYTES), "cache", size)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = []
    for r in rows:
        ms = ["-" if r[n] is None else f"{r[n]:.2f}" for n in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")]
        lines.append(
            [
                r["part"], f"{r['at']:,}", r["op"], f"{r['clients']}", f"{r['ops_per_s']:,.0f}", *ms,
                str(sum(r["errors"].values())), f"{max(r['memory_mib'])}", f"{max(r['private_mib'])}",
            ]
        )  # fmt: skip
    columns = (
        "changed", "to", "op", "clients", "ops/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "errors", "MiB", "private MiB",
    )  # fmt: skip
    return table(columns, lines, left=1)


def sizes(text: str) -> list[int]:
    """`N,N,…` as numbers. Raises argparse.ArgumentTypeError."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 10,100")
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.growth", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--only", default=",".join(PARTS), help="of %(default)s")
    for part, default in PARTS.items():
        p.add_argument(f"--{part}", type=sizes, default=sizes(default), metavar="N,…", help="(default %(default)s)")
    p.add_argument("--rounds", type=int, default=1, help="(default %(default)s)")
    p.add_argument("--seconds", type=float, default=3.0, help="each figure (default %(default)s)")
    p.add_argument("--warm-up", type=float, default=0.5, metavar="SECONDS", help="(default %(default)s)")
    p.add_argument("--dir", type=Path, help="on the disk to be measured (default: a temporary directory)")
    p.add_argument("--out", type=Path, help="write every figure there, as JSON")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    parts = a.only.split(",")
    if not set(parts) <= set(PARTS) or a.rounds < 1 or a.seconds <= 0:
        p.error(f"--only takes {', '.join(PARTS)}; --rounds and --seconds must be positive")
    base = Plan((), seconds=a.seconds, warm_up_s=a.warm_up, fill=False)
    study = Study(base, a.dir, a.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    code = 0
    try:
        if a.dir:
            a.dir.mkdir(parents=True, exist_ok=True)
        for part in parts:
            getattr(study, part)(getattr(a, part))
    except (OSError, RuntimeError) as error:
        print(f"bench.growth: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    facts = machine.facts(a.dir or Path(tempfile.gettempdir()))
    if a.out:
        command = " ".join(["python -m bench.growth", *(sys.argv[1:] if arguments is None else arguments)])
        a.out.write_text(json.dumps({"machine": facts, "command": command, "growth": study.rows}, indent=1) + "\n")
    print(f"{machine.sentence(facts)}\n\n{show(study.rows)}")
    return code


if __name__ == "__main__":
    sys.exit(commanded(main))
