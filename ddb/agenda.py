"""Virtual time: what happens when, in one thread.

Laws: nothing happens but what was put here; two things due at the same time happen in the order in which they were
put; so one seed is one history. Time costs nothing: it jumps from one event to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Protocol


class Actor(Protocol):
    """Whose event it is: somebody that can die, be stopped, and begin anew."""

    life: int  # counts its beginnings; what was put down for an earlier life does not happen

    def happens(self, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Call `fn(*args)` as this actor's own doing, now or when it can."""


class Agenda:
    """The events to come. `now` is in virtual seconds, `steps` counts what has begun to
    happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Actor | None, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, when: float, actor: Actor | None, fn: Callable[..., None], *args: Any) -> None:
        """Have `fn(*args)` happen at `when`, to `actor` if it still lives the same life then, or to nobody in particular."""
        self._number += 1
        heappush(self._heap, (when, self._number, actor, 0 if actor is None else actor.life, fn, args))

    def after(self, delay_s: float, actor: Actor | None, fn: Callable[..., None], *args: Any) -> None:
        """The same, `delay_s` from now."""
        self._number += 1
        life = 0 if actor is None else actor.life
        heappush(self._heap, (self.now + delay_s, self._number, actor, life, fn, args))

    def run(self, until: float, steps: int) -> bool:
        """Let what is due before `until` happen, `steps` events at most; returns whether there were so many."""
        heap = self._heap
        while steps > 0:
            if not heap or heap[0][0] >= until:
                self.now = max(self.now, until)
                return False
            when, _, actor, life, fn, args = heappop(heap)
            if actor is None:
                self.now = when
                self.steps += 1
                steps -= 1
                fn(*args)
            elif actor.life == life:
                self.now = when
                self.steps += 1
                steps -= 1
                actor.happens(fn, args)
        return True

    def step(self, until: float) -> bool:
        """Let the next event happen, if it is due before `until`; returns whether there was one."""
        return self.run(until, 1)
