"""A node: one member of a cluster as a process. `python -m ddb.node`.

This only composes what is below. One thread, the loop's, owns all of it; the log's writer and two workers for what takes
long (checkpoints, snapshots) are the only others, and post what they have done. Each turn of the loop ends in
`Replica.flush`: all requests that came in it share one log entry batch, one fsync and one message to each follower.

How a node starts: it locks its data directory, reads log and snapshot, listens, and registers. If it
belongs to a cluster, that is all: the others find it. If not, it asks the registry whether it may begin one; one node is
granted that, and the others wait until that one's leader adds them (membership.py). Without a registry it
begins a cluster of its own at once: one node alone is a complete database.

How it ends: SIGTERM or SIGINT makes it stop accepting, hand over the leadership, answer who waits, and exit 0.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddb import wire
from ddb.config import Bounds, Timing
from ddb.datadir import DataDirectory
from ddb.discovery import Discovery
from ddb.disk import Disk, remove_if_there
from ddb.election import STRATEGIES, Election
from ddb.errors import BadRequest, CorruptStore, DdbError, Forbidden, InvariantError, NoLeader, Overloaded, StartupError
from ddb.kv import Machine
from ddb.log import SEGMENT_BYTES_MAX, Log
from ddb.loop import Fatal
from ddb.membership import Patience, Sighting, Standing, next_change
from ddb.messages import Call, CallReply, Configuration, HardState, Member, Message
from ddb.peers import Peers
from ddb.raft import Raft
from ddb.raftlog import RaftLog
from ddb.replica import Replica
from ddb.scheduling import keep_turns_whole
from ddb.server import Limits, raise_descriptor_limit
from ddb.service import NodeService
from ddb.settings import SettingsParser, seconds, whole
from ddb.store import Store
from ddb.sync import Policy, Sync
from ddb.tenure import SESSION_UNUSED_S, Tenure
from ddb.world import OsWorld, World, settle_collector

log = logging.getLogger("ddb.node")

BOOTSTRAP_EVERY_S: Final = 0.1
MEMBERSHIP_EVERY_S: Final = 0.1
CAUGHT_UP_ENTRIES: Final = 1000  # a learner this close to the leader's log is promoted
IDENTITY_RETRY_S: Final = 5.0
MOVE_LEAD_EVERY_S: Final = 2.0
HAND_OVER_S: Final = 1.0
DRAIN_S: Final = 2.0
LINGER_S: Final = 0.2
REMOVED: Final = "This node was removed from its cluster. To let it join again as a new member, remove {}."


@dataclass(frozen=True, slots=True)
class Settings:
    """What a node is told. `port` 0 picks a free one; `advertise` is the address that others are told."""

    data_dir: Path
    registry: tuple[str, int] | None = None
    host: str = "127.0.0.1"
    port: int = 8050
    advertise: str | None = None
    name: str | None = None
    election: str = "bully"
    expect: int = 1
    replace_after_s: float = 30.0
    frame_bytes_max: int = 16 << 20
    policy: Policy = Policy()
    timing: Timing = Timing()
    bounds: Bounds = Bounds()
    segment_bytes_max: int = SEGMENT_BYTES_MAX
    session_unused_s: float = SESSION_UNUSED_S
    cache_bytes_max: int = 256 << 20
    repair: bool = False


class Node:
    """One node, from `Node(settings)` over `run()` to `close()`, which may be called twice."""

    def __init__(self, settings: Settings, world: World | None = None) -> None:
        self.settings = settings
        self._closing: list[Callable[[], object]] = []
        self.world = world or OsWorld()
        self.loop = self.world.loop
        self._closing.append(self.loop.close)
        self.now = self.loop.now
        self.started_at = self.now()
        self.patience = Patience(replace_after_s=settings.replace_after_s)
        self._sightings: dict[str, Sighting] = {}
        self._registry_cluster: str | None = None
        self._known_config: Configuration | None = None
        self._removed: object = None
        self._expelled_at = -1
        self._identity_due = True
        self._shown_state: object = None
        self._next_membership_at = 0.0
        self._next_move_at = 0.0
        self._next_identity_at = 0.0
        self._leave_phase = 0
        self._leave_at = 0.0
        self._has_handed_over = False
        self._discovery: Discovery | None = None
        try:
            self._open(settings)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return repr(self.replica)

    # --- starting -----------------------------------------------------------------------------------------------

    def _open(self, settings: Settings) -> None:
        self.data = DataDirectory.open(settings.data_dir, disk=self.world.disk, new_id=self.world.new_id)
        self._closing.append(self.data.close)
        self.id = self.data.identity.id
        self.name = settings.name or self.id
        self.service = NodeService(self)
        limits = Limits(frame_bytes_max=settings.frame_bytes_max)
        self.server = self.world.listen(self.service, settings.host, settings.port, limits)
        self._closing.append(self.server.close)
        self.address = settings.advertise or _advertised(settings.host, self.server.address[1])
        log.info("listening on %s", wire.format_address(settings.host, self.server.address[1]))
        self._open_replica(settings)
        bind_host = None if settings.host in ("", "0.0.0.0", "::") else settings.host
        self.peers = Peers(self.loop, self, self.id, bind_host)
        self._closing.append(self.peers.close)
        self._on_config(self.replica.raft.config)
        self.loop.every(settings.timing.tick_s, self._tick)
        self.loop.on_turn.append(self._flush)
        self._begin_or_join(settings)

    def _open_replica(self, settings: Settings) -> None:
        """Put the member together from what its disk remembers."""
        journal = self.journal = Log.open(
            self.data.log_path, disk=self.world.disk,
            segment_bytes_max=settings.segment_bytes_max, repair=settings.repair,
        )  # fmt: skip
        self._closing.append(journal.close)
        self.data.change(born=True)
        store = _open_store(self.data.store_path, self.world.disk, settings)
        self._closing.append(store.close)
        raft_log = _recovered_log(journal, store, settings.repair)
        config = store.meta.configuration or Configuration(self.data.identity.cluster or "", settings.election)
        bounds = settings.bounds
        raft = Raft(
            self.id, self.name, raft_log, journal.hard_state, config, self._election(config.election),
            self.now(), store.meta.applied, settings.timing, bounds, self.world.rng.getrandbits(48),
        )  # fmt: skip
        writer = self.writer = self.world.writer(journal, self._saved, self._disk_failed, self._disk_space)
        self._closing.append(writer.close)
        background, leisure = self.world.background(), self.world.background()
        self._closing += [background.close, leisure.close]
        machine = Machine(store, store.meta.applied)
        first_ticket = self.world.rng.getrandbits(48)
        self.replica = Replica(
            raft, machine, writer, self._send, journal.read, self.world.wall_ms, bounds, first_ticket
        )  # fmt: skip
        self.sync = Sync(
            self.replica, store, self.data.path, background.run, journal.drop_below, settings.policy, bounds,
            disk=self.world.disk, leisure=leisure.run, inspect=self.world.inspect,
        )  # fmt: skip
        self._closing.append(self.sync.close)
        self.tenure = Tenure(self.replica, self.world.wall_ms, settings.session_unused_s)
        self.replica.snapshots = self.sync
        self.replica.remember = self._remember
        raft.remembered = frozenset(self.data.identity.members)
        self.replica.push = self.loop.flush
        log.info("%r: node %s, data in %s, %d keys", self, self.id, self.data.path, store.key_count)

    def _election(self, name: str) -> Election:
        return STRATEGIES[name](self.settings.timing.election_timeout_s, self.world.rng)

    def _begin_or_join(self, settings: Settings) -> None:
        identity, raft = self.data.identity, self.replica.raft
        if settings.registry is not None:
            self._discovery = Discovery(self.loop, settings.registry, self._introduce, self._on_nodes)
            self._closing.append(self._discovery.close)
        if identity.founding is not None and raft.log.last_index == 0 and raft.term == 0:
            raft.found(Configuration.from_json(identity.founding), identity.founding.get("at", self.world.wall_ms()))
        elif identity.cluster is None and settings.registry is None:
            self._found(self.world.new_id(), [])

    @property
    def cluster(self) -> str | None:
        """See service.Node."""
        return self.data.identity.cluster

    def adopt(self, cluster: str) -> None:
        """See service.Node."""
        log.info("%r: joins cluster %s", self, cluster)
        self.data.change(cluster=cluster)

    def _found(self, cluster: str, nodes: list[dict[str, Any]]) -> None:
        """Begin `cluster`, with these `nodes` as its first voters, or with this one alone."""
        members = [Member(str(n["id"]), str(n["name"]), str(n["address"]), voter=True) for n in nodes]
        members = [m for m in members if m.id != self.id] + [Member(self.id, self.name, self.address, voter=True)]
        members.sort(key=lambda m: m.id)
        config = Configuration(cluster, self.settings.election, tuple(members))
        log.info("%r: begins cluster %s of %d", self, cluster, len(members))
        # The identity first: after a crash in between, the node founds the same cluster again.
        # It is the same to the byte: others may hold its first entry, though this node's log loses it.
        at_ms = self.world.wall_ms()
        founding = {**config.to_json(), "at": at_ms}
        self._change_identity(cluster=cluster, founding=founding, members=tuple(m.id for m in members))
        self.replica.raft.found(config, at_ms)

    # --- the registry -------------------------------------------------------------------------------------------

    def _introduce(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "address": self.address, "cluster": self.cluster}

    def _on_nodes(self, sightings: dict[str, Sighting], cluster: str | None) -> None:
        self._sightings = sightings
        self._registry_cluster = cluster
        for sighting in sightings.values():
            if sighting.id != self.id:
                self.peers.sighted(sighting)
        self._keep_peers()
        self._bootstrap()

    def _bootstrap(self) -> None:
        """While there is no cluster anywhere, ask to begin it."""
        if self.cluster is None and self._registry_cluster is None and self._discovery is not None:
            proposal = self.world.new_id()
            request: dict[str, Any] = {"op": "bootstrap", "id": self.id, "cluster": proposal}
            if self.settings.expect > 1:
                request["expect"] = self.settings.expect
            self._discovery.ask(request, self._on_bootstrap)

    def _on_bootstrap(self, reply: dict[str, Any]) -> None:
        if self.cluster is not None or reply.get("ok") is not True:
            return
        self._registry_cluster = reply.get("cluster")
        if reply.get("granted") is True and type(reply.get("cluster")) is str:
            self._found(reply["cluster"], reply.get("nodes") or [])
            if self._discovery is not None:
                self._discovery.register()
        elif self._registry_cluster is None:
            self.loop.call_later(BOOTSTRAP_EVERY_S, self._bootstrap)

    # --- the other members --------------------------------------------------------------------------------------

    def introduction(self, to: str) -> dict[str, Any]:
        """See peers.Host."""
        return {"op": "peer", "to": to, "version": 1, **self._introduce()}

    def received(self, message: Message) -> None:
        """See peers.Host."""
        if type(message) is Call:
            self.service.on_call(message)
        elif type(message) is CallReply:
            self.service.on_call_reply(message)
        else:
            self.replica.step(message, self.now())

    def connected(self, peer: str) -> None:
        """See peers.Host."""
        self.replica.connected(peer)

    def disconnected(self, peer: str) -> None:
        """See peers.Host."""
        self.replica.disconnected(peer, self.now())
        self.sync.disconnected(peer)
        self.service.disconnected(peer)
        self._keep_peers()

    def greeted(self, peer: str) -> None:
        """See peers.Host."""
        self._keep_peers()

    def refused(self, peer: str, code: str, message: str) -> None:
        """See peers.Host."""
        if code == "forbidden":
            self._end_removed()
        log.warning("%r: %s refused our connection: %s", self, peer, message)

    def _end_removed(self) -> None:
        raise Fatal(REMOVED.format(self.data.path))

    def _send(self, message: Message) -> None:
        self.peers.send(message)

    def _keep_peers(self) -> None:
        raft = self.replica.raft
        wanted = {m.id for m in raft.config.members} | raft.remembered | self.peers.introduced().keys()
        if self._registry_cluster is not None and (
            raft.config.member(self.id) is None or not raft.hears_leader(self.now())
        ):
            # Whoever leads there takes in a node that introduces itself. One that was about to be taken in when the
            # leader died belongs to the cluster already, and yet nobody else knows: it has to go on knocking. So has
            # one that was away so long that all the members it knows have been replaced, and itself perhaps removed.
            wanted |= self._sightings.keys()
        self.peers.keep(wanted)

    def standings(self) -> dict[str, Standing]:
        """See service.Node."""
        raft, now = self.replica.raft, self.now()
        return {
            id: Standing(
                now - p.heard_at,
                not p.probing and not p.snapshot and raft.log.last_index - p.match <= CAUGHT_UP_ENTRIES,
                p.spoken and self.replica.reaches(id),
                p.counts,
            )
            for id, p in raft.progress.items()
        }  # fmt: skip

    def _flush(self) -> None:
        self.replica.flush(self.now())
        if self.service.flushed():
            self.replica.flush(self.now())
        self.service.watching.turn()

    # --- time ---------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.now()
        self.replica.tick(now)
        self.tenure.tick(now)
        self.sync.tick(now)
        self.service.tick(now)
        raft = self.replica.raft
        if raft.config is not self._known_config:
            self._on_config(raft.config)
        if raft.commit != self._expelled_at:
            self._expelled_at = raft.commit
            self._expel(raft.config_at(raft.commit))
            self._identity_due = True
        if self._identity_due and now >= self._next_identity_at:
            self._settle_identity(now)
        if now >= self._next_membership_at and self.replica.is_leader and not self._leave_phase:
            self._next_membership_at = now + MEMBERSHIP_EVERY_S
            self._tend_members()
        if self.replica.read_only:
            self._move_lead(now)
        state = (raft.role, raft.term, raft.leader)
        if state != self._shown_state:
            self._shown_state = state
            leader = raft.config.member(raft.leader) if raft.leader else None
            log.info("%r%s", self, f", led by {leader.name}" if leader and leader.id != self.id else "")
        if self._leave_phase:
            self._leave(now)

    def _remember(self, config: Configuration) -> None:
        """`config` is about to go to the log. Know its members even if the log loses its end: alone with an old log, this
        node would take itself for all. Raises StartupError where the disk refuses."""
        ids = self.replica.raft.remembered.union([m.id for m in config.members])
        if ids != self.replica.raft.remembered:
            self._change_identity(members=tuple(sorted(ids)))

    def _settle_identity(self, now: float) -> None:
        """What the committed log says need not be remembered beside it: the founding, and members that have left. Forgetting
        can wait: for room on the disk, and until a doubt is over."""
        raft = self.replica.raft
        fields: dict[str, Any] = {}
        if self.data.identity.founding is not None and raft.commit >= 1:
            fields["founding"] = None
        if not raft.doubt and raft.members_in_force != raft.remembered:
            fields["members"] = tuple(sorted(raft.members_in_force))
        try:
            if fields:
                self._change_identity(**fields)
            self._identity_due = raft.doubt
        except StartupError as error:
            self._next_identity_at = now + IDENTITY_RETRY_S
            log.warning("%s", error.message)

    def _change_identity(self, **fields: Any) -> None:
        self.data.change(**fields)
        self.replica.raft.remembered = frozenset(self.data.identity.members)

    def _on_config(self, config: Configuration) -> None:
        self._known_config = config
        for member in config.members:
            if member.id != self.id and member.id not in self._sightings:
                self.peers.sighted_if_unknown(Sighting(member.id, member.name, member.address))
        self._keep_peers()
        if config.members and config.election != self.replica.raft.election.name:
            log.warning("%r: the cluster holds its elections by %r; so does this node now", self, config.election)
            self.replica.raft.election = self._election(config.election)
            self.replica.raft.election.follow(self.now())
        voters = sorted(m.name for m in config.members if m.voter)
        learners = sorted(m.name for m in config.members if not m.voter)
        if config.members:
            log.info(
                "%r: voters %s%s", self, ", ".join(voters), f"; learners {', '.join(learners)}" if learners else ""
            )

    def _expel(self, committed: Configuration) -> None:
        """Tell those who were removed: the leader that did it may be gone, and speaks to them no more anyway. Who knows of
        its own removal ends without being told, for nobody may be left who could; but first it answers who asked for it."""
        if committed.removed is not self._removed:
            self._removed = committed.removed
            if self.id in committed.removed:
                self.loop.call_later(HAND_OVER_S, self._end_removed)
            for id in committed.removed:
                self.peers.refuse(id, Forbidden("The node was removed from the cluster."))

    def _tend_members(self) -> None:
        """As the leader, bring the configuration one step closer to what it should be."""
        raft = self.replica.raft
        if not raft.has_committed_in_term or raft.config_index > raft.commit or raft.transfer_to is not None:
            return
        own = Sighting(self.id, self.name, self.address)
        sightings = {**self._sightings, **self.peers.introduced(), self.id: own}
        # Where all are voters, there is nobody to promote or to drop, and nobody's standing matters.
        standings = {} if all(member.voter for member in raft.config.members) else self.standings()
        change = next_change(raft.config, self.id, sightings, standings, self.patience)
        if change is not None:
            try:
                raft.change(change, self.world.wall_ms())
            except (NoLeader, Overloaded, BadRequest) as error:
                log.warning("%r: the members can't be changed now: %s", self, error)

    # --- the disk -----------------------------------------------------------------------------------------------

    def _saved(self, ticket: int) -> None:
        self.replica.saved(ticket, self.now())

    def _disk_failed(self, error: BaseException) -> None:
        raise Fatal(
            f"The log can't be written any more ({error}); the node ends rather than promise what it can't keep."
        )

    def _disk_space(self, room: bool) -> None:
        self.replica.full(not room)
        self._move_lead(self.now())

    def _move_lead(self, now: float) -> None:
        """Where the disk here is full, another member should lead. Where none can, this one goes on, for the reads."""
        if self.replica.read_only and self.replica.is_leader and now >= self._next_move_at:
            self._next_move_at = now + MOVE_LEAD_EVERY_S
            successor = self.service.best_successor()
            if successor is not None and self.replica.raft.transfer_to is None:
                self.replica.raft.transfer(successor.id, now)

    # --- leaving ------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Begin to leave; `run` returns when that is done. On the loop's thread."""
        if self._leave_phase:
            return
        log.info("%r: leaving", self)
        self.server.stop_accepting()
        if self._discovery is not None:
            self._discovery.close()
        self._leave_phase = 1
        self._leave_at = self.now() + HAND_OVER_S
        successor = self.service.best_successor() if self.replica.is_leader else None
        if successor is not None:
            self._has_handed_over = True
            self.replica.raft.transfer(successor.id, self.now())
        self._leave(self.now())

    def _leave(self, now: float) -> None:
        """First the leadership goes, then who waits is answered, then the others have a moment to notice."""
        raft = self.replica.raft
        if self._leave_phase == 1:
            handing_over = self.replica.is_leader and raft.transfer_to is not None
            in_between = self._has_handed_over and not self.replica.is_leader and raft.leader is None
            if (handing_over or in_between) and now < self._leave_at:
                return
            self.service.leaving = True
            self.service.watching.leave()
            self._leave_phase, self._leave_at = 2, now + DRAIN_S
        if self._leave_phase == 2 and (self.replica.idle or now >= self._leave_at):
            self._leave_phase, self._leave_at = 3, now + LINGER_S
        elif self._leave_phase == 3 and now >= self._leave_at:
            self.loop.stop()

    def run(self) -> None:
        """Serve until `leave`, or until something fatal comes out."""
        self.loop.run()
        log.info("%r: left", self)

    def close(self) -> None:
        """End everything, the newest first: what was saved is flushed. May be called twice."""
        while self._closing:
            self._closing.pop()()


