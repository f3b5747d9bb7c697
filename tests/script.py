"""A language for stories about consensus: commands, and below each what came of it.

    # The bully: b asks whether it may stand, and is told to wait for its better.
    > tick b
    > deliver ask
    b@1 -> a ask: may 1@1 b stand? (a is down)
    b@1 -> c ask: may 1@1 b stand?
    > deliver answer
    c@1 -> b answer: alive

Laws: a line that begins with `>` is a command; one with `#` is the story, and empty ones are air; all others are what the
command above them did, exactly. Time moves, messages arrive and disks finish only where a command says so (`raft_net`), and
every rule of Raft is checked after each step, whether the story speaks of it or not.

What a command did: the messages that it delivered, if that is what it is for; the reads that were answered; then each
member whose state is another than before, in one line: name@term, role, the log's last entry as index@term, the commit
index. Where a member's configuration changed, it is shown too, learners with a `+`.

| command | what it does |
|---|---|
| `nodes a b +c [election=raft] [seed=7] [append_bytes=1]` | a cluster of voters a and b and learner c, all down |
| `log a 1 1 2 [term=3] [vote=b]` | give a, which is down, a log of entries of these terms |
| `start [a …]` · `crash a … [silently] [forget=1]` | `silently`: nobody notices; `forget`: so many durable records are gone |
| `join d` | start a member that no configuration knows |
| `stand a` · `elect [a]` | a becomes a candidate, asking nobody; and wins. Without a name: wait until somebody leads |
| `put a [3]` · `read a` | at a: propose that many writes as one batch; ask for a linearizable read |
| `add d` · `promote d` · `remove d` | the leader's change of the members: d becomes a learner, a voter, or nothing |
| `transfer a` | the leader hands over to a |
| `checkpoint a` | a takes a snapshot, and drops the log below |
| `tick [a …] [s=0.025]` · `wait 1.5` | time passes: for these, once; or for all, everything being delivered |
| `wire [FILTER]` · `deliver [FILTER]` · `drop [FILTER]` | show, deliver or lose the messages that are on the wire now |
| `settle [FILTER]` | deliver all of it and all that comes of it, showing only what has changed at the end |
| `delay [FILTER]` · `arrive` | put messages aside; deliver those, however late |
| `cut a b` · `cut a->b` · `isolate a …` · `heal` | nothing passes between two, one way only, or from these to the rest; mend all |
| `hold a` · `write a` | the disk of a saves nothing any more; it saves all that waits |
| `show [a …]` · `logs [a …]` | states; logs, one term an entry (`c`: a configuration), with a bar behind the committed |

A FILTER is any of `a->b` (`*` for anybody) and kinds of message: `ask`, `answer`, `vote?`, `vote`, `append`, `heartbeat`,
`ack`, `stand`, `read?`, `read`, `snapshot`, `installed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ddb.config import Bounds
from ddb.errors import DdbError
from ddb.messages import (
    Append,
    AppendReply,
    Batch,
    Configuration,
    ElectionReply,
    ElectionRequest,
    InstallSnapshot,
    Member,
    Message,
    ReadReply,
    ReadRequest,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from tests.raft_net import Net, with_log


class ScriptError(Exception):
    """A command that can't be understood or done; the line is named."""


def play(text: str) -> str:
    """The script `text` with what its commands really did in place of what it expects. Raises ScriptError."""
    stage = Stage()
    played: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(">"):
            try:
                played += [line, *stage.do(line[1:].split())]
            except ScriptError as error:
                raise ScriptError(f"line {number}, {line!r}: {error}") from error
        elif line.startswith("#") or not line.strip():
            played.append(line)
    return "\n".join(played) + "\n"


# --- how things look -----------------------------------------------------------------------------------------------------


def kind_of(m: Message) -> str:
    """What a FILTER calls the message, and its line begins with."""
    if isinstance(m, Append):
        return "append" if m.batches else "heartbeat"
    return KINDS[type(m)]


