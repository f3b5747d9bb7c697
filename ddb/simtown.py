"""A simulated town: the hosts, what runs on them, and the operator who starts again what has ended.

Laws: the programs are the production ones, put together as their own `main` does. The operator does what the
documentation tells a person to do, and no more: start a node again, with `--repair` where its log says so, with an
empty directory where it was removed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ddb.agenda import Agenda
from ddb.calls import Knowledge
from ddb.config import Bounds, Timing
from ddb.errors import DdbError
from ddb.history import Operation
from ddb.messages import Role
from ddb.node import Node, Settings
from ddb.registry import MemoryFile, Registry
from ddb.roster import Roster
from ddb.server import Limits
from ddb.simclients import Caller, Client
from ddb.simduties import Duties
from ddb.simhost import PORT, Host, SimWorld
from ddb.simnet import Network
from ddb.simrules import Rules, Violation
from ddb.simtenants import Holder, SessionClient
from ddb.simtenure import TenureRules
from ddb.simwatch import Truth, Watcher
from ddb.sync import Policy

NODES_MAX: Final = 7
JOINING_MAX: Final = 2  # beside those that a run begins with
TICK_S_MAX: Final = 0.2  # who ticks less often than every tenure.LATE_S was paused, as far as leases go
REGISTRY_TICK_S: Final = 0.3  # in its own main 0.1; it has next to nothing to look at
BACK_S: Final = 1.0  # an ended program is started again after so long, when nothing else was said
AT_THE_LEADER: Final = 0.6  # this share of the faults with one victim strikes the leader
UNDAMAGED: Final = "a disk that lost nothing is never refused (docs/architecture.md, law 2)"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is drawn once for a run: the programs' settings, and who else is there."""

    nodes: int
    election: str
    clients: int
    keys: int
    pace_s: float
    expect: int
    timing: Timing
    bounds: Bounds
    policy: Policy
    segment_bytes_max: int
    replace_after_s: float
    skew: bool  # whether the clocks run at different rates
    sessions: int = 0  # clients with a session, in the place of so many
    holders: int = 0  # clients with a lease
    session_unused_s: float = 3600.0
    watchers: int = 0
    registry_ttl_s: float = 3.0


def draw_plan(rng: random.Random, nodes: int, election: str) -> Plan:
    """Small batches, small segments and frequent snapshots find more than the defaults would.

    Bugs are found where accidents meet, and not where a healthy cluster beats time. So clockwork, clients and registrations
    are slower than by default: beside draws of 0.025 to 0.1 s for a tick, 0.1 to 0.3 s for a heartbeat, and clients of
    twice the pace, a simulated second costs 1.6 times less, and known bugs are found in as few seeds (docs/testing.md)."""
    small = rng.random() < 0.7
    calm = rng.choice([1.0, 1.0, 2.0])
    return Plan(
        nodes=nodes,
        election=election,
        clients=rng.choice([2, 3, 4]),
        keys=rng.choice([1, 3, 6]),
        pace_s=rng.choice([0.6, 1.2, 2.4]),
        expect=nodes if rng.random() < 0.5 else 1,
        timing=Timing(
            tick_s=min(rng.choice([0.05, 0.1, 0.1, 0.15, 0.15]) * calm, TICK_S_MAX),
            heartbeat_s=rng.choice([0.2, 0.3, 0.3]) * calm,
            election_timeout_s=0.75 * calm,
        ),
        bounds=replace(
            Bounds(),
            append_bytes_max=rng.choice([60, 200, 1 << 20]),
            appends_in_flight_max=rng.choice([1, 2, 4]),
            batches_in_flight_max=rng.choice([1, 2, 4]),
            batch_entries_max=rng.choice([1, 2, 4096]),
            snapshot_chunk_bytes=rng.choice([3000, 256 << 10]),
        ),
        policy=Policy(
            entries=rng.choice([3, 10, 40]) if small else 100_000,
            bytes=rng.choice([100, 64 << 20, 64 << 20, 64 << 20]),
            retain_entries=rng.choice([0, 2, 20]),
        ),
        segment_bytes_max=rng.choice([1 << 10, 8 << 10]) if small else 64 << 10,
        replace_after_s=rng.choice([3.0, 8.0]),
        skew=rng.random() < 0.3,
        sessions=rng.choice([0, 1, 2]),
        holders=rng.choice([0, 0, 1, 2]),
        session_unused_s=rng.choice([1.0, 4.0, 3600.0]),
        watchers=rng.choice([0, 0, 1, 2]),
        registry_ttl_s=rng.choice([3.0, 6.0, 6.0]),
    )


