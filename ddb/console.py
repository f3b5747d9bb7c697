"""What every command shares: how it is described, what it reads, how it speaks, and how it ends.

Laws:

1. What was asked for goes to standard output, everything else to standard error; so output can be piped.
2. A failure is one sentence, never a traceback, and its kind is the exit code: 0 ok, 1 error, 2 usage, 3 not found,
   4 condition not met, 5 no leader or unreachable, 6 outcome unknown (a write that may have happened).
3. A key or value on the command line is a text as it stands, with one exception that is always the same: `-` is what
   standard input holds, `@FILE` is what that file holds, and `@@…` is a text that begins with @.

Theory. A key is one line of text, and editors end a line with LF; so where a key comes from a file or from standard
input, one LF at its end is no part of it. A value is all of it, to the last byte.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final, TextIO

from ddb import wire
from ddb.client import Client
from ddb.errors import DdbError
from ddb.formats import Format, Sheet
from ddb.overview import wants_colour
from ddb.settings import USAGE, is_utf8

OK, ERROR, NOT_FOUND, CONDITION_NOT_MET, UNREACHABLE, INTERRUPTED, BROKEN_PIPE = 0, 1, 3, 4, 5, 130, 141

INPUT_BYTES_MAX: Final = 256 << 20

EXIT_CODES: Final = """exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 condition not met,
            5 no leader or unreachable, 6 outcome unknown (the write may have happened)"""


class UsageError(DdbError):
    """Arguments that make no sense."""

    exit_code = USAGE


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what it is called, its options, and what it does.

    `run` takes an open client and the arguments and returns an exit code; a command that needs no client, or makes its
    own, has `alone` instead. `formats` are what `-o` may ask of it, and `common` tells whether `--server` and
    `--timeout` mean anything to it. `words`: what stands behind `--` is another program's command line.
    """

    name: str
    options: Callable[[argparse.ArgumentParser], None]
    summary: str
    examples: Sequence[str]
    run: Callable[[Client, argparse.Namespace], int] | None = None
    alone: Callable[[argparse.Namespace], int] | None = None
    formats: Sequence[Format] = tuple(Format)
    common: bool = True
    words: bool = False


# ------------------------------------------------------------------- out


def stand_in() -> None:
    """Give a standard stream that this process was started without (`>&-`) its number back, and let its use fail with a
    sentence; only complaints may go nowhere.

    Otherwise the next file or connection would get that number, and be written to by whoever means the stream.
    """
    streams = ((0, os.O_WRONLY, "stdin", "r"), (1, os.O_RDONLY, "stdout", "w"), (2, os.O_WRONLY, "stderr", "w"))
    for number, flags, name, mode in streams:
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, flags)
            os.dup2(opened, number)  # which a process that is started gets as well
            if opened != number:
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def speak_utf8() -> None:
    """Texts are UTF-8 whatever the locale says; what can't be shown is escaped, what can't be read is found out where it is
    used (PEP 383), and neither ends in a traceback. Warnings look like all else that is said."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)
    if logging.lastResort is not None:  # what a library warns of, where nobody keeps a log
        logging.lastResort.setFormatter(logging.Formatter("ddb: %(message)s"))


def give_up(stream: TextIO) -> None:
    """Nobody takes what is said to `stream`, or not all of it: the rest goes nowhere, and fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """One line of what was asked for."""
    sys.stdout.write(f"{line}\n")


def complain(sentence: str) -> None:
    """One sentence about what was not."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        give_up(sys.stdout)
    try:
        sys.stderr.write(f"ddb: {sentence}\n")
        sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)  # the exit code tells it


def say_json(value: Any) -> None:
    """`value` as one line of JSON."""
    say(wire.encode(value).decode())


def write(data: bytes) -> None:
    """Bytes as they are, behind what was said before."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)


def as_json(args: argparse.Namespace) -> bool:
    """Whether the server's reply is to be shown as it came."""
    return args.output is Format.JSON


