"""The words that the members of a cluster exchange, and the log keeps.

Theory in four sentences. The replicated log is a sequence of *entries*, numbered from 1; a client's write is
one entry, and its index is the write's revision. Entries travel and rest in *batches*: all that one leader
appended in one go, in one term. A batch is never split: not on disk (one record, one checksum), not on the
network, not by a conflict, not by the commit index. So two logs that share an entry share its whole batch (Raft
§5.3, Log Matching: one leader per term, one append per index), and all bookkeeping is per batch, however
many entries it holds.

Everything here is immutable and knows nothing of sockets, files or clocks.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Final

Command = list[Any]  # one entry as decoded from JSON: ["put", key, value], ["noop"], …


class Role(enum.Enum):
    """What a member is in its term."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"
    LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the cluster as the log's configuration names it."""

    id: str
    name: str
    address: str
    voter: bool


@dataclass(frozen=True, slots=True)
class Configuration:
    """Who belongs to the cluster. It takes effect where it stands in the log, not when it commits
    (Raft dissertation §4.1)."""

    cluster: str
    election: str = "bully"
    members: tuple[Member, ...] = ()
    removed: tuple[str, ...] = ()  # ids that may never come back
    voters: tuple[str, ...] = field(init=False, compare=False, repr=False)
    """The ids of the voters, sorted. Asked for in every turn of the loop, so made once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "voters", tuple(sorted(m.id for m in self.members if m.voter)))

    def member(self, id: str) -> Member | None:
        """The member with this `id`, or None."""
        return next((m for m in self.members if m.id == id), None)

    def with_member(self, member: Member) -> Configuration:
        """This configuration with `member` added, or put in place of the one with its id."""
        others = [m for m in self.members if m.id != member.id]
        members = tuple(sorted([*others, member], key=lambda m: m.id))
        return Configuration(self.cluster, self.election, members, self.removed)

    def without(self, id: str) -> Configuration:
        """This configuration without the member `id`, which is remembered as removed."""
        members = tuple(m for m in self.members if m.id != id)
        return Configuration(self.cluster, self.election, members, (*self.removed, id))

    def to_json(self) -> dict[str, Any]:
        """The form that the log and the snapshot keep."""
        return {
            "cluster": self.cluster,
            "election": self.election,
            "members": [{"id": m.id, "name": m.name, "address": m.address, "voter": m.voter} for m in self.members],
            "removed": list(self.removed),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Configuration:
        """The inverse of `to_json`. Raises KeyError or TypeError where `value` is something else."""
        members = tuple(Member(m["id"], m["name"], m["address"], m["voter"]) for m in value["members"])
        config = cls(value["cluster"], value["election"], members, tuple(value["removed"]))
        texts = [config.cluster, config.election, *config.removed]
        for member in members:
            texts += [member.id, member.name, member.address]
        if not all(type(text) is str for text in texts) or not all(type(m.voter) is bool for m in members):
            raise TypeError("a field of the configuration is of the wrong type")
        return config


@dataclass(frozen=True, slots=True)
class HardState:
    """What must be on disk before any message that depends on it leaves (Raft §5.1, figure 2).

    `doubt` is True on a member whose log lost a damaged tail: it may have forgotten what it once acknowledged,
    so its vote is worth nothing until a leader has confirmed its log.
    """

    term: int = 0
    vote: str | None = None
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """The entries `first`..`last` that one leader appended at once in `term`, `at_ms` by its wall clock.

    `data` is the batch's only encoding, a JSON object without a line feed: the log's record holds these bytes, and so does the
    message that replicates it. `commands` is the same, decoded; it is dropped once applied.
    """

    first: int
    last: int
    term: int
    data: bytes
    at_ms: int = 0
    commands: list[Command] | None = field(default=None, compare=False, repr=False)
    config: Configuration | None = None

    def __repr__(self) -> str:
        kind = "config" if self.config else "entries"
        return f"{kind} {self.first}..{self.last}@{self.term}"


NOOP: Final[Command] = ["noop"]


# --- what members say to each other ------------------------------------------------------------------------------------
# `src` and `dst` are member ids. They are not encoded: a connection belongs to one pair of members.


@dataclass(frozen=True, slots=True)
class Append:
    """AppendEntries (Raft §5.3); without batches it is the heartbeat, and the first of a term is the bully's victory message.

    `round` counts the leader's confirmations of its leadership (ReadIndex, dissertation §6.4): a reply that
    echoes it was sent after the leader asked. `digest` is (index, digest of the state there). `confirmed` tells
    a member in doubt that its log holds all that this leader's did.
    """

    src: str
    dst: str
    term: int
    prev_index: int
    prev_term: int
    commit: int
    round: int
    batches: tuple[Batch, ...] = ()
    digest: tuple[int, int] | None = None
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class AppendReply:
    """`ok`: everything up to `match` is durable here and equal to the leader's. Else `rejected` is the prev_index that
    did not match, and (`hint_index`, `hint_term`) where the conflicting term begins (Raft §5.3, last paragraphs)."""

    src: str
    dst: str
    term: int
    ok: bool
    match: int
    round: int
    rejected: int = 0
    hint_index: int = 0
    hint_term: int = 0
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """RequestVote (Raft §5.2). `transfer`: the leader itself asked for this, so hearing it is no reason to refuse."""

    src: str
    dst: str
    term: int
    last_index: int
    last_term: int
    transfer: bool = False


@dataclass(frozen=True, slots=True)
class VoteReply:
    """A vote, durable before it is sent; `doubt` where the voter may have forgotten what it acknowledged."""

    src: str
    dst: str
    term: int
    granted: bool
    doubt: bool = False


@dataclass(frozen=True, slots=True)
class ElectionRequest:
    """The bully's ping, and Raft's PreVote: "may I stand?". Changes no term and no vote. `ask` numbers the question."""

    src: str
    dst: str
    term: int
    last_term: int
    last_index: int
    name: str
    ask: int


@dataclass(frozen=True, slots=True)
class ElectionReply:
    """`leader` (I hear one), `alive` (I outrank you) or `yield` (go ahead)."""

    src: str
    dst: str
    term: int
    answer: str
    ask: int


@dataclass(frozen=True, slots=True)
class TimeoutNow:
    """The leader hands over: stand at once (dissertation §3.10)."""

    src: str
    dst: str
    term: int


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A follower asks the leader for a read index (dissertation §6.4)."""

    src: str
    dst: str
    term: int
    ticket: int


