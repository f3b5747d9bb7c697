"""The command line: `python -m ddb`, `bin/ddb`.

Laws:

1. What was asked for goes to standard output, everything else to standard error; so output can be piped.
2. A failure is one sentence, never a traceback, and its kind is the exit code: 0 ok, 1 error, 2 usage, 3 not found,
   4 condition not met, 5 no leader or unreachable, 6 outcome unknown (a write that may have happened).
3. A value is text unless `--type` says otherwise: `put n 5` stores the string "5", and never guesses.
4. `--json` prints the server's reply as it came, one object a line.

Each command is one function that takes the client and the arguments and returns an exit code; `_COMMANDS` at the end
is the table of them.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import ddb
from ddb import options, overview, wire
from ddb.client import Client, connect, next_page
from ddb.errors import DdbError, Unreachable
from ddb.options import TIMEOUT_S, VERIFY_TIMEOUT_S
from ddb.progress import Progress
from ddb.settings import USAGE, OneLineParser

OK, ERROR, NOT_FOUND, CONDITION_NOT_MET, UNREACHABLE, INTERRUPTED, BROKEN_PIPE = 0, 1, 3, 4, 5, 130, 141
UNREACHABLE_S: Final = 1.0
PAGE_ITEMS: Final = 1000  # asked for at once

EXIT_CODES = """exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 condition not met,
            5 no leader or unreachable, 6 outcome unknown (the write may have happened)"""


class UsageError(DdbError):
    """Arguments that make no sense."""

    exit_code = USAGE


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (the process's own when None) and return the exit code."""
    _speak_utf8()
    try:
        args = _parser().parse_args(argv)
        code = _run(args)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse's --help and errors
        return end.code if isinstance(end.code, int) else OK
    except DdbError as error:
        _complain(error.message)
        return error.exit_code
    except BrokenPipeError:  # the reader has seen enough: `ddb scan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    if args.command == "sim":
        return _sim(args)
    if args.timeout is None:
        args.timeout = VERIFY_TIMEOUT_S if args.command == "verify" else TIMEOUT_S
    if args.command == "verify":
        return _verify(args)
    if args.command == "bench":
        return _bench(args)
    if args.command == "up":
        from ddb import up  # it needs the machinery of processes, which others don't

        settings = up.Settings(
            Path(args.dir), args.nodes, args.host, args.port, args.registry_port, args.election, args.ready_timeout
        )
        return up.run(settings, lambda line: print(line, flush=True), overview.wants_colour(sys.stdout))
    try:
        connected = connect(args.server, timeout_s=args.timeout, discover=False, unreachable_s=UNREACHABLE_S)
    except DdbError as error:
        raise UsageError(error.message) from None
    with connected as client:
        code: int = args.run(client, args)
        return code


# ------------------------------------------------------------------- data


def _put(client: Client, args: argparse.Namespace) -> int:
    request = {"op": "put", "key": args.key, "value": _value(args.value, args.type), **_conditions(args)}
    reply = client.call(request)
    return _written(reply, args, f"revision {reply['rev']}")


def _get(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "get", "key": args.key, **_reading(args)})
    if args.json:
        _print_json(reply)
    elif reply["found"]:
        _print_value(reply["value"])
    else:
        _complain(f"There is nothing under {args.key!r}.")
    return OK if reply["found"] else NOT_FOUND


def _delete(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "delete", "key": args.key, **_conditions(args)})
    code = _written(reply, args, f"deleted at revision {reply['rev']}" if reply.get("deleted") else None)
    if code == OK and not reply.get("deleted"):
        if not args.json:
            _complain(f"There was nothing under {args.key!r}.")
        return NOT_FOUND
    return code


def _written(reply: dict[str, Any], args: argparse.Namespace, said: str | None) -> int:
    """Show the reply to a write that may have had a condition."""
    if args.json:
        _print_json(reply)
    elif not reply.get("applied", True):
        now = f"{args.key!r} is at revision {reply['rev']}" if reply.get("found") else f"{args.key!r} does not exist"
        _complain(f"The condition does not hold, nothing was changed: {now}.")
    elif said is not None:
        print(said)
    return OK if reply.get("applied", True) else CONDITION_NOT_MET


