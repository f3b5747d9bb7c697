"""A whole cluster, its clients and everything that can go wrong, in one thread, from one seed.

`python -m ddb sim` replays hours of faults in seconds, checks each step (simrules.py), and judges at the end what the
clients saw (checker.py). What runs is the production code: replica, raft, election, kv, log, store, sync, peers,
discovery, service, registry, and the client's retry logic. Only clock, network, disk and threads are simulated.

Laws: the same seed and options give the same trace, byte for byte, on every machine. A violation names its rule, its
seed and its step, and the command that replays it.

Theory. A run has three parts. While the *swarm* strikes (simfaults.py), only safety is asked for. Then all is *healed*, and the
cluster owes progress: within `PROGRESS_S` a leader, equal digests on all nodes, and an answered write. At the end the
*history* must be linearizable. (The idea is FoundationDB's; Zhou et al., SIGMOD 2021, §4.)
"""

from __future__ import annotations

import gc
import logging
import random
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ddb.agenda import Agenda
from ddb.checker import check
from ddb.errors import DdbError, InvariantError
from ddb.simfaults import Fault, strike, swarm
from ddb.simrules import LAWFUL, Violation
from ddb.simtenants import TTLS_S
from ddb.simtenure import ENDS
from ddb.simtown import Plan, Town, draw_plan

PROGRESS_S: Final = 90.0
CHAOS_S: Final = 30.0
LOOK_EVERY_STEPS: Final = 50
LEASES_END_S: Final = max(TTLS_S) * 1.1 + 2.0  # when nobody keeps them alive, and nobody leads anew
WATCHERS_S: Final = 30.0  # until everybody who watches has been told everything
GRACE_S: Final = 10.0  # for clients to end their last call
CONFIGURATIONS_MAX: Final = 4_000  # of the checker's search, for each key: a run is not to take minutes
PROGRESS: Final = "a healed cluster elects a leader, converges and answers"
TOLD: Final = "a healed cluster tells everybody who watches everything"
LINEARIZABLE: Final = "what clients saw is linearizable (Herlihy and Wing 1990)"


@dataclass(frozen=True, slots=True)
class Options:
    """What to simulate. None: drawn from the seed. `kept` are the positions of the faults that happen (None: all), for a
    smaller schedule."""

    seed: int = 0
    nodes: int | None = None
    election: str | None = None
    steps: int | None = None
    faults: tuple[str, ...] | None = None
    until: int | None = None
    kept: tuple[int, ...] | None = None

    def command(self, step: int | None = None) -> str:
        """The command that replays this."""
        parts = ["python -m ddb sim", f"--seed {self.seed}"]
        if self.nodes is not None:
            parts.append(f"--nodes {self.nodes}")
        if self.election is not None:
            parts.append(f"--election {self.election}")
        if self.steps is not None:
            parts.append(f"--steps {self.steps}")
        if self.faults is not None:
            parts.append(f"--faults {','.join(self.faults)}")
        if self.kept is not None:
            parts.append(f"--keep {','.join(map(str, self.kept))}")
        if step is not None:
            parts.append(f"--trace --until {step}")
        return " ".join(parts)


@dataclass(slots=True)
class Result:
    """What came of a run. `met` counts the faults that struck and the rare things that were seen; `operations` are those
    that clients were done with; `state` says how each node was in the end. `violation` is None where every rule held."""

    options: Options
    plan: Plan
    faults: list[Fault]
    met: Counter[str]
    steps: int
    simulated_s: float
    operations: int
    state: list[str]
    violation: Violation | None = None


