"""The commands about change: watch, history, diff.

Law of `watch --exec`: the command is run as it was written, split into words as a shell would, but by no shell. What
happened reaches it through environment variables and standard input only, so no key or value can become a part of
the command. One runs at a time, in the order of the changes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from ddb import changes, console, options, wire
from ddb.client import Client
from ddb.console import ERROR, OK, Command, UsageError, as_json, complain, say, say_json
from ddb.formats import ABSENT, Format, one_line
from ddb.results import Event, to_wire

_EVENT: Final = ("rev", "event", "key", "value", "version")
_CHANGE: Final = ("rev", "at", "term", "client", "event", "key", "value", "version")
VARIABLE_BYTES_MAX: Final = 100_000  # Linux takes no longer one than 128 KiB


# -------------------------------------------------------------------- watch


def _watch(client: Client, args: argparse.Namespace) -> int:
    if args.key is not None and args.prefix is not None:
        raise UsageError("Give a PREFIX or --key, not both.")
    command = _words(args.exec)
    sheet = console.sheet(args, _EVENT, "value")
    told, failed = 0, False
    prefix = None if args.key is not None else args.prefix or ""
    with client.watch(args.key, prefix=prefix, from_rev=args.from_) as watch:
        for event in watch:
            message = _message(event)
            if command:
                failed = not _run(command, message) or failed
            elif as_json(args):
                say_json(message)
            elif args.output is not None:
                console.write(sheet.page([[message.get(name, ABSENT) for name in _EVENT]]))
            else:
                value = f"\t{one_line(message['value'])}" if event.kind == "put" else ""
                say(f"{event.rev}\t{event.kind}\t{one_line(event.key)}{value}")
            sys.stdout.flush()
            told += 1
            if told == args.limit:
                break
    return ERROR if failed else OK


def _message(event: Event) -> dict[str, Any]:
    """An event as the protocol tells it."""
    if event.kind == "delete":
        return {"event": "delete", "key": event.key, "rev": event.rev}
    put = {"event": "put", "key": event.key, "value": to_wire(event.value)}
    return {**put, "rev": event.rev, "version": event.version}


def _words(command: str | None) -> list[str]:
    if command is None:
        return []
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--exec {command!r} can't be split into words: {error}.") from None
    if not words:
        raise UsageError("--exec needs a command.")
    return words


def _run(command: Sequence[str], message: dict[str, Any]) -> bool:
    """Run a command with a change as its input, and wait for its end. Returns whether it ended well."""
    line = wire.encode(message) + b"\n"
    sys.stdout.flush()
    try:
        done = subprocess.run(command, input=line, env={**os.environ, **variables(message)}, check=False)
    except OSError as error:
        raise UsageError(f"{command[0]} can't be run: {error.strerror}.") from None
    if done.returncode:
        complain(f"{command[0]} ended with {done.returncode} at revision {message['rev']}.")
    return done.returncode == 0


def variables(message: dict[str, Any]) -> dict[str, str]:
    """The environment variables that tell of a change. What a variable can't hold (NUL, or too much) is left out, and
    stands in the command's input only."""
    named = {"DDB_EVENT": message["event"], "DDB_KEY": message["key"], "DDB_REV": str(message["rev"])}
    if message["event"] == "put":
        value = message["value"]
        named["DDB_VALUE"] = value if isinstance(value, str) else wire.encode(value).decode()
        named["DDB_VERSION"] = str(message["version"])
    return {name: text for name, text in named.items() if "\0" not in text and len(text) <= VARIABLE_BYTES_MAX // 4}


# ------------------------------------------------------------ history, diff


def _history(client: Client, args: argparse.Namespace) -> int:
    if args.key is not None and args.prefix is not None:
        raise UsageError("Give a KEY or --prefix, not both.")
    sheet = console.sheet(args, _CHANGE, "value")
    count = 0
    for page in _history_pages(client, args):
        count += len(page["changes"])
        if as_json(args):
            say_json(page)
        elif args.output is Format.CSV or args.output is Format.RAW:
            console.write(sheet.page([_change(c, c["at"]) for c in page["changes"]]))
        else:
            console.write(sheet.page([_change(c, _clock(c["at"])) for c in page["changes"]]))
        sys.stdout.flush()
        oldest = page["oldest"]
    if not count and not as_json(args):
        complain(f"Nothing has changed there since revision {oldest}, where what is kept begins.")
    return OK


def _change(change: dict[str, Any], at: Any) -> list[Any]:
    told = {**change, "at": at}
    return [told.get(name, ABSENT) for name in _CHANGE]


def _clock(at_ms: int) -> str:
    """A time of the leader's clock, in this machine's time zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000)) + f".{at_ms % 1000:03}"
    except (OverflowError, ValueError, OSError):
        return str(at_ms)


def _history_pages(client: Client, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pages until there is no more, or `--limit` is reached."""
    wanted = args.limit
    fields = {"key": args.key, "prefix": args.prefix, "from": args.from_, "to": args.to}
    request = {"op": "history", "reverse": args.reverse, **{n: v for n, v in fields.items() if v is not None}}
    while True:
        page = changes.ask(client, {**request, "limit": min(wanted, changes.PAGE_CHANGES)})
        wanted -= len(page["changes"])
        yield page
        if not page["more"] or wanted <= 0:
            return
        last = page["changes"][-1]["rev"]
        request.update({"to": last - 1} if args.reverse else {"from": last + 1})


def _diff(client: Client, args: argparse.Namespace) -> int:
    """The keys that differ between two revisions: what each was at the first, and is at the second."""
    if args.first > args.second:
        raise UsageError("The older revision comes first.")
    touched: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # each key's first change in between, and its last
    if args.second > args.first:
        for page in changes.pages(client, args.first + 1, args.second, prefix=args.prefix):
            for change in page["changes"]:
                begun = touched.get(change["key"])
                touched[change["key"]] = (begun[0] if begun else change, change)
    sheet = console.sheet(args, ("change", "key", "old", "new"), "key")
    for key in sorted(touched):
        before, after = _before(client, key, args.first, touched[key][0]), _value(touched[key][1])
        if before is after or (
            before is not ABSENT and after is not ABSENT and wire.encode([before]) == wire.encode([after])
        ):
            continue
        kind = "added" if before is ABSENT else "removed" if after is ABSENT else "changed"
        if as_json(args):
            shown = {"change": kind, "key": key, "old": before, "new": after}
            say_json({name: value for name, value in shown.items() if value is not ABSENT})
        elif args.output is not None:
            console.write(sheet.page([[kind, key, before, after]]))
        else:
            for sign, value in (("-", before), ("+", after)):
                if value is not ABSENT:
                    say(f"{sign} {one_line(key)}\t{one_line(value)}")
    return OK


def _before(client: Client, key: str, rev: int, first: dict[str, Any]) -> Any:
    """The value of `key` at `rev`, where `first` is the first change behind it."""
    if first["event"] == "put" and first.get("version") == 1:
        return ABSENT
    reply = changes.ask(client, {"op": "get", "key": key, "rev": rev})
    return reply["value"] if reply["found"] else ABSENT


def _value(change: dict[str, Any]) -> Any:
    return change["value"] if change["event"] == "put" else ABSENT


COMMANDS: Final = (
    Command(
        "watch",
        options.watch_options,
        "show changes as they happen, or run a command for each",
        ("ddb watch user/", "ddb watch --key city --from 12 -o json", "ddb watch jobs/ --exec 'python3 handle.py'"),
        _watch,
    ),
    Command(
        "history",
        options.history_options,
        "show what happened to a key, or to all: who wrote what, when, and in which term",
        ("ddb history city", "ddb history --prefix user/ --reverse --limit 10", "ddb history -o json"),
        _history,
    ),
    Command(
        "diff",
        options.diff_options,
        "show which keys differ between two revisions",
        ("ddb diff 12 40", "ddb diff 12 40 user/ -o table"),
        _diff,
    ),
)
