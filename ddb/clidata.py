"""The commands that read and write data: put, get, del, scan, count, incr, txn; export, import and mirror.

Law: a value is text unless `--type` says otherwise: `put n 5` stores the string "5", and never guesses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ddb import console, options, wire
from ddb.client import Client, next_page
from ddb.console import CONDITION_NOT_MET, NOT_FOUND, OK, Command, UsageError, as_json, complain, say, say_json
from ddb.formats import ABSENT, Format, held_bytes, one_line, raw_bytes

PAGE_ITEMS: Final = 1000  # asked for at once
ITEM: Final = ("key", "value", "rev", "created", "version")


def _put(client: Client, args: argparse.Namespace) -> int:
    _refuse_shared_input(args.key, args.value, args.if_value)
    key, kind = console.key(args.key), options.value_type(args)
    request = {"op": "put", "key": key, "value": console.value(args.value, kind), **_conditions(args, kind)}
    if args.lease is not None:
        request["lease"] = args.lease
    reply = client.call(request)
    return _written(reply, args, key, f"revision {reply['rev']}", version=reply.get("version", ABSENT))


def _get(client: Client, args: argparse.Namespace) -> int:
    keys = console.keys(args.keys)
    alone = len(args.keys) == 1 and len(keys) == 1
    request = {"op": "get", **_reading(args), **({} if args.rev is None else {"rev": args.rev})}
    sheet = console.sheet(args, ITEM, "value")
    found_all = True
    for key in keys:
        reply = client.call({**request, "key": key})
        found_all = found_all and reply["found"]
        if as_json(args):
            say_json(reply)
        elif not reply["found"]:
            then = "" if args.rev is None else f" at revision {args.rev}"
            complain(f"There {'is' if args.rev is None else 'was'} nothing under {key!r}{then}.")
        elif args.output is Format.RAW and alone:
            console.write(raw_bytes(reply["value"]))
        elif args.output is not None:
            console.write(sheet.page([_row(reply)]))
        elif alone:
            _say_value(reply["value"])
        else:
            say(f"{key}\t{one_line(reply['value'])}")
    return OK if found_all else NOT_FOUND


def _say_value(value: Any) -> None:
    """A text as it is, bytes as they are (a terminal would obey them: there as JSON), anything else as JSON."""
    raw = held_bytes(value)
    if raw is not None and not sys.stdout.isatty():
        console.write(raw)
    else:
        say(value if isinstance(value, str) else _as_json(value))


def _as_json(value: Any) -> str:
    return wire.encode(value).decode()


def _delete(client: Client, args: argparse.Namespace) -> int:
    _refuse_shared_input(*args.keys, args.if_value)
    code = OK
    for key in console.keys(args.keys):
        reply = client.call({"op": "delete", "key": key, **_conditions(args, options.value_type(args))})
        deleted = reply.get("deleted")
        said = f"deleted at revision {reply['rev']}" if deleted else None
        code = max(code, _written(reply, args, key, said, deleted=deleted))
        if reply.get("applied", True) and not deleted:
            if not as_json(args):
                complain(f"There was nothing under {key!r}.")
            code = max(code, NOT_FOUND)
    return code


def _written(reply: dict[str, Any], args: argparse.Namespace, key: str, said: str | None, **more: Any) -> int:
    """Show the reply to a write that may have had a condition."""
    applied = reply.get("applied", True)
    if as_json(args):
        say_json(reply)
    elif not applied:
        now = f"{key!r} is at revision {reply['rev']}" if reply.get("found") else f"{key!r} does not exist"
        complain(f"The condition does not hold, nothing was changed: {now}.")
    elif said is not None:
        console.show(args, reply, said, "rev", key=key, rev=reply["rev"], **more)
    return OK if applied else CONDITION_NOT_MET


def _scan(client: Client, args: argparse.Namespace) -> int:
    columns = ("key", *ITEM[2:]) if args.keys_only else ITEM
    sheet = console.sheet(args, columns, "key" if args.keys_only else "value")
    for page in _pages(client, args):
        if as_json(args):
            say_json(page)
        elif args.output is not None:
            console.write(sheet.page(_row(item, columns) for item in page["items"]))
        else:
            for item in page["items"]:
                say(item["key"] if args.keys_only else f"{item['key']}\t{one_line(item['value'])}")
    return OK


def _row(item: dict[str, Any], columns: Sequence[str] = ITEM) -> list[Any]:
    return [item.get(name, ABSENT) for name in columns]


def _pages(client: Client, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The replies to a scan, until the range or `--limit` is exhausted."""
    wanted = args.limit
    request: dict[str, Any] = {"op": "scan", **_range(args), **_reading(args)}
    request.update({name: True for name in ("reverse", "keys_only") if getattr(args, name)})
    while True:
        page = client.call(request if wanted is None else {**request, "limit": min(wanted, PAGE_ITEMS)})
        yield page
        wanted = None if wanted is None else wanted - len(page["items"])
        if not page["more"] or not page["items"] or wanted == 0:
            return
        request = next_page(request, page["items"][-1]["key"])


def _count(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "count", **_range(args), **_reading(args)})
    console.show(args, reply, str(reply["count"]), "count", count=reply["count"], rev=reply.get("rev", ABSENT))
    return OK


