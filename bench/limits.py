"""What this machine allows, so that a database's figures can be seen as a share of it.

    python -m bench.limits                       # the floor, and ddb's share of it, in about a minute
    python -m bench.limits --no-ddb --dir /srv   # the floor alone; the disk under /srv

Laws: nothing here is faster than it has to be, and nothing slower: plain system calls in plain Python, for that is what a
database in Python stands on. What is measured is written beside each figure.

Theory. A write that is durable can't be acknowledged before one fdatasync has returned; a write on three nodes has at
least one round trip to another process besides the client's own. A server in one thread can't answer more requests
than a bare loop that reads the same frames, cuts them and sends a reply of the same kind, and does nothing in between.
The load generator is the same, so its own share of the machine is in both figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.cluster import measure as measure_row
from bench.cluster import table
from bench.load import fill, run
from bench.plan import Plan, Result
from bench.servers import commanded
from bench.systems import Ddb, await_leader

BLOCK = b"x" * 4095 + b"\n"
WRITTEN_BYTES = 16 << 20
FILES = 3
RECEIVE_BYTES = 1 << 18
PING = b"x" * 100
LOADS = ((1, 1), (64, 1), (256, 1), (64, 16))  # clients, pipeline
KINDS = {"bare": "cuts frames", "json": "and reads and writes each as JSON"}
PARSED = b'{"op":"put","key":"k000000","value":"%b"}' % (b"v" * 256)  # 295 bytes
PARSED_TIMES, REPEATS = 5_000, 7
_SYNC = getattr(os, "fdatasync", os.fsync)


# ------------------------------------------------------------- the disk


def sync_latencies(path: Path, seconds: float, written: bool) -> list[float]:
    """Write 4 KiB and fdatasync, over and over: how long each took, in seconds.

    `written`: into a file that was written before, so that no block is allocated and no size changes; else at the end
    of a file that grows. Raises OSError.
    """
    latencies = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        if written:
            for _ in range(WRITTEN_BYTES // len(BLOCK)):
                os.write(descriptor, BLOCK)
            os.fsync(descriptor)
        position, until = 0, time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            os.pwrite(descriptor, BLOCK, position)
            _SYNC(descriptor)
            latencies.append(time.perf_counter() - began)
            position += len(BLOCK)
            if written and position >= WRITTEN_BYTES:
                position = 0
        return latencies
    finally:
        os.close(descriptor)


def disk(directory: Path, seconds: float) -> dict[str, dict[str, float]]:
    """fdatasync of one file and of three at once, appended and into written space: how many a second, and p50."""
    figures = {}
    for written in (False, True):
        for files in (1, FILES):
            all_latencies: list[list[float]] = [[] for _ in range(files)]

            def work(i: int, written: bool = written, found: list[list[float]] = all_latencies) -> None:
                found[i] = sync_latencies(directory / f"sync-{i}", seconds, written)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(files)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            counts = [len(latencies) for latencies in all_latencies]
            if not all(counts):
                raise OSError(f"no fdatasync came back in {directory}")
            name = f"{'written' if written else 'appended'}, {files} file{'s' if files > 1 else ''}"
            every = sorted(latency for latencies in all_latencies for latency in latencies)
            figures[name] = {
                "per_s": round(median(counts) / seconds),
                "p50_ms": round(1000 * every[len(every) // 2], 4),
                "p99_ms": round(1000 * every[int(len(every) * 0.99)], 4),
            }
    return figures


# --------------------------------------------------------- the processor


def processor() -> dict[str, float]:
    """How long this Python takes for `json.loads` of a request: the machine's speed without disk or network."""
    times = timeit.repeat(lambda: json.loads(PARSED), number=PARSED_TIMES, repeat=REPEATS)
    return {"json_loads_us": round(1e6 * median(times) / PARSED_TIMES, 3)}


# ---------------------------------------------------------- the network


