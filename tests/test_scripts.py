"""Scripted traces: a cluster's story as a text that a person can read, and that is compared to what really happens.

A script (tests/scripts/*.txt) is made of

    # remarks, which tell the story,
    commands, one a line, which the test carries out,
        and, indented below a command, what it makes happen: each message delivered, and each change of role.

Nothing happens but by commands. After a change of the core that should change the story,

    DDB_REWRITE=1 pytest tests/test_scripts.py

writes what happens now in place of what was expected; `git diff` then shows what changed. The commands:

    cluster NAME… [election=raft] [learners=NAME,…] [down] [one-by-one]    make a cluster; connected, and at rest, or
                                           still down; an append carries one batch only
    log NAME TERM… [term=N] [vote=NAME]    what is on the disk of a member that is down: the terms of its entries
    start NAME… · crash NAME… [forget=N] · silence NAME…     silence: stop it, without its connections breaking
    cut NAME… · heal                       cut the members named off from the rest; mend all
    stand NAME                             make it a candidate without asking anybody
    put NAME [N] · read NAME · transfer NAME NAME · add NAME · promote NAME · remove NAME    the latter three at the leader
    checkpoint NAME                        snapshot the state and drop the log below it
    tick NAME [SECONDS]                    let time pass for one of them
    pass SECONDS                           let time pass for all, and deliver everything
    deliver [FROM->TO] [KIND]              deliver the messages that are on their way now (from, to, of a kind)
    lose [FROM->TO] [KIND]                 lose them instead
    delay [FROM->TO] [KIND] · arrive       put them aside; deliver what was put aside, however late
    settle                                 deliver all messages, and what comes of them
    quietly COMMAND                        do it, and keep silent about messages
    show                                   each member's state, and its log: 1×3 is three entries of term 1
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

from ddb.config import Bounds
from ddb.errors import DdbError
from ddb.messages import (
    Append,
    AppendReply,
    ElectionReply,
    ElectionRequest,
    InstallSnapshot,
    Member,
    RaftMessage,
    ReadReply,
    ReadRequest,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.raft_net import Net, Peer, terms, with_log

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.txt"))
INDENT = "    "

KINDS: dict[type[RaftMessage], str] = {
    Append: "append",
    AppendReply: "reply",
    VoteRequest: "ask-vote",
    VoteReply: "vote",
    ElectionRequest: "may-I-stand",
    ElectionReply: "answer",
    TimeoutNow: "stand-now",
    ReadRequest: "ask-read",
    ReadReply: "read-at",
    InstallSnapshot: "snapshot",
    SnapshotReply: "snapshot-reply",
}


def tell(m: RaftMessage) -> str:
    """`m` in one line."""
    return f"{m.src} -> {m.dst}  @{m.term} {KINDS[type(m)]}{_details(m)}"


def _details(m: RaftMessage) -> str:
    match m:
        case Append():
            batches = "".join(f" {b.first}{f'..{b.last}' if b.last > b.first else ''}@{b.term}" for b in m.batches)
            what = f":{batches}" if batches else ""
            return f" after {m.prev_index}@{m.prev_term}{what}, commit {m.commit}{', confirmed' * m.confirmed}"
        case AppendReply():
            said = f"have {m.match}" if m.ok else f"refuse {m.rejected}, try {m.hint_index}@{m.hint_term}"
            return f" {said}{', in doubt' * m.doubt}"
        case VoteRequest() | ElectionRequest():
            return f" with {m.last_index}@{m.last_term}"
        case VoteReply():
            return f" {'yes' if m.granted else 'no'}{', in doubt' * m.doubt}"
        case ElectionReply():
            return f" {m.answer}"
        case ReadReply():
            return f" {m.index}"
        case InstallSnapshot():
            return f" of {m.index}@{m.index_term}"
        case SnapshotReply():
            return f" {m.index} installed"
        case _:
            return ""


def show(peer: Peer) -> str:
    """A peer's state in one line."""
    if peer.raft is None:
        return f"{peer.id} is down"
    raft = peer.raft
    runs = " ".join(f"{t}×{n}" if (n := len(list(run))) > 1 else f"{t}" for t, run in groupby(terms(raft)))
    base = f"snapshot {raft.log.base_index}@{raft.log.base_term} " if raft.log.base_index else ""
    return f"{raft!r}{' in doubt' * raft.doubt}  | {base}{runs}".rstrip()


