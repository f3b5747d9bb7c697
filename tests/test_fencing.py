"""Locks whose holders and whose cluster are killed and frozen: what checks the token never lets a stale holder in.

Laws: contenders are processes, so they can be stopped at any line. They do what careless programs do: having got the lock
they go on to the end of their block, and look at nothing again before they write. What they
write to is judged from outside: the guarded key by the log, which tells who held the lock at each revision; a machine
that is no part of the cluster by the tokens alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import ddb
from ddb.client import Client
from ddb.results import Change
from tests.harness import Cluster, environment, wait
from tests.proving import LONG, SEED, State, size

CONTENDERS = size(5, 20)
SECONDS = size(0.0, 120.0)
HARM = ("freeze holder", "kill leader", "freeze holder", "kill holder", "freeze leader", "freeze holder", "kill holder")
TTL_S = size(0.5, 1.0)
GONE_ON = 20  # writes of others, after which whoever was frozen is surely stale

CONTENDER = """
import os, sys, ddb
machine, ttl_s = int(sys.argv[2]), float(sys.argv[3])
with ddb.connect(sys.argv[1], timeout_s=30) as db:
    while True:
        try:
            with db.lock("resource", ttl_s, value=os.getpid()) as lock:
                for step in range(20):
                    believed = not lock.lost
                    db.put("guarded", lock.token, if_=lock.guard)
                    os.write(machine, b"%d %d\\n" % (lock.token, believed))
        except ddb.DdbError:
            continue
"""


class Contender:
    """A process that wants the lock, over and over."""

    def __init__(self, addresses: str, machine: Machine) -> None:
        command = [sys.executable, "-c", CONTENDER, addresses, str(machine.inlet), str(TTL_S)]
        self.process = subprocess.Popen(command, env=environment(), pass_fds=[machine.inlet])

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.thaw()
        self.process.kill()
        self.process.wait()


class Machine:
    """Something outside of the cluster that takes orders, and remembers the greatest token that it has seen.

    `accepted` are the tokens of the orders that it carried out; `refused` those that came too late, each with whether its
    sender had looked, before its last step, and had been told that it held the lock. A machine that checks no tokens would have
    carried out these as well.
    """

    def __init__(self) -> None:
        self._outlet, self.inlet = os.pipe()  # shorter than PIPE_BUF, so each order comes whole, whoever is killed
        self.accepted: list[int] = []
        self.refused: list[tuple[int, bool]] = []
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        with open(self._outlet) as orders:
            for order in orders:
                token, believed = map(int, order.split())
                if self.accepted and token < self.accepted[-1]:
                    self.refused.append((token, bool(believed)))
                else:
                    self.accepted.append(token)

    def __enter__(self) -> Machine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.inlet)
        self._thread.join()


def writes(db: Client) -> int:
    """How many writes the guard has let through."""
    item = db.get("guarded")
    return 0 if item is None else item.version


class Harm:
    """Kills and freezes holders and leaders, one at a time, and sees each time that the others go on."""

    def __init__(self, three: Cluster, db: Client, machine: Machine, stack: contextlib.ExitStack) -> None:
        self._three = three
        self._db = db
        self._machine = machine
        self._stack = stack
        self._rng = random.Random(SEED)
        self.contenders = [self._contender() for _ in range(CONTENDERS)]
        self.done = dict.fromkeys(sorted(set(HARM)), 0)

    def _contender(self) -> Contender:
        one = Contender(self._three.addresses, self._machine)
        self._stack.callback(one.end)
        return one

    def _holder(self) -> Contender:
        """Who holds the lock now, or anybody."""
        holders = [leader.value for leader in self._db.lock("resource").holders()]
        return next((one for one in self.contenders if one.process.pid in holders), self._rng.choice(self.contenders))

    def go_on(self) -> None:
        """Wait until so much was written that the lock has changed hands, or can't have been lost."""
        before = writes(self._db)
        wait(lambda: writes(self._db) > before + GONE_ON, 60, "somebody goes on")

    def do(self, what: str) -> None:
        """One harm, mended before it returns."""
        self.done[what] += 1
        if what == "kill holder":
            victim = self._holder()
            victim.end()
            self.contenders[self.contenders.index(victim)] = self._contender()
            self.go_on()
        elif what == "freeze holder":
            victim = self._holder()
            victim.freeze()
            self.go_on()
            victim.thaw()
        elif what == "kill leader":
            leader = self._three.leader()
            leader.kill()
            self.go_on()
            leader.start()
        else:
            leader = self._three.leader()
            leader.stop_signal()
            self._stack.callback(leader.cont)
            self.go_on()
            leader.cont()


@pytest.mark.proof
def test_no_stale_holder_writes_where_its_token_is_checked_while_holders_and_leaders_are_frozen_and_killed(
    cluster: Callable[..., Cluster], record_property: State
) -> None:
    three = cluster(3, retain=1_000_000)
    with ddb.connect(three.addresses, timeout_s=30) as db:
        with Machine() as machine, contextlib.ExitStack() as stack:
            harm = Harm(three, db, machine, stack)
            harm.go_on()
            until_s = time.monotonic() + SECONDS
            while True:
                for what in HARM:
                    harm.do(what)
                if time.monotonic() > until_s:
                    break
            three.wait_ready(30)
            assert all(one.process.poll() is None for one in harm.contenders), "nobody met with what is no DdbError"
        judged = judge(db)
    assert machine.accepted == sorted(machine.accepted)
    assert judged == sorted(judged), "never an older token after a newer one"
    assert len(set(judged)) >= 4, "the lock changed hands"
    assert machine.refused or not LONG, "nobody was stale, so nothing was proved"
    for what, count in harm.done.items():
        record_property(what, count)
    record_property("holders", len(set(judged)))
    record_property("guarded writes", len(judged))
    record_property("orders accepted", len(machine.accepted))
    record_property("stale orders refused", len(machine.refused))
    record_property("of senders that had just been told they held it", sum(sure for _, sure in machine.refused))


def judge(db: Client) -> list[int]:
    """The tokens of all guarded writes, in order. Each was made while its writer had the first place in the line."""
    line: dict[str, int] = {}
    tokens: list[int] = []
    for change in history(db):
        if change.key.startswith("ddb/lock/resource/"):
            if change.kind == "put":
                line.setdefault(change.key, change.rev)
            else:
                line.pop(change.key, None)
        elif change.key == "guarded":
            assert change.value == min(line.values()), f"revision {change.rev} is written by who does not hold the lock"
            tokens.append(change.value)
    return tokens


def history(db: Client) -> Iterator[Change]:
    """All that happened, in order."""
    first = 1
    while (page := db.history(prefix="", from_rev=first, limit=1000)).changes:
        yield from page
        first = page.changes[-1].rev + 1