@dataclass(frozen=True, slots=True)
class ReadReply:
    """Reads under `ticket` may be answered from any state that has applied `index`."""

    src: str
    dst: str
    term: int
    ticket: int
    index: int


@dataclass(frozen=True, slots=True)
class InstallSnapshot:
    """One chunk of the leader's snapshot, a SQLite file of `size` bytes (Raft §7). `sha256` is the whole file's; it may be empty but in
    the last chunk."""

    src: str
    dst: str
    term: int
    index: int
    index_term: int
    offset: int
    size: int
    sha256: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SnapshotReply:
    """The chunks up to `offset` have arrived; `installed` once the whole has been verified and taken over."""

    src: str
    dst: str
    term: int
    index: int
    offset: int
    installed: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """A follower whose data proved wrong, though its log is right, asks the leader for its snapshot."""

    src: str
    dst: str
    term: int


@dataclass(frozen=True, slots=True)
class Forward:
    """A follower passes its clients' writes on, each already encoded as a log entry."""

    src: str
    dst: str
    ticket: int
    entries: tuple[bytes, ...]
    commands: tuple[Command, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """The leader's replies to a Forward, in its order; none where it does not lead: then nothing was done."""

    src: str
    dst: str
    ticket: int
    replies: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A member passes on a request that only the leader can serve, other than a write: who is a member, who leads, or a
    read where this member's disk is full."""

    src: str
    dst: str
    ticket: int
    request: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CallReply:
    """The leader's reply to a Call."""

    src: str
    dst: str
    ticket: int
    reply: dict[str, Any]


RaftMessage = (
    Append
    | AppendReply
    | VoteRequest
    | VoteReply
    | ElectionRequest
    | ElectionReply
    | TimeoutNow
    | ReadRequest
    | ReadReply
    | InstallSnapshot
    | SnapshotReply
    | SnapshotRequest
)
"""What consensus is made of: each carries its sender's term."""

Message = RaftMessage | Forward | ForwardReply | Call | CallReply
