"""A closed-loop load generator: so many clients, each sends a request, waits for the reply, sends the next.

    python -m bench.load --server 127.0.0.1:8050 --clients 64 --op put --seconds 5

Laws:

1. The generator is never what is measured. Requests are encoded beforehand but for the key's digits, replies are cut
   and, but for failures, not decoded; `load cpu` in the result says how much of a core it took: near 100 % it is the
   bottleneck, and `--processes` divides it up.
2. Every reply is checked: what does not say `"ok":true` is an error, counted under its code, and not
   among the operations or the latencies.
3. The clock of a request begins when it is handed to the kernel and ends when its reply has been cut; with
   `--pipeline` it waits for those before it, as it would for a real client.

Theory. "Closed loop" means that a slow server is asked less often, so a latency here is that of a request sent when
there was one slot free, not of a user who arrives no matter what (Schroeder, Wierman and Harchol-Balter, "Open Versus
Closed: A Cautionary Tale", NSDI 2006). It is what etcd's and ZooKeeper's own benchmarks do, so figures compare.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import selectors
import socket
import string
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import Any

OPS = ("put", "get", "mixed")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
FILL_CLIENTS = 8
FILL_PIPELINE = 64
CONNECT_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 5.0
RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. `mixed` is half puts, half gets; `read` is what a get asks for."""

    servers: tuple[str, ...]
    clients: int = 64
    op: str = "put"
    value_bytes: int = 256
    seconds: float = 5.0
    warm_up_s: float = 1.0
    pipeline: int = 1
    keys: int = 10_000
    read: str = "linearizable"
    processes: int = 1
    fill: bool = True
    seed: int = 1


@dataclass(slots=True)
class Result:
    """What happened in the measured seconds: a latency for each operation that succeeded."""

    seconds: float
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    def add(self, other: Result) -> None:
        """Take what another process measured in the same seconds into this."""
        self.latencies_s.extend(other.latencies_s)
        self.errors.update(other.errors)
        self.cpu_s += other.cpu_s

    def summary(self) -> dict[str, Any]:
        """The figures: operations a second, latencies in milliseconds, errors by code, share of a core used."""
        ordered = sorted(self.latencies_s)
        figures: dict[str, Any] = {"ops": len(ordered), "ops_per_s": round(len(ordered) / self.seconds, 1)}
        for name, quantile in QUANTILES.items():
            figures[f"{name}_ms"] = round(1000 * ordered[int(quantile * len(ordered))], 3) if ordered else None
        figures["max_ms"] = round(1000 * ordered[-1], 3) if ordered else None
        figures["errors"] = dict(self.errors)
        figures["load_cpu_percent"] = round(100 * self.cpu_s / self.seconds, 1)
        return figures


# ------------------------------------------------------------ requests


def frame(payload: bytes) -> bytes:
    """`payload` as one frame."""
    return b"%d\n%b\n" % (len(payload), payload)


def template(plan: Plan, op: str) -> bytes:
    """The frame of one request, with %07d where the key's number goes: all are of one length."""
    key = b'"key":"k%07d"'
    if op == "get":
        read = b',"read":"stale"' if plan.read == "stale" else b""
        body = b'{"op":"get",' + key + read + b"}"
    else:
        letters = random.Random(plan.seed).choices(string.ascii_letters + string.digits, k=plan.value_bytes)
        body = b'{"op":"put",' + key + b',"value":"' + "".join(letters).encode() + b'"}'
    return b"%d\n" % len(body % 0) + body + b"\n"


def requests(plan: Plan, seed: int) -> Callable[[], bytes]:
    """A function that makes the next request, its key drawn at random."""
    put, get = template(plan, "put"), template(plan, "get")
    draw, keys = random.Random(seed).random, plan.keys
    if plan.op == "put":
        return lambda: put % int(draw() * keys)
    if plan.op == "get":
        return lambda: get % int(draw() * keys)
    return lambda: (put if draw() < 0.5 else get) % int(draw() * keys)


# ----------------------------------------------------------- connections