def _open_store(path: Path, disk: Disk, settings: Settings) -> Store:
    try:
        return Store.open(path, disk=disk, cache_bytes_max=settings.cache_bytes_max)
    except CorruptStore as error:
        if not settings.repair:
            raise CorruptStore(
                f"{error.message} Start the node once with --repair to fetch the data from the leader."
            ) from error
        damaged = path.with_suffix(".damaged")
        log.warning("%s; it is kept as %s", error.message, damaged)
        disk.rename(path, damaged)
        for side in ("-wal", "-shm"):
            remove_if_there(disk, path.with_name(path.name + side))
        return Store.open(path, disk=disk, cache_bytes_max=settings.cache_bytes_max)


def _recovered_log(journal: Log, store: Store, repair: bool) -> RaftLog:
    """The log as Raft sees it, made to fit the snapshot: it goes on where that ends, or begins anew behind it."""
    raft_log = RaftLog(journal.read, *journal.base, journal.batches)
    meta = store.meta
    if raft_log.term_at(meta.applied) == meta.term:
        return raft_log
    if meta.applied < raft_log.base_index:
        if not repair:
            raise CorruptStore(
                f"{store.path} ends at {meta.applied}, but the log begins after {raft_log.base_index}; "
                "start the node once with --repair to fetch the data from the leader."
            )
        state = journal.hard_state
        journal.write(HardState(state.term, state.vote, doubt=True), [], (meta.applied, meta.term))
    else:
        journal.write(None, [], (meta.applied, meta.term))
    journal.sync()
    raft_log.reset(meta.applied, meta.term)
    return raft_log