def _incr(client: Client, args: argparse.Namespace) -> int:
    key = console.key(args.key)
    reply = client.call({"op": "incr", "key": key, "by": args.by})
    console.show(args, reply, str(reply["value"]), "value", key=key, value=reply["value"], rev=reply["rev"])
    return OK


def _txn(client: Client, args: argparse.Namespace) -> int:
    text = args.txn
    if text == "-" or text.startswith("@"):
        text = console.text(text)
    elif not text.lstrip().startswith("{"):
        text = Path(text).read_text(encoding="utf-8", errors="surrogateescape")
    request = console.parse_json(text, "The transaction")
    if not isinstance(request, dict) or not {"if", "then", "else"} & set(request):
        raise UsageError('A transaction is an object like {"if":[…],"then":[…],"else":[…]}.')
    reply = client.call({**request, "op": "txn"})
    if as_json(args):
        say_json(reply)
    elif args.output is not None:
        columns = ("rev", "result")
        console.write(console.sheet(args, columns, "result").page([reply["rev"], one] for one in reply["results"]))
    else:
        say(f"{'succeeded' if reply['succeeded'] else 'condition not met'} at revision {reply['rev']}")
        for result in reply["results"]:
            say_json(result)
    return OK if reply["succeeded"] else CONDITION_NOT_MET


def _export(client: Client, args: argparse.Namespace) -> int:
    from ddb import exporter  # like the two below, it needs more than others

    return exporter.export(client, args)


def _import(client: Client, args: argparse.Namespace) -> int:
    from ddb import importer

    return importer.import_(client, args)


def _mirror(client: Client, args: argparse.Namespace) -> int:
    from ddb import mirror

    return mirror.mirror(client, args)


# ------------------------------------------------------------- arguments


def _refuse_shared_input(*arguments: str | None) -> None:
    if arguments.count("-") > 1:
        raise UsageError("Standard input can be read for one argument only; name a file for the other: @FILE.")


def _conditions(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The `if` of a put or delete."""
    conditions: list[dict[str, Any]] = []
    if args.if_rev is not None:
        conditions.append({"rev": args.if_rev})
    if args.if_version is not None:
        conditions.append({"version": args.if_version})
    if args.if_value is not None:
        conditions.append({"value": console.value(args.if_value, kind)})
    if args.if_absent or args.if_exists:
        conditions.append({"exists": bool(args.if_exists)})
    return {"if": conditions} if conditions else {}


def _range(args: argparse.Namespace) -> dict[str, Any]:
    if args.prefix is not None and (args.start is not None or args.end is not None):
        raise UsageError("Give a PREFIX, or --start and --end, not both.")
    fields = {"prefix": args.prefix, "start": args.start, "end": args.end}
    return {name: value for name, value in fields.items() if value is not None}


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    if not args.stale:
        return {}
    return {"read": "stale", **({} if args.max_lag is None else {"max_lag": args.max_lag})}


COMMANDS: Final = (
    Command(
        "put",
        options.put_options,
        "set a key to a value",
        ("ddb put city Oslo", "ddb put logo @logo.png --bytes", "ddb put user/7 '{\"age\":41}' -t json --if-absent"),
        _put,
    ),
    Command(
        "get",
        options.get_options,
        "show the value of a key, or of several",
        ("ddb get city", "ddb get city motto -o table", "ddb get logo -o raw > logo.png", "ddb get city --rev 12"),
        _get,
    ),
    Command(
        "del",
        options.del_options,
        "delete a key, or several",
        ("ddb del city --if-rev 12", "ddb scan tmp/ --keys-only | ddb del -"),
        _delete,
    ),
    Command(
        "scan",
        options.scan_options,
        "list keys and values in the order of the keys",
        ("ddb scan user/ --limit 10", "ddb scan -o csv > all.csv", "ddb scan --start b --end d --reverse"),
        _scan,
    ),
    Command("count", options.count_options, "count keys", ("ddb count user/",), _count),
    Command("incr", options.incr_options, "add to an integer", ("ddb incr visits 5",), _incr),
    Command(
        "txn",
        options.txn_options,
        "do several operations at once, under conditions",
        ("""ddb txn '{"if":[{"key":"a","exists":true}],"then":[{"op":"delete","key":"a"}]}'""", "ddb txn @move.json"),
        _txn,
    ),
    Command(
        "export",
        options.export_options,
        "write keys and values to a file, as lines of JSON; where it is killed, the same command goes on",
        ("ddb export all.jsonl", "ddb export - --prefix user/ | gzip > user.gz"),
        _export,
        formats=(),
    ),
    Command(
        "import",
        options.import_options,
        "put what an export wrote, or any lines of JSON with key and value; where it is stopped, the same command goes on",
        ("ddb import all.jsonl", "gunzip < user.gz | ddb import - --into old/"),
        _import,
        formats=(),
    ),
    Command(
        "mirror",
        options.mirror_options,
        "copy keys to another cluster, and keep them up to date there; where it is stopped, the same command goes on",
        ("ddb mirror 10.0.1.1:8050", "ddb mirror 10.0.1.1:8050 user/ --into eu/ --once"),
        _mirror,
        formats=(),
    ),
)
