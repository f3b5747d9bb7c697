"""How rows are shown: `ddb/formats.py`."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddb.formats import ABSENT, Format, Sheet, columns, held_bytes, raw_bytes

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]))


def shown(form: Format, *pages: list[list[Any]], names: tuple[str, ...] = ("key", "value", "rev")) -> str:
    sheet = Sheet(form, names, "value")
    return b"".join(sheet.page(page) for page in pages).decode()


def test_a_table_is_aligned_and_numbers_stand_to_the_right() -> None:
    assert shown(Format.TABLE, [["a", "Oslo", 7], ["long key", {"n": 1}, 1234]]) == (
        "KEY       VALUE     REV\n"
        "a         Oslo        7\n"
        'long key  {"n":1}  1234\n'
    )  # fmt: skip


def test_a_later_page_goes_on_in_the_same_columns_without_a_heading() -> None:
    assert (
        shown(Format.TABLE, [["aaaa", "x", 1]], [["b", "y", 2]])
        == "KEY   VALUE  REV\naaaa  x        1\nb     y        2\n"
    )


def test_wide_and_combining_characters_are_measured_as_a_terminal_shows_them() -> None:
    assert [columns(text) for text in ("ab", "日本", "e\u0301", "ø")] == [2, 4, 1, 1]
    lines = shown(Format.TABLE, [["日本", "x", 1], ["ab", "y", 2]]).splitlines()
    assert lines[1].startswith("日本  x") and lines[2].startswith("ab    y")


def test_what_is_not_there_is_told_apart_from_null() -> None:
    assert shown(Format.TABLE, [["a", ABSENT, 1], ["b", None, 2]]).splitlines()[1:] == [
        "a    -        1",
        "b    null     2",
    ]
    assert shown(Format.CSV, [["a", ABSENT, 1], ["b", None, 2]]).splitlines()[1:] == ["a,,1", "b,null,2"]
    assert [json.loads(line) for line in shown(Format.JSON, [["a", ABSENT, 1], ["b", None, 2]]).splitlines()] == [
        {"key": "a", "rev": 1}, {"key": "b", "value": None, "rev": 2},
    ]  # fmt: skip


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3)))
def test_a_csv_reader_gets_back_every_text(rows: list[list[str]]) -> None:
    read = list(csv.reader(io.StringIO(shown(Format.CSV, rows), newline="")))
    assert read == [["key", "value", "rev"], *rows]


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3)))
def test_a_table_has_a_line_for_every_row(rows: list[list[str]]) -> None:
    assert len(shown(Format.TABLE, rows).split("\n")) == len(rows) + 2


@pytest.mark.parametrize(
    ("value", "raw"),
    [("text", b"text"), ("", b""), ({"$b64": "AP8="}, b"\x00\xff"), ({"$b64": "no"}, b'{"$b64":"no"}'), (None, b"null"),
     ([1, "ø"], '[1,"ø"]'.encode()), ("two\nlines", b"two\nlines")],
)  # fmt: skip
def test_raw_is_the_value_and_nothing_else(value: Any, raw: bytes) -> None:
    assert raw_bytes(value) == raw


def test_only_whole_base64_counts_as_bytes() -> None:
    assert (
        held_bytes({"$b64": "AP8=", "more": 1}) is None and held_bytes({"$b64": 5}) is None and held_bytes("x") is None
    )
