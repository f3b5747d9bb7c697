"""The commands that hold something while another one runs: lock, elect; and lease, on which these hang.

Laws:

1. COMMAND runs only while the lock is held, as far as anybody can know: where it may be lost, COMMAND is killed at once,
   and so is all that it started, where there is no terminal.
2. COMMAND's exit code is the result; its signals are its own: what this process is sent, it is sent.
3. Whatever ends it, the lock is given back; where nobody can be told, it is free when its lease has run out.

Theory. Killing is the best that can be done from outside, and no more than that: a machine that was frozen wakes up with
COMMAND in the middle of a write. So DDB_TOKEN tells a number that grows with every holder; what COMMAND writes to should
refuse a smaller one than it has seen (docs/recipes.md). What COMMAND writes to ddb itself can be tied to the lock: the
key in DDB_LOCK_KEY is there for as long as it is held.

At a terminal COMMAND stays in the terminal's foreground, so that it can be typed to; Ctrl-C and Ctrl-\\ then reach it from
the terminal itself, and are not passed on a second time. Elsewhere it leads a process group of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final, TypeVar

from ddb import console, options
from ddb.client import Client
from ddb.commands import TTL_MS_MAX
from ddb.console import CONDITION_NOT_MET, ERROR, OK, Command, UsageError, as_json, complain, say, say_json, show
from ddb.errors import BadRequest, DdbError, TooLarge
from ddb.formats import ABSENT, Format, one_line
from ddb.options import REVISION_MAX
from ddb.recipes import Election, Lock
from ddb.results import to_wire
from ddb.scratch import Interrupts
from ddb.settings import is_utf8, seconds, whole

L = TypeVar("L", bound=Lock)

NOT_EXECUTABLE, NOT_THERE, OF_SIGNAL = 126, 127, 128  # as POSIX shells have it
PASSED_ON: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
FROM_THE_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
LOOK_S: Final = 0.05  # whether it is still held


# -------------------------------------------------------------- lock, elect


def _lock(client: Client, args: argparse.Namespace) -> int:
    return _hold(_judged(client.lock, args), args)


def _elect(client: Client, args: argparse.Namespace) -> int:
    if args.observe and (args.words or args.value is not None):
        raise UsageError("--observe only looks; leave out --value and COMMAND.")
    election = _judged(client.election, args)
    return _observe(election, args) if args.observe else _hold(election, args)


def _judged(make: Callable[..., L], args: argparse.Namespace) -> L:
    """The lock that the arguments name. Raises UsageError where there can't be such a one, or no such COMMAND."""
    if any("\0" in text for text in (args.name, *args.words)):
        raise UsageError("Neither a name nor COMMAND can hold a NUL: no program could be told of it.")
    if not all(is_utf8(text) for text in (args.name, args.value or "")):
        raise UsageError("A name or a --value is not UTF-8.")
    try:
        return make(args.name, args.ttl, value=args.value)
    except (BadRequest, TooLarge) as error:
        raise UsageError(error.message) from None


def _hold(lock: Lock, args: argparse.Namespace) -> int:
    """Wait for the lock, run COMMAND (or wait for an interrupt) while it is held, and give it back."""
    with Interrupts():
        try:
            if not lock.acquire(args.wait):
                who = ", ".join(one_line(to_wire(holder.value)) for holder in lock.holders()) or "nobody any more"
                complain(f"{lock.name!r} was not to be had within {args.wait:g} s; it is held by {who}.")
                return CONDITION_NOT_MET
            code = _run(args.words, lock) if args.words else _wait(lock, args)
            lost = lock.lost
        finally:
            lock.release()
    if lost:
        complain(f"{lock.name!r} may have been lost" + (", so the command was killed." if args.words else "."))
        return ERROR
    return code


def _wait(lock: Lock, args: argparse.Namespace) -> int:
    """Hold it until an interrupt."""
    verb = "leading" if isinstance(lock, Election) else "held"
    reply = {"ok": True, "name": lock.name, "token": lock.token, "key": lock.key}
    show(args, reply, f"{verb}, token {lock.token}; Ctrl-C ends it", "token", name=lock.name, token=lock.token)
    sys.stdout.flush()
    try:
        while not lock.lost:
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        pass
    return OK


def _run(words: Sequence[str], lock: Lock) -> int:
    """Run COMMAND while `lock` is held. Returns its exit code, as a shell would tell it."""
    env = {**os.environ, "DDB_LOCK": lock.name, "DDB_TOKEN": str(lock.token), "DDB_LOCK_KEY": lock.key}
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    sys.stdout.flush()
    try:
        with _signals_for(at_terminal) as child:
            child.process = subprocess.Popen(words, env=env, process_group=None if at_terminal else 0)
            child.deliver()
            return _until_ended(child, lock)
    except OSError as error:
        complain(f"{words[0]} can't be run: {error.strerror}.")
        return NOT_THERE if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    except UnicodeEncodeError as error:  # typed into the shell, which is UTF-8 whatever the locale says
        complain(f"{words[0]} can't be run: this locale has no {error.object[error.start]!r}.")
        return NOT_EXECUTABLE


def _until_ended(child: _Child, lock: Lock) -> int:
    process = child.process
    assert process is not None
    try:
        while True:
            if lock.lost:
                child.kill()
            try:
                code = process.wait(LOOK_S)
                break
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        child.kill()
        process.wait()
        raise
    return code if code >= 0 else OF_SIGNAL - code


