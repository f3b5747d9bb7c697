"""The command line as data: what its parser knows, for whoever has to tell others of it.

The shell completes words by it, `ddb completion` writes scripts from it, and docs/cli.md is written from it; so none of
them says anything else than what the parser does. argparse keeps all of this, but under private names, and shows it
in a form that differs from one Python to the next: it is read here, once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its `flags`, what it takes (`metavar`, empty where it takes nothing), and out of which `choices`."""

    flags: tuple[str, ...]
    metavar: str
    choices: tuple[str, ...]
    help: str
    group: str

    @property
    def takes_value(self) -> bool:
        """Whether a word follows it."""
        return bool(self.metavar or self.choices)


@dataclass(frozen=True, slots=True)
class Positional:
    """An argument without a flag. `optional`: it may be left out; `many`: several may be given, and where it is `rest`,
    all that follows belongs to it."""

    metavar: str
    choices: tuple[str, ...]
    help: str
    optional: bool
    many: bool
    rest: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What may be said to one command, or before any (`name` is empty)."""

    name: str
    summary: str
    positionals: tuple[Positional, ...]
    options: tuple[Option, ...]

    def option(self, flag: str) -> Option | None:
        """The option called `flag`."""
        return next((option for option in self.options if flag in option.flags), None)

    def positional(self, position: int) -> Positional | None:
        """The argument that the word at `position` among those without a flag is, from 0."""
        if position < len(self.positionals):
            return self.positionals[position]
        last = self.positionals[-1] if self.positionals else None
        return last if last is not None and (last.many or last.rest) else None


@dataclass(frozen=True, slots=True)
class Grammar:
    """What may be said before a command, and to each."""

    top: Usage
    commands: Mapping[str, Usage]


def grammar(parser: argparse.ArgumentParser) -> Grammar:
    """What `parser` knows, one level of subcommands deep."""
    commands: dict[str, Usage] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                commands[name] = _usage(sub, name, summaries.get(name, ""))
    return Grammar(_usage(parser, "", parser.description or ""), commands)


def _usage(parser: argparse.ArgumentParser, name: str, summary: str) -> Usage:
    positionals: list[Positional] = []
    options: list[Option] = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            if action.option_strings:
                options.append(_option(action, _group_title(group)))
            else:
                positionals.append(_positional(action))
    return Usage(name, summary, tuple(positionals), tuple(options))


def _group_title(group: argparse._ArgumentGroup) -> str:
    """The title of a group of options, empty for argparse's own."""
    title = group.title or ""
    return "" if title in ("options", "positional arguments") else title


def _option(action: argparse.Action, group: str) -> Option:
    choices = _choices(action)
    metavar = _metavar(action) if action.nargs != 0 else ""
    if isinstance(action, argparse._HelpAction):
        return Option(tuple(action.option_strings), "", (), "show this help and end", group)
    if isinstance(action, argparse._VersionAction):
        return Option(tuple(action.option_strings), "", (), "show the version and end", group)
    return Option(tuple(action.option_strings), metavar, choices, action.help or "", group)


def _positional(action: argparse.Action) -> Positional:
    nargs = action.nargs
    rest = nargs in (argparse.REMAINDER, "...")
    return Positional(
        _metavar(action), _choices(action), action.help or "", nargs in ("?", "*") or rest, nargs in ("+", "*"), rest
    )


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """The words that an argument may be: those that argparse knows, or those that its metavar lists with `|`."""
    if action.choices is not None:
        return tuple(str(choice) for choice in action.choices)
    listed = _metavar(action).split("|")
    return tuple(listed) if len(listed) > 1 and not isinstance(action, argparse._StoreConstAction) else ()


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "|".join(str(choice) for choice in action.choices)
    return action.dest.upper()