KINDS: dict[type[Any], str] = {
    AppendReply: "ack",
    ElectionReply: "answer",
    ElectionRequest: "ask",
    InstallSnapshot: "snapshot",
    ReadReply: "read",
    ReadRequest: "read?",
    SnapshotReply: "installed",
    TimeoutNow: "stand",
    VoteReply: "vote",
    VoteRequest: "vote?",
}


def tell(m: Message) -> str:
    """The message in one line."""
    term = getattr(m, "term", "")
    return f"{m.src}@{term} -> {m.dst} {kind_of(m)}: {_content(m)}"


def _content(m: Message) -> str:
    doubt = " (in doubt)" if getattr(m, "doubt", False) else ""
    match m:
        case Append():
            words = [" ".join(map(_batch, m.batches)), f"after {m.prev_index}@{m.prev_term}", f"commit={m.commit}"]
            words += [f"round={m.round}"] if m.round else []
            words += ["confirmed"] if m.confirmed else []
            return " ".join(filter(None, words))
        case AppendReply(ok=True):
            return f"to {m.match}" + (f" round={m.round}" if m.round else "") + doubt
        case AppendReply(rejected=0):
            return "no, the term is over"
        case AppendReply():
            there = f"{m.hint_term} from {m.hint_index} on" if m.hint_term else f"nothing from {m.hint_index} on"
            return f"no, not after {m.rejected}: here is {there}{doubt}"
        case VoteRequest():
            return f"for a log to {m.last_index}@{m.last_term}" + (" (transfer)" if m.transfer else "")
        case VoteReply():
            return ("yes" if m.granted else "no") + doubt
        case ElectionRequest():
            return f"may {m.last_index}@{m.last_term} {m.name} stand?"
        case ElectionReply():
            return m.answer
        case TimeoutNow():
            return "at once"
        case ReadRequest():
            return f"#{m.ticket}"
        case ReadReply():
            return f"#{m.ticket} from {m.index} on"
        case InstallSnapshot():
            return f"to {m.index}@{m.index_term}"
        case SnapshotReply():
            return f"to {m.index}"
    return repr(m)


def _batch(batch: Batch) -> str:
    at = f"{batch.first}" if batch.first == batch.last else f"{batch.first}..{batch.last}"
    return f"{at}@{batch.term}" + ("c" if batch.config else "")


def _members(config: Configuration) -> str:
    return " ".join(m.id if m.voter else f"+{m.id}" for m in config.members) or "none"


# --- what the commands do ------------------------------------------------------------------------------------------------