@contextlib.contextmanager
def child(work: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """The port on which `work`, in a process of its own, listens. It ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def echo(pipe: Pipe) -> None:
    """A server for one connection that sends back what comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while data := connection.recv(RECEIVE_BYTES):
                connection.sendall(data)


def round_trip(seconds: float) -> dict[str, float]:
    """A message of 100 bytes to another process and back, over loopback, with sockets that block."""
    with child(echo) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        latencies, until = [], time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            connection.sendall(PING)
            connection.recv(RECEIVE_BYTES)
            latencies.append(time.perf_counter() - began)
    latencies.sort()
    return {"per_s": round(len(latencies) / seconds), "p50_ms": round(1000 * latencies[len(latencies) // 2], 4)}


def bare_loop(pipe: Pipe, kind: str) -> None:
    """A server that cuts frames out of the stream and answers each; with `kind` "json" it also decodes and encodes them."""
    selector = selectors.DefaultSelector()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    selector.register(listener, selectors.EVENT_READ)
    pipe.send(listener.getsockname()[1])
    rests: dict[socket.socket, bytes] = {}
    reply = b"20\n" + b'{"ok":true,"rev":12}' + b"\n"
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(connection, selectors.EVENT_READ)
                rests[connection] = b""
                continue
            connection = key.fileobj  # type: ignore[assignment]
            try:
                data = connection.recv(RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                selector.unregister(connection)
                del rests[connection]
                connection.close()
                continue
            payloads, rests[connection] = _cut(rests[connection] + data)
            if kind == "json":
                out = b"".join(_framed(json.dumps({"ok": True, "rev": len(json.loads(p))})) for p in payloads)
            else:
                out = reply * len(payloads)
            if out:
                connection.sendall(out)


def _cut(data: bytes) -> tuple[list[bytes], bytes]:
    payloads, start = [], 0
    while (line_feed := data.find(b"\n", start)) >= 0:
        end = line_feed + int(data[start:line_feed]) + 2
        if end > len(data):
            break
        payloads.append(data[line_feed + 1 : end - 1])
        start = end
    return payloads, data[start:]


def _framed(text: str) -> bytes:
    return b"%d\n%b\n" % (len(text), text.encode())


def loops(seconds: float, loads: tuple[tuple[int, int], ...] = LOADS) -> dict[str, dict[str, float]]:
    """What the bare loops answer, by kind, clients and pipeline, to puts of 256 bytes."""
    figures: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        with child(bare_loop, kind) as port:
            for clients, pipeline in loads:
                plan = Plan((f"127.0.0.1:{port}",), clients, seconds=seconds, warm_up_s=0.2, pipeline=pipeline)
                result: Result = run(plan)
                if result.errors:
                    raise RuntimeError(f"the bare loop failed: {dict(result.errors)}")
                s = result.summary()
                figures[f"{kind} {clients}×{pipeline}"] = {
                    "per_s": s["ops_per_s"], "p50_ms": s["p50_ms"], "load_cpu_percent": s["load_cpu_percent"],
                }  # fmt: skip
    return figures


def measure(directory: Path | None, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """All the limits; the disk is the one under `directory`."""
    place = Path(tempfile.mkdtemp(prefix="ddb-limits-", dir=directory))
    try:
        say("limits: processor")
        speed = processor()
        say("limits: fdatasync")
        found = disk(place, seconds / 2)
        say("limits: loopback")
        trip = round_trip(seconds / 2)
        say("limits: bare loop")
        return {"processor": speed, "disk": found, "round_trip": trip, "loop": loops(seconds / 2)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ----------------------------------------------------------- the tables


def show(limits: dict[str, Any]) -> str:
    """The limits as a table."""
    rows = []
    if speed := limits.get("processor"):
        each_us = speed["json_loads_us"]
        rows.append([f"json.loads of {len(PARSED)} bytes", f"{1e6 / each_us:,.0f}", f"{each_us / 1000:.4f}"])
    rows += [
        [f"4 KiB + fdatasync, {name}", f"{f['per_s']:,}", f"{f['p50_ms']:.3f}"] for name, f in limits["disk"].items()
    ]
    trip = limits["round_trip"]
    rows.append(["loopback round trip, blocking sockets", f"{trip['per_s']:,}", f"{trip['p50_ms']:.3f}"])
    for name, f in limits["loop"].items():
        kind, load = name.split()
        clients, pipeline = load.split("×")
        ways = f"{clients} × {pipeline} pipelined" if pipeline != "1" else f"{clients} client{'s'[: clients != '1']}"
        p50 = "-" if f["p50_ms"] is None else f"{f['p50_ms']:.3f}"
        rows.append([f"bare loop ({KINDS[kind]}), {ways}", f"{f['per_s']:,.0f}", p50])
    return table(("what the machine allows", "a second (each file's)", "p50 ms"), rows, left=1)


def shares(limits: dict[str, Any], own: dict[str, dict[str, float]]) -> str:
    """ddb's figures, by work, as shares of the limits. Empty where there are none."""
    rows = []
    sync, trip = limits["disk"]["written, 1 file"], limits["round_trip"]
    for clients, pipeline in LOADS:
        ways = f" × {pipeline} pipelined" if pipeline > 1 else ""
        loop = limits["loop"][f"bare {clients}×{pipeline}"]
        for what in ("put", "linearizable get"):
            work = f"{what}, {clients} client{'s'[: clients > 1]}{ways}"
            if (m := own.get(work)) is None:
                continue
            share = f"{100 * m['ops_per_s'] / loop['per_s']:.0f} % of the bare loop's {loop['per_s']:,.0f}/s"
            if work == "put, 1 client":
                least_ms = sync["p50_ms"] + 2 * trip["p50_ms"]
                share = f"{m['p50_ms'] / least_ms:.1f}× one fdatasync and two round trips ({least_ms:.3f} ms)"
            elif work == "linearizable get, 1 client":
                least_ms = 2 * trip["p50_ms"]
                share = f"{m['p50_ms'] / least_ms:.1f}× two round trips ({least_ms:.3f} ms)"
            rows.append([work, f"{m['ops_per_s']:,.0f}", f"{m['p50_ms']:.2f}", share])
    return table(("ddb", "ops/s", "p50 ms", "share"), rows, left=1) if rows else ""


def ddb_figures(directory: Path | None, seconds: float, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Three nodes of ddb under the same loads, by work."""
    place = Path(tempfile.mkdtemp(prefix="ddb-limits-", dir=directory))
    system = Ddb(place)
    found = {}
    try:
        system.start()
        base = Plan((await_leader(system).address,), seconds=seconds, warm_up_s=0.3, fill=False)
        fill(base)
        for op, what in (("put", "put"), ("get", "linearizable get")):
            for clients, pipeline in LOADS:
                leader = await_leader(system)
                plan = replace(base, servers=(leader.address,), clients=clients, pipeline=pipeline, op=op)
                ways = f" × {pipeline} pipelined" if pipeline > 1 else ""
                work = f"{what}, {clients} client{'s'[: clients > 1]}{ways}"
                found[work] = measure_row(plan, leader, system.nodes)
                say(f"ddb: {work}: {found[work]['ops_per_s']:,.0f}/s")
    finally:
        system.close()
        shutil.rmtree(place, ignore_errors=True)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.limits", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--dir", type=Path, help="on the disk to be measured (default: a temporary directory)")
    p.add_argument("--seconds", type=float, default=3.0, help="each measurement, about (default %(default)s)")
    p.add_argument("--no-ddb", action="store_true", help="the limits alone")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    if a.seconds <= 0:
        p.error("--seconds must be positive")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        if a.dir:
            a.dir.mkdir(parents=True, exist_ok=True)
        found = measure(a.dir, a.seconds, say)
        own = {} if a.no_ddb else ddb_figures(a.dir, a.seconds, say)
    except (OSError, RuntimeError) as error:
        print(f"bench.limits: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    facts = machine.facts(a.dir or Path(tempfile.gettempdir()))
    if a.json:
        print(json.dumps({"machine": facts, "limits": found, "ddb": own}))
    else:
        print("\n\n".join(part for part in (machine.sentence(facts), show(found), shares(found, own)) if part))
    return 0


if __name__ == "__main__":
    sys.exit(commanded(main))