def sheet(args: argparse.Namespace, columns: Sequence[str], raw: str) -> Sheet:
    """The sheet for rows of these `columns`, in the format that was asked for; `raw` names the column that alone counts
    where it is raw. As a table where none was asked for."""
    return Sheet(args.output or Format.TABLE, columns, raw, wants_colour(sys.stdout))


def show(args: argparse.Namespace, reply: dict[str, Any], plain: str, raw: str, **row: Any) -> None:
    """Show the one result of a command: the `reply` for JSON, the line `plain` where no format was asked for, else the
    columns of `row`."""
    if as_json(args):
        say_json(reply)
    elif args.output is None:
        say(plain)
    else:
        write(sheet(args, list(row), raw).page([list(row.values())]))


# -------------------------------------------------------------------- in


def parse_json(text: str, what: str) -> Any:
    """The value of the JSON `text`. Raises UsageError, which calls it `what`."""
    try:
        return wire.decode_value(text.encode("utf-8", "surrogateescape"))
    except DdbError as error:
        raise UsageError(f"{what} is not JSON: {error.message}") from None


def _all_of(stream: IO[bytes], name: str) -> bytes:
    """What `stream` holds. Raises UsageError, which calls it `name`, where that is more than any request can be."""
    content = stream.read(INPUT_BYTES_MAX + 1)
    if len(content) > INPUT_BYTES_MAX:
        raise UsageError(f"{name} holds more than {INPUT_BYTES_MAX >> 20} MiB; `import` takes that much.")
    return content


def value(text: str, kind: str) -> Any:
    """The value that the argument `text` stands for, taken as `kind` says: text, json, bytes or base64.

    Raises UsageError, and OSError for a file that can't be read.
    """
    if kind == "bytes":
        return {"$b64": base64.b64encode(_content(text)).decode()}
    plain = _text(text)
    if kind == "base64":
        try:
            return {"$b64": base64.b64encode(base64.b64decode("".join(plain.split()), validate=True)).decode()}
        except (binascii.Error, ValueError):
            raise UsageError("The value is not base64.") from None
    return parse_json(plain, "The value") if kind == "json" else plain


def text(argument: str) -> str:
    """The text that an argument stands for (law 3)."""
    return _text(argument)


def key(argument: str) -> str:
    """The one key that an argument stands for."""
    return _text(argument).removesuffix("\n") if _elsewhere(argument) else _text(argument)


def keys(arguments: Sequence[str]) -> list[str]:
    """The keys that arguments stand for: `-` and `@FILE` hold one a line."""
    found: list[str] = []
    for argument in arguments:
        if _elsewhere(argument):
            found += [line for line in _text(argument).split("\n") if line]
        else:
            found.append(_text(argument))
    return found


def _elsewhere(argument: str) -> bool:
    return argument == "-" or (argument.startswith("@") and not argument.startswith("@@"))


def _content(argument: str) -> bytes:
    if argument == "-":
        return _all_of(sys.stdin.buffer, "Standard input")
    if not _elsewhere(argument):
        return os.fsencode(argument.removeprefix("@") if argument.startswith("@@") else argument)
    if argument == "@":
        raise UsageError("After @ the name of a file must follow; @@ stands for a text that begins with @.")
    with open(argument[1:], "rb") as file:
        return _all_of(file, argument[1:])


def _text(argument: str) -> str:
    if not _elsewhere(argument):
        if not is_utf8(argument):
            raise UsageError(
                "A key or value on the command line is not UTF-8; other bytes can be values, with --bytes."
            )
        return argument.removeprefix("@") if argument.startswith("@@") else argument
    try:
        return _content(argument).decode()
    except UnicodeDecodeError:
        source = "Standard input" if argument == "-" else argument[1:]
        raise UsageError(f"{source} is not UTF-8; for other bytes say --type bytes.") from None
