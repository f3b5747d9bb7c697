"""The harm that `ddb verify --faults` does to a cluster: one node after another is killed, frozen or told to leave.

Laws:

* At most one node is harmed at a time, and the next comes to harm only when that one is back and knows a leader. So with
  three nodes or more there is always a majority that could serve.
* What is done is undone: whoever was killed is started again, whoever was frozen goes on.
* A node that ends without having been told to is a flaw, not a fault: it is told as `trouble`, and nobody is harmed any
  more.

Theory. Faults find most where they hit the leader, so half of them are aimed at it. What happens, to whom, and for how
long is drawn from a seed; when exactly it happens, and who leads then, is up to the machine.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from ddb import overview
from ddb.up import LOOK_S, Child, start_again
from ddb.workload import Fault

FIRST_S: Final = (0.3, 0.8)  # until the first fault; shortest and longest
REST_S: Final = (0.3, 1.2)
LEAVE_PATIENCE_S: Final = 15.0
LASTS_S: Final = {  # some long enough for another leader to be elected
    Fault.KILL: (0.1, 1.5),
    Fault.STOP: (0.2, 4.0),
    Fault.RESTART: (LEAVE_PATIENCE_S, LEAVE_PATIENCE_S),
}
ASK_PATIENCE_S: Final = 0.3


class Nemesis:
    """Harms the `nodes` of a running cluster, by those `faults`. `tick` is to be called many times a second, and `heal`
    in the end.

    `done` counts the faults. `trouble` is a sentence about what no fault explains, empty where all is as expected.
    """

    def __init__(self, nodes: Sequence[Child], faults: Sequence[Fault], chance: random.Random) -> None:
        self.done: Counter[Fault] = Counter()
        self.trouble = ""
        self._nodes = nodes
        self._faults = faults
        self._chance = chance
        self._victim: Child | None = None
        self._fault = faults[0]
        self._harmed = False  # or on the way back
        self._due_s = time.monotonic() + chance.uniform(*FIRST_S)

    def __str__(self) -> str:
        if self._victim is None:
            return "all nodes up"
        doing = {Fault.KILL: "killed", Fault.STOP: "frozen", Fault.RESTART: "told to leave"}[self._fault]
        return f"{self._victim.name} {doing if self._harmed else 'on its way back'}"

    def tick(self) -> None:
        """Do what is due."""
        self._look_for_the_dead()
        now_s = time.monotonic()
        if self._victim is None:
            if now_s >= self._due_s and not self.trouble:
                self._strike(now_s)
        elif self._harmed:
            left = self._fault is Fault.RESTART and self._victim.process.poll() is not None
            if left or now_s >= self._due_s:
                self._mend(left)
        elif _is_back(self._victim):
            self._victim = None
            self._due_s = now_s + self._chance.uniform(*REST_S)

    def heal(self, patience_s: float) -> bool:
        """Undo the harm now, and wait until whoever suffered it is back, at most for `patience_s`. Says whether all are."""
        deadline_s = time.monotonic() + patience_s
        self._faults = ()
        while self._victim is not None and not self.trouble and time.monotonic() < deadline_s:
            if self._fault is not Fault.RESTART:
                self._due_s = 0.0
            self.tick()
            time.sleep(LOOK_S / 2)
        self._look_for_the_dead()
        return self._victim is None and not self.trouble

    def release(self) -> None:
        """Let a frozen node go on, whatever else is the matter."""
        if self._victim is not None and self._harmed and self._fault is Fault.STOP:
            self._victim.process.send_signal(signal.SIGCONT)
            self._harmed = False

    def _strike(self, now_s: float) -> None:
        if not self._faults:
            return
        fault, victim, aimed = (
            self._chance.choice(self._faults),
            self._chance.choice(self._nodes),
            self._chance.random(),
        )
        lasts_s = self._chance.uniform(*LASTS_S[fault])
        if aimed < 0.5:
            leader = overview.leader_of(overview.ask_all([node.address for node in self._nodes], ASK_PATIENCE_S))
            victim = next((node for node in self._nodes if leader and node.address == leader.address), victim)
        self._victim, self._fault, self._harmed = victim, fault, True
        self._due_s = now_s + lasts_s
        self.done[fault] += 1
        if fault is Fault.STOP:
            victim.process.send_signal(signal.SIGSTOP)
        elif fault is Fault.RESTART:
            victim.process.terminate()
        else:
            victim.process.kill()
            victim.process.wait()

    def _mend(self, left: bool) -> None:
        victim = self._victim
        assert victim is not None
        self._harmed = False
        if self._fault is Fault.STOP:
            victim.process.send_signal(signal.SIGCONT)
            return
        if self._fault is Fault.RESTART and not left:
            self._say(f"{victim.name} was told to leave, and did not within {LEAVE_PATIENCE_S:g} s.")
            victim.process.kill()
            victim.process.wait()
        elif self._fault is Fault.RESTART and victim.process.returncode != 0:
            self._say(f"{victim.name} was told to leave, and ended {_how(victim)}: {victim.last_words()}")
        start_again(victim)

    def _look_for_the_dead(self) -> None:
        for node in self._nodes:
            harmed = node is self._victim and self._harmed and self._fault is not Fault.STOP
            if not harmed and node.process.poll() is not None:
                self._say(f"{node.name} ended by itself, {_how(node)}: {node.last_words()}")

    def _say(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble  # what came first says most


def _how(node: Child) -> str:
    status = node.process.returncode
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"


def _is_back(node: Child) -> bool:
    """Whether it answers, and knows a leader."""
    status = overview.ask(node.address, node.name, ASK_PATIENCE_S).status
    return status is not None and status.get("leader") is not None
