"""Writes docs/cli.md from the parser: `python -m tests.cli_manual`. A test holds the file to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ddb import cli
from ddb.grammar import Grammar, Option, Positional, Usage, grammar
from ddb.shell import OF_THE_SHELL

FILE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = """\
# The command line

`python3 -m ddb COMMAND`, or `bin/ddb COMMAND` from any directory; here `ddb` for short. This page is written from the
program's own parser (`python -m tests.cli_manual`), and says what `ddb COMMAND --help` says.

**Which cluster.** `--server HOST:PORT,…` or the environment variable `DDB_SERVER` name the nodes to ask; one that works is
enough. Without either it is 127.0.0.1:8050.

**Keys and values.** A value is text unless `--type` says otherwise: `put n 5` stores the string "5", and never guesses. In
the place of a key or a value, `-` is what standard input holds, and `@FILE` what a file holds; a text that begins with @ is
written `@@…`. Several keys come one a line. Bytes are bytes with `--bytes`, and `--type base64` takes them in base64; `get`
gives them back as they were, and where JSON is shown they are `{"$b64":"…"}`, which the Python client takes for `bytes`.

**Results** go to standard output, everything else to standard error. `-o` shows them as a `table`, as `csv` (RFC 4180), as
`json` (the server's replies as they came, an object a line; also `--json`), or `raw`: values and nothing else, byte for byte.
Colours are for terminals only, and for nobody who sets `NO_COLOR`.

**Exit codes.** 0 ok · 1 error · 2 usage · 3 not found · 4 condition not met · 5 no leader or unreachable · 6 outcome unknown
(the write may have happened) · 130 interrupted. A failure is one sentence.

**Completion.** `eval "$(ddb completion bash)"` in `~/.bashrc`, or `eval "$(ddb completion zsh)"` behind `compinit` in `~/.zshrc`,
completes commands, options, and keys from the database.
"""

ABOUT = {
    "export": """\
The file is lines of JSON, `{"key":…,"value":…}`, with a first and a last line about the export itself. It is the state of
one moment, also where others write meanwhile: what has changed since the first line was read stands at the end, and
`import` repeats it. Where the nodes don't keep these changes any more (the export took longer than `--retain` entries), it says between
which revisions each key was read. FILE appears when it is whole and on disk; until then it is FILE.part. What hangs on a lease is
exported like everything else, and is a plain key where it is imported.""",
    "import": """\
Many lines are one entry of the log, several of them under way at once, under the numbers of a session: a batch whose answer
was lost is never done twice. How far it got is kept in FILE.import (or `--state`, also for `-`) until it is done. A line that
can't be taken is named; what stands before it is in the database. Keys that are not in the file are left alone.""",
    "watch": """\
With `--exec`, COMMAND is split into words as a shell would, and run by no shell: no key or value can become a part of it. It is told of
one change at a time, by environment variables (`DDB_EVENT` is put or delete; a value that is no text is JSON in `DDB_VALUE`)
and by one JSON object on its standard input. What can't be in a variable (NUL, very long texts) is in the input only. Changes that
happen while it runs are told afterwards, in order. If it fails, that is said, and the next change comes.""",
    "lock": """\
COMMAND gets `DDB_LOCK`, `DDB_TOKEN` (the fencing token: it grows with every holder) and `DDB_LOCK_KEY` (a key that is there as long as the
lock is held: a condition for what COMMAND writes to ddb). Signals are passed on. Where the lock may be lost, because the
cluster could not be told in time that its holder lives, COMMAND is killed at once, with all that it started unless it runs in a
terminal, and the exit code is 1. 126 and 127: COMMAND can't be run, or is not there; 128+N: signal N ended it. With `--wait`, 4 means
that it was not to be had in time. What a lock over a network can't promise is told in [recipes.md](recipes.md).""",
    "elect": """\
Like `lock`, among candidates: one at a time leads, the next one in line follows. `--value` is what others see of the leader.""",
    "lease": """\
A key that was put with a lease (`ddb put --lease`) is deleted when the lease is not kept alive for its time. `keepalive` goes on until
Ctrl-C, and fails where the lease is gone.""",
    "diff": """\
What a key was at a revision is told from what the nodes keep of the past (`--retain` entries); where that is gone, `compacted` says from
where on it can be told.""",
    "mirror": """\
The other cluster is left with exactly these keys under the prefix: what it has besides is deleted. From "Following" on, the
copy is always the source as it was at some revision. How far it got stands in the copy itself, under `ddb.mirror/`, so the same
command goes on, from any machine; a second mirror of the same keys takes over from the first, which ends. Where the source keeps the
changes no longer, everything is copied again. What somebody else writes under the prefix there stays until that
key changes at the source, or until `--restart`. Leases and locks are not mirrored: only the keys.""",
    "shell": """\
A line is a command as it stands here, without `ddb`; but JSON needs no quotes, and may take several lines. Tab completes commands, options
and keys (level by level, like paths). Lines are kept in `$XDG_STATE_HOME/ddb/history` (`~/.local/state/ddb/history`), but for those that begin with
a blank. Ctrl-C cancels the line or the command, Ctrl-D ends the shell. Fed from a file or a pipe it shows no prompt, and its exit
code is that of the last command that failed.""",
}  # fmt: skip


