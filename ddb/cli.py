"""The command line: `python -m ddb`, `bin/ddb`.

Laws: those of console.py, and one more: a command line is judged whole before anything is sent.

Each command is one function that takes the client and the arguments and returns an exit code. They stand in files by
what they are about, each with a table of its own; here the tables are laid together, parsed by, and run.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from typing import Final

import ddb
from ddb import clichanges, clicluster, clidata, clilock, clitools, completion, options
from ddb.client import Client, connect
from ddb.console import (
    BROKEN_PIPE,
    ERROR,
    EXIT_CODES,
    INTERRUPTED,
    OK,
    Command,
    UsageError,
    complain,
    give_up,
    speak_utf8,
    stand_in,
)
from ddb.errors import DdbError
from ddb.formats import Format
from ddb.options import TIMEOUT_S, VERIFY_TIMEOUT_S
from ddb.settings import OneLineParser

UNREACHABLE_S: Final = 1.0


def _shell(client: Client, args: argparse.Namespace) -> int:
    """The interactive shell, which runs the commands of this table over its own client."""
    from ddb import shell

    whole = parser()

    def execute(words: Sequence[str]) -> int:
        asked = parse(words, whole)
        shared = asked.server == default_server and asked.timeout is None
        if asked.server == default_server:
            asked.server = args.server
        asked.timeout = args.timeout if asked.timeout is None else asked.timeout
        return run(asked, client if shared else None)

    default_server = whole.get_default("server")
    return shell.run(client, whole, lambda words: guarded(lambda: execute(words)))


def _completion(client: Client, args: argparse.Namespace) -> int:
    return completion.run(client, args, parser())


_OWN: Final = (
    Command(
        "shell",
        options.none,
        "talk with the database: completion, history, help, JSON over several lines",
        ("ddb shell", "ddb shell < script"),
        _shell,
        formats=(),
    ),
    Command(
        "completion",
        options.completion_options,
        "print a script that completes commands, options and keys in bash or zsh",
        ("ddb completion bash", "ddb completion keys user/"),
        _completion,
        formats=(),
    ),
)

COMMANDS: Final[dict[str, Command]] = {
    command.name: command
    for group in (
        clidata.COMMANDS,
        clichanges.COMMANDS,
        clilock.COMMANDS,
        clicluster.COMMANDS,
        clitools.COMMANDS,
        _OWN,
    )
    for command in group
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own when None) and return the exit code."""
    stand_in()
    speak_utf8()
    try:
        return guarded(lambda: run(parse(sys.argv[1:] if argv is None else argv)))
    except BrokenPipeError:  # the reader has seen enough: `ddb scan | head`
        give_up(sys.stdout)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        try:
            sys.stderr.flush()
        except OSError:  # what argparse said
            give_up(sys.stderr)


def guarded(work: Callable[[], int]) -> int:
    """What `work` returns; where it fails, says so in one sentence, and returns what that means as an exit code.

    A broken pipe and Ctrl-C pass: what they end, the command or all of it, is not to be decided here.
    """
    try:
        code = _unless_it_exits(work)
        sys.stdout.flush()
        return code
    except DdbError as error:
        complain(error.message)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno == errno.EBADF:
            complain("Standard input or output is closed.")
        else:
            complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
        return ERROR


def _unless_it_exits(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as end:  # argparse's --help and errors
        return end.code if isinstance(end.code, int) else OK


def run(args: argparse.Namespace, client: Client | None = None) -> int:
    """Run the command that `args` (made by `parser`) name, with the open `client` where there is one already.

    Returns the exit code. Raises DdbError, OSError and KeyboardInterrupt.
    """
    command = COMMANDS[args.command]
    _check_format(command, args)
    if args.timeout is None:
        args.timeout = _timeout_s(command)
    if command.alone is not None:
        return command.alone(args)
    assert command.run is not None
    if client is not None:
        return command.run(client, args)
    try:
        connected = connect(args.server, timeout_s=args.timeout, discover=False, unreachable_s=UNREACHABLE_S)
    except DdbError as error:
        raise UsageError(error.message) from None
    with connected:
        return command.run(connected, args)


def parse(argv: Sequence[str], whole: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """What the command line `argv` asks for. Ends the process (SystemExit) where it can't be understood.

    Another program's command line behind `--` is kept as it stands: argparse would look for options in it.
    """
    whole = whole or parser()
    name = next((word for word in argv if word in COMMANDS), None)
    if name is None or not COMMANDS[name].words or "--" not in argv:
        return whole.parse_args(argv)
    cut = list(argv).index("--")
    args = whole.parse_args(argv[:cut])
    args.words = [*args.words, *argv[cut + 1 :]]
    return args


def _check_format(command: Command, args: argparse.Namespace) -> None:
    """`-o` may stand before the command, where the parser can't know yet which formats that has."""
    wanted: Format | None = args.output
    if wanted is not None and wanted not in command.formats:
        offered = " or ".join(form.value for form in command.formats) or "none"
        raise UsageError(f"`{command.name}` has no format {wanted.value} (it has {offered}).")


def _timeout_s(command: Command) -> float:
    return VERIFY_TIMEOUT_S if command.name == "verify" else TIMEOUT_S


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = OneLineParser(
        prog="ddb",
        description="A replicated key/value database. Start with: ddb up",
        epilog=EXIT_CODES,
    )
    whole.add_argument("--version", action="version", version=f"ddb {ddb.__version__}")
    options.common(whole, top=True)
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for command in COMMANDS.values():
        heading = "example:" if len(command.examples) == 1 else "examples:\n "
        sub = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"{heading} {_LF.join(command.examples)}\n\n{EXIT_CODES}",
        )
        command.options(sub)
        if command.common:
            options.common(sub, top=False, formats=command.formats, timeout_s=_timeout_s(command))
    return whole


_LF: Final = "\n  "