class RegistryProgram:
    """The registry as its process is: roster, memory, service."""

    def __init__(self, world: SimWorld, ttl_s: float) -> None:
        self.file = MemoryFile(Path("/registry"), world.disk)
        self.roster = Roster(self.file.load(), world.loop.now(), ttl_s)
        self.service = Registry(self.roster, self.file, world.loop.now)
        self.listener = world.listen(self.service, "registry", PORT, Limits())
        world.loop.every(REGISTRY_TICK_S, self.service.tick)

    def __repr__(self) -> str:
        return repr(self.roster)

    def close(self) -> None:
        """See simhost.Program."""
        self.listener.close()
        self.file.close()


class Town:
    """Everybody. `rng` draws what is not drawn beforehand; `met(what)` counts; `note(text)` gets the trace, when there is
    one."""

    def __init__(
        self,
        agenda: Agenda,
        plan: Plan,
        rng: random.Random,
        met: Callable[[str], None],
        note: Callable[[str], None] | None,
    ) -> None:
        self.plan = plan
        self.rng = rng
        self.met = met
        self.note = note
        self.agenda = agenda
        self.network = Network(self.agenda, random.Random(rng.getrandbits(64)), met)
        self.rules = Rules(met, note)
        self.duties = Duties(self.rules)
        self.hosts: dict[str, Host] = {}
        self.tenure = TenureRules(met, lambda: self.agenda.now, self.hosts)
        self.nodes: list[str] = []
        self.clients: list[Client] = []
        self.holders: list[Holder] = []
        self.watchers: list[Watcher] = []
        self.truth = Truth(self.rules)
        self.history: list[Operation] = []
        self.back_in_s: dict[str, float] = {}
        self.healed = False
        self._damaged: dict[str, tuple[str, int]] = {}  # host -> whose data was, and what was committed then
        self.rotten: set[str] = set()  # hosts on whose disks something was changed behind the program's back
        self._repairs: set[str] = set()
        self._away: set[str] = set()  # hosts whose start is on the agenda
        registry = self._host("registry")
        registry.boot = lambda world: RegistryProgram(world, plan.registry_ttl_s)
        registry.start()
        for _ in range(plan.nodes):
            self.join()
        self._operator = self._host("operator")

    def _host(self, name: str) -> Host:
        host = self.hosts[name] = Host(name, self.agenda, self.network, random.Random(self.rng.getrandbits(64)))
        host.on_exit = self._exited
        return host

    # -- nodes

    def join(self) -> None:
        """One more node starts, where there is room for one."""
        most = min(NODES_MAX, self.plan.nodes + JOINING_MAX)
        if len(self.nodes) >= most or (self.agenda.now and not self.registry_knows):
            return
        name = f"n{len(self.nodes) + 1}"
        self.nodes.append(name)
        host = self._host(name)
        host.busy = self.rng.choice([0.0, 0.1, 0.5])
        if self.plan.skew:
            host.rate = 0.97 + 0.06 * self.rng.random()
        host.boot = lambda world: self._boot_node(host, world)
        host.start()

    def _boot_node(self, host: Host, world: SimWorld) -> Node:
        plan = self.plan
        settings = Settings(
            data_dir=Path("/") / host.name,
            registry=("registry", PORT),
            host=host.name,
            port=PORT,
            name=host.name,
            election=plan.election,
            expect=plan.expect,
            replace_after_s=plan.replace_after_s,
            policy=plan.policy,
            timing=plan.timing,
            bounds=plan.bounds,
            segment_bytes_max=plan.segment_bytes_max,
            session_unused_s=plan.session_unused_s,
            repair=host.name in self._repairs,
        )
        node = Node(settings, world)
        self._repairs.discard(host.name)
        self.rules.attach(host, node)
        self.duties.attach(host, node)
        self.tenure.attach(host, node)
        host.on_turn_done = self._look_at(node)
        if self.note is not None:
            self.note(f"{host.name} has started: {node!r}")
        return node

    def _look_at(self, node: Node) -> Callable[[Host], None]:
        """What has the rules look at `node` after a turn, if that changed anything that they look at. (Most turns are
        ticks, which don't.)"""
        raft, log, sync, data = node.replica.raft, node.replica.raft.log, node.sync, node.data
        rules, duties = self.rules, self.duties
        looked: object = None  # what was there to see at its last turn

        def turn_done(host: Host) -> None:
            nonlocal looked
            leads = raft._leadership
            seen = (
                raft.term, raft.role, raft.commit, raft.durable, log.last_index, raft.doubt, raft._configs[-1][0],
                leads and leads.transfer_to, sync._begun, sync._store._checkpoint, data.identity,
            )  # fmt: skip
            if looked != seen:
                looked = seen
                duties.look(host)
                rules.look(host)

        return turn_done

    def node(self, name: str) -> Node | None:
        """The node that runs on the host `name`."""
        program = self.hosts[name].program
        return program if isinstance(program, Node) else None

    @property
    def running(self) -> list[Node]:
        """The nodes that run."""
        return [node for name in self.nodes if (node := self.node(name)) is not None]

    @property
    def leader(self) -> str | None:
        """The host of the leader of the highest term."""
        leading = [n for n in self.nodes if (node := self.node(n)) is not None and node.replica.is_leader]
        return max(leading, key=lambda n: self.node(n).replica.raft.term, default=None)  # type: ignore[union-attr]

    @property
    def has_cluster(self) -> bool:
        """Whether a node that runs belongs to a cluster."""
        return any(node.replica.raft.commit for node in self.running)

    @property
    def all_belong(self) -> bool:
        """Whether all nodes run and belong to the cluster."""
        return all((node := self.node(name)) is not None and node.cluster is not None for name in self.nodes)

    @property
    def registry_knows(self) -> bool:
        """Whether the registry knows the cluster. One that has lost its memory can't tell a newcomer from a founder, so
        nobody new should come before it has heard of the cluster again (roster.py)."""
        program = self.hosts["registry"].program
        return isinstance(program, RegistryProgram) and program.roster.memory.cluster is not None

    # -- what faults ask

    def victim(self, where: float) -> str:
        """The node that a fault strikes, for its number from [0, 1)."""
        if where < AT_THE_LEADER and (leader := self.leader) is not None:
            return leader
        return self.nodes[int(where * 1000) % len(self.nodes)]

    def nodes_from(self, where: float) -> list[str]:
        """All nodes in some order, the victim first."""
        first = self.victim(where)
        others = [name for name in self.nodes if name != first]
        random.Random(int(where * 2**32)).shuffle(others)
        return [first, *others]

    def may_lose_data(self, name: str) -> bool:
        """Whether the disk of `name` may lose what it promised to keep: that is no more than a cluster survives. If so,
        it counts as damaged from now on."""
        if any(self.node(n) is None for n in self.nodes if n not in self.damaged):
            return False  # nobody knows what is in its log
        rafts = [node.replica.raft for node in self.running]
        configs = [config for raft in rafts for index, config in raft._configs if index > raft.commit]
        configs += [raft.config_at(raft.commit) for raft in rafts]
        smallest = min((len(config.voters) for config in configs if config.members), default=0)
        if len({*self.damaged, name}) > (smallest - 1) // 2 or not self.has_cluster:
            return False
        node = self.node(name)
        if node is None and name not in self._damaged:
            return False  # whose it was is not known now
        if node is not None:
            if name in self._damaged and self._damaged[name][0] != node.id:
                return False
            self._damaged[name] = (node.id, self.rules.committed)
        return True

    @property
    def damaged(self) -> dict[str, tuple[str, int]]:
        """The hosts whose data were lost, as far as they have not been made good: whose they were, and what was committed then."""
        self._damaged = {host: was for host, was in self._damaged.items() if not self._is_mended(host, *was)}
        return self._damaged

    def _is_mended(self, name: str, id: str, committed: int) -> bool:
        """Whether the member `id` has all that it had promised, or is a member no more, for certain."""
        node = self.node(name)
        if node is not None and node.id == id:
            raft = node.replica.raft
            return not raft.doubt and not node.replica.diverged and node.replica.machine.applied >= committed
        leader = self.node(self.leader) if self.leader is not None else None
        if leader is None or not leader.replica.raft.has_committed_in_term:
            return False
        raft = leader.replica.raft
        return raft.config_at(raft.commit).member(id) is None and raft.config.member(id) is None

    # -- ends and beginnings

    def kill(self, name: str, power: bool, back_in_s: float) -> None:
        """End the program on `name` at once; it is started again `back_in_s` later."""
        host = self.hosts[name]
        if host.program is not None or host.crash_in is not None:
            host.die(power)
        self._start_in(name, back_in_s)

    def terminate(self, name: str, back_in_s: float) -> None:
        """Ask the node on `name` to leave."""
        node, host = self.node(name), self.hosts[name]
        if node is not None and not host.paused:
            self.back_in_s[name] = back_in_s
            host.happens(node.leave, ())

    def wipe(self, name: str) -> None:
        """Empty the disk of `name`, which is down."""
        self.hosts[name].disk.wipe()
        self.rotten.discard(name)
        self.met("disk wiped")

    def _exited(self, host: Host, why: str | None) -> None:
        """The program on `host` has ended: by a crash point (why None), or by itself."""
        name = host.name
        back_s = self.back_in_s.pop(name, BACK_S)
        if why is None:
            host.die(power=host.rng.random() < 0.6)
            self.met("died between two effects")
        elif "was removed from its cluster" in why:
            if self.registry_knows:  # else the operator waits, and it is told again
                self.wipe(name)
                self.met("removed node started anew")
        elif "--repair" in why or "is missing" in why or "not a node's identity" in why:
            if name not in self.rotten:
                raise Violation(UNDAMAGED, name, why)
            self._repairs.add(name)
            self.met("damage refused, then repaired")
        elif why != "it has left":
            self.met("ended by itself: " + why.split("(")[0].split(":")[0].strip())
        if self.note is not None:
            self.note(f"{name} has ended: {why or 'it crashed'}")
        self._start_in(name, min(back_s, BACK_S) if self.healed else back_s)

    def _start_in(self, name: str, delay_s: float) -> None:
        if name not in self._away:
            self._away.add(name)
            self.agenda.after(delay_s, None, self._start, name)

    def _start(self, name: str) -> None:
        self._away.discard(name)
        if self.hosts[name].program is None:
            self.hosts[name].start()

    def heal(self) -> None:
        """Let nothing go wrong any more, and everybody be up soon."""
        self.healed = True
        self.network.chances.loss = self.network.chances.repeat = self.network.chances.reorder = 0.0
        for host in list(self.hosts.values()):
            host.crash_in = host.crash_only = None
            host.disk.faults.clear()
            host.disk.room_bytes = None
            if host.paused:
                host.resume()

    # -- clients

    def open_shop(self, rng: random.Random) -> None:
        """Let the clients begin."""
        addresses = [f"{name}:{PORT}" for name in self.nodes]
        keys = [chr(ord("a") + number) for number in range(self.plan.keys)]
        for number in range(max(1, self.plan.clients - self.plan.sessions)):
            host = self._host(f"c{number + 1}")
            own = random.Random(rng.getrandbits(64))
            self.clients.append(Client(host, addresses, keys, own, self.plan.pace_s, self._record))
        for number in range(self.plan.sessions):
            host, own = self._host(f"s{number + 1}"), random.Random(rng.getrandbits(64))
            self.clients.append(SessionClient(host, addresses, keys, own, self.plan.pace_s, self._record, self.tenure))
        for number in range(self.plan.holders):
            host, own = self._host(f"h{number + 1}"), random.Random(rng.getrandbits(64))
            self.holders.append(Holder(host, addresses, own, self.tenure))
        for number in range(self.plan.watchers):
            host, own = self._host(f"w{number + 1}"), random.Random(rng.getrandbits(64))
            self.watchers.append(Watcher(host, addresses, own, self.truth, self.met, self.note))

    def _record(self, operation: Operation) -> None:
        self.history.append(operation)
        if self.note is not None:
            self.note(f"{operation}")

    def ask(
        self,
        request: dict[str, Any],
        at: str | None = None,
        timeout_s: float = 3.0,
        done: Callable[[dict[str, Any] | DdbError], None] = lambda reply: None,
    ) -> None:
        """The operator asks the cluster, or the node `at`, for something."""
        addresses = [f"{name}:{PORT}" for name in self.nodes]
        caller = Caller(self._operator, Knowledge(addresses), random.Random(self.rng.getrandbits(64)))
        caller.call(request, f"{at}:{PORT}" if at else None, timeout_s, done)

    # -- the end

    @property
    def is_beyond_help(self) -> bool:
        """Whether so many voters' memory is gone, wholly or by a torn tail, that no majority can remember all that it
        acknowledged: then ddb waits for a person rather than guess (docs/architecture.md)."""
        if not self.running:
            return False
        best = max(self.running, key=lambda node: (node.replica.raft.log.last_term, node.replica.raft.log.last_index))
        voters = best.replica.raft.config.voters
        sure = sum(1 for node in self.running if node.id in voters and not node.replica.raft.doubt)
        return 2 * sure <= len(voters)

    def why_not_settled(self) -> str | None:
        """What is still missing for all to be well; None when nothing is."""
        for name in self.nodes:
            if self.node(name) is None:
                return f"{name} is down"
        leader = self.node(self.leader) if self.leader is not None else None
        if leader is None or not leader.replica.raft.has_committed_in_term:
            return "nobody leads"
        applied, digest = leader.replica.machine.applied, leader.replica.machine.table.digest
        ids = {member.id for member in leader.replica.raft.config.members}
        for node in self.running:
            machine, raft = node.replica.machine, node.replica.raft
            if node.id not in ids:
                return f"{node!r} is no member of {sorted(ids)}"
            if (machine.applied, machine.table.digest) != (applied, digest) or node.replica.diverged:
                return f"{node!r} is not where {leader!r} is"
            if raft.role is not Role.LEADER and raft.leader != leader.id:
                return f"{node!r} does not follow {leader!r}"
        return None