class Script:
    """Carries out the commands of one script."""

    def __init__(self) -> None:
        self.net = Net(0)
        self.said: list[str] = []
        self._delayed: list[RaftMessage] = []
        self._roles: dict[str, str] = {}
        self._tickets = 0

    def do(self, command: str) -> list[str]:
        """What `command` makes happen, line by line."""
        self.said = []
        name, *words = command.split()
        quietly = name == "quietly"
        if quietly:
            name, *words = words
        self.net.on_deliver = None if quietly else lambda m: self.said.append(tell(m))
        options = dict(w.split("=", 1) for w in words if "=" in w)
        act: Callable[..., None] = getattr(self, f"do_{name}")
        try:
            act(*[w for w in words if "=" not in w], **options)
        except DdbError as error:
            self.said.append(f"{type(error).__name__}: {error.message}")
        self._tell_roles()
        return self.said

    def _tell_roles(self) -> None:
        for peer in self.net.running:
            leader = peer.up.leader
            role = f"{peer.id} is {peer.up.role_shown.value} @{peer.up.term}"
            role += f", led by {leader}" if leader not in (None, peer.id) else ""
            if self._roles.get(peer.id) != role:
                self._roles[peer.id] = role
                self.said.append(f"* {role}")
            for ticket, index in self.net.rules.answers.pop(peer.id, []):
                self.said.append(f"* {peer.id} may answer read {ticket}, having applied {index}")

    # --- the commands -----------------------------------------------------------------------------------------------

    def do_cluster(self, *names: str, election: str = "bully", learners: str = "") -> None:
        ids = [n for n in names if n not in ("down", "one-by-one")]
        bounds = Bounds(append_bytes_max=1) if "one-by-one" in names else Bounds()
        others = learners.split(",") if learners else ()
        self.net = Net(ids, election, learners=others, bounds=bounds, start="down" not in names)
        self._roles = {}
        self.said.clear()

    def do_log(self, name: str, *log: str, term: str = "", vote: str | None = None) -> None:
        with_log(self.net, name, [int(t) for t in log], int(term) if term else None, vote)

    def do_start(self, *names: str) -> None:
        for name in names:
            self.net.start(name)

    def do_crash(self, *names: str, forget: str = "0") -> None:
        for name in names:
            self.net.crash(name, forget=int(forget))
            self._roles.pop(name, None)

    def do_silence(self, *names: str) -> None:
        for name in names:
            self.net.crash(name, noticed=False)

    def do_cut(self, *names: str) -> None:
        self.net.isolate(*names)

    def do_heal(self) -> None:
        self.net.heal()

    def do_stand(self, name: str) -> None:
        self.net.provoke(name)

    def do_put(self, name: str, count: str = "1") -> None:
        for _ in range(int(count)):
            self.net.put(id=name)

    def do_read(self, name: str) -> None:
        self._tickets += 1
        self.net.read(name, self._tickets)

    def do_transfer(self, name: str, to: str) -> None:
        self.net[name].transfer(to, self.net.now)
        self.net.look_after(name)

    def do_add(self, name: str) -> None:
        self.net.change(self.net.leading.config.with_member(Member(name, name, name, False)))
        self.net.join(name)

    def do_promote(self, name: str) -> None:
        self.net.change(self.net.leading.config.with_member(Member(name, name, name, True)))

    def do_remove(self, name: str) -> None:
        self.net.change(self.net.leading.config.without(name))

    def do_checkpoint(self, name: str) -> None:
        self.net.peers[name].checkpoint()

    def do_tick(self, name: str, seconds: str = "0") -> None:
        self.net.tick(name, float(seconds))

    def do_pass(self, seconds: str) -> None:
        self.net.run(float(seconds))

    def do_settle(self) -> None:
        self.net.settle()

    def do_deliver(self, *which: str) -> None:
        for m in self._choose(which):
            self.net.deliver(self.net.wire.index(m))

    def do_lose(self, *which: str) -> None:
        for m in self._choose(which):
            self.net.wire.remove(m)
            if self.net.on_deliver:
                self.said.append(f"lost: {tell(m)}")

    def do_delay(self, *which: str) -> None:
        for m in self._choose(which):
            self.net.wire.remove(m)
            self._delayed.append(m)
            self.said.append(f"delayed: {tell(m)}")

    def do_arrive(self) -> None:
        delayed, self._delayed = self._delayed, []
        for m in delayed:
            self.net.hand(m)

    def do_show(self) -> None:
        self.said += [show(peer) for _, peer in sorted(self.net.peers.items())]

    def _choose(self, which: tuple[str, ...]) -> list[RaftMessage]:
        chosen = list(self.net.wire)
        for word in which:
            if "->" in word:
                src, dst = word.split("->")
                chosen = [m for m in chosen if src in ("", m.src) and dst in ("", m.dst)]
            else:
                assert word in KINDS.values(), f"no kind of message: {word}"
                chosen = [m for m in chosen if KINDS[type(m)] == word]
        return chosen


def perform(text: str) -> str:
    """`text` with what happens now in place of what it expects."""
    script = Script()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(INDENT):
            continue
        lines.append(line.rstrip())
        if line.strip() and not line.startswith("#"):
            lines += [INDENT + said for said in script.do(line)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_tells_what_happens(path: Path) -> None:
    expected = path.read_text()
    happened = perform(expected)
    if os.environ.get("DDB_REWRITE"):
        path.write_text(happened)
        return
    diff = difflib.unified_diff(expected.splitlines(), happened.splitlines(), "expected", "happened", lineterm="", n=8)
    assert happened == expected, f"{path.name} (DDB_REWRITE=1 rewrites it):\n" + "\n".join(diff)


def test_every_command_is_explained() -> None:
    commands = [name.removeprefix("do_") for name in dir(Script) if name.startswith("do_")]
    missing = [c for c in commands if not re.search(rf"^ {{4}}.*\b{c}\b", __doc__ or "", re.MULTILINE)]
    assert commands and missing == []


def test_a_story_is_compared_to_what_happens_and_told_anew() -> None:
    told = "# Alone.\n\ncluster n1\n    * n1 is leader @3\n    and more\nquietly pass 1\nshow\n"
    happened = "# Alone.\n\ncluster n1\n    * n1 is follower @0\nquietly pass 1\n    * n1 is leader @1\nshow\n"
    happened += "    n1@1 leader last=1@1 commit=1  | 1\n"
    assert perform(told) == happened
    assert perform(happened) == happened


@pytest.mark.parametrize("command", ["dance", "put", "deliver gossip", "start nobody", "log n1 one"])
def test_a_command_that_makes_no_sense_ends_the_story(command: str) -> None:
    with pytest.raises((AssertionError, AttributeError, KeyError, TypeError, ValueError)):
        perform(f"cluster n1 down\n{command}\n")
