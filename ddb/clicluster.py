"""The commands about the cluster itself: status, members, remove, promote, transfer, snapshot, log, ping."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, Final

from ddb import console, options, overview, wire
from ddb.client import Client
from ddb.console import OK, UNREACHABLE, Command, as_json, complain, say, say_json, show
from ddb.errors import Unreachable
from ddb.formats import ABSENT, Format

_MEMBER: Final = ("name", "role", "address", "alive", "match", "last_heard", "id")


def _status(client: Client, args: argparse.Namespace) -> int:
    views = overview.ask_all(client.servers, min(args.timeout, overview.PATIENCE_S))
    if as_json(args):
        for view in views:
            gone = {"ok": False, "node": view.name, "address": view.address}
            error = view.error and {"error": view.error.code, "message": view.error.message}
            say_json(view.status or {**gone, **(error or {})})
    elif args.output is Format.CSV:
        columns = ("name", "role", "term", "address", "last", "commit", "applied")
        console.write(console.sheet(args, columns, "name").page(map(_status_row, views)))
    else:
        say("\n".join(overview.status_table(views, overview.wants_colour(sys.stdout))))
    if all(view.status is None for view in views):
        raise Unreachable(f"No server answered: {'; '.join(v.error.message for v in views if v.error)}")
    if overview.leader_of(views) is None:
        complain("There is no leader now.")
        return UNREACHABLE
    return OK


def _status_row(view: overview.View) -> list[Any]:
    status = view.status or {}
    log = status.get("log") or {}
    numbers = [log.get(name, ABSENT) for name in ("last", "commit", "applied")]
    return [view.name, status.get("role", "unreachable"), status.get("term", ABSENT), view.address, *numbers]


def _members(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "members"})
    members = sorted(reply["members"], key=lambda m: str(m["name"]))
    if as_json(args):
        say_json(reply)
        return OK
    if args.output is Format.CSV:
        rows = [[ABSENT if m.get(name) is None else m[name] for name in _MEMBER] for m in members]
        console.write(console.sheet(args, _MEMBER, "name").page(rows))
        return OK
    table = [["NAME", "ROLE", "ADDRESS", "ALIVE", "MATCH", "HEARD", "ID"]]
    for m in members:
        alive = {True: "yes", False: "no", None: "-"}[m.get("alive")]
        heard = "-" if m.get("last_heard") is None else f"{m['last_heard']:.1f} s ago"
        match = "-" if m.get("match") is None else str(m["match"])
        table.append([m["name"], m["role"], m["address"], alive, match, heard, m["id"]])
    say("\n".join(overview.aligned(table, right={4}, colour=overview.wants_colour(sys.stdout))))
    return OK


def _remove(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "member_remove", "name": args.name})
    said = f"{args.name} is no member any more, since revision {reply['rev']}"
    show(args, reply, said, "rev", name=args.name, rev=reply["rev"])
    return OK


def _promote(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "member_promote", "name": args.name})
    show(args, reply, f"{args.name} is a voter since revision {reply['rev']}", "rev", name=args.name, rev=reply["rev"])
    return OK


def _transfer(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "transfer", **({"to": args.to} if args.to else {})})
    said = f"the leader is {reply['name']} at {reply['leader']}"
    show(args, reply, said, "name", name=reply["name"], address=reply["leader"])
    return OK


def _snapshot(client: Client, args: argparse.Namespace) -> int:
    reply = client.call({"op": "snapshot"})
    show(args, reply, f"revision {reply['rev']} is in the snapshot on disk", "rev", rev=reply["rev"])
    return OK


def _ping(client: Client, args: argparse.Namespace) -> int:
    began = time.perf_counter()
    reply = client.call({"op": "ping"})
    took_ms = (time.perf_counter() - began) * 1e3
    show(args, reply, f"{reply['node']} answered in {took_ms:.1f} ms", "ms", node=reply["node"], ms=round(took_ms, 3))
    return OK


def _log(client: Client, args: argparse.Namespace) -> int:
    request: dict[str, Any] = {"op": "log", "limit": args.limit}
    request.update({} if args.from_ is None else {"from": args.from_})
    reply = client.call(request)
    if as_json(args):
        say_json(reply)
        return OK
    if args.output is not None:
        rows = [[e["index"], e["term"], e["at"], entry_shown(e)] for e in reply["entries"]]
        console.write(console.sheet(args, ("index", "term", "at", "entry"), "entry").page(rows))
        return OK
    for entry in reply["entries"]:
        say(f"{entry['index']:>8} @{entry['term']}  {entry_shown(entry)}")
    return OK


def entry_shown(entry: dict[str, Any]) -> str:
    """What an entry of the log does: a command as JSON, a configuration as its members' names."""
    if "config" not in entry:
        return wire.encode(entry["command"]).decode()
    members = sorted(entry["config"]["members"], key=lambda m: str(m["name"]))
    return "members: " + ", ".join(m["name"] if m["voter"] else f"{m['name']} (learner)" for m in members)


_TABLES: Final = (Format.TABLE, Format.JSON, Format.CSV)

COMMANDS: Final = (
    Command("status", options.none, "ask every member how it is", ("ddb status",), _status, formats=_TABLES),
    Command(
        "members", options.none, "list the members as the leader sees them", ("ddb members",), _members, formats=_TABLES
    ),
    Command("remove", options.name_option, "remove a member for good", ("ddb remove n3",), _remove),
    Command("promote", options.name_option, "make a learner a voter", ("ddb promote n4",), _promote),
    Command("transfer", options.transfer_options, "hand leadership to another voter", ("ddb transfer n2",), _transfer),
    Command("snapshot", options.none, "have the asked node write a checkpoint now", ("ddb snapshot",), _snapshot),
    Command(
        "log",
        options.log_options,
        "show the replicated log as the asked node keeps it",
        ("ddb log --from 10 --limit 5",),
        _log,
    ),
    Command("ping", options.none, "see whether a node answers", ("ddb ping --server 127.0.0.1:8051",), _ping),
)
