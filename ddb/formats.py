"""How rows are shown: a table for people, CSV for spreadsheets, JSON and raw values for programs.

Laws:

1. Nothing is lost or taken for something else: in a table and in CSV a text stands as it is where it is printable, and
   every other value is JSON. In CSV a text of several lines is quoted by RFC 4180, as it is.
2. Raw is the value and nothing else: a text's UTF-8, bytes as they are, JSON for the rest.
3. Rows come page by page, and no more than one page is held: a column is as wide as the widest cell so far.
"""

from __future__ import annotations

import base64
import binascii
import csv
import enum
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final

from ddb import wire

_DIM: Final = "\x1b[2m"
_PLAIN: Final = "\x1b[0m"
ABSENT: Final[Any] = object()  # in the place of a value that isn't there; None is the value null
CELL_COLUMNS_MAX: Final = 60  # wider cells don't push what follows out of sight on other rows


class Format(enum.Enum):
    """What `-o` may ask for."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    RAW = "raw"


class Sheet:
    """Rows under one heading, shown page by page.

    `columns` are the names over them; `raw` is the one that counts where `form` is raw; `colour` dims the heading of
    a table.
    """

    def __init__(self, form: Format, columns: Sequence[str], raw: str, colour: bool = False) -> None:
        self.form = form
        self.columns = columns
        self._raw = columns.index(raw)
        self._colour = colour
        self._widths = [len(name) for name in columns]
        self._headed = False

    def page(self, rows: Iterable[Sequence[Any]]) -> bytes:
        """The next rows, and the heading before the first of them."""
        match self.form:
            case Format.TABLE:
                text = self._table(list(rows))
            case Format.CSV:
                text = self._csv(rows)
            case Format.JSON:
                objects = ({n: v for n, v in zip(self.columns, row, strict=True) if v is not ABSENT} for row in rows)
                return b"".join(wire.encode(one) + b"\n" for one in objects)
            case Format.RAW:
                return b"".join(raw_bytes(row[self._raw]) + b"\n" for row in rows)
        self._headed = True
        return text.encode("utf-8", "backslashreplace")

    def _table(self, rows: list[Sequence[Any]]) -> str:
        cells = [[_cell(value) for value in row] for row in rows]
        for row in cells:
            wide = [max(width, min(columns(cell), CELL_COLUMNS_MAX)) for width, cell in zip(self._widths, row)]
            self._widths = wide
        to_right = [all(_is_number(row[n]) for row in rows) and bool(rows) for n in range(len(self.columns))]
        lines = [] if self._headed else [self._line([name.upper() for name in self.columns], to_right)]
        if lines and self._colour:
            lines = [f"{_DIM}{lines[0]}{_PLAIN}"]
        lines += [self._line(row, to_right) for row in cells]
        return "".join(f"{line}\n" for line in lines)

    def _line(self, cells: Sequence[str], to_right: Sequence[bool]) -> str:
        padded = []
        for cell, width, right in zip(cells, self._widths, to_right, strict=True):
            blank = " " * (width - columns(cell))
            padded.append(blank + cell if right else cell + blank)
        return "  ".join(padded).rstrip()

    def _csv(self, rows: Iterable[Sequence[Any]]) -> str:
        lines = _Lines()
        writer = csv.writer(lines, lineterminator="\r\n")  # RFC 4180 §2.1
        if not self._headed:
            writer.writerow(self.columns)
        writer.writerows([_csv_cell(value) for value in row] for row in rows)
        return "".join(lines)


class _Lines(list[str]):
    """What csv wants to write to."""

    write = list.append


def one_line(value: Any) -> str:
    """A value for a line of its own: a text that would break the line, like anything that is no text, as JSON."""
    return value if isinstance(value, str) and value.isprintable() else wire.encode(value).decode()


def raw_bytes(value: Any) -> bytes:
    """A value and nothing else (law 2)."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace")
    held = held_bytes(value)
    return wire.encode(value) if held is None else held


def held_bytes(value: Any) -> bytes | None:
    """The bytes that the object `{"$b64": …}` stands for, None where `value` is no such object."""
    if isinstance(value, dict) and set(value) == {"$b64"} and isinstance(value["$b64"], str):
        try:
            return base64.b64decode(value["$b64"], validate=True)
        except (binascii.Error, ValueError):
            return None
    return None


def columns(text: str) -> int:
    """How many columns of a terminal `text` takes: East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(_columns_of(character) for character in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _is_number(value: Any) -> bool:
    return value is ABSENT or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    return "-" if value is ABSENT else one_line(value)


def _csv_cell(value: Any) -> str:
    if value is ABSENT:
        return ""
    return value if isinstance(value, str) else wire.encode(value).decode()