def _scan(client: Client, args: argparse.Namespace) -> int:
    for page in _pages(client, args):
        if args.json:
            _print_json(page)
            continue
        for item in page["items"]:
            print(item["key"] if args.keys_only else f"{item['key']}\t{_one_line(item['value'])}")
    return OK


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
    _print_json(reply) if args.json else print(reply["count"])
    return OK


def _incr(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "incr", "key": args.key, "by": args.by})
    _print_json(reply) if args.json else print(reply["value"])
    return OK


def _txn(client: Client, args: argparse.Namespace) -> int:
    text = args.txn
    if text == "-":
        text = _stdin()
    elif not text.lstrip().startswith("{"):
        text = Path(text).read_text(encoding="utf-8", errors="surrogateescape")
    request = _parse_json(text, "The transaction")
    if not isinstance(request, dict) or not {"if", "then", "else"} & set(request):
        raise UsageError('A transaction is an object like {"if":[…],"then":[…],"else":[…]}.')
    reply = client.call({**request, "op": "txn"})
    if args.json:
        _print_json(reply)
    else:
        print(f"{'succeeded' if reply['succeeded'] else 'condition not met'} at revision {reply['rev']}")
        for result in reply["results"]:
            _print_json(result)
    return OK if reply["succeeded"] else CONDITION_NOT_MET


# ---------------------------------------------------------------- cluster


def _status(client: Client, args: argparse.Namespace) -> int:
    views = overview.ask_all(client.servers, min(args.timeout, overview.PATIENCE_S))
    if args.json:
        for view in views:
            gone = {"ok": False, "node": view.name, "address": view.address}
            error = view.error and {"error": view.error.code, "message": view.error.message}
            _print_json(view.status or {**gone, **(error or {})})
    else:
        print("\n".join(overview.status_table(views, overview.wants_colour(sys.stdout))))
    if all(view.status is None for view in views):
        raise Unreachable(f"No server answered: {'; '.join(v.error.message for v in views if v.error)}")
    if overview.leader_of(views) is None:
        _complain("There is no leader now.")
        return UNREACHABLE
    return OK


def _members(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "members"})
    if args.json:
        _print_json(reply)
        return OK
    rows = [["NAME", "ROLE", "ADDRESS", "ALIVE", "MATCH", "HEARD", "ID"]]
    for m in sorted(reply["members"], key=lambda m: str(m["name"])):
        alive = {True: "yes", False: "no", None: "-"}[m.get("alive")]
        heard = "-" if m.get("last_heard") is None else f"{m['last_heard']:.1f} s ago"
        match = "-" if m.get("match") is None else str(m["match"])
        rows.append([m["name"], m["role"], m["address"], alive, match, heard, m["id"]])
    print("\n".join(overview.aligned(rows, right={4}, colour=overview.wants_colour(sys.stdout))))
    return OK


def _remove(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "member_remove", "name": args.name})
    _print_json(reply) if args.json else print(f"{args.name} is no member any more, since revision {reply['rev']}")
    return OK


def _promote(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "member_promote", "name": args.name})
    _print_json(reply) if args.json else print(f"{args.name} is a voter since revision {reply['rev']}")
    return OK


def _transfer(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "transfer", **({"to": args.to} if args.to else {})})
    _print_json(reply) if args.json else print(f"the leader is {reply['name']} at {reply['leader']}")
    return OK


def _snapshot(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "snapshot"})
    _print_json(reply) if args.json else print(f"revision {reply['rev']} is in the snapshot on disk")
    return OK


def _ping(client: Client, args: argparse.Namespace) -> int:
    began = time.perf_counter()
    reply = client.call({"op": "ping"})
    took_ms = (time.perf_counter() - began) * 1e3
    _print_json(reply) if args.json else print(f"{reply['node']} answered in {took_ms:.1f} ms")
    return OK


def _log(client: Client, args: argparse.Namespace) -> int:
    request: dict[str, Any] = {"op": "log", "limit": args.limit}
    request.update({} if args.from_ is None else {"from": args.from_})
    reply = client.call(request)
    if args.json:
        _print_json(reply)
        return OK
    for entry in reply["entries"]:
        print(f"{entry['index']:>8} @{entry['term']}  {_entry_shown(entry)}")
    return OK


