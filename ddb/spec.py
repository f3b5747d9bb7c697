"""What a reply must say: the data's sequential specification, against which a history is held.

Laws:

* It shares no line with what it judges (`commands.py`, `kv.py`): a mistake made there is not made here again.
* It never blames what may be right. What no reply told (the revision of a write whose outcome is unknown) agrees with
  everything; what a reply leaves out is not asked.
* Everything is immutable but a command's working copy of the rows, so a state can be remembered and compared.

Theory. A *row* is what is known of a key, a *state* is all rows, and a *command* changes a working copy of them and
says what the reply must be. `agrees` holds what a client was told against that.

What nobody was told is nobody's mistake: a write without a reply has some revision, but only a lower bound of it
is known; versions are counted only where anybody was told one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

UNSEEN: Final = ""  # no JSON text is empty

Row = tuple[str, int, int, int | None]
"""value (JSON text with sorted names), rev, created, version (None: not counted, for nobody was told one). A revision
that nobody was told is `~n`, a negative number: it is higher than `n`, and that is all that's known of it."""

Rows = list[Row | None]
State = tuple[int, tuple[Row | None, ...]]
"""the lowest revision that the log can have reached, and a row (None: absent) for each key"""

Value = tuple[int, str | None]
"""the position of a row, and what is or was its value (None: absent)"""

Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a command is run with: its revision (negative: not told), whether versions are counted, and whether a
    condition that can't be known holds."""

    rev: int
    versions: bool
    choice: bool


class Command(Protocol):
    """A request in terms of rows. `writes` are the rows that it may change."""

    @property
    def writes(self) -> frozenset[int]:
        """The positions of the rows that the command may change."""
        ...

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """Change `rows`, and return the right reply; None where the data refuses the command."""
        ...


def is_integer(text: str) -> bool:
    """Whether a JSON text is that of an integer."""
    return text.removeprefix("-").isdigit()


def text_of(value: Any) -> str:
    """A JSON value as the one text that stands for it here."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


# -------------------------------------------------------------- conditions


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of an `if`; `wanted` is a number, a truth or, for a value, its JSON text."""

    position: int
    subject: str
    op: str
    wanted: Any

    def holds(self, rows: Rows) -> bool | None:
        """Whether it holds; None where that can't be known."""
        row = rows[self.position]
        if self.subject == "exists":
            return _compare(row is not None, self.op, self.wanted)
        if self.subject == "value":
            return self._value_holds(row)
        number = 0 if row is None else row[1] if self.subject == "rev" else row[3]
        return None if number is None or number < 0 else _compare(number, self.op, self.wanted)

    def _value_holds(self, row: Row | None) -> bool:
        if row is None or row[0] == UNSEEN:
            return self.op == "!="
        if self.op in ("=", "!="):
            return (row[0] == self.wanted or same(json.loads(row[0]), json.loads(self.wanted))) is (self.op == "=")
        held, wanted = json.loads(row[0]), json.loads(self.wanted)
        ordered = (isinstance(held, str) and isinstance(wanted, str)) or (_is_number(held) and _is_number(wanted))
        return ordered and _compare(held, self.op, wanted)


def _all_hold(conditions: Sequence[Condition], rows: Rows) -> bool | None:
    known: bool | None = True
    for condition in conditions:
        held = condition.holds(rows)
        if held is False:
            return False
        known = known and held
    return known


