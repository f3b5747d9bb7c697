"""Chance against consensus: seeded clusters under every fault at once, then peace, in which they must agree.

Each seed decides all: who crashes and what its disk had finished, what is lost, repeated and overtaken on the wire, who
ticks late, when a disk forgets, when members come and go. The rules of `raft_net.Rules` are looked at after each step
(safety); after the faults end, a leader must emerge, a write must commit and all logs must be equal, within a bound of
simulated time (liveness).

A failure names its seed; `DDB_SEED=1234 pytest tests/test_raft_random.py` replays that one alone, and `DDB_SEEDS=5000`
tries more.
"""

from __future__ import annotations

import os
import random

import pytest

from ddb.config import Timing
from ddb.errors import BadRequest, NoLeader, Overloaded
from ddb.messages import Member, Role, SnapshotRequest
from tests.raft_net import Net, Peer

SEEDS = [int(os.environ["DDB_SEED"])] if "DDB_SEED" in os.environ else range(int(os.environ.get("DDB_SEEDS", "400")))
STEPS = 1200
PEACE_S = 20.0


class Chaos:
    """One seed's cluster and its misfortunes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        size = self.rng.choice([1, 3, 3, 3, 5])
        # Half of the clusters are so impatient that terms come and go while messages are still on their way.
        timeout_s = self.rng.choice([Timing().election_timeout_s, 0.15])
        timing = Timing(election_timeout_s=timeout_s, heartbeat_s=timeout_s / 5)
        self.net = Net(size, election=self.rng.choice(["bully", "raft"]), seed=seed, timing=timing)
        self.joined = size
        self.tickets = 0
        self.forgetful = self.rng.random() < 0.5
        self.lossy = self.rng.random() < 0.7
        self.changing = self.rng.random() < 0.6
        acts = [
            (60, self.deliver), (14, self.tick), (20, self.write), (6, self.put), (3, self.read),
            (0.6, self.crash), (1.6, self.restart), (0.3, self.partition), (0.8, self.heal),
            (0.3, self.break_connection), (0.4, self.transfer), (1.0, self.checkpoint), (0.15, self.stall),
        ]  # fmt: skip
        if self.rng.random() < 0.5:
            acts += [(1.5, self.provoke)]
        if self.changing:
            acts += [(1.0, self.change)]
        if size > 1:
            acts += [(0.2, self.distrust), (1.0, self.request)]
        self.acts = [act for _, act in acts]
        self.weights = [weight for weight, _ in acts]

    def run(self) -> None:
        for peer in self.net.running:
            peer.disk.writes = False
        for act in self.rng.choices(self.acts, self.weights, k=STEPS):
            act()
            del self.net.wire[2000:]
        self.make_peace()

    def make_peace(self) -> None:
        net = self.net
        for peer in net.peers.values():
            if peer.raft is None:
                net.start(peer.id)
        for peer in net.peers.values():
            peer.disk.writes = True
            while net.write(peer.id):
                pass
        net.heal()
        net.settle()
        assert net.run(PEACE_S, lambda: net.leader is not None and net.leading.accepts), "a leader in time of peace"
        last = net.put("peace").last
        assert net.run(PEACE_S, lambda: self.agree(last)), f"agreement in time of peace: {net.running}"

    def agree(self, last: int) -> bool:
        net = self.net
        if net.leader is None:
            return False
        self.request()
        members = [net.peers[m.id] for m in net.leading.config.members]
        return (
            all(p.applied >= last and p.up.term == net.leading.term and not p.up.doubt for p in members)
            and len({(p.applied, p.digest, p.up.log.last_index, p.up.log.last_term) for p in members}) == 1
        )

    # --- what happens ---------------------------------------------------------------------------------------------

    def somebody(self) -> Peer | None:
        return self.rng.choice(self.net.running) if self.net.running else None

    def deliver(self) -> None:
        """Mostly the oldest message between two peers, as on a connection; at times another, or twice, or never."""
        wire, rng = self.net.wire, self.rng
        if not wire:
            return
        position = rng.randrange(len(wire))
        chance = rng.random() if self.lossy else 1.0
        if chance > 0.06:
            pair = (wire[position].src, wire[position].dst)
            position = next(i for i, m in enumerate(wire) if (m.src, m.dst) == pair)
        if chance < 0.02:
            wire.pop(position)
        else:
            self.net.deliver(position, repeat=chance > 0.97 and self.lossy)

    def tick(self) -> None:
        if peer := self.somebody():
            self.net.tick(peer.id, self.rng.random() * self.net.timing.tick_s)

    def stall(self) -> None:
        """Time passes, and nobody looks at the clock."""
        self.net.now += self.rng.random() * 2

    def write(self) -> None:
        if peer := self.somebody():
            self.net.write(peer.id)

    def put(self) -> None:
        for peer in self.net.running:
            if peer.up.accepts:
                self.net.put(self.rng.random(), self.rng.choice([1, 1, 2, 5]), peer.id)

    def read(self) -> None:
        leaders = [p for p in self.net.running if p.up.role is Role.LEADER]  # two at once make it interesting
        for peer in leaders or filter(None, [self.somebody()]):
            self.tickets += 1
            self.net.read(peer.id, self.tickets)

    def crash(self) -> None:
        peer = self.somebody()
        if peer is None:
            return
        unfinished = sum(len(t.records) for t in peer.disk.queue)
        forgets = self.forgetful and self.rng.random() < 0.5 and self.may_forget(peer)
        forget = self.rng.choice([0, 1, 2, 3, 8]) if forgets else 0
        torn = 0 if forget else self.rng.randint(0, unfinished)
        self.net.crash(peer.id, torn, forget, noticed=self.rng.random() < 0.8)

    def restart(self) -> None:
        down = [p for p in self.net.peers.values() if p.raft is None]
        if down:
            self.net.start(self.rng.choice(down).id)

    def may_forget(self, peer: Peer) -> bool:
        """Fewer than half the voters may be impaired at once: what a majority forgets is gone. And none while a change of
        the members is under way: a learner may then hold entries that decide, and not know that it may stand."""
        known = {p.up.config for p in self.net.running if p.up.config.members}
        if len(known) != 1 or len(self.net.running) < len(self.net.peers):
            return False
        voters = known.pop().voters
        impaired = sum(self.is_impaired(p) for p in self.net.peers.values() if p is not peer)
        return impaired + 1 <= (len(voters) - 1) // 2

    def is_impaired(self, peer: Peer) -> bool:
        doubt = peer.raft.doubt if peer.raft else peer.disk.recover()[1].doubt
        return peer.diverged or doubt

    def distrust(self) -> None:
        """A member finds its state wrong; it needs somebody else's."""
        peer = self.somebody()
        if peer and self.may_forget(peer):
            peer.distrust()
            self.net.look_after(peer.id)

    def request(self) -> None:
        for peer in self.net.running:
            if peer.diverged and peer.up.leader:
                self.net.post([SnapshotRequest(peer.id, peer.up.leader, peer.up.term)])

    def partition(self) -> None:
        ids = sorted(self.net.peers)
        some = self.rng.sample(ids, self.rng.randint(1, len(ids)))
        if self.rng.random() < 0.5:
            self.net.isolate(*some, noticed=self.rng.random() < 0.5)
        else:  # one way only
            self.net.cut |= {(a, b) for a in some for b in ids if b not in some}

    def heal(self) -> None:
        self.net.heal()

    def break_connection(self) -> None:
        ids = sorted(p.id for p in self.net.running)
        if len(ids) > 1:
            a, b = self.rng.sample(ids, 2)
            self.net.disconnect(a, b)

    def transfer(self) -> None:
        if self.net.leader is None:
            return
        leader = self.net.leading
        to = self.rng.choice(sorted(self.net.peers))
        if to != leader.id and to in leader.config.voters:
            leader.transfer(to, self.net.now)
            self.net.look_after(leader.id)

    def provoke(self) -> None:
        """Somebody stands out of turn: safety must not hang on who asks when, nor on anybody having asked first."""
        peer = self.somebody()
        if peer and peer.up.role is Role.FOLLOWER:
            self.net.provoke(peer.id, transfer=self.rng.random() < 0.5)

    def checkpoint(self) -> None:
        if peer := self.somebody():
            peer.checkpoint(keep=self.rng.choice([0, 0, 3, 20]))

    def change(self) -> None:
        """Add a learner, promote one, or remove somebody, the leader too."""
        net, rng = self.net, self.rng
        if net.leader is None or any(self.is_impaired(p) for p in net.peers.values()):
            return
        config = net.leading.config
        learners = [m for m in config.members if not m.voter]
        choice = rng.random()
        try:
            if learners and choice < 0.6:
                m = rng.choice(learners)
                net.change(config.with_member(Member(m.id, m.name, m.address, True)))
            elif len(net.peers) < 8 and choice < 0.8:
                self.joined += 1
                id = f"n{self.joined}"
                net.change(config.with_member(Member(id, id, id, False)))
                net.join(id)
                net.peers[id].disk.writes = False
            elif len(config.voters) > 1:
                net.change(config.without(rng.choice(config.voters)))
        except (NoLeader, Overloaded, BadRequest):
            pass


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_nothing_committed_is_lost_and_peace_brings_agreement(seed: int) -> None:
    chaos = Chaos(seed)
    try:
        chaos.run()
    except Exception as error:
        error.add_note(f"replay: DDB_SEED={seed} pytest {os.path.relpath(__file__)}")
        raise
