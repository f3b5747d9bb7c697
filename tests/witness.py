"""Clients that crowd on a few keys, and whose whole history must be linearizable (ddb/checker.py).

Laws:

* Every attempt is an operation of its own, with the times at which it was called and at which its reply was there.
  Nothing is tried again under the same name.
* What got no reply stays unknown; what was never sent is no operation.

The witnesses speak frames by themselves, like the harness. Where tests/load.py proves that nothing acknowledged is lost,
they prove that what everybody was told makes one story.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ddb.checker import check
from ddb.history import Operation, to_lines
from tests.harness import NodeServer
from tests.load import Talker

REPLY_TIMEOUT_S = 2.0
PAUSE_S = 0.004  # between two operations of a client: enough of them, and a history that is judged in seconds
AGE_S = 2.0  # then the keys are others: a key's history stays short, however many outcomes are unknown

Request = dict[str, Any]


class Witnesses:
    """`count` clients of `nodes`, whose requests are drawn from `seed`. A context manager; `check` comes after it."""

    def __init__(self, nodes: list[NodeServer], seed: int, count: int = 5, keys: int = 2) -> None:
        self.history: list[Operation] = []
        self._nodes = nodes
        self._keys = keys
        self._stopping = threading.Event()
        self._began_s = time.monotonic()
        self._prefix = f"witness{time.monotonic_ns()}"  # a history begins with no keys
        lots = [random.Random(f"{seed}/{number}") for number in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(n, lot), daemon=True) for n, lot in enumerate(lots)]

    def __enter__(self) -> Witnesses:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def check(self, evidence: Path) -> None:
        """Judge the history; where it can't be explained it is kept in the file `evidence`."""
        verdict = check(self.history)
        if not verdict.ok:
            evidence.write_text("".join(line + "\n" for line in to_lines(self.history)))
        assert verdict.ok, f"{verdict} The history is in {evidence}."
        assert any(operation.reply for operation in self.history), "somebody was told something"

    def _run(self, number: int, lot: random.Random) -> None:
        talker = Talker(self._nodes, number)
        count = 0
        while not self._stopping.is_set():
            count += 1
            request = self._draw(lot, f"{number}/{count}")
            called = time.monotonic()
            reply, sent, _ = talker.ask(REPLY_TIMEOUT_S, **request)
            returned = time.monotonic()
            if reply is not None:
                self.history.append(Operation(f"c{number}", request, called, returned, reply))
                if reply["ok"] is not True:
                    talker.move_on()
            elif sent:
                self.history.append(Operation(f"c{number}", request, called))
            time.sleep(PAUSE_S)
        talker.close()

    def _draw(self, lot: random.Random, value: str) -> Request:
        """A request on one of the keys of this time, or on two of them at once; every value is written once."""
        age = int((time.monotonic() - self._began_s) / AGE_S)
        one = f"{self._prefix}/{age}/{lot.randrange(self._keys)}"
        pair = [f"{self._prefix}/{age}/pair{n}" for n in range(2)]
        kinds: dict[Callable[[], Request], int] = {
            lambda: {"op": "get", "key": one}: 8,
            lambda: {"op": "put", "key": one, "value": value}: 4,
            lambda: {"op": "put", "key": one, "value": value, "if": {"exists": lot.random() < 0.5}}: 1,
            lambda: {"op": "delete", "key": one}: 1,
            lambda: {"op": "incr", "key": f"{self._prefix}/{age}/count"}: 1,
            lambda: {"op": "txn", "then": [{"op": "put", "key": key, "value": value} for key in pair]}: 1,
            lambda: {"op": "txn", "then": [{"op": "get", "key": key} for key in pair]}: 1,
        }
        (kind,) = lot.choices(list(kinds), list(kinds.values()))
        return kind()