def _compare(held: Any, op: str, wanted: Any) -> bool:
    if op == "=":
        return bool(held == wanted)
    if op == "!=":
        return bool(held != wanted)
    return bool(held < wanted) if op == "<" else bool(held > wanted)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal as docs/protocol.md says: 1 is 1.0, true is not 1, names have no order."""
    if _is_number(one) and _is_number(other):
        return bool(one == other)
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    return bool(one == other)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Put:
    """`put`, with or without conditions; `cas` too, which is a put if the value is the expected one."""

    position: int
    value: str
    conditions: tuple[Condition, ...] | None
    writes: frozenset[int]

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        old = rows[self.position]
        if self.conditions is not None and not _decided(self.conditions, rows, stamp):
            return _not_applied(old)
        row = rows[self.position] = _written(old, self.value, stamp)
        return {"applied": True, "rev": stamp.rev, "version": row[3]}


@dataclass(frozen=True, slots=True)
class Delete:
    """`delete`, with or without conditions."""

    position: int
    conditions: tuple[Condition, ...] | None
    writes: frozenset[int]

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        old = rows[self.position]
        if self.conditions is not None and not _decided(self.conditions, rows, stamp):
            return {**_not_applied(old), "deleted": 0}
        rows[self.position] = None
        return {"applied": True, "deleted": int(old is not None), "rev": stamp.rev}


@dataclass(frozen=True, slots=True)
class Incr:
    """`incr`: an absent key counts as 0, and what is no integer refuses."""

    position: int
    by: int
    writes: frozenset[int]

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        old = rows[self.position]
        text = "0" if old is None else old[0]
        if not is_integer(text):
            return None
        row = rows[self.position] = _written(old, str(int(text) + self.by), stamp)
        return {"value": row[0], "rev": stamp.rev, "version": row[3]}


@dataclass(frozen=True, slots=True)
class Get:
    """`get`."""

    position: int
    writes: frozenset[int] = frozenset()

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        row = rows[self.position]
        if row is None:
            return {"found": False, "value": "null", "rev": 0, "created": 0, "version": 0}
        return {"found": True, "value": row[0], "rev": row[1], "created": row[2], "version": row[3]}


@dataclass(frozen=True, slots=True)
class Range:
    """`scan` and `count`: the keys at `positions`, in the order asked for. What a scan left out, it may: `more`."""

    keys: tuple[str, ...]
    positions: tuple[int, ...]
    writes: frozenset[int] = frozenset()

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        items = [
            {"key": key, "value": row[0], "rev": row[1], "created": row[2], "version": row[3]}
            for key, position in zip(self.keys, self.positions, strict=True)
            if (row := rows[position]) is not None
        ]
        return {"items": items, "count": len(items)}


@dataclass(frozen=True, slots=True)
class Batch:
    """`batch`: puts and deletes, together."""

    commands: tuple[Command, ...]
    writes: frozenset[int]

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        for command in self.commands:
            command.run(rows, stamp)
        return {"rev": stamp.rev}


@dataclass(frozen=True, slots=True)
class Txn:
    """`txn`: one list of commands or the other, all of it or nothing."""

    conditions: tuple[Condition, ...]
    then: tuple[Command, ...]
    otherwise: tuple[Command, ...]
    writes: frozenset[int]

    def run(self, rows: Rows, stamp: Stamp) -> Reply | None:
        """See Command."""
        succeeded = _decided(self.conditions, rows, stamp)
        results = []
        for command in self.then if succeeded else self.otherwise:
            result = command.run(rows, stamp)
            if result is None:
                return None
            results.append(result)
        return {"succeeded": succeeded, "results": results, "rev": stamp.rev}


def _decided(conditions: Sequence[Condition], rows: Rows, stamp: Stamp) -> bool:
    held = _all_hold(conditions, rows)
    return stamp.choice if held is None else held


def _not_applied(old: Row | None) -> Reply:
    if old is None:
        return {"applied": False, "found": False, "value": "null", "rev": 0}
    return {"applied": False, "found": True, "value": old[0], "rev": old[1]}


def _written(old: Row | None, value: str, stamp: Stamp) -> Row:
    if old is None:
        return value, stamp.rev, stamp.rev, 1 if stamp.versions else None
    return value, stamp.rev, old[2], None if old[3] is None else old[3] + 1


def agrees(right: Reply, told: Mapping[str, Any]) -> bool:
    """Whether what was `told` can be what is `right`: in each field that was told, and that is known."""
    for name, value in told.items():
        if name == "more":
            continue
        if name == "results":
            if len(value) != len(right["results"]) or not all(map(agrees, right["results"], value)):
                return False
        elif name == "items":
            if not _items_agree(right["items"], value, told["more"]):
                return False
        else:
            if name not in right:
                return False
            expected = right[name]
            if expected != value and expected is not None and not _is_later(value, expected):
                return False
    return True


def _is_later(told: Any, unknown: Any) -> bool:
    """Whether `unknown` is a revision that nobody was told, and may be the one that was `told` here."""
    return isinstance(unknown, int) and unknown < 0 and isinstance(told, int) and told > ~unknown


def _items_agree(right: list[Reply], told: Sequence[Mapping[str, Any]], more: bool | None) -> bool:
    if len(told) > len(right) or (more is not None and more is not (len(told) < len(right))):
        return False
    return all(map(agrees, right, told))