def _entry_shown(entry: dict[str, Any]) -> str:
    """What an entry of the log does: a command as JSON, a configuration as its members' names."""
    if "config" not in entry:
        return wire.encode(entry["command"]).decode()
    members = sorted(entry["config"]["members"], key=lambda m: str(m["name"]))
    return "members: " + ", ".join(m["name"] if m["voter"] else f"{m['name']} (learner)" for m in members)


# ----------------------------------------------------------------- verify


def _verify(args: argparse.Namespace) -> int:
    from ddb import verify  # like `up`, it needs more than others

    if args.html is not None and not _can_be_written(args.html):
        raise UsageError(f"{args.html} can't be written: choose another file for --html.")
    settings = verify.Settings(
        servers=tuple(_addresses(args.server)), seconds=args.seconds, clients=args.clients, keys=args.keys,
        rate=args.rate, mix=args.mix, timeout_s=args.timeout, seed=args.seed, faults=args.faults or (),
        nodes=args.nodes, election=args.election,
    )  # fmt: skip
    with Progress(sys.stderr) as progress:
        findings = verify.run(settings, progress.show)
    if args.json:
        _print_json(findings.to_json())
    else:
        print("\n".join(findings.lines(overview.wants_colour(sys.stdout))))
    if findings.refuted and args.html is not None:
        args.html.write_text(findings.to_html(), encoding="utf-8")
        _complain(f"The picture is in {args.html}.")
    if findings.trouble:
        _complain(findings.trouble)
    return findings.exit_code


def _bench(args: argparse.Namespace) -> int:
    from ddb import benchmark

    settings = benchmark.Settings(
        tuple(_addresses(args.server)), args.seconds, args.clients, args.value_size, args.keys, args.timeout
    )
    with Progress(sys.stderr) as progress:
        report = benchmark.run(settings, progress.show)
    _print_json(report.to_json()) if args.json else print("\n".join(report.lines(overview.wants_colour(sys.stdout))))
    if report.trouble:
        _complain(report.trouble)
    return report.exit_code


def _can_be_written(path: Path) -> bool:
    place = path if path.exists() else path.parent
    return os.access(place, os.W_OK) and not path.is_dir()


def _addresses(servers: str) -> list[str]:
    """The addresses in `--server`, each in the one way."""
    try:
        with connect(servers, discover=False) as client:
            return list(client.servers)
    except DdbError as error:
        raise UsageError(error.message) from None


# --------------------------------------------------------------------- sim


def _sim(args: argparse.Namespace) -> int:
    from ddb import simreport  # it needs everything

    try:
        faults, kept = simreport.fault_kinds(args.faults), simreport.positions(args.keep)
    except ValueError as error:
        raise UsageError(str(error)) from None
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    asked = simreport.Options(seed, args.nodes, args.election, args.steps, faults, args.until, kept)
    say = (lambda line: None) if args.json else print
    with Progress(sys.stderr) as progress:
        if args.seeds > 1:
            tally = simreport.many(asked, args.seeds, args.jobs, say, progress.show)
        else:
            tally = simreport.one(asked, say, args.trace, args.minimize, progress.show)
    if args.json:
        _print_json(tally.to_json())
    return ERROR if tally.failures else OK


# ----------------------------------------------------------- in and out