def _advertised(host: str, port: int) -> str:
    """What the others are told when nothing else was said: a host that stands for all is of no use to them."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname()
        log.warning("listening on all addresses; the others are told %s (--advertise says otherwise)", host)
    return wire.format_address(host, port)


def parse(argv: list[str] | None) -> Settings:
    """The settings that the command line and the environment give. Ends the process with exit code 2 where they don't fit."""
    parser = SettingsParser(
        "DDB",
        prog="ddb-node",
        description="Run one node of a ddb cluster, or, without a registry, a complete database of one node.",
        epilog="example:\n  python -m ddb.registry &\n  python -m ddb.node -ra 127.0.0.1:8080 --port 8051 --data-dir n1",
    )

    def address(text: str) -> tuple[str, int]:
        return _address(parser, text)

    parser.setting(
        "-ra",
        "--registry",
        type=address,
        default=None,
        metavar="ADDR",
        help="the registry, HOST:PORT or http://HOST:PORT",
    )
    parser.setting("--host", type=str, default="127.0.0.1", help="the address to listen on, 127.0.0.1 by default")
    parser.setting(
        "--port", type=whole(0, 65535), default=8050, help="the port to listen on, 8050 by default; 0 picks a free one"
    )
    parser.setting(
        "--advertise", type=address, default=None, metavar="HOST:PORT", help="the address that others are told"
    )
    parser.setting(
        "--data-dir", type=Path, default=None, metavar="DIR", help="where the data is, ddb-data-PORT by default"
    )
    parser.setting("--name", type=_name, default=None, help="what people call the node; its id when not given")
    parser.setting(
        "--election", type=_strategy, default="bully", metavar="bully|raft", help="how a new cluster holds elections"
    )
    parser.setting(
        "--expect",
        type=whole(1, 99),
        default=1,
        metavar="N",
        help="begin a cluster only when N nodes are there, with all of them",
    )
    parser.setting(
        "--replace-after",
        type=seconds(1, 1e7),
        default=30.0,
        metavar="SECONDS",
        help="how long a voter must be dead before a newcomer takes its place, 30 by default",
    )
    parser.setting(
        "--max-frame",
        type=whole(1024, 64 << 20),
        default=16 << 20,
        metavar="BYTES",
        help="the largest request taken, 16 MiB by default",
    )
    parser.setting(
        "--checkpoint-every",
        type=whole(1, 1 << 40),
        default=100_000,
        metavar="ENTRIES",
        help="how often the snapshot is brought up to date",
    )
    parser.setting(
        "--retain",
        type=whole(0, 1 << 40),
        default=20_000,
        metavar="ENTRIES",
        help="how many entries are kept behind: in the log for members that lag, and as history for watches",
    )
    parser.setting(
        "--retain-bytes",
        type=whole(0, 1 << 40),
        default=64 << 20,
        metavar="BYTES",
        help="how much of history is kept at most, in memory as well as in the snapshot, 64 MiB by default",
    )
    parser.setting(
        "--cache",
        type=whole(1, 1 << 20),
        default=256,
        metavar="MIB",
        help="memory for values that are on disk as well, 256 MiB by default; the data may be larger",
    )
    parser.add_argument(
        "--repair", action="store_true", help="give up what is damaged in log or snapshot; the leader has it"
    )
    found = parser.parse_args(argv)
    return Settings(
        data_dir=found.data_dir or Path(f"ddb-data-{found.port}"),
        registry=found.registry,
        host=found.host,
        port=found.port,
        advertise=wire.format_address(*found.advertise) if found.advertise else None,
        name=found.name,
        election=found.election,
        expect=found.expect,
        replace_after_s=found.replace_after,
        frame_bytes_max=found.max_frame,
        policy=Policy(entries=found.checkpoint_every, retain_entries=found.retain, retain_bytes=found.retain_bytes),
        cache_bytes_max=found.cache << 20,
        repair=found.repair,
    )


