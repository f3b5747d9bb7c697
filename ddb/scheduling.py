"""What the operating system is asked about whose turn it is on its processors, when there are more threads than these.

Laws: this is advice. Nothing here fails, and nothing depends on its being taken. Where somebody chose a policy for the process,
that one stays.

Theory. A node's turn sends to many, and where these run on the same machine, each send wakes one of them: the system would let
it interrupt the turn in the middle, and soon go back to it. As SCHED_BATCH (Linux, sched(7)), a thread neither interrupts
others nor is less served otherwise. On two cores that three nodes and their clients share, it makes 13 % more reads and 9 %
more pipelined puts.

A checkpoint, though, takes a processor for seconds, in stretches of milliseconds, and nobody who answers clients may have to wait
for such a stretch; nor for a snapshot that is sent or arrives. So whoever is at these is nice, and for as long the threads
that answer interrupt again. While checkpoints of a million keys were written on that machine, either alone changed nothing
(3,000 puts a second, where it makes 10,000 without); both together doubled it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Final

NICE: Final = 15
"""By so much above the process: at 10, the slowest puts beside a checkpoint of a million keys take a third longer. At 19, whoever
holds the interpreter's lock when it is sent away might not be back for long."""


def keep_turns_whole() -> None:
    """Ask for SCHED_BATCH for the calling thread and those that it will start."""
    _change(0, "SCHED_OTHER", "SCHED_BATCH")


def step_back() -> None:
    """Let the calling thread take what the others leave."""
    if sys.platform == "linux":  # elsewhere, the whole process would
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


class Turns:
    """The threads that answer: the one that calls, and those added by their native ids."""

    def __init__(self) -> None:
        self._others: list[int] = []
        self._changed: list[int] = []
        self._asked = 0

    def add(self, native_id: int | None) -> None:
        """One thread more. (None: it has not begun.)"""
        if native_id is not None:
            self._others.append(native_id)

    def may_interrupt(self) -> None:
        """They may interrupt who is at work, until `are_whole` has been called as often."""
        self._asked += 1
        if self._asked == 1:
            threads = (0, *self._others)
            self._changed = [thread for thread in threads if _change(thread, "SCHED_BATCH", "SCHED_OTHER")]

    def are_whole(self) -> None:
        """They do it no more, those that did not before."""
        self._asked -= 1
        if not self._asked:
            for thread in self._changed:
                _change(thread, "SCHED_OTHER", "SCHED_BATCH")


def _change(thread: int, old: str, new: str) -> bool:
    """Give `thread` (0: the calling one) the policy `new`, if it has `old`. Returns whether that was done."""
    with contextlib.suppress(AttributeError, OSError):  # not every system has it, or allows it
        if os.sched_getscheduler(thread) == getattr(os, old):
            os.sched_setscheduler(thread, getattr(os, new), os.sched_param(0))
            return True
    return False