def _speak_utf8() -> None:
    """Values are UTF-8 whatever the locale says; what can't be shown is escaped, and never ends in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _complain(sentence: str) -> None:
    print(f"ddb: {sentence}", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(wire.encode(value).decode())


def _print_value(value: Any) -> None:
    """A text as it is, bytes as they are, anything else as JSON."""
    raw = _raw_bytes(value)
    if raw is not None:
        sys.stdout.flush()
        sys.stdout.buffer.write(raw)
    else:
        print(value if isinstance(value, str) else wire.encode(value).decode())


def _one_line(value: Any) -> str:
    """A value for a line of its own: a text that would break the line, like anything that is no text, as JSON."""
    return value if isinstance(value, str) and value.isprintable() else wire.encode(value).decode()


def _raw_bytes(value: Any) -> bytes | None:
    """The bytes that the object `{"$b64": …}` stands for, None where `value` is no such object."""
    if isinstance(value, dict) and set(value) == {"$b64"} and isinstance(value["$b64"], str):
        try:
            return base64.b64decode(value["$b64"], validate=True)
        except (binascii.Error, ValueError):
            return None
    return None


def _stdin_bytes() -> bytes:
    return sys.stdin.buffer.read()


def _stdin() -> str:
    try:
        return _stdin_bytes().decode()
    except UnicodeDecodeError:
        raise UsageError("Standard input is not UTF-8; for other bytes say --type bytes.") from None


def _value(text: str, kind: str) -> Any:
    """The value that the argument `text` (`-`: standard input) stands for."""
    if kind == "bytes":
        raw = _stdin_bytes() if text == "-" else os.fsencode(text)
        return {"$b64": base64.b64encode(raw).decode()}
    if text == "-":
        text = _stdin()
    return _parse_json(text, "The value") if kind == "json" else text


def _parse_json(text: str, what: str) -> Any:
    try:
        return wire.decode_value(text.encode("utf-8", "surrogateescape"))
    except DdbError as error:
        raise UsageError(f"{what} is not JSON: {error.message}") from None


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    """The `if` of a put or delete."""
    conditions: list[dict[str, Any]] = []
    if args.if_rev is not None:
        conditions.append({"rev": args.if_rev})
    if args.if_version is not None:
        conditions.append({"version": args.if_version})
    if args.if_value is not None:
        conditions.append({"value": _value(args.if_value, args.type)})
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


# ------------------------------------------------------------ the parser


_Run = Callable[[Client, argparse.Namespace], int]
_COMMANDS: dict[str, tuple[_Run | None, Callable[[argparse.ArgumentParser], None], str, str]] = {
    "up": (
        None,
        options.up_options,
        "run a whole cluster on this machine until Ctrl-C",
        "ddb up --nodes 5 --dir /tmp/five",
    ),
    "put": (_put, options.put_options, "set a key to a value", "ddb put city Oslo"),
    "get": (_get, options.get_options, "show the value of a key", "ddb get city"),
    "del": (_delete, options.del_options, "delete a key", "ddb del city --if-rev 12"),
    "scan": (_scan, options.scan_options, "list keys and values in the order of the keys", "ddb scan user/ --limit 10"),
    "count": (_count, options.count_options, "count keys", "ddb count user/"),
    "incr": (_incr, options.incr_options, "add to an integer", "ddb incr visits 5"),
    "txn": (
        _txn,
        options.txn_options,
        "do several operations at once, under conditions",
        """ddb txn '{"if":[{"key":"a","exists":true}],"then":[{"op":"delete","key":"a"}]}'""",
    ),
    "status": (_status, options.none, "ask every member how it is", "ddb status"),
    "members": (_members, options.none, "list the members as the leader sees them", "ddb members"),
    "remove": (_remove, options.name_option, "remove a member for good", "ddb remove n3"),
    "promote": (_promote, options.name_option, "make a learner a voter", "ddb promote n4"),
    "transfer": (_transfer, options.transfer_options, "hand leadership to another voter", "ddb transfer n2"),
    "snapshot": (_snapshot, options.none, "have the asked node write a checkpoint now", "ddb snapshot"),
    "log": (
        _log,
        options.log_options,
        "show the replicated log as the asked node keeps it",
        "ddb log --from 10 --limit 5",
    ),
    "verify": (
        None,
        options.verify_options,
        "see whether what clients are told is linearizable (exit code 0) or not (1)",
        "ddb verify --faults",
    ),
    "sim": (
        None,
        options.sim_options,
        "simulate a cluster, its clients and all that can go wrong, from one seed (exit code 1: a rule was broken)",
        "ddb sim --seed 7 --nodes 3 --trace",
    ),
    "bench": (
        None,
        options.bench_options,
        "measure how fast the cluster answers, with keys of its own that it removes again",
        "ddb bench --clients 16 --seconds 5",
    ),
    "ping": (_ping, options.none, "see whether a node answers", "ddb ping --server 127.0.0.1:8051"),
}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="ddb",
        description="A replicated key/value database. Start with: ddb up",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"ddb {ddb.__version__}")
    options.common(parser, top=True)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for name, (run, add_options, summary, example) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}\n\n{EXIT_CODES}",
        )
        add_options(sub)
        if name not in ("up", "sim"):
            options.common(sub, top=False, timeout_s=VERIFY_TIMEOUT_S if name == "verify" else TIMEOUT_S)
        sub.set_defaults(run=run)
    return parser
