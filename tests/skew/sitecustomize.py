"""A process whose clocks go wrong: with this directory on PYTHONPATH, Python imports this file before anything else.

DDB_TEST_CLOCK_FILE names a file that holds two numbers, read again every few milliseconds: how many seconds the wall clock
is off, and at what rate time passes (1.5: half as fast again). The wall clock jumps when the first changes; the steady
clock never does, and never goes back. What waits inside the kernel waits by the kernel's clock, as ever.
"""

from __future__ import annotations

import os
import threading
import time

READ_EVERY_S = 0.02

_path = os.environ["DDB_TEST_CLOCK_FILE"]
_monotonic, _time = time.monotonic, time.time


class Clocks:
    """What the clocks showed when they were last set, and how they go on from there."""

    def __init__(self) -> None:
        now_s = _monotonic()
        self._set = (now_s, now_s, _time(), 0.0, 1.0)  # real, steady, wall, off, rate: one tuple, changed in one go
        self._setting = threading.Lock()
        self._read_at_s = 0.0

    def _look(self) -> tuple[float, float, float]:
        """How much time has passed since the clocks were set; what the steady and the wall clock showed then."""
        now_s = _monotonic()
        if now_s - self._read_at_s > READ_EVERY_S and self._setting.acquire(blocking=False):
            self._read_at_s = now_s
            real_s, steady_s, wall_s, _, rate = self._set
            passed_s = (now_s - real_s) * rate
            self._set = (now_s, steady_s + passed_s, wall_s + passed_s, *self._ordered())
            self._setting.release()
        real_s, steady_s, wall_s, off_s, rate = self._set
        return (now_s - real_s) * rate, steady_s, wall_s + off_s

    def _ordered(self) -> tuple[float, float]:
        try:
            with open(_path, encoding="ascii") as file:
                off_s, rate = (float(word) for word in file.read().split())
            return off_s, rate
        except (OSError, ValueError):
            return self._set[3:]  # there is no such order

    def monotonic(self) -> float:
        """The steady clock."""
        passed_s, steady_s, _ = self._look()
        return steady_s + passed_s

    def time(self) -> float:
        """The wall clock."""
        passed_s, _, wall_s = self._look()
        return wall_s + passed_s


_clocks = Clocks()
time.monotonic = _clocks.monotonic
time.monotonic_ns = lambda: int(_clocks.monotonic() * 1e9)
time.time = _clocks.time
time.time_ns = lambda: int(_clocks.time() * 1e9)