def main() -> None:
    """Write the file."""
    FILE.write_text(manual(), encoding="utf-8")


def manual() -> str:
    """The whole page."""
    known = grammar(cli.parser())
    parts = [INTRODUCTION, "## Before or behind any command\n", *table(_common(known))]
    parts += ["\n## Commands\n", *(f"- [`{name}`](#{name}): {usage.summary}" for name, usage in known.commands.items())]
    for usage in known.commands.values():
        parts += ["", *section(usage, known)]
    return "\n".join(parts) + "\n"


def _common(known: Grammar) -> list[Option]:
    return [option for option in known.top.options if "-h" not in option.flags]


def section(usage: Usage, known: Grammar) -> Iterator[str]:
    """What is said of one command."""
    common = {option.flags for option in known.top.options}
    own = [option for option in usage.options if option.flags not in common and "-h" not in option.flags]
    yield f"## {usage.name}\n"
    yield f"    {' '.join(['ddb', usage.name, *(['[OPTION …]'] if own else []), *map(placed, usage.positionals)])}\n"
    yield f"{usage.summary[0].upper()}{usage.summary[1:]}.\n"
    if usage.name in ABOUT:
        yield f"{ABOUT[usage.name]}\n"
    if usage.positionals or own:
        yield from table([*usage.positionals, *own])
        yield ""
    if usage.name == "shell":
        yield "| inside | does |"
        yield "|---|---|"
        yield from (f"| `{form}` | {summary} |" for form, summary, _ in OF_THE_SHELL.values())
        yield ""
    yield "```sh"
    yield from cli.COMMANDS[usage.name].examples
    yield "```"


def placed(one: Positional) -> str:
    """An argument as it stands in a line of usage."""
    name = f"{one.metavar} …" if one.many else one.metavar
    name = f"-- {name}" if cli_words(one) else name
    return f"[{name}]" if one.optional or (one.many and cli_words(one)) else name


def cli_words(one: Positional) -> bool:
    """Whether it is another program's command line."""
    return one.metavar == "COMMAND" and one.many


def table(rows: list[Option | Positional] | list[Option]) -> Iterator[str]:
    """Options and arguments with what they mean."""
    yield "| | |"
    yield "|---|---|"
    group = ""
    for row in rows:
        if isinstance(row, Option):
            if row.group != group:
                group = row.group
                yield f"| *{group}* | |"
            taken = f" {row.metavar}" if row.takes_value else ""
            name = ", ".join(row.flags) + taken
        else:
            name = row.metavar
        help_ = row.help or (f"one of {', '.join(row.choices)}" if row.choices else "")
        yield f"| `{escaped(name)}` | {escaped(help_)} |"


def escaped(text: str) -> str:
    """`text` for a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
