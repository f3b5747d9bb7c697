"""Load on a real cluster, and what its history must look like afterwards.

Laws:

* Every write has a key and a value of its own, and is tried again only after an answer that says "surely not done".
  So each key was written at most once, and what the cluster holds can be judged key by key (`Load.check`): what was
  acknowledged is there once, with the revision that was told; what was refused is not; what is unknown may be.
* The register's writes are conditional on the value before, so a late one can't take it back: it only ever grows, and a
  read that returns less than what was acknowledged before it began is stale.

The writers speak frames by themselves, like the harness: a broken client can't hide a broken server.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ddb.errors import BY_CODE
from tests.harness import Cluster, NodeServer, ask, exchange, wait

REPLY_TIMEOUT_S = 3.0
PAUSE_S = 0.002  # between two attempts, and two writes: load, not a benchmark


@dataclass(slots=True)
class Write:
    """One write: when it began and ended (steady clock), how many attempts it took, what came of it."""

    key: str
    value: str
    began_s: float
    ended_s: float = 0.0
    tries: int = 0
    rev: int | None = None  # where it was acknowledged
    unknown: bool = False  # where it may have been done
    why: str = ""  # the last failure


class Talker:
    """A connection to one node at a time; to the next one where that fails."""

    def __init__(self, nodes: list[NodeServer], first: int) -> None:
        self._nodes = nodes
        self._position = first
        self._connection: socket.socket | None = None

    def ask(self, timeout_s: float = REPLY_TIMEOUT_S, **request: Any) -> tuple[dict[str, Any] | None, bool, str]:
        """The reply (None where none came), whether the request may have been taken, and why there is no reply."""
        sent = False
        try:
            if self._connection is None:
                node = self._nodes[self._position % len(self._nodes)]
                self._connection = socket.create_connection((node.host, node.port), timeout=min(timeout_s, 1.0))
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connection.settimeout(timeout_s)
            sent = True
            return exchange(self._connection, request), True, ""
        except OSError as error:
            self.move_on()
            return None, sent, repr(error)

    def move_on(self) -> None:
        """Ask another node from now on."""
        self.close()
        self._position += 1

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Load:
    """`writers` threads that write to `cluster`, each beginning at another of `nodes` (all when not given).

    A context manager: at its end the threads stop, and `writes` holds all that they did. A writer whose request fails,
    or whose connection breaks, asks another node next, unless it `stays`.
    """

    def __init__(
        self,
        cluster: Cluster,
        writers: int = 4,
        nodes: list[NodeServer] | None = None,
        prefix: str = "load",
        stays: bool = False,
    ) -> None:
        self.prefix = prefix
        self.stays = stays
        self.nodes = nodes or cluster.nodes  # the cluster's own list: who joins later is asked, too
        self.writes: list[Write] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(writers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for(len(self._threads))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the writers. May be called twice."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        talker = Talker([self.nodes[number % len(self.nodes)]] if self.stays else self.nodes, number)
        count = 0
        while not self._stopping.is_set():
            count += 1
            write = Write(f"{self.prefix}/{number}/{count}", f"value {number}/{count}", time.monotonic())
            self._write(talker, write)
            self.writes.append(write)
            time.sleep(PAUSE_S)
        talker.close()

    def _write(self, talker: Talker, write: Write) -> None:
        """Try until it is acknowledged, or nobody can know whether it was done."""
        while not self._stopping.is_set():
            write.tries += 1
            reply, sent, why = talker.ask(op="put", key=write.key, value=write.value)
            write.ended_s = time.monotonic()
            if reply is not None and reply.get("ok") is True:
                write.rev = reply["rev"]
                return
            if reply is not None:
                why = str(reply)
                sent = not BY_CODE[reply["error"]].definite
                talker.move_on()
            write.why = why
            write.unknown = sent
            if sent:
                return
            time.sleep(PAUSE_S)

    # What came of it

    def acknowledged(self, since_s: float = 0.0) -> list[Write]:
        """The acknowledged writes that began at `since_s` or later, the first to end first."""
        done = [w for w in list(self.writes) if w.rev is not None and w.began_s >= since_s]
        return sorted(done, key=lambda w: w.ended_s)

    def wait_for(self, count: int, since_s: float = 0.0, timeout_s: float = 15.0) -> Write:
        """Wait until `count` writes that began at `since_s` or later are acknowledged; returns the first of them."""

        def enough() -> list[Write]:
            done = self.acknowledged(since_s)
            return done if len(done) >= count else []

        return wait(enough, timeout_s, f"{count} writes were acknowledged")[0]

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        """The longest time between two acknowledgements, from `since_s` to `until_s`."""
        ends = [w.ended_s for w in self.acknowledged() if since_s <= w.ended_s <= until_s]
        marks = [since_s, *ends, until_s]
        return max(later - earlier for earlier, later in itertools.pairwise(marks))

    def check(self, nodes: list[NodeServer]) -> None:
        """Hold what each of `nodes` itself has (they must have applied the same) against the history."""
        for node in nodes:
            found = rows(node, self.prefix + "/")
            for write in self.writes:
                self._check_one(node, write, found.get(write.key))

    def _check_one(self, node: NodeServer, write: Write, item: dict[str, Any] | None) -> None:
        if write.rev is not None:
            assert item is not None, f"{node.name} lost {write}"
            assert (item["value"], item["rev"], item["version"]) == (write.value, write.rev, 1), (
                node.name,
                write,
                item,
            )
        elif write.unknown:
            assert item is None or (item["value"], item["version"]) == (write.value, 1), (node.name, write, item)
        else:
            assert item is None, f"{node.name} has done what was refused: {write}, {item}"


def rows(node: NodeServer, prefix: str = "", read: str = "stale") -> dict[str, dict[str, Any]]:
    """All items that `node` has under `prefix`, page by page."""
    found: dict[str, dict[str, Any]] = {}
    request: dict[str, Any] = {"op": "scan", "start": prefix, "end": prefix + "\U0010ffff", "read": read, "limit": 2000}
    while True:
        reply = ask(node.address, 10.0, **request)
        assert reply.get("ok") is True, (node.name, reply)
        found.update((item["key"], item) for item in reply["items"])
        if not reply["more"]:
            return found
        request["start"] = reply["items"][-1]["key"] + "\0"


class Register:
    """One key that only ever grows, written by one thread and read, linearizably, at each of `nodes` by another.

    A context manager. `stale` lists the reads that returned less than what had been acknowledged before they began.
    """

    KEY = "register"

    def __init__(self, cluster: Cluster, nodes: list[NodeServer] | None = None) -> None:
        self.nodes = list(nodes or cluster.nodes)
        self.acknowledged = 0
        self.reads: dict[str, int] = {node.name: 0 for node in self.nodes}
        self.stale: list[str] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._write, daemon=True)]
        self._threads += [threading.Thread(target=self._read, args=(node,), daemon=True) for node in self.nodes]

    def __enter__(self) -> Register:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert not self.stale, self.stale

    def _write(self) -> None:
        talker = Talker(self.nodes, 0)
        value = 0
        while not self._stopping.is_set():
            condition = {"value": value} if value else {"exists": False}
            reply, _, _ = talker.ask(op="put", key=self.KEY, value=value + 1, **{"if": condition})
            if reply is not None and reply.get("ok") is True and reply["applied"]:
                value += 1
                self.acknowledged = value
            elif reply is not None and reply.get("ok") is True:
                value = reply["value"] if reply["found"] else 0
            elif reply is not None:
                talker.move_on()
            time.sleep(PAUSE_S)
        talker.close()

    def _read(self, node: NodeServer) -> None:
        talker = Talker([node], 0)
        while not self._stopping.is_set():
            floor = self.acknowledged
            reply, _, _ = talker.ask(op="get", key=self.KEY)
            if reply is not None and reply.get("ok") is True:
                self.reads[node.name] += 1
                found = reply["value"] if reply["found"] else 0
                if found < floor:
                    self.stale.append(f"{node.name} answered {found} after {floor} was acknowledged")
            time.sleep(PAUSE_S)
        talker.close()


def flood(node: NodeServer, count: int, prefix: str = "flood/") -> dict[str, int]:
    """Put `count` keys through one connection to `node`, all requests at once; returns the revisions by key."""
    keys = [f"{prefix}{n:06d}" for n in range(count)]
    requests = b"".join(
        b"%d\n%b\n" % (len(payload), payload)
        for payload in (
            b'{"op":"put","key":"%b","value":"%b","timeout":20}' % (key.encode(), b"v" * 64) for key in keys
        )
    )
    with socket.create_connection((node.host, node.port), timeout=20.0) as connection:
        sender = threading.Thread(target=connection.sendall, args=(requests,), daemon=True)
        sender.start()
        replies = connection.makefile("rb")
        revs = {}
        for key in keys:
            reply = json.loads(replies.read(int(replies.readline()) + 1))
            assert reply["ok"] is True, reply
            revs[key] = reply["rev"]
        sender.join()
    return revs
