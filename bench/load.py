"""A closed-loop load generator: so many clients, each sends a request, waits for the reply, sends the next.

    python -m bench.load --server 127.0.0.1:8050 --clients 64 --op put --seconds 5

Laws:

1. The generator is never what is measured. Requests are encoded beforehand but for the key's digits, replies are cut
   and, but for failures, not decoded; `load cpu` in the result says how much of a core it took: near 100 % a process it is
   the bottleneck, it says so, and `--processes` divides it up.
2. Every reply is checked: what does not say that it succeeded is an error, counted under its code, and not
   among the operations or the latencies.
3. The clock of a request begins when it is handed to the kernel and ends when its reply has been cut; with
   `--pipeline` it waits for those before it, as it would for a real client.
4. All databases are measured by this same loop; only the bytes differ (dialect.py).

Theory. "Closed loop" means that a slow server is asked less often, so a latency here is that of a request sent when
there was one slot free, not of a user who arrives no matter what (Schroeder, Wierman and Harchol-Balter, "Open Versus
Closed: A Cautionary Tale", NSDI 2006). It is what etcd's and ZooKeeper's own benchmarks do, so figures compare.

Keys are drawn uniformly, or as YCSB does (Cooper et al., SoCC 2010): the n-th most popular of them with a
probability in proportion to 1/n^0.99, and the popular ones spread over the whole range.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import select
import socket
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate
from multiprocessing.connection import Connection as Pipe
from typing import Any

from bench import dialect
from bench.dialect import Dialect
from bench.plan import Plan, Result
from bench.servers import own_memory_bytes

FILL_CLIENTS = 8
FILL_BYTES_UNDERWAY = 60_000  # less than HTTP/2's first window
CONNECT_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 5.0
LOOK_S = 0.1
OTHER_DESCRIPTORS = 128
RECEIVE_BYTES = 1 << 18
ZIPF_EXPONENT = 0.99
PRIME = 2_147_483_647

Next = Callable[[Dialect], "bytes | None"]


# ------------------------------------------------------------ requests


def numbers(plan: Plan, draw: Callable[[], float]) -> Callable[[], int]:
    """A function that draws the next key's number."""
    keys = plan.keys
    if plan.distribution == "uniform":
        return lambda: int(draw() * keys)
    weights = list(accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, keys + 1)))
    total = weights[-1]
    return lambda: min(bisect(weights, draw() * total), keys - 1) * PRIME % keys


def requests(plan: Plan, seed: int) -> Callable[[Dialect], bytes]:
    """A function that makes the next request for a connection, its key drawn by lot."""
    draw = random.Random(seed).random
    number = numbers(plan, draw)
    if plan.op == "put":
        return lambda d: d.put(number())
    if plan.op == "get":
        return lambda d: d.get(number())
    if plan.op == "batch":
        count, most = plan.batch_keys, max(1, plan.keys - plan.batch_keys + 1)
        return lambda d: d.fill(int(draw() * most), count)
    return lambda d: d.put(number()) if draw() < 0.5 else d.get(number())


# ----------------------------------------------------------- connections


class Client:
    """One connection with up to `pipeline` requests on their way. `servers` are tried in turn when it breaks."""

    def __init__(self, plan: Plan, position: int, result: Result) -> None:
        self.plan = plan
        self.position = position
        self.result = result
        self.sent_at: deque[float] = deque()
        self._connect()

    def _connect(self) -> None:
        servers, failure = self.plan.servers, OSError("no server")
        for attempt in range(len(servers)):
            host, _, port = servers[(self.position + attempt) % len(servers)].rpartition(":")
            try:
                self.socket = socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S)
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.dialect = dialect.new(self.plan)
                self.dialect.greet(self.socket)
            except OSError as error:
                failure = error
                continue
            self.socket.setblocking(False)
            self.position += attempt
            self.unsent = self.rest = b""
            return
        raise failure

    def reconnect(self) -> None:
        """Count what is on its way as lost, and go on at the next server. Raises OSError when none answers."""
        self.result.errors["connection_lost"] += len(self.sent_at)
        self.socket.close()
        self.sent_at.clear()
        self.position += 1
        self._connect()

    def send(self, data: bytes, count: int) -> None:
        """Send `count` requests, `data`; what the kernel does not take waits in `unsent`."""
        now = time.perf_counter()
        if count == 1:
            self.sent_at.append(now)
        else:
            self.sent_at.extend([now] * count)
        if self.unsent:
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
        found, self.rest = self.dialect.outcomes(self.rest + data if self.rest else data)
        now = time.perf_counter()
        latencies, sent_at = self.result.latencies_s, self.sent_at
        for failure in found:
            began = sent_at.popleft()
            if failure:
                self.result.errors[failure] += 1
            else:
                latencies.append(now - began)
        if self.plan.timed:
            self.result.answered_at.extend([now] * (len(latencies) - len(self.result.answered_at)))
        return len(found)

    def close(self) -> None:
        """Take leave and close the connection."""
        try:
            self.socket.send(self.dialect.farewell)
        except OSError:
            pass  # it is closed all the same
        self.socket.close()


