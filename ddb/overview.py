"""Every member at one glance: ask all of them at once, and lay the answers out as a table.

A node that is dead, frozen or cut off must not hide the others or delay them, so each is asked by a thread of its own
with its own short patience; the threads end with the question.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TextIO

from ddb.client import connect
from ddb.errors import DdbError

PATIENCE_S: Final = 1.0
ASKED_AT_ONCE_MAX: Final = 32

_BOLD_GREEN: Final = "\x1b[1;32m"
_RED: Final = "\x1b[31m"
_DIM: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class View:
    """What one member answered (`status`), or why it did not (`error`)."""

    address: str
    name: str
    status: dict[str, Any] | None
    error: DdbError | None = None

    @property
    def leads(self) -> bool:
        """Whether it says that it is the leader."""
        return self.status is not None and self.status.get("role") == "leader"


def ask(address: str, name: str = "?", timeout_s: float = PATIENCE_S) -> View:
    """The status of the one node at `address`. `name` is used where it does not answer. Never raises a DdbError."""
    with connect(address, discover=False) as client:
        try:
            status = client.status(timeout_s=timeout_s)
        except DdbError as error:
            return View(address, name, None, error)
    return View(address, str(status.get("node", name)), status)


def ask_all(servers: Sequence[str], timeout_s: float = PATIENCE_S) -> list[View]:
    """The status of every member of the cluster that any of `servers` belongs to, sorted by name.

    Asks `servers`, then whoever these name as members. A server that belongs to no cluster yet counts as well.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE_MAX, "ask") as pool:
        first = list(pool.map(lambda address: ask(address, timeout_s=timeout_s), servers))
        names: dict[str, str] = {}
        for view in first:
            members = (view.status or {}).get("members") or ()
            names.update({m["address"]: m["name"] for m in members})
        known = {view.address for view in first if view.status is not None or view.address not in names}
        others = [address for address in names if address not in known]
        rest = list(pool.map(lambda address: ask(address, names[address], timeout_s), others))
    answered = [view for view in first if view.address in known] + rest
    one_of_each = {(v.status or {}).get("id", v.address): v for v in answered}  # a node may be known by two addresses
    return sorted(one_of_each.values(), key=lambda v: (v.name, v.address))


def leader_of(views: Sequence[View]) -> View | None:
    """The one that leads in the highest term, or None: a deposed leader that has not heard of it may still claim to."""
    leaders = [v for v in views if v.leads and v.status is not None]
    return max(leaders, key=lambda v: v.status["term"] if v.status else 0, default=None)


def status_table(views: Sequence[View], colour: bool = False) -> list[str]:
    """One line for each member under a heading. Lag is how many committed entries it has still to apply."""
    leader = leader_of(views)
    committed = leader.status["log"]["commit"] if leader and leader.status else None
    rows = [["NAME", "ROLE", "TERM", "ADDRESS", "LAST", "COMMIT", "APPLIED", "LAG"]]
    for view in views:
        if view.status is None:
            rows.append([view.name, paint("unreachable", _RED, colour), "-", view.address, "-", "-", "-", "-"])
            continue
        role, log = str(view.status.get("role", "?")), view.status.get("log") or {}
        lag = "-" if committed is None else str(max(0, committed - log.get("applied", 0)))
        shown = paint(role, _BOLD_GREEN if view is leader else "", colour)
        numbers = [str(log.get(name, "-")) for name in ("last", "commit", "applied")]
        rows.append([view.name, shown, str(view.status.get("term", "-")), view.address, *numbers, lag])
    return aligned(rows, right={2, 4, 5, 6, 7}, colour=colour)


def aligned(rows: Sequence[Sequence[str]], right: set[int] | None = None, colour: bool = False) -> list[str]:
    """`rows` as lines with their columns under one another; the columns in `right` to the right; the first row is
    the heading."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for position, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (width - _width(cell))
            cells.append(blank + cell if right and position in right else cell + blank)
        lines.append("  ".join(cells).rstrip())
    return [paint(lines[0], _DIM, colour), *lines[1:]]


def paint(text: str, style: str, colour: bool) -> str:
    """`text` in a terminal's `style` where `colour` is wanted."""
    return f"{style}{text}{_PLAIN}" if colour and style else text


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal of a person who has not said NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _width(cell: str) -> int:
    return len(_ESCAPES.sub("", cell))