class Stage:
    """A cluster, and what of it was shown last."""

    def __init__(self) -> None:
        self._net: Net | None = None
        self._shown: dict[str, str] = {}
        self._configs: dict[str, str] = {}
        self._aside: list[Message] = []
        self._tickets = 0
        self._answered = 0
        self._said: list[str] = []

    @property
    def net(self) -> Net:
        """The cluster that `nodes` has made."""
        if self._net is None:
            raise ScriptError("there are no nodes yet")
        return self._net

    def do(self, words: list[str]) -> list[str]:
        """Obey one command; the lines that tell what it did."""
        command = getattr(self, f"do_{words[0]}", None) if words else None
        if command is None:
            raise ScriptError("no such command")
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        self._said = []
        try:
            command([word for word in words[1:] if "=" not in word], options)
        except DdbError as error:
            self._said.append(f"{type(error).__name__}: {error}")
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise ScriptError(f"can't be done: {error!r}") from error
        return self._said + self._answers() + self._changes()

    def do_nodes(self, words: list[str], options: dict[str, str]) -> None:
        learners = [word[1:] for word in words if word.startswith("+")]
        voters = [word for word in words if not word.startswith("+")]
        bounds = Bounds(append_bytes_max=int(options.get("append_bytes", 1 << 20)))
        self._net = Net(
            voters, options.get("election", "bully"), int(options.get("seed", 1)), learners, bounds=bounds, start=False
        )  # fmt: skip
        self._shown, self._configs = {id: f"{id} down" for id in self.net.peers}, {}
        self._aside, self._tickets, self._answered = [], 0, 0

    def do_log(self, words: list[str], options: dict[str, str]) -> None:
        term = int(options["term"]) if "term" in options else None
        with_log(self.net, words[0], map(int, words[1:]), term, options.get("vote"))

    def do_start(self, words: list[str], options: dict[str, str]) -> None:
        for id in words or [p.id for p in self.net.peers.values() if p.raft is None]:
            self.net.start(id)

    def do_join(self, words: list[str], options: dict[str, str]) -> None:
        for id in words:
            self.net.join(id)

    def do_crash(self, words: list[str], options: dict[str, str]) -> None:
        for id in words:
            if id != "silently":
                self.net.crash(id, forget=int(options.get("forget", 0)), noticed="silently" not in words)

    def do_stand(self, words: list[str], options: dict[str, str]) -> None:
        self.net.provoke(words[0])

    def do_elect(self, words: list[str], options: dict[str, str]) -> None:
        self.net.elect(*words)

    def do_put(self, words: list[str], options: dict[str, str]) -> None:
        self.net.put(id=words[0], count=int(words[1]) if len(words) > 1 else 1)

    def do_read(self, words: list[str], options: dict[str, str]) -> None:
        self._tickets += 1
        if not self.net.read(words[0], self._tickets):
            self._say(f"{words[0]} knows no leader")

    def do_add(self, words: list[str], options: dict[str, str]) -> None:
        self._change(lambda config, id: config.with_member(Member(id, id, id, voter=False)), words)

    def do_promote(self, words: list[str], options: dict[str, str]) -> None:
        self._change(lambda config, id: config.with_member(Member(id, id, id, voter=True)), words)

    def do_remove(self, words: list[str], options: dict[str, str]) -> None:
        self._change(lambda config, id: config.without(id), words)

    def do_transfer(self, words: list[str], options: dict[str, str]) -> None:
        leader = self.net.leading
        leader.transfer(words[0], self.net.now)
        self.net.look_after(leader.id)

    def do_checkpoint(self, words: list[str], options: dict[str, str]) -> None:
        for id in words:
            self.net.peers[id].checkpoint()

    def do_tick(self, words: list[str], options: dict[str, str]) -> None:
        self.net.now += float(options.get("s", self.net.timing.tick_s))
        for id in words or [p.id for p in self.net.running]:
            self.net.tick(id)

    def do_wait(self, words: list[str], options: dict[str, str]) -> None:
        self.net.run(float(words[0]))

    def do_wire(self, words: list[str], options: dict[str, str]) -> None:
        for m in self._picked(words):
            self._say(tell(m))

    def do_deliver(self, words: list[str], options: dict[str, str]) -> None:
        for m in self._picked(words):
            self._take(m)
            self._deliver(m)

    def do_drop(self, words: list[str], options: dict[str, str]) -> None:
        for m in self._picked(words):
            self._take(m)
            self._say(f"{tell(m)} (dropped)")

    def do_settle(self, words: list[str], options: dict[str, str]) -> None:
        self.net.settle(keep=lambda m: not self._fits(m, words))

    def do_delay(self, words: list[str], options: dict[str, str]) -> None:
        for m in self._picked(words):
            self._take(m)
            self._aside.append(m)
            self._say(f"{tell(m)} (delayed)")

    def do_arrive(self, words: list[str], options: dict[str, str]) -> None:
        for m in self._aside:
            self._deliver(m)
        self._aside = []

    def do_cut(self, words: list[str], options: dict[str, str]) -> None:
        for word in words:
            if "->" in word:
                src, dst = word.split("->")
                self.net.cut |= {(s, d) for s in self._ids(src) for d in self._ids(dst) if s != d}
        ids = [word for word in words if "->" not in word]
        self.net.cut |= {(a, b) for a in ids for b in ids if a != b}

    def do_isolate(self, words: list[str], options: dict[str, str]) -> None:
        self.net.isolate(*words)

    def do_heal(self, words: list[str], options: dict[str, str]) -> None:
        self.net.heal()

    def do_hold(self, words: list[str], options: dict[str, str]) -> None:
        self.net.peers[words[0]].disk.writes = False

    def do_write(self, words: list[str], options: dict[str, str]) -> None:
        self.net.peers[words[0]].disk.writes = True
        self.net.look_after(words[0])

    def do_show(self, words: list[str], options: dict[str, str]) -> None:
        for id in words or sorted(self.net.peers):
            self._shown[id] = self._state(id)
            self._say(self._shown[id])

    def do_logs(self, words: list[str], options: dict[str, str]) -> None:
        for id in words or sorted(self.net.peers):
            self._say(f"{id}: {self._log(id)}")

    # --- the means --------------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        self._said.append(line)

    def _change(self, make: Callable[[Configuration, str], Configuration], words: list[str]) -> None:
        self.net.change(make(self.net.leading.config, words[0]))

    def _ids(self, pattern: str) -> Iterable[str]:
        return sorted(self.net.peers) if pattern == "*" else [pattern]

    def _fits(self, m: Message, words: list[str]) -> bool:
        links = [word.split("->") for word in words if "->" in word]
        kinds = [word for word in words if "->" not in word]
        if unknown := set(kinds) - {"append", "heartbeat", *KINDS.values()}:
            raise ScriptError(f"no such kind of message: {', '.join(sorted(unknown))}")
        on_link = not links or any(src in ("*", m.src) and dst in ("*", m.dst) for src, dst in links)
        return on_link and (not kinds or kind_of(m) in kinds)

    def _picked(self, words: list[str]) -> list[Message]:
        return [m for m in self.net.wire if self._fits(m, words)]

    def _take(self, m: Message) -> None:
        position = next(i for i, other in enumerate(self.net.wire) if other is m)
        del self.net.wire[position]

    def _deliver(self, m: Message) -> None:
        dropped = self.net.dropped
        self._say(tell(m))
        self.net.hand(m)
        if self.net.dropped > dropped:
            peer = self.net.peers.get(m.dst)
            self._said[-1] += " (lost)" if peer and peer.raft else f" ({m.dst} is down)"

    def _state(self, id: str) -> str:
        raft = self.net.peers[id].raft
        return f"{raft!r}{' in doubt' * raft.doubt}" if raft else f"{id} down"

    def _log(self, id: str) -> str:
        raft = self.net.peers[id].raft
        if raft is None:
            return "down"
        log = raft.log
        words = [f"({log.base_index}@{log.base_term})"] if log.base_index else []
        words += ["|"] if raft.commit == log.base_index else []
        for batch in log.batches():
            for index in range(batch.first, batch.last + 1):
                words.append(f"{batch.term}c" if batch.config else f"{batch.term}")
                words += ["|"] if index == raft.commit else []
        return " ".join(words)

    def _answers(self) -> list[str]:
        """The reads that were answered since the last command."""
        if self._net is None:
            return []
        answers = [(t, f"{id} reads #{t} at {i}") for id, all in self._net.rules.answers.items() for t, i in all]
        new, self._answered = answers[self._answered :], len(answers)
        return [line for _, line in sorted(new)]

    def _changes(self) -> list[str]:
        """The states that are others than when they were last shown."""
        lines = []
        for id in sorted(self._net.peers if self._net else ()):
            state = self._state(id)
            if self._shown.get(id) != state:
                lines.append(state)
            self._shown[id] = state
            raft = self.net.peers[id].raft
            if raft is not None:
                members = _members(raft.config)
                if self._configs.setdefault(id, members) != members:
                    lines.append(f"{id} knows the members {members}")
                self._configs[id] = members
        return lines

