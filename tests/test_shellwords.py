"""How a line typed into the shell falls into words: `ddb/shellwords.py`."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddb.shellwords import complete, in_one_line, quoted, words

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def texts(line: str) -> list[str]:
    return [word.text for word in words(line)]


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_a_quoted_text_is_one_word_and_itself(given_texts: list[str]) -> None:
    line = "put " + " ".join(map(quoted, given_texts))
    assert complete(line)
    assert texts(line)[1:] == given_texts
    assert texts("put " + " ".join(quoted(text, '"') for text in given_texts))[1:] == given_texts


@given(st.lists(st.text("abc'\"\\ \t", max_size=8), max_size=4))
def test_words_are_those_of_a_posix_shell(parts: list[str]) -> None:
    line = "x" + " ".join(parts)
    try:
        expected = shlex.split(line)
    except ValueError:
        assert not complete(line)
    else:
        assert complete(line)
        assert texts(line) == expected


@given(st.dictionaries(TEXTS, JSON, min_size=1, max_size=3), st.sampled_from([None, 1]))
def test_json_needs_no_quotes_and_may_take_several_lines(value: dict[str, object], indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert texts(f"put k {text} -t json") == ["put", "k", text, "-t", "json"]
    kept = in_one_line(f"put k {text} -t json")
    assert kept is not None and "\n" not in kept
    assert json.loads(texts(kept)[2]) == value


@given(st.dictionaries(TEXTS, JSON, min_size=1, max_size=3), st.data())
def test_json_that_is_cut_anywhere_waits_for_its_end(value: dict[str, object], data: st.DataObject) -> None:
    text = json.dumps(value)
    cut = data.draw(st.integers(1, len(text) - 1))
    assert not complete(f"put k {text[:cut]}")


@pytest.mark.parametrize("line", ["put 'a", 'put "a', "put a\\", 'put {"a": 1', 'put [1, "]"', "put {"])
def test_what_is_open_is_not_complete(line: str) -> None:
    assert not complete(line)


def test_a_command_of_the_shell_keeps_its_backslash() -> None:
    assert texts("\\watch 2 get a\\ b") == ["\\watch", "2", "get", "a b"]
    assert texts("get \\watch") == ["get", "watch"]


def test_a_line_break_in_a_quoted_text_has_no_line_of_its_own() -> None:
    assert in_one_line("put a 'b\nc'") is None
    assert in_one_line('put a {"b":\n   2}') == 'put a {"b": 2}'
