"""`ddb bench`: how fast a living cluster answers, for whoever runs it.

Laws:

1. The cluster's own data is not touched. All keys are under a scratch prefix that nobody used before, and they are
   removed at the end, however it ends.
2. The load is bounded: a closed loop of so many clients for so many seconds, so a slow cluster is asked less often. Ctrl-C
   ends it, and what was measured is shown.
3. An operation that failed is in no figure but the count of failures, and any failure makes the exit code 1.

Theory. One thread asks on many sockets: each sends a request, awaits the reply, and sends the next. What one client alone
sees of a put is the network's way there and back, some fractions of a millisecond of work, and the time until a
majority's disks have it. A `ping` takes the same way and needs no disk, so the difference is what the disks
take, and what the verdict is on. It knows of no single disk: the leader's and the quickest followers' make it up. Nor
does it know whether they are disks: on a tmpfs an fsync costs nothing.

`bench/` in the repository measures more, and more exactly: this is the short version.
"""

from __future__ import annotations

import json
import random
import secrets
import selectors
import socket
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ddb import overview, wire
from ddb.client import connect
from ddb.errors import BadFrame, DdbError, NoLeader, Timeout, Unreachable
from ddb.scratch import Interrupts, remove_all

FILL_KEYS: Final = 100  # in one batch
FILL_BYTES: Final = 1 << 20
LOOK_S: Final = 0.1
RECEIVE_BYTES: Final = 1 << 18
REPLY_BYTES_MAX: Final = 32 << 20
PING_SHARE, LONE_SHARE = 0.1, 0.3  # of the seconds; the rest is divided among the others
QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
_COLUMNS: Final = ("", "CLIENTS", "OPS/S", "P50 MS", "P95 MS", "P99 MS", "P99.9 MS", "MAX MS", "ERRORS")

# What a durable write took beyond a ping, at most, in ms; what to call it; what to say of it.
VERDICTS: Final = (
    (2.0, "good", "as it should be on an SSD"),
    (8.0, "fair", "slow for an SSD, or a disk behind a network"),
    (30.0, "slow", "like a disk that turns, or one that others keep busy"),
    (float("inf"), "bad", "every write waits for this: look for what else keeps the disks busy"),
)

Watch = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What `ddb bench` was told: load for `seconds` in all, `timeout_s` for the reply to one request."""

    servers: tuple[str, ...]
    seconds: float = 10.0
    clients: int = 64
    value_bytes: int = 256
    keys: int = 1000
    timeout_s: float = 5.0


@dataclass(slots=True)
class Figures:
    """What one kind of load gave."""

    name: str
    clients: int
    seconds: float = 0.0
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)

    def ms(self, quantile: float) -> float | None:
        """A quantile of the latencies, in milliseconds; None where there are none."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(int(quantile * len(ordered)), len(ordered) - 1)] if ordered else None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        latencies = {f"{name}_ms": self.ms(quantile) for name, quantile in {**QUANTILES, "max": 1.0}.items()}
        rate = len(self.latencies_s) / self.seconds if self.seconds else 0.0
        return {
            "name": self.name, "clients": self.clients, "ops": len(self.latencies_s), "ops_per_s": round(rate, 1),
            **{name: None if ms is None else round(ms, 3) for name, ms in latencies.items()},
            "errors": dict(self.errors),
        }  # fmt: skip