class Poller:
    """The kernel's own epoll or poll, for `selectors` makes an object of each event, which costs as much as a request."""

    READ, WRITE = select.POLLIN, select.POLLOUT  # epoll's are the same

    def __init__(self) -> None:
        epoll = getattr(select, "epoll", None)
        self._poll = epoll() if epoll else select.poll()
        self._timeout = LOOK_S if epoll else LOOK_S * 1000
        self._epoll = epoll is not None

    def watch(self, sock: socket.socket, writing: bool = False) -> None:
        """Look for what can be read on `sock`, and for room to write there; the first time and again."""
        mask = self.READ | (self.WRITE if writing else 0)
        try:
            self._poll.modify(sock.fileno(), mask)
        except OSError:  # not known yet
            self._poll.register(sock.fileno(), mask)

    def forget(self, sock: socket.socket) -> None:
        """Look at `sock` no more."""
        self._poll.unregister(sock.fileno())

    def wait(self) -> list[tuple[int, int]]:
        """What can be done: descriptors, and how."""
        return self._poll.poll(self._timeout)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._epoll:
            self._poll.close()  # type: ignore[union-attr]


def allow_connections(count: int) -> None:
    """Let this process have so many connections, as far as the system permits: many shells allow 1,024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Loop:
    """Several clients in one thread."""

    def __init__(self, plan: Plan, clients: int, first: int, result: Result) -> None:
        allow_connections(clients)
        self.clients: dict[int, Client] = {}
        self.poller = Poller()
        try:
            for i in range(clients):
                self._take_in(Client(plan, first + i, result))
        except OSError:
            self.close()
            raise

    def _take_in(self, client: Client) -> None:
        self.clients[client.socket.fileno()] = client
        self.poller.watch(client.socket)

    def run(self, next_request: Next, pipeline: int, stop: Callable[[], bool]) -> None:
        """Keep `pipeline` requests of each client on their way until `stop()` or no next request, then await the rest."""
        for client in self.clients.values():
            self._send(client, next_request, pipeline)
        while not stop() and self._waits():
            self._turn(next_request)
        deadline = time.perf_counter() + DRAIN_TIMEOUT_S
        while self._waits() and time.perf_counter() < deadline:
            self._turn(lambda _: None)

    def _waits(self) -> bool:
        return any(client.sent_at for client in self.clients.values())

    def _turn(self, next_request: Next) -> None:
        clients = self.clients
        for descriptor, events in self.poller.wait():
            client = clients[descriptor]
            try:
                if events & Poller.WRITE:
                    client.send(b"", 0)
                    if not client.unsent:
                        self.poller.watch(client.socket)
                if events & ~Poller.WRITE:
                    self._send(client, next_request, client.receive())
            except BlockingIOError:
                continue
            except OSError:
                self._replace(client, next_request)

    def _send(self, client: Client, next_request: Next, count: int) -> None:
        batch = [request for _ in range(count) if (request := next_request(client.dialect)) is not None]
        if not batch:
            return
        client.send(b"".join(batch), len(batch))
        if client.unsent:
            self.poller.watch(client.socket, writing=True)

    def _replace(self, client: Client, next_request: Next) -> None:
        outstanding = len(client.sent_at)
        self.poller.forget(client.socket)
        del self.clients[client.socket.fileno()]
        client.reconnect()
        self._take_in(client)
        self._send(client, next_request, outstanding)

    def close(self) -> None:
        """Close every connection."""
        self.poller.close()
        for client in self.clients.values():
            client.close()


# ------------------------------------------------------------- processes


def fill(plan: Plan) -> None:
    """Put every key once. Raises OSError, or RuntimeError where a put fails."""
    result, done = Result(1.0), 0
    loop = Loop(plan, FILL_CLIENTS, 0, result)
    size = next(iter(loop.clients.values())).dialect.fill_keys_max
    starts: Iterator[int] = iter(range(0, plan.keys, size))

    def following(d: Dialect) -> bytes | None:
        start = next(starts, None)
        return None if start is None else d.fill(start, min(size, plan.keys - start))

    try:
        request_bytes = size * (plan.value_bytes + dialect.KEY_BYTES)
        loop.run(following, max(1, FILL_BYTES_UNDERWAY // request_bytes), lambda: False)
        done = len(result.latencies_s)
    finally:
        loop.close()
    if result.errors or done != len(range(0, plan.keys, size)):
        raise RuntimeError(f"could not put the {plan.keys} keys to be read: {dict(result.errors) or 'no reply'}")


def measure(plan: Plan, clients: int, first: int, start: Callable[[], None]) -> Result:
    """Connect `clients`, wait in `start`, warm up, and measure; all in this process."""
    result = Result(plan.seconds)
    loop = Loop(plan, clients, first, result)
    try:
        next_request = requests(plan, plan.seed + first)
        start()
        begin = time.perf_counter() + plan.warm_up_s
        end = begin + plan.seconds
        warm = 0
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
        result.memory_bytes = own_memory_bytes()
        del result.latencies_s[:warm], result.answered_at[:warm]
        return result
    finally:
        loop.close()


def _until(next_request: Callable[[Dialect], bytes], end: float) -> Next:
    return lambda d: next_request(d) if time.perf_counter() < end else None


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
    if plan.fill and plan.op in ("get", "mixed"):
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


if __name__ == "__main__":
    import sys

    from bench.options import main
    from bench.servers import commanded

    sys.exit(commanded(main))
