"""The interactive shell: the same commands, one after another, over one connection.

Laws:

1. Ctrl-C cancels the line that is being typed, or the command that runs, and never the shell; Ctrl-D on an empty line
   ends it.
2. A line means here what it means behind `ddb`, but for JSON, which needs no quotes (shellwords.py).
3. Completion never delays a person: what the database doesn't answer within COMPLETION_S is not offered.
4. The history is the person's own: in $XDG_STATE_HOME/ddb/history, readable by nobody else. A line that begins with a
   blank is not kept.

Theory. readline asks for one candidate after another for the word before the cursor, where *it* thinks that a word
begins; what is offered here are whole words as they must be typed, less what stands before that place.

Where there is no readline, all else works.
"""

from __future__ import annotations

import argparse
import cmd
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from ddb import shellwords
from ddb.client import Client
from ddb.completion import COMPLETION_S, KEYS, levels
from ddb.console import ERROR, INTERRUPTED, OK, complain, say
from ddb.errors import DdbError
from ddb.formats import Format
from ddb.grammar import Grammar, Usage, grammar
from ddb.overview import paint, wants_colour

try:
    import readline
except ImportError:  # a Python that was built without it
    readline = None  # type: ignore[assignment]

HISTORY_LINES: Final = 10_000
PROMPT: Final = "ddb> "
PROMPT_MORE: Final = "...> "
_BOLD: Final = "\x1b[1m"
_DIM: Final = "\x1b[2m"

OF_THE_SHELL: Final = {
    "\\timing": ("\\timing", "tell after each command how long it took, or no longer", "\\timing"),
    "\\watch": (
        "\\watch N COMMAND",
        "run COMMAND every N seconds, until Ctrl-C",
        "\\watch 2 count user/",
    ),
    "\\o": (
        "\\o [FORMAT]",
        "show results as table, json, csv or raw from now on; without FORMAT as at first",
        "\\o table",
    ),
    "help": ("help [COMMAND]", "list the commands, or explain one", "help put"),
    "exit": ("exit", "end the shell, like Ctrl-D", "exit"),
}
NOT_HERE: Final = frozenset({"shell", "up", "completion"})
"""Commands that make no sense inside the shell."""

Execute = Callable[[Sequence[str]], int]
"""Runs the words of one command, says what there is to be said, and returns its exit code; lets KeyboardInterrupt pass."""


def run(client: Client, parser: argparse.ArgumentParser, execute: Execute) -> int:
    """Talk with whoever sits at standard input until there is nothing more, and return the exit code: that of the last
    command that failed where the input is no terminal, else 0.

    `client` is for completion; `execute` runs a command that `parser` understands.
    """
    shell = Shell(client, parser, execute, interactive=sys.stdin.isatty())
    with shell.history():
        shell.greet()
        while True:
            try:
                shell.cmdloop()
                break
            except KeyboardInterrupt:
                shell.cancel()
    return OK if shell.interactive else shell.code