class _Child:
    """COMMAND as a process, and the signals that came before it was there."""

    def __init__(self, at_terminal: bool) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._at_terminal = at_terminal
        self._early: list[int] = []

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._at_terminal and number in FROM_THE_TERMINAL:
            return
        if self.process is None:
            self._early.append(number)
        else:
            self._send(number)

    def deliver(self) -> None:
        """Pass on what came before there was anybody to take it."""
        for number in self._early:
            self._send(number)

    def kill(self) -> None:
        """End it, and where it leads a group, the group."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        assert self.process is not None
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            (os.kill if self._at_terminal else os.killpg)(self.process.pid, number)


@contextlib.contextmanager
def _signals_for(at_terminal: bool) -> Iterator[_Child]:
    """A child to be, that is passed on the signals of this process."""
    child = _Child(at_terminal)
    if threading.current_thread() is not threading.main_thread():
        yield child
        return
    before = {number: signal.signal(number, child.pass_on) for number in PASSED_ON}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _observe(election: Election, args: argparse.Namespace) -> int:
    """Tell who leads, now and whenever that changes."""
    sheet = console.sheet(args, ("token", "value"), "value")
    for told, leader in enumerate(election.observe(), 1):
        token, value = (ABSENT, ABSENT) if leader is None else (leader.token, to_wire(leader.value))
        if as_json(args):
            say_json({"token": None, "value": None} if leader is None else {"token": token, "value": value})
        elif args.output is not None:
            console.write(sheet.page([[token, "" if value is ABSENT and args.output is Format.RAW else value]]))
        else:
            say("nobody leads" if leader is None else f"{one_line(value)} leads, token {token}")
        sys.stdout.flush()
        if told == args.limit:
            break
    return OK


# -------------------------------------------------------------------- lease


def _lease(client: Client, args: argparse.Namespace) -> int:
    if args.action == "list":
        if args.what is not None:
            raise UsageError("`lease list` takes no ID.")
        return _lease_list(client, args)
    if args.what is None:
        raise UsageError(
            f"`lease {args.action}` needs {'a TTL in seconds' if args.action == 'grant' else 'the ID of a lease'}."
        )
    if args.action == "grant":
        return _lease_grant(client, args)
    return _lease_keepalive(client, args) if args.action == "keepalive" else _lease_revoke(client, args)


def _lease_id(args: argparse.Namespace) -> int:
    try:
        return whole(1, REVISION_MAX)(args.what)
    except argparse.ArgumentTypeError:
        raise UsageError(
            f"{args.what!r} is no lease's ID, a number as `lease grant` and `lease list` tell it."
        ) from None


def _lease_grant(client: Client, args: argparse.Namespace) -> int:
    try:
        ttl_s = seconds(0.001, TTL_MS_MAX / 1000)(args.what)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{error}.") from None
    reply = client.call({"op": "lease_grant", "ttl": int(ttl_s) if ttl_s == int(ttl_s) else ttl_s})
    show(args, reply, str(reply["lease"]), "lease", lease=reply["lease"], ttl=reply.get("ttl", ttl_s))
    return OK


def _lease_keepalive(client: Client, args: argparse.Namespace) -> int:
    """One sign of life with --once, else one each third of its time, until an interrupt. Raises BadRequest where it is
    gone."""
    lease, last_s = _lease_id(args), time.monotonic()
    ttl_s = 0.0
    with Interrupts(), contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                reply = client.call({"op": "lease_keepalive", "lease": lease})
                last_s = time.monotonic()
                if not ttl_s:
                    said = f"{lease} is kept alive, {reply['ttl']:g} s at a time"
                    show(
                        args,
                        reply,
                        said + ("" if args.once else "; Ctrl-C ends it"),
                        "ttl",
                        lease=lease,
                        ttl=reply["ttl"],
                    )
                    sys.stdout.flush()
                ttl_s = float(reply["ttl"])
            except DdbError as error:
                if isinstance(error, BadRequest) or not ttl_s or time.monotonic() - last_s > ttl_s:
                    raise
            if args.once:
                return OK
            time.sleep(ttl_s / 3)
    return OK


def _lease_revoke(client: Client, args: argparse.Namespace) -> int:
    lease = _lease_id(args)
    reply = client.call({"op": "lease_revoke", "lease": lease})
    deleted = reply.get("deleted", 0)
    said = f"revoked at revision {reply['rev']}, and {deleted} keys with it"
    show(args, reply, said, "rev", lease=lease, deleted=deleted, rev=reply["rev"])
    return OK


def _lease_list(client: Client, args: argparse.Namespace) -> int:
    columns = ("lease", "ttl", "keys", "remaining")
    sheet = console.sheet(args, columns, "lease")
    request: dict[str, Any] = {"op": "lease_list"}
    while True:
        reply = client.call(request)
        if as_json(args):
            say_json(reply)
        else:
            rows = [[one.get(name, ABSENT) for name in columns] for one in reply["leases"]]
            console.write(sheet.page([*row[:3], round(row[3], 1) if row[3] is not ABSENT else ABSENT] for row in rows))
        if not reply.get("more"):
            return OK
        request["from"] = reply["leases"][-1]["lease"] + 1


COMMANDS: Final = (
    Command(
        "lock",
        options.lock_options,
        "run a command while a lock is held (DDB_TOKEN is its fencing token); its exit code is the result",
        ("ddb lock backup -- ./backup.sh /data", "ddb lock backup --ttl 30 --wait 0 -- make deploy", "ddb lock backup"),
        _lock,
        words=True,
    ),
    Command(
        "elect",
        options.elect_options,
        "campaign, and run a command while leading; or watch who leads",
        ("ddb elect scheduler --value host7 -- ./scheduler", "ddb elect scheduler --observe"),
        _elect,
        words=True,
    ),
    Command(
        "lease",
        options.lease_options,
        "grant, keep alive, revoke or list leases, which keys put with --lease hang on",
        ("ddb lease grant 60", "ddb lease keepalive 17", "ddb lease revoke 17", "ddb lease list -o json"),
        _lease,
    ),
)