class Client:
    """One connection with up to `pipeline` requests on their way. `servers` are tried in turn when it breaks."""

    def __init__(self, servers: tuple[str, ...], position: int, result: Result) -> None:
        self.servers = servers
        self.position = position
        self.result = result
        self.sent_at: deque[float] = deque()
        self.unsent = b""
        self.rest = b""
        self.socket = self._connect()

    def _connect(self) -> socket.socket:
        for attempt in range(len(self.servers)):
            host, _, port = self.servers[(self.position + attempt) % len(self.servers)].rpartition(":")
            try:
                connection = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
            except OSError as error:
                failure = error
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            self.position += attempt
            return connection
        raise failure

    def reconnect(self) -> None:
        """Count what is on its way as lost, and go on at the next server. Raises OSError when none answers."""
        self.result.errors["connection_lost"] += len(self.sent_at)
        self.socket.close()
        self.sent_at.clear()
        self.unsent = self.rest = b""
        self.position += 1
        self.socket = self._connect()

    def send(self, data: bytes, count: int) -> None:
        """Send `count` requests, `data`; what the kernel does not take waits in `unsent`."""
        self.sent_at.extend([time.perf_counter()] * count)
        data = self.unsent + data
        try:
            self.unsent = data[self.socket.send(data) :]
        except BlockingIOError:
            self.unsent = data

    def receive(self) -> int:
        """Take the replies that have come; returns how many. Raises ConnectionError when the server has hung up."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionError("the server hung up")
        if self.rest:
            data = self.rest + data
        start = count = 0
        now = time.perf_counter()
        latencies, sent_at = self.result.latencies_s, self.sent_at
        while (line_feed := data.find(b"\n", start)) >= 0:
            end = line_feed + int(data[start:line_feed]) + 2
            if end > len(data):
                break
            began = sent_at.popleft()
            if data.startswith(b'{"ok":true', line_feed + 1) or not (code := failure(data[line_feed + 1 : end])):
                latencies.append(now - began)
            else:
                self.result.errors[code] += 1
            start, count = end, count + 1
        self.rest = data[start:]
        return count


def failure(reply: bytes) -> str:
    """The code in a reply that is a failure; empty for one that is none."""
    try:
        value = json.loads(reply)
        return "" if value["ok"] is True else str(value["error"])
    except (ValueError, LookupError, TypeError):
        return "unreadable_reply"


class Loop:
    """Several clients in one thread."""

    def __init__(self, plan: Plan, clients: int, first: int, result: Result) -> None:
        self.clients = [Client(plan.servers, first + i, result) for i in range(clients)]
        self.selector = selectors.DefaultSelector()
        self.result = result
        for client in self.clients:
            self._watch(client)

    def _watch(self, client: Client) -> None:
        self.selector.register(client.socket, selectors.EVENT_READ, client)

    def run(self, next_request: Callable[[], bytes | None], pipeline: int, stop: Callable[[], bool]) -> None:
        """Keep `pipeline` requests of each client on their way until `stop()` or no next request, then await the rest."""
        for client in self.clients:
            self._send(client, next_request, pipeline)
        while not stop() and any(client.sent_at for client in self.clients):
            self._turn(next_request, 0.1)
        deadline = time.perf_counter() + DRAIN_TIMEOUT_S
        while any(client.sent_at for client in self.clients) and time.perf_counter() < deadline:
            self._turn(lambda: None, 0.1)

    def _turn(self, next_request: Callable[[], bytes | None], timeout_s: float) -> None:
        for key, events in self.selector.select(timeout_s):
            client: Client = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    client.send(b"", 0)
                    if not client.unsent:
                        self.selector.modify(client.socket, selectors.EVENT_READ, client)
                if events & selectors.EVENT_READ:
                    self._send(client, next_request, client.receive())
            except OSError:
                self._replace(client, next_request)

    def _send(self, client: Client, next_request: Callable[[], bytes | None], count: int) -> None:
        batch = [request for _ in range(count) if (request := next_request()) is not None]
        if not batch:
            return
        client.send(b"".join(batch), len(batch))
        if client.unsent:
            self.selector.modify(client.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def _replace(self, client: Client, next_request: Callable[[], bytes | None]) -> None:
        outstanding = len(client.sent_at)
        self.selector.unregister(client.socket)
        client.reconnect()
        self._watch(client)
        self._send(client, next_request, outstanding)

    def close(self) -> None:
        """Close every connection."""
        self.selector.close()
        for client in self.clients:
            client.socket.close()


# ------------------------------------------------------------- processes


def fill(plan: Plan) -> None:
    """Put every key once. Raises OSError, or RuntimeError where a put fails."""
    put, result = template(plan, "put"), Result(1.0)
    numbers: Iterator[int] = iter(range(plan.keys))

    def following() -> bytes | None:
        number = next(numbers, None)
        return None if number is None else put % number

    loop = Loop(plan, FILL_CLIENTS, 0, result)
    try:
        loop.run(following, FILL_PIPELINE, lambda: False)
    finally:
        loop.close()
    if result.errors or len(result.latencies_s) != plan.keys:
        raise RuntimeError(f"could not put the {plan.keys} keys to be read: {dict(result.errors) or 'no reply'}")


def measure(plan: Plan, clients: int, first: int, start: Callable[[], None]) -> Result:
    """Connect `clients`, wait in `start`, warm up, and measure; all in this process."""
    result = Result(plan.seconds)
    loop = Loop(plan, clients, first, result)
    try:
        start()
        begin = time.perf_counter() + plan.warm_up_s
        end = begin + plan.seconds
        next_request = requests(plan, plan.seed + first)
        warm = len(result.latencies_s)
        cpu_began = 0.0
        measuring = False

        def stop() -> bool:
            nonlocal warm, cpu_began, measuring
            now = time.perf_counter()
            if not measuring and now >= begin:
                measuring, warm, cpu_began = True, len(result.latencies_s), time.process_time()
                result.errors.clear()
            return now >= end

        loop.run(_until(next_request, end), plan.pipeline, stop)
        result.cpu_s = time.process_time() - cpu_began
        del result.latencies_s[:warm]
        return result
    finally:
        loop.close()


def _until(next_request: Callable[[], bytes], end: float) -> Callable[[], bytes | None]:
    return lambda: next_request() if time.perf_counter() < end else None


def _worker(plan: Plan, clients: int, first: int, barrier: Any, pipe: Pipe) -> None:
    try:
        pipe.send(measure(plan, clients, first, barrier.wait))
    except Exception as error:  # said by the parent
        barrier.abort()
        pipe.send(error)
    finally:
        pipe.close()


def run(plan: Plan) -> Result:
    """Carry `plan` out. Raises OSError where no server answers, RuntimeError where the keys can't be put."""
    if plan.op != "put" and plan.fill:
        fill(plan)
    processes = min(plan.processes, plan.clients)
    if processes == 1:
        return measure(plan, plan.clients, 0, lambda: None)
    context = multiprocessing.get_context("spawn")  # a fork would take the caller's threads' locks along
    barrier = context.Barrier(processes)
    pipes, workers = [], []
    for i in range(processes):
        first, last = plan.clients * i // processes, plan.clients * (i + 1) // processes
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_worker, args=(plan, last - first, first, barrier, theirs))
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    answers = [pipe.recv() for pipe in pipes]
    for worker in workers:
        worker.join()
    failures = [a for a in answers if isinstance(a, Exception)]
    if failures:
        raise next((f for f in failures if isinstance(f, OSError)), failures[0])
    total = Result(plan.seconds)
    for answer in answers:
        total.add(answer)
    return total