class Report:
    """Grows while `run` works. `trouble` is a sentence, empty where nothing went wrong."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.leader = ""
        self.nodes = 0
        self.figures: list[Figures] = []
        self.trouble = ""
        self.exit_code = 0

    def fail(self, trouble: str, exit_code: int = 1) -> None:
        """Note what went wrong; the first one counts."""
        if not self.trouble:
            self.trouble, self.exit_code = trouble, exit_code

    def disk_ms(self) -> float | None:
        """What a lone put took beyond a ping, medians, in milliseconds; None where it was not measured."""
        half = {f.name: f.ms(0.5) for f in self.figures if f.clients == 1}
        put, ping = half.get("put"), half.get("ping")
        return None if put is None or ping is None else max(0.0, put - ping)

    def verdict(self) -> tuple[str, str] | None:
        """What to call the disks, and a sentence on them; None where a lone put was not measured."""
        took_ms = self.disk_ms()
        if took_ms is None:
            return None
        word, why = next((word, why) for most, word, why in VERDICTS if took_ms < most)
        majority = "the disk" if self.nodes == 1 else "a majority's disks"
        return word, f"{majority} took {took_ms:.2f} ms of each write: {word} ({why})."

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        verdict, took_ms = self.verdict(), self.disk_ms()
        return {
            "ok": not self.trouble, "leader": self.leader, "nodes": self.nodes,
            "figures": [f.to_json() for f in self.figures],
            "disk": None if verdict is None or took_ms is None else {"ms": round(took_ms, 3), "verdict": verdict[0]},
            **({"message": self.trouble} if self.trouble else {}),
        }  # fmt: skip

    def lines(self, colour: bool = False) -> list[str]:
        """For people."""
        rows: list[Sequence[str]] = [_COLUMNS]
        for figures in self.figures:
            f = figures.to_json()
            latencies = ["-" if f[f"{n}_ms"] is None else f"{f[f'{n}_ms']:.2f}" for n in (*QUANTILES, "max")]
            errors = ", ".join(f"{count} {code}" for code, count in sorted(figures.errors.items())) or "0"
            rows.append([f["name"], str(f["clients"]), f"{f['ops_per_s']:,.0f}", *latencies, errors])
        lines = overview.aligned(rows, right=set(range(1, 8)), colour=colour)
        if verdict := self.verdict():
            lines += ["", f"Disks: {verdict[1]}"]
        return lines


def run(settings: Settings, watch: Watch) -> Report:
    """Measure, clean up, and return what was found; `watch` gets a line on how far it is, several times a second.

    Raises Unreachable or NoLeader where there is no cluster to ask, KeyboardInterrupt at a second Ctrl-C.
    """
    report = Report(f"bench/{secrets.token_hex(4)}/")
    leader, everybody = _members(settings)
    report.leader, report.nodes = leader.name, len(everybody)
    with Interrupts() as interrupts:
        load = _Load(settings, report, interrupts, watch)
        try:
            with interrupts.noted():
                load.all_of_it(leader.address, everybody)
        except DdbError as error:
            report.fail(error.message, error.exit_code)
        finally:
            watch("removing the keys")
            _clean(settings, report, everybody)
    if failed := sum(sum(f.errors.values()) for f in report.figures):
        report.fail(f"{failed} operations failed.")
    if interrupts.asked:
        report.fail("It was interrupted.", 130)
    return report


def _members(settings: Settings) -> tuple[overview.View, list[str]]:
    """The leader, and the addresses of all members that answer."""
    views = overview.ask_all(settings.servers, min(settings.timeout_s, overview.PATIENCE_S))
    answering = [view.address for view in views if view.status is not None]
    if not answering:
        raise next((view.error for view in views if view.error), Unreachable("No server was named."))
    leader = overview.leader_of(views)
    if leader is None:
        raise NoLeader("There is no leader now; try again in a moment, or see `ddb status`.")
    return leader, answering


def _clean(settings: Settings, report: Report, addresses: list[str]) -> None:
    try:
        with connect(addresses, discover=False, timeout_s=settings.timeout_s) as client:
            remove_all(client, report.prefix, settings.timeout_s)
    except DdbError as error:
        report.fail(f"The keys under {report.prefix} could not be removed: {error.message}", error.exit_code)


# --------------------------------------------------------------- the load


class _Load:
    """The kinds of load, one after the other."""

    def __init__(self, settings: Settings, report: Report, interrupts: Interrupts, watch: Watch) -> None:
        self._settings = settings
        self._report = report
        self._interrupts = interrupts
        self._watch = watch
        self._random = random.Random(1)
        prefix = wire.encode_string(report.prefix)[:-1]
        value = b'"' + b"v" * settings.value_bytes + b'"'
        self._put = b'{"op":"put","key":%b%%06d","value":%b}' % (prefix, value)
        self._get = b'{"op":"get","key":%b%%06d"}' % prefix
        self._stale = b'{"op":"get","key":%b%%06d","read":"stale"}' % prefix

    def all_of_it(self, leader: str, everybody: list[str]) -> None:
        """Fill, then each kind in turn, until it is done or interrupted."""
        s = self._settings
        self._fill(leader)
        rest_s = s.seconds * (1 - PING_SHARE - LONE_SHARE)
        many = s.clients
        kinds: list[tuple[str, int, float, Sequence[str], Callable[[], bytes]]] = [
            ("ping", 1, s.seconds * PING_SHARE, [leader], lambda: b'{"op":"ping"}'),
            ("put", 1, s.seconds * LONE_SHARE, [leader], self._some(self._put)),
            ("put", many, rest_s / 3, [leader], self._some(self._put)),
            ("get", many, rest_s / 3, [leader], self._some(self._get)),
            ("stale get", many, rest_s / 3, everybody, self._some(self._stale)),
        ]
        for name, clients, seconds, addresses, make in kinds:
            if self._interrupts.asked:
                return
            figures = Figures(name, clients)
            self._report.figures.append(figures)
            _Clients(s, figures, addresses).run(make, seconds, self._on_look)

    def _some(self, template: bytes) -> Callable[[], bytes]:
        keys, draw = self._settings.keys, self._random.random
        return lambda: template % int(draw() * keys)

    def _fill(self, leader: str) -> None:
        s = self._settings
        size = max(1, min(FILL_KEYS, FILL_BYTES // (s.value_bytes + 64)))
        with connect(leader, timeout_s=s.timeout_s) as client:
            for first in range(0, s.keys, size):
                if self._interrupts.asked:
                    return
                numbers = range(first, min(first + size, s.keys))
                self._watch(f"putting {s.keys:,} keys: {first:,}")
                client.batch([json.loads(self._put % number) for number in numbers])

    def _on_look(self, figures: Figures, left_s: float) -> bool:
        """Say how far it is. False where it is to end."""
        done = len(figures.latencies_s)
        self._watch(f"{figures.name}, {figures.clients} clients: {done:,} done, {max(0.0, left_s):.0f} s left")
        return not self._interrupts.asked


class _Asking:
    """One connection, and when its request went out."""

    def __init__(self, address: str, timeout_s: float) -> None:
        host, port = wire.parse_address(address)
        try:
            self.socket = socket.create_connection((host, port), timeout_s)
        except OSError as error:
            raise Unreachable(f"{address} can't be reached: {error.strerror or error}.") from None
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.frames = wire.FrameBuffer(REPLY_BYTES_MAX)
        self.sent_at = 0.0
        self.address = address

    def send(self, payload: bytes) -> None:
        """Send one request; raises OSError. It blocks where the kernel takes no more, which it never is for long."""
        self.sent_at = time.perf_counter()
        self.socket.sendall(wire.frame(payload))


class _Clients:
    """Clients in one thread, each with one request under way."""

    def __init__(self, settings: Settings, figures: Figures, addresses: Sequence[str]) -> None:
        self._settings = settings
        self._figures = figures
        self._selector = selectors.DefaultSelector()
        self._clients: list[_Asking] = []
        try:
            for i in range(figures.clients):
                client = _Asking(addresses[i % len(addresses)], settings.timeout_s)
                self._clients.append(client)
                self._selector.register(client.socket, selectors.EVENT_READ, client)
        except DdbError:
            self.close()
            raise

    def run(self, make: Callable[[], bytes], seconds: float, on_look: Callable[[Figures, float], bool]) -> None:
        """Ask for `seconds`, then await the replies that are missing. Raises Timeout, Unreachable."""
        began = look_at = time.perf_counter()
        end = began + seconds
        try:
            for client in self._clients:
                client.send(make())
            busy = len(self._clients)
            while busy:
                now = time.perf_counter()
                if now >= look_at:
                    look_at = now + LOOK_S
                    if not on_look(self._figures, end - now):
                        end = min(end, now)
                    self._check_patience(now)
                for key, _ in self._selector.select(LOOK_S):
                    if self._receive(key.data):
                        if time.perf_counter() < end:
                            key.data.send(make())
                        else:
                            key.data.sent_at = 0.0
                            busy -= 1
        except OSError as error:
            raise Unreachable(f"The connection to a node was lost: {error.strerror or error}.") from None
        finally:
            self._figures.seconds = time.perf_counter() - began
            self.close()

    def _receive(self, client: _Asking) -> bool:
        """Take what has come; whether it was the reply."""
        data = client.socket.recv(RECEIVE_BYTES)
        if not data:
            raise Unreachable(f"{client.address} has hung up.")
        payloads = client.frames.feed(data)
        for payload in payloads:
            if payload.startswith(b'{"ok":true') or not (code := _code(payload)):
                self._figures.latencies_s.append(time.perf_counter() - client.sent_at)
            else:
                self._figures.errors[code] += 1
        return bool(payloads)

    def _check_patience(self, now: float) -> None:
        late = now - self._settings.timeout_s
        for client in self._clients:
            if 0.0 < client.sent_at < late:
                raise Timeout(f"{client.address} has not answered for {self._settings.timeout_s:g} s.")

    def close(self) -> None:
        """Close every connection."""
        self._selector.close()
        for client in self._clients:
            client.socket.close()


def _code(payload: bytes) -> str:
    """The code in a reply that is a failure; empty for one that is none."""
    try:
        reply = wire.decode(payload)
        return "" if reply["ok"] is True else str(reply["error"])
    except (DdbError, KeyError):
        raise BadFrame("The answer is none; is it a ddb server?") from None