class Shell(cmd.Cmd):
    """One conversation. `interactive`: whether a person takes part in it, who sees a prompt."""

    def __init__(
        self, client: Client, parser: argparse.ArgumentParser, execute: Execute, interactive: bool = True
    ) -> None:
        super().__init__(completekey="tab")
        self.interactive = interactive
        self.use_rawinput = True
        self.code = OK
        self.timing = False
        self.form = ""
        self.prompt = PROMPT if interactive else ""
        self._client = client
        self._execute = execute
        self._parser = parser
        self._grammar: Grammar = grammar(parser)
        self._commands = {name: usage for name, usage in self._grammar.commands.items() if name not in NOT_HERE}
        self._begun = ""  # the lines so far of a command that isn't finished
        self._candidates: list[str] = []
        self._mark = "'"  # the quotation mark that the word to be completed begins with

    # ------------------------------------------------------------ a line

    def greet(self) -> None:
        """Say who is there, and how to go on."""
        if not self.interactive:
            return
        try:
            status = self._client.status(timeout_s=1.0)
            leader = (status.get("leader") or {}).get("name", "nobody")
            say(f"ddb {status['version']}, {len(status['members'])} members, led by {leader}. Try help, or Tab.")
        except (DdbError, KeyError) as error:
            complain(f"Nobody answers yet: {error.message}" if isinstance(error, DdbError) else "Is it a ddb server?")

    def emptyline(self) -> bool:
        """An empty line does nothing (cmd would repeat the last one)."""
        return False

    def onecmd(self, line: str) -> bool:
        """Take one line, and run what is complete with it. Returns whether the shell ends."""
        if line == "EOF":  # cmd's word for the end of the input
            return self._end_of_input()
        whole = f"{self._begun}\n{line}" if self._begun else line
        if not shellwords.complete(whole):
            self._begun = whole
            self.prompt = PROMPT_MORE if self.interactive else ""
            return False
        self._reset()
        if not whole.strip():
            return False
        self._keep(whole)
        try:
            return self._run(whole)
        except KeyboardInterrupt:
            self.code = INTERRUPTED
            self.cancel()
            return False

    def _end_of_input(self) -> bool:
        if self._begun and not self.interactive:
            complain("The input ends in the middle of a command: a quote or a brace is open.")
            self.code = ERROR
        elif self.interactive:
            say("")
        return True

    def cancel(self) -> None:
        """Forget the line that was begun."""
        self._reset()
        sys.stdout.flush()
        sys.stderr.write("\n")
        sys.stderr.flush()

    def _reset(self) -> None:
        self._begun = ""
        self.prompt = PROMPT if self.interactive else ""

    def _run(self, line: str) -> bool:
        words = [word.text for word in shellwords.words(line)]
        if not words:
            return False
        match words[0]:
            case "exit" | "quit" | "\\q":
                return True
            case "help" | "?" | "\\?":
                self._help(words[1:])
            case "\\timing":
                self.timing = not self.timing
                say(f"timing is {'on' if self.timing else 'off'}")
            case "\\o":
                self._format(words[1:])
            case "\\watch":
                self._watch(words[1:])
            case _:
                self._timed(words)
        return False

    # -------------------------------------------------------- what it does

    def _timed(self, words: Sequence[str]) -> None:
        """Run one command, and tell how long it took where that was asked for."""
        began_s = time.perf_counter()
        self._command(words)
        if self.timing:
            took_ms = (time.perf_counter() - began_s) * 1e3
            say(paint(f"took {took_ms:.1f} ms", _DIM, wants_colour(sys.stdout)))

    def _command(self, words: Sequence[str]) -> None:
        name = words[0]
        if name not in self._commands:
            why = "makes no sense inside the shell" if name in NOT_HERE else "is no command; help lists them"
            complain(f"{name!r} {why}.")
            self.code = ERROR
            return
        before = ["-o", self.form] if self.form and self._commands[name].option("-o") else []
        code = self._execute([*before, *words])
        sys.stdout.flush()
        self.code = code or self.code

    def _format(self, words: Sequence[str]) -> None:
        known = [form.value for form in Format]
        if len(words) > 1 or (words and words[0] not in known):
            complain(f"\\o takes one of {', '.join(known)}, or nothing.")
            self.code = ERROR
        else:
            self.form = words[0] if words else ""

    def _watch(self, words: Sequence[str]) -> None:
        """Run a command every so many seconds."""
        try:
            pause_s = float(words[0])
        except (IndexError, ValueError):
            pause_s = float("nan")
        if not 0.05 <= pause_s <= 86400 or len(words) < 2:
            complain("\\watch takes a number of seconds and a command, like \\watch 2 count user/.")
            self.code = ERROR
            return
        while True:
            heading = f"{time.strftime('%H:%M:%S')}, every {pause_s:g} s; Ctrl-C ends it: {' '.join(words[1:])}"
            say(paint(heading, _DIM, wants_colour(sys.stdout)))
            self._timed(words[1:])
            sys.stdout.flush()
            time.sleep(pause_s)

    def _help(self, words: Sequence[str]) -> None:
        if not words:
            self._list_commands()
        elif words[0] in OF_THE_SHELL or f"\\{words[0]}" in OF_THE_SHELL:
            name = words[0] if words[0] in OF_THE_SHELL else f"\\{words[0]}"
            form, summary, example = OF_THE_SHELL[name]
            say(f"{form}\n\n{summary[0].upper()}{summary[1:]}.\n\nexample: {example}")
        elif words[0] in self._commands:
            self._execute([words[0], "--help"])
        else:
            complain(f"{words[0]!r} is no command; help lists them.")
            self.code = ERROR

    def _list_commands(self) -> None:
        colour = wants_colour(sys.stdout)
        room = max(shutil.get_terminal_size().columns - 14, 30)
        listed = [(name, usage.summary) for name, usage in self._commands.items()]
        listed += [(form, summary) for form, summary, _ in OF_THE_SHELL.values()]
        for name, summary in listed:
            short = summary if len(summary) <= room else summary[: room - 1] + "…"
            say(f"{paint(f'{name:<11}', _BOLD, colour)}  {short}" if len(name) <= 11 else f"{name}\n{'':13}{short}")
        say("\nhelp COMMAND explains one of them, with examples. Tab completes commands, options and keys.")
        say("A command goes on over several lines until its braces and quotes are closed.")
        say("Ctrl-C cancels, Ctrl-D ends.")

    # ---------------------------------------------------------- completion

    def complete(self, text: str, state: int) -> str | None:  # type: ignore[override]  # readline's own protocol
        """The candidate number `state` for the word that readline calls `text`."""
        if state == 0:
            self._candidates = []
            assert readline is not None
            with contextlib.suppress(DdbError, KeyError, TypeError):
                self._candidates = self.candidates(readline.get_line_buffer(), readline.get_begidx(), len(text))
        return self._candidates[state] if state < len(self._candidates) else None

    def candidates(self, line: str, begin: int, length: int) -> list[str]:
        """What the `length` characters of `line` from `begin` on may become. Raises DdbError."""
        before = (f"{self._begun}\n" if self._begun else "") + line[:begin]
        words = shellwords.words(before + line[begin : begin + length])
        whole = before + line[begin : begin + length]
        word = words.pop() if words and (not words[-1].closed or not whole[-1:].isspace()) else None
        start = word.start if word is not None else len(whole)
        given = [earlier.text for earlier in words]
        skip = len(before) - start  # of a word that began before the place where readline sees its beginning
        self._mark = '"' if whole[start : start + 1] == '"' else "'"
        offered = [text for text in self._offers(given, word.text if word else "") if text]
        return [text[max(skip, 0) :] for text in offered]

    def _offers(self, given: list[str], begun: str) -> list[str]:
        """Whole words, as they must be typed, that begin with the word `begun` and may follow those `given`."""
        if given and given[0] == "\\watch" and len(given) > 1:
            given = given[2:]
        if not given:
            names = [*self._commands, *OF_THE_SHELL]
            return [f"{name} " for name in sorted(names) if name.startswith(begun)]
        if given[0] == "help":
            return [name for name in sorted([*self._commands, *OF_THE_SHELL]) if name.startswith(begun)]
        if given[0] == "\\o":
            return [form.value for form in Format if form.value.startswith(begun)]
        usage = self._commands.get(given[0])
        if usage is None:
            return []
        asking = usage.option(given[-1]) if given[-1].startswith("-") else None
        if asking is not None and asking.takes_value:
            return self._values(asking.metavar, asking.choices, begun)
        if begun.startswith("-"):
            flags = [flag for option in usage.options for flag in option.flags if flag.startswith("--")]
            return [f"{flag} " for flag in sorted(flags) if flag.startswith(begun)]
        positional = usage.positional(_position(usage, given[1:]))
        return [] if positional is None else self._values(positional.metavar, positional.choices, begun)

    def _values(self, metavar: str, choices: Sequence[str], begun: str) -> list[str]:
        if choices:
            return [f"{choice} " for choice in choices if choice.startswith(begun)]
        if metavar in KEYS:
            return [shellwords.quoted(key, self._mark) for key in self.keys(begun)]
        if metavar == "NAME":
            names = [member.name for member in self._client.members(timeout_s=COMPLETION_S)]
            return [f"{name} " for name in sorted(names) if name.startswith(begun)]
        return []

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, and where more levels lie below a `/`, that level. Raises DdbError."""
        return list(levels(self._client, prefix))

    # ------------------------------------------------------------- history

    @contextlib.contextmanager
    def history(self) -> Iterator[None]:
        """While this lasts, lines can be called back; those of earlier times too."""
        if readline is None or not self.interactive:
            yield
            return
        file = history_file()
        readline.set_auto_history(False)
        readline.set_completer_delims(" \t\n")
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
        before = readline.get_current_history_length()
        try:
            yield
        finally:
            new = readline.get_current_history_length() - before
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file.touch(0o600)
                readline.append_history_file(max(new, 0), file)

    def _keep(self, line: str) -> None:
        """Add a line to the history (law 4), unless it is the same as the one before."""
        if readline is None or not self.interactive or line[0].isspace():
            return
        kept = shellwords.in_one_line(line)
        count = readline.get_current_history_length()
        if kept and (count == 0 or readline.get_history_item(count) != kept):
            readline.add_history(kept)


def history_file() -> Path:
    """Where lines are kept: the XDG Base Directory Specification's place for what should survive a restart of the
    program, but is not worth a backup."""
    place = os.environ.get("XDG_STATE_HOME", "")
    base = Path(place) if os.path.isabs(place) else Path.home() / ".local" / "state"  # "must be absolute", it says
    return base / "ddb" / "history"


def _position(usage: Usage, words: Sequence[str]) -> int:
    """How many of `words`, which stand behind a command, are arguments without a flag."""
    count, skip = 0, False
    for word in words:
        option = usage.option(word) if word.startswith("-") else None
        if skip or option is not None:
            skip = not skip and option is not None and option.takes_value
        else:
            count += 1
    return count