class Simulation:
    """One run. `note(text)` gets each line of the trace."""

    def __init__(self, options: Options, note: Callable[[str], None] | None = None) -> None:
        self.options = options
        rng = random.Random(options.seed)
        nodes = options.nodes or rng.choice([3, 3, 3, 5])
        election = options.election or rng.choice(["bully", "raft"])
        self.plan = draw_plan(random.Random(rng.getrandbits(64)), nodes, election)
        self.faults = swarm(random.Random(rng.getrandbits(64)), CHAOS_S, options.faults)
        self.met: Counter[str] = Counter()
        self._note = note
        self._shop_rng = random.Random(rng.getrandbits(64))
        self._agenda = Agenda()
        self.town = Town(
            self._agenda, self.plan, random.Random(rng.getrandbits(64)), self._meet, self.note if note else None
        )
        self._undone: list[Callable[[], None]] = []

    def _meet(self, what: str) -> None:
        self.met[what] += 1
        if self._note is not None:
            self.note(f"({what})")

    def note(self, text: str) -> None:
        """Put a line into the trace."""
        if self._note is not None:
            agenda = self._agenda
            self._note(f"{agenda.steps:7d} {agenda.now:10.6f} {text}")

    def run(self) -> Result:
        """Run to the end, or to the first violation."""
        violation = None
        try:
            self._chaos()
            if not self._is_over:
                self._heal()
                self._judge()
        except Violation as found:
            violation = found
        except InvariantError as error:
            violation = Violation(LAWFUL, "?", str(error))
        except Exception as error:  # whatever a handler lets out is a bug, and is replayed like any other
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = (
                f"{type(error).__name__}: {error} (in {where.name}, line {where.lineno} of {Path(where.filename).name})"
            )
            violation = Violation(LAWFUL, "?", what)
        town = self.town
        return Result(
            self.options,
            self.plan,
            self.faults,
            self.met,
            town.agenda.steps,
            town.agenda.now,
            len(town.history),
            [repr(town.hosts[name]) for name in town.nodes],
            violation,
        )

    @property
    def _is_over(self) -> bool:
        return self.options.until is not None and self.town.agenda.steps >= self.options.until

    def _chaos(self) -> None:
        town = self.town
        kept = self.options.kept
        for number, fault in enumerate(self.faults):
            if kept is None or number in kept:
                town.agenda.at(fault.at_s, None, self._strike, fault)
        town.agenda.at(0.5, None, town.open_shop, self._shop_rng)
        limit = self.options.steps or 1 << 62
        self._turn(CHAOS_S, lambda: town.agenda.steps >= limit)

    def _turn(self, until_s: float, enough: Callable[[], bool]) -> bool:
        """Let things happen until `until_s`, or until it is `enough`, which is looked at now and then; returns whether it
        was."""
        agenda = self.town.agenda
        last = self.options.until
        while True:
            steps = LOOK_EVERY_STEPS if last is None else min(LOOK_EVERY_STEPS, last - agenda.steps)
            if not agenda.run(until_s, steps):
                return enough()
            if (last is not None and agenda.steps >= last) or enough():
                return True

    def _strike(self, fault: Fault) -> None:
        if self.town.healed:
            return
        self.met[f"fault: {fault.kind}"] += 1
        self.note(f"--- {fault}")
        undo = strike(fault, self.town)
        if undo is not None:
            self._undone.append(undo)
            self.town.agenda.after(fault.for_s, None, self._undo, undo, fault.kind)

    def _undo(self, undo: Callable[[], None], kind: str) -> None:
        if undo in self._undone:
            self._undone.remove(undo)
            self.note(f"--- {kind} is over")
            undo()

    def _heal(self) -> None:
        """End all faults, and wait for what a healed cluster owes."""
        town = self.town
        for name in town.nodes:
            node = town.node(name)
            if node is not None and name not in town.rotten:
                town.tenure.look_at_digest(name, node)
        for undo in self._undone:
            undo()
        self._undone.clear()
        town.heal()
        self.note("--- healed")
        for client in town.clients:
            client.stop()
        for holder in town.holders:
            holder.stop()
        agenda = town.agenda
        self._turn(agenda.now + GRACE_S, lambda: all(client.pending is None for client in town.clients))
        end_s = agenda.now + PROGRESS_S
        if not self._turn(end_s, lambda: town.why_not_settled() is None) and not self._is_over:
            if town.is_beyond_help:
                self._meet("too many lost their memory: waits for a person")
                return
            raise Violation(PROGRESS, "town", f"after {PROGRESS_S:g} s: {town.why_not_settled()}")
        replies: list[object] = []
        town.ask({"op": "put", "key": "last", "value": 1}, timeout_s=5.0, done=replies.append)
        self._turn(agenda.now + 10.0, lambda: bool(replies))
        if not self._is_over and (not replies or isinstance(replies[0], DdbError)):
            raise Violation(PROGRESS, "town", f"a write is answered with {replies}")
        self._await_watchers()
        if not self._turn(agenda.now + LEASES_END_S, lambda: not town.tenure.leases) and not self._is_over:
            raise Violation(
                ENDS, "town", f"{LEASES_END_S:g} s after the last keep-alive there are {town.tenure.leases}"
            )

    def _await_watchers(self) -> None:
        """Whoever watches is told everything, once nothing goes wrong any more."""
        town = self.town
        last = town.rules.committed
        done = self._turn(town.agenda.now + WATCHERS_S, lambda: all(watcher.told >= last for watcher in town.watchers))
        if not done and not self._is_over:
            raise Violation(TOLD, "town", f"{WATCHERS_S:g} s after revision {last}: {town.watchers}")
        for watcher in town.watchers:
            watcher.stop()

    def _judge(self) -> None:
        """Hold what the clients saw against what could have been."""
        history = [*self.town.history, *(c.pending for c in self.town.clients if c.pending is not None)]
        verdict = check(history, configurations_max=CONFIGURATIONS_MAX)
        if verdict.linearizable is None:
            self._meet("history too hard to judge")
        if verdict.linearizable is False:
            raise Violation(LINEARIZABLE, "the clients", str(verdict.counterexample))


def run(options: Options, note: Callable[[str], None] | None = None) -> Result:
    """Simulate. The production code's own log is silent meanwhile, and garbage waits: a run is short."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    collects = gc.isenabled()
    gc.disable()
    try:
        return Simulation(options, note).run()
    finally:
        logging.disable(level)
        if collects:
            gc.enable()


def minimize(options: Options, progress: Callable[[str], None]) -> Options:
    """The smallest schedule of faults found that still breaks the same rule: faults are left out as long as it does
    (delta debugging, Zeller and Hildebrandt 2002)."""
    first = run(options)
    if first.violation is None:
        return options
    rule = first.violation.rule
    kept = list(options.kept if options.kept is not None else range(len(first.faults)))
    kept = [number for number in kept if first.faults[number].at_s <= first.simulated_s]
    size = max(1, len(kept) // 2)
    while True:
        position = 0
        while position < len(kept):
            fewer = kept[:position] + kept[position + size :]
            found = run(replace(options, kept=tuple(fewer))).violation
            if found is not None and found.rule == rule:
                kept = fewer
                progress(f"{len(kept)} faults are left")
            else:
                position += size
        if size == 1:
            return replace(options, kept=tuple(kept))
        size //= 2
