"""docs/cli.md says what the parser says."""

from __future__ import annotations

import re

import pytest

from ddb import cli
from ddb.grammar import grammar
from tests import cli_manual


def test_the_manual_is_written_from_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDB_SERVER", raising=False)
    assert cli_manual.FILE.read_text(encoding="utf-8") == cli_manual.manual(), "run: python -m tests.cli_manual"


def test_the_manual_names_every_command_and_every_option() -> None:
    text = cli_manual.manual()
    for name, usage in grammar(cli.parser()).commands.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert all(example in section for example in cli.COMMANDS[name].examples)
        for option in usage.options:
            assert any(flag in text for flag in option.flags)


def test_every_argument_and_option_says_what_it_is() -> None:
    known = grammar(cli.parser())
    for usage in [known.top, *known.commands.values()]:
        for option in usage.options:
            assert option.help, f"{usage.name} {option.flags}"
        for positional in usage.positionals:
            assert positional.help or positional.choices or positional.metavar == "KEY", f"{usage.name} {positional}"


def test_every_line_about_a_command_is_about_one_that_is_there() -> None:
    assert set(cli_manual.ABOUT) <= set(cli.COMMANDS)
    assert not re.findall(r"\]\((?!recipes\.md|#)", cli_manual.manual())
