"""What idle watchers cost a node: the puts of others, and memory.

    python -m bench.watchers                        # 10,000 watchers on the leader of one node, in about a minute
    python -m bench.watchers --nodes 3 --watchers 1000

Laws: the watchers are real connections, each with a watch of a key (every other one: of a prefix) that nobody writes, held and
read by a process of their own. The same load is measured before they come, while they are there, and after they have gone, and
once more in that order: a machine that gets slower meanwhile must not be blamed on them.

Theory. A watcher costs memory, a place in the index, and a sign of life every few seconds. A put that it does not watch
costs a look for its key, and one for each length of a watched prefix, however many watchers there are. What is left to be
seen is the signs of life: some 3,000 a second for 10,000 watchers, of which the node sends each with a system call.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import selectors
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import mean
from typing import Any

from bench.cluster import measure, table
from bench.frames import frame
from bench.plan import Plan
from bench.servers import commanded
from bench.systems import Ddb, await_leader

COLUMNS = ("watchers", "puts/s", "p50 ms", "p99 ms", "node", "MiB", "progress/s")
SPARE_DESCRIPTORS = 500  # of the node and of the watchers' process
ROUNDS = 2
PATIENCE_S = 30.0


def allowed(wanted: int) -> int:
    """How many of `wanted` watchers the limit of descriptors allows each process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most - SPARE_DESCRIPTORS)


def watch(address: str, count: int, pipe: Pipe) -> None:
    """In a process of its own: open `count` watches at `address`, say so, read them until told to end."""
    host, _, port = address.rpartition(":")
    told = 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            what = b'"key":"watched/%d"' % number if number % 2 else b'"prefix":"watched/%d/"' % number
            connection.sendall(frame(b'{"op":"watch",%b}' % what))
            if b'"watch":true' not in connection.recv(4096):
                pipe.send(number)
                return
            selector.register(connection, selectors.EVENT_READ)
        selector.register(pipe, selectors.EVENT_READ)
        pipe.send(count)
        while True:
            for key, _ in selector.select():
                if key.fileobj is pipe:
                    if pipe.recv() == "end":
                        return
                    pipe.send(told)
                elif isinstance(key.fileobj, socket.socket):
                    told += key.fileobj.recv(1 << 16).count(b'"progress"')


@contextlib.contextmanager
def watching(address: str, count: int) -> Iterator[Pipe]:
    """Within it, so many watchers are there. Raises RuntimeError where they don't all get in."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=watch, args=(address, count, there))
    process.start()
    try:
        if not here.poll(PATIENCE_S * 4) or (got := here.recv()) != count:
            raise RuntimeError(f"the node took only {got if here else 'some'} watchers")
        yield here
    finally:
        with contextlib.suppress(OSError):
            here.send("end")
        process.join(PATIENCE_S)
        process.kill()


def told(pipe: Pipe) -> int:
    """How many signs of life the watchers have had so far."""
    pipe.send("told")
    return int(pipe.recv())


def row(count: int, figures: dict[str, Any], progress_per_s: float) -> tuple[str, ...]:
    """The figures as the cells of `COLUMNS`."""
    return (
        f"{count:,}", f"{figures['ops_per_s']:,.0f}", f"{figures['p50_ms']:.2f}", f"{figures['p99_ms']:.2f}",
        f"{figures['leader_cpu_percent']} %", str(figures["private_mib"][0]), f"{progress_per_s:,.0f}",
    )  # fmt: skip


def compare(system: Ddb, plan: Plan, count: int) -> list[tuple[int, dict[str, Any], float]]:
    """The rows: without watchers and with them, by turns, and without them again."""
    leader = await_leader(system)
    nodes = [leader, *[node for node in system.nodes if node is not leader]]
    rows = []
    for _ in range(ROUNDS):
        rows.append((0, measure(plan, leader, nodes), 0.0))
        with watching(leader.address, count) as pipe:
            before, began = told(pipe), time.monotonic()
            figures = measure(plan, leader, nodes)
            rows.append((count, figures, (told(pipe) - before) / (time.monotonic() - began)))
    rows.append((0, measure(plan, leader, nodes), 0.0))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m bench.watchers", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--watchers", type=int, default=10_000, metavar="N")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--seconds", type=float, default=8.0, help="a row (default %(default)s)")
    p.add_argument("--dir", type=Path, help="where the nodes keep their data (default: a temporary directory)")
    a = p.parse_args(arguments)
    count = allowed(a.watchers)
    if count < a.watchers:
        print(f"The limit of descriptors allows {count:,} watchers; `ulimit -n` raises it.", file=sys.stderr)
    directory = Path(tempfile.mkdtemp(prefix="ddb-bench-", dir=a.dir))
    system = Ddb(directory, a.nodes)
    try:
        system.start()
        plan = replace(
            Plan((await_leader(system).address,)), clients=a.clients, seconds=a.seconds, fill=False, keys=10_000
        )  # fmt: skip
        rows = compare(system, plan, count)
    except (OSError, RuntimeError) as error:
        print(f"bench.watchers: {error}", file=sys.stderr)
        return 1
    finally:
        system.close()
        shutil.rmtree(directory, ignore_errors=True)
    print(table(COLUMNS, [row(*one) for one in rows]))
    without = [figures for watchers, figures, _ in rows if not watchers]
    with_them = [figures for watchers, figures, _ in rows if watchers]
    share = mean(f["ops_per_s"] for f in with_them) / mean(f["ops_per_s"] for f in without)
    more_kib = (with_them[0]["private_mib"][0] - without[0]["private_mib"][0]) * 1024 / count
    print(f"\nWith {count:,} idle watchers, {share:.0%} of the puts are left; each takes about {more_kib:.1f} KiB.")
    return 0


if __name__ == "__main__":
    sys.exit(commanded(main))
