"""Calls in the future, kept by a thread of their own.

Laws: the thread touches nothing but its heap; a due timer's `fire` is *posted* to the thread that owns all state
(loop.py). So a timer that was cancelled there does not fire any more, however late it was.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Timer:
    """A call in the future. `cancel` it on the loop's thread, and it surely does not happen any more."""

    __slots__ = ("_thread", "due_s", "fn", "interval_s", "posted")

    def __init__(self, thread: TimerThread, due_s: float, fn: Callable[[], None], interval_s: float | None) -> None:
        self._thread = thread
        self.due_s = due_s
        self.fn: Callable[[], None] | None = fn
        self.interval_s = interval_s
        self.posted = False  # to the loop's thread, which has not come to it yet

    def cancel(self) -> None:
        """Forget the call. May be called at any time, more than once."""
        if self.fn is not None:
            self.fn = None
            self._thread.note_cancelled()

    def fire(self) -> None:
        """Run on the loop's thread, when due."""
        self.posted = False
        if self.fn is not None:
            self.fn()


class TimerThread:
    """Keeps the timers in a heap and posts the due ones; it touches nothing else."""

    def __init__(self, post: Callable[..., None]) -> None:
        self._post = post
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = itertools.count()
        self._cancelled = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, timer: Timer) -> None:
        """Keep `timer` until it is due. Starts the thread when it is the first."""
        with self._changed:
            heapq.heappush(self._heap, (timer.due_s, next(self._number), timer))
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="timers", daemon=True)
                self._thread.start()
            elif self._heap[0][2] is timer:
                self._changed.notify()

    def note_cancelled(self) -> None:
        """A timer was cancelled. The heap is cleaned when most of it is dead."""
        with self._changed:
            self._cancelled += 1
            if self._cancelled > 64 and self._cancelled > len(self._heap) // 2:
                self._heap = [entry for entry in self._heap if entry[2].fn is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def close(self) -> None:
        """End the thread and forget all timers."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                while self._heap and self._heap[0][0] <= now_s:
                    self._ring(heapq.heappop(self._heap)[2], now_s)
                self._changed.wait(self._heap[0][0] - now_s if self._heap else None)

    def _ring(self, timer: Timer, now_s: float) -> None:
        """Post what is due. A repeating timer is not posted again before it was worked off: a process that was stopped
        for a minute finds one call waiting, not a minute's worth. It is armed again here: were the loop's thread to do
        that, it would wake this one each time, and an idle node would take a third more of the processor."""
        if timer.fn is None:
            return
        if not timer.posted:
            timer.posted = True
            self._post(timer.fire)
        if timer.interval_s is not None:
            timer.due_s = max(timer.due_s + timer.interval_s, now_s)
            heapq.heappush(self._heap, (timer.due_s, next(self._number), timer))