def _address(parser: SettingsParser, text: str) -> tuple[str, int]:
    try:
        return wire.parse_address(text)
    except BadRequest as error:
        raise ValueError(error.message) from None


def _name(text: str) -> str:
    if not 0 < len(text) <= 64 or not text.isprintable() or " " in text:
        raise ValueError("a name has 1 to 64 printable characters and no space")
    return text


def _strategy(text: str) -> str:
    if text not in STRATEGIES:
        raise ValueError(f"the elections are {' and '.join(sorted(STRATEGIES))}")
    return text


def main(argv: list[str] | None = None) -> int:
    """Run a node until it is told to end. Returns the exit code: 0 after SIGTERM or SIGINT, 1 after a failure."""
    settings = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    sys.set_int_max_str_digits(wire.DIGITS_MAX)
    raise_descriptor_limit()
    keep_turns_whole()
    node: Node | None = None
    asked_to_leave = False

    def leave(*_: object) -> None:
        nonlocal asked_to_leave
        asked_to_leave = True  # for a start that takes long
        if node is not None:
            node.loop.post(node.leave)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    try:
        node = Node(settings)
        if asked_to_leave:
            node.loop.post(node.leave)
        settle_collector()
        node.run()
        return 0
    except StartupError as error:
        log.error("%s", error.message)
    except (Fatal, InvariantError, DdbError) as error:
        log.critical("%s", error)
    except OSError as error:
        log.critical("The node ends rather than go on without what failed under it: %s", error)
    finally:
        if node is not None:
            node.close()
    return 1


if __name__ == "__main__":
    sys.exit(main())
