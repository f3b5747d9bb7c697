"""Whether the revisions that clients were told can be true, whatever the order of the operations.

Laws: only what was told is judged; one contradiction is reported for each rule and operation.

Theory. A revision is an index in the one log of all keys, so revisions say more than a check of each key by itself can
see. Three rules follow from that, each checked in one pass:

* No two writes have the same revision.
* Whatever was called after somebody had been told a revision has a higher one if it writes, and sees at least that one
  if it reads the state as a whole (scan, count).
* A key's value, version and creation at a revision are the same for all who were told them, stale readers included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddb.history import Operation, Outcome

_WRITES = frozenset({"put", "cas", "delete", "incr", "batch", "txn"})
_WHOLE = frozenset({"scan", "count"})


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two operations that were told what can't both be true, and the rule that says so."""

    rule: str
    one: Operation
    other: Operation

    def __str__(self) -> str:
        return f"{self.rule}: {self.one}, but {self.other}."


def contradictions(history: Sequence[Operation]) -> tuple[Contradiction, ...]:
    """What the revisions told in `history` contradict; nothing where they can be true."""
    done = [operation for operation in history if operation.outcome is Outcome.DONE]
    return (*_shared(done), *_against_the_clock(done), *_different_facts(done))


def _shared(done: Sequence[Operation]) -> Iterator[Contradiction]:
    writers: dict[int, Operation] = {}
    for operation in done:
        rev = written_at(operation)
        if rev is not None and writers.setdefault(rev, operation) is not operation:
            yield Contradiction(f"two writes have revision {rev}", writers[rev], operation)


def _against_the_clock(done: Sequence[Operation]) -> Iterator[Contradiction]:
    told = [(operation.returned, _rev(operation), operation) for operation in done]
    returns = sorted(((at, rev, op) for at, rev, op in told if at is not None and rev is not None), key=lambda t: t[0])
    highest: tuple[int, Operation] | None = None
    position = 0
    for operation in sorted(done, key=lambda operation: operation.called):
        while position < len(returns) and returns[position][0] < operation.called:
            _, rev, earlier = returns[position]
            if highest is None or rev > highest[0]:
                highest = rev, earlier
            position += 1
        if highest is None:
            continue
        written, seen = written_at(operation), _whole_seen_at(operation)
        if written is not None and written <= highest[0]:
            yield Contradiction("a later write has no higher revision", highest[1], operation)
        elif seen is not None and seen < highest[0]:
            yield Contradiction("a later read saw an older state", highest[1], operation)


def _different_facts(done: Sequence[Operation]) -> Iterator[Contradiction]:
    known: dict[tuple[str, int, str], tuple[Any, Operation]] = {}
    for operation in done:
        for key, rev, name, value in _facts(operation):
            first, told_to = known.setdefault((key, rev, name), (value, operation))
            if first != value or isinstance(first, bool) is not isinstance(value, bool):
                yield Contradiction(f"at revision {rev}, {key} has two answers to its {name}", told_to, operation)
                break


def _facts(operation: Operation) -> Iterator[tuple[str, int, str, Any]]:
    """Key, revision, the name of a field, and its value, for all that the operation was told of rows."""
    request, reply = operation.request, operation.reply or {}
    op = request.get("op")
    rows: Sequence[Mapping[str, Any]] = ()
    if op == "get" or reply.get("applied") is False:
        rows = [{**reply, "key": request.get("key")}] if reply.get("found", True) else []
    elif op in ("put", "cas"):
        rows = [{**reply, "key": request.get("key"), "value": request.get("value")}]
    elif op == "incr":
        rows = [{**reply, "key": request.get("key")}]
    elif op == "scan":
        rows = reply.get("items", ())
    for row in rows:
        if isinstance(row.get("rev"), int):
            for name in ("value", "version", "created"):
                if name in row:
                    yield row["key"], row["rev"], name, row[name]


def _rev(operation: Operation) -> int | None:
    rev = (operation.reply or {}).get("rev")
    return rev if isinstance(rev, int) else None


def written_at(operation: Operation) -> int | None:
    """The revision that the operation, if it is a write and done, was told to have; None where it was told none."""
    applied = (operation.reply or {}).get("applied", True)
    return (
        _rev(operation)
        if applied and operation.outcome is Outcome.DONE and operation.request.get("op") in _WRITES
        else None
    )


def _whole_seen_at(operation: Operation) -> int | None:
    """The revision of the state that a linearizable scan or count saw."""
    request = operation.request
    linearizable = request.get("read", "linearizable") == "linearizable"
    return _rev(operation) if linearizable and request.get("op") in _WHOLE else None
