"""Work in forked processes of its own, a few at a time, so that nothing that is planted can leak.

Laws: a job begins with whatever is planted when it is added to a free place, or with its own mutant; its process is
ended and waited for, whatever it does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests.mutants.planting import Mutant, Rotten, planted


@dataclass(slots=True)
class _Running:
    key: Hashable
    process: BaseProcess
    began_s: float


class Forks:
    """Jobs by key. `result(key)` is what the job returned, or the exception that it raised, as text; `width` of them run at
    a time, each for at most `patience_s`. Raises Rotten where the mutant does not fit."""

    def __init__(self, width: int = 2, patience_s: float = 60.0) -> None:
        self.took_s: dict[Hashable, float] = {}
        self._width = width
        self._patience_s = patience_s
        self._waiting: deque[tuple[Hashable, Callable[[], Any], Mutant | None]] = deque()
        self._running: dict[Connection, _Running] = {}
        self._results: dict[Hashable, Any] = {}

    def add(self, key: Hashable, work: Callable[[], Any], bug: Mutant | None = None) -> None:
        """Have `work()` done in a process where `bug` is planted."""
        self._waiting.append((key, work, bug))

    def result(self, key: Hashable) -> Any:
        """Wait for the job `key`."""
        while key not in self._results:
            self._fill()
            assert self._running or key in self._results, f"there is no job {key!r}"
            for receiver in wait(list(self._running), timeout=0.5):
                assert isinstance(receiver, Connection)
                self._take(receiver)
            for receiver, one in list(self._running.items()):
                if time.monotonic() - one.began_s > self._patience_s:
                    self._end(receiver, f"it does not end within {self._patience_s:g} s")
        result = self._results[key]
        if isinstance(result, Rotten):
            raise result
        return result

    def close(self) -> None:
        """End what still runs."""
        self._waiting.clear()
        for receiver in list(self._running):
            self._end(receiver, "given up")

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._width:
            key, work, bug = self._waiting.popleft()
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=_work, args=(work, sender))
            try:
                with planted(bug) if bug is not None else nullcontext():  # the child inherits it
                    process.start()
            except Rotten as error:
                self._results[key] = error
                receiver.close()
                sender.close()
                continue
            sender.close()
            self._running[receiver] = _Running(key, process, time.monotonic())

    def _take(self, receiver: Connection) -> None:
        try:
            self._end(receiver, receiver.recv())
        except EOFError:
            self._end(receiver, "its process died")

    def _end(self, receiver: Connection, result: Any) -> None:
        one = self._running.pop(receiver)
        self._results[one.key] = result
        self.took_s[one.key] = time.monotonic() - one.began_s
        one.process.kill()
        one.process.join()
        receiver.close()


def _work(work: Callable[[], Any], sender: Connection) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        result = work()
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"[:1000]
    sender.send(result)