# ---------------------------------------------------------- command line


def line(plan: Plan, figures: dict[str, Any]) -> str:
    """The figures as one line for a person."""
    what = plan.op if plan.op == "put" else f"{plan.op} {plan.read}"
    latencies = "  ".join(
        f"{name} {figures[name + '_ms']:.2f}" for name in (*QUANTILES, "max") if figures[name + "_ms"] is not None
    )
    errors = ", ".join(f"{count} {code}" for code, count in sorted(figures["errors"].items())) or "none"
    return (
        f"{what}, {plan.clients} clients × {plan.pipeline}, {plan.value_bytes} B: {figures['ops_per_s']:,.0f} ops/s; "
        f"ms: {latencies or 'no reply'}; errors: {errors}; load cpu {figures['load_cpu_percent']:.0f} %"
    )


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--server", required=True, help="HOST:PORT[,HOST:PORT…]; the clients are dealt out among them")
    p.add_argument("--clients", type=int, default=64, help="connections (default %(default)s)")
    p.add_argument("--op", choices=OPS, default="put")
    p.add_argument("--value-size", type=int, default=256, metavar="BYTES")
    p.add_argument("--seconds", type=float, default=5.0, help="measured, after the warm-up (default %(default)s)")
    p.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS")
    p.add_argument("--pipeline", type=int, default=1, help="requests of one client on their way (default %(default)s)")
    p.add_argument("--keys", type=int, default=10_000, help="different keys (default %(default)s)")
    p.add_argument("--read", choices=("linearizable", "stale"), default="linearizable", help="what a get asks for")
    p.add_argument("--processes", type=int, default=1, help="to divide the load's own work among (default %(default)s)")
    p.add_argument("--no-fill", action="store_true", help="don't put every key before getting them")
    p.add_argument("--seed", type=int, default=1, help="of the keys' order and the value")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    if min(a.clients, a.pipeline, a.keys, a.processes) < 1 or a.keys > 10_000_000 or a.seconds <= 0:
        p.error("clients, pipeline, processes, seconds and keys (at most ten million) must be positive")
    servers = tuple(a.server.split(","))
    if not all(s.rpartition(":")[2].isdecimal() for s in servers):
        p.error("--server takes HOST:PORT[,HOST:PORT…]")
    plan = Plan(
        servers, a.clients, a.op, a.value_size, a.seconds, a.warm_up, a.pipeline, a.keys, a.read, a.processes,
        not a.no_fill, a.seed,
    )  # fmt: skip
    try:
        figures = run(plan).summary()
    except (OSError, RuntimeError) as error:
        print(f"bench.load: {a.server}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures) if a.json else line(plan, figures))
    return 0 if figures["ops"] else 1


if __name__ == "__main__":
    sys.exit(main())
