"""When leases and sessions end: never early, soon enough, and only by who leads. Replicas on virtual time."""

from __future__ import annotations

import pytest

from ddb import tenure
from ddb.errors import BadRequest, DdbError, NoLeader
from ddb.leasing import keep_alive
from ddb.replica import Replica
from ddb.tenure import Tenure
from tests.town import Asked, Town

TICK_S = 0.025  # how much later than due an expiry may be proposed
COMMIT_S = 0.02  # how long it may take until that is applied here


class Office:
    """What leasing.py needs of a node."""

    def __init__(self, town: LeaseTown, replica: Replica, session_unused_s: float) -> None:
        self.town = town
        self.replica = replica
        self.tenure = Tenure(replica, lambda: int(town.now * 1000) + town.wall_ahead_ms, session_unused_s)

    def now(self) -> float:
        return self.town.now


class LeaseTown(Town):
    """A town whose members keep deadlines while they lead."""

    def __init__(self, names: str = "abc", session_unused_s: float = 3600.0) -> None:
        super().__init__(names)
        self.offices = {name: Office(self, replica, session_unused_s) for name, replica in self.replicas.items()}
        self.wall_ahead_ms = 0

    def turn(self) -> None:
        super().turn()
        for office in self.offices.values():
            office.tenure.tick(office.now())

    def leads(self) -> str:
        """Wait for a leader that counts; return its name."""
        name = self.leader()
        self.until(lambda: self.offices[name].tenure.leads(self.now))
        return name

    def grant(self, ttl: float) -> int:
        reply = self.answer(self.write(self.leads(), "lease_grant", ttl=ttl))
        assert reply["ok"], reply
        return int(str(reply["lease"]))

    def has(self, lease: int, at: str = "") -> bool:
        return lease in self.replicas[at or self.leader()].machine.leases.ttl_ms

    def keep_alive(self, lease: int, at: str) -> Asked:
        asked = Asked(self.now + 5.0)
        asked.has_room = True  # type: ignore[attr-defined]
        keep_alive(self.offices[at], {"lease": lease}, asked)  # type: ignore[arg-type]
        return asked

    def kept_alive(self, lease: int) -> dict[str, object]:
        return self.answer(self.keep_alive(lease, self.leads()))

    def lived_s(self, lease: int, since: float, at: str = "abc") -> float:
        """Wait until the members `at` have all forgotten `lease`; how long that is after `since`."""
        self.until(lambda: not any(self.has(lease, name) for name in at if name in self.replicas), 60.0)
        return self.now - since

    def wait(self, span_s: float) -> None:
        end = self.now + span_s
        self.until(lambda: self.now >= end, span_s + 1.0)


def test_a_lease_ends_its_ttl_after_it_was_applied_and_its_keys_with_it() -> None:
    town = LeaseTown()
    lease = town.grant(1.0)
    granted = town.now
    leader = town.leads()
    assert town.answer(town.write(leader, key="k", value=1, lease=lease))["ok"]
    lived_s = town.lived_s(lease, granted)
    assert 1.0 <= lived_s <= 1.0 + TICK_S + COMMIT_S + 0.1  # followers hear of a commit with the next heartbeat
    assert all(replica.machine.table.row("k") is None for replica in town.replicas.values())


def test_a_keepalive_gives_the_whole_ttl_again() -> None:
    town = LeaseTown()
    lease = town.grant(0.5)
    for _ in range(5):
        town.wait(0.4)
        assert town.kept_alive(lease) == {"ok": True, "lease": lease, "ttl": 0.5}
    kept = town.now
    assert 0.5 <= town.lived_s(lease, kept) <= 0.5 + TICK_S + COMMIT_S + 0.1


def test_time_runs_from_the_grant_s_application_not_from_its_proposal() -> None:
    town = LeaseTown()
    leader = town.leads()
    for name in town.replicas:
        town.journals[name].stuck = True
    asked = town.write(leader, "lease_grant", ttl=0.3)
    town.wait(0.5)
    for name in town.replicas:
        town.journals[name].stuck = False
    lease = int(str(town.answer(asked)["lease"]))
    assert town.lived_s(lease, town.now) >= 0.3 - 0.002  # a turn of the town passes before the answer is looked at


def test_the_time_of_day_makes_no_difference() -> None:
    town = LeaseTown()
    lease = town.grant(1.0)
    town.wait(0.1)
    town.wall_ahead_ms += 3_600_000
    assert town.kept_alive(lease)["ok"]
    kept = town.now
    town.wall_ahead_ms += 3_600_000
    assert town.lived_s(lease, kept) >= 1.0
    lease = town.grant(1.0)
    town.wall_ahead_ms -= 7_200_000
    assert town.lived_s(lease, town.now) <= 1.0 + TICK_S + COMMIT_S + 0.1


def test_a_new_leader_gives_every_lease_its_full_ttl_again() -> None:
    town = LeaseTown()
    lease = town.grant(1.0)
    old = town.leads()
    town.wait(0.9)
    town.isolate(old)
    new = town.leader(other_than=old)
    town.until(lambda: town.offices[new].tenure.leads(town.now))
    assert 1.0 <= town.lived_s(lease, town.now, new) <= 1.0 + TICK_S + COMMIT_S


def test_a_former_leader_that_is_cut_off_ends_nothing_and_its_word_is_not_said_again_when_it_returns() -> None:
    town = LeaseTown()
    lease = town.grant(0.3)
    old = town.leads()
    town.wait(0.28)
    town.isolate(old)
    town.until(lambda: lease in town.offices[old].tenure._ending)  # it proposes the end, to nobody
    new = town.leader(other_than=old)
    town.until(lambda: town.offices[new].tenure.leads(town.now))
    assert town.answer(town.keep_alive(lease, new))["ok"]
    kept = town.now
    town.heal()
    town.until(lambda: town.replicas[old].raft.leader == new)
    assert town.has(lease, new)
    assert town.lived_s(lease, kept) >= 0.3


def test_a_keepalive_that_meets_a_proposed_end_is_told_so_and_changes_nothing() -> None:
    town = LeaseTown()
    lease = town.grant(0.3)
    leader = town.leads()
    town.until(lambda: lease in town.offices[leader].tenure._ending)
    assert town.has(lease, leader)
    with pytest.raises(BadRequest) as caught:
        town.offices[leader].tenure.keep_alive(lease, town.now)
    assert caught.value.fields == {"lease": lease}
    town.until(lambda: not town.has(lease, leader), 0.1)


def test_a_keepalive_is_not_answered_by_a_leader_that_nobody_confirms() -> None:
    town = LeaseTown()
    lease = town.grant(30.0)
    leader = town.leads()
    town.isolate(leader)
    asked = town.keep_alive(lease, leader)
    before = town.offices[leader].tenure.remaining_s(lease, town.now)
    assert before is not None
    town.until(lambda: not town.replicas[leader].is_leader)
    assert not asked.done
    town.leader(other_than=leader)
    town.heal()
    reply = town.answer(asked)  # in the end another leader confirms the read, but this node counts no more
    assert reply["ok"] is False and reply["error"] == "no_leader"


def test_a_leader_counts_only_once_it_has_applied_an_entry_of_its_own_term() -> None:
    town = LeaseTown()
    town.until(lambda: any(replica.is_leader for replica in town.replicas.values()))
    leader = next(name for name, replica in town.replicas.items() if replica.is_leader)
    assert not town.replicas[leader].raft.has_committed_in_term
    assert not town.offices[leader].tenure.leads(town.now)
    town.until(lambda: town.offices[leader].tenure.leads(town.now))
    assert town.replicas[leader].machine.applied >= 1
    others = [office for name, office in town.offices.items() if name != leader]
    assert not any(office.tenure.leads(town.now) for office in others)


def test_after_a_pause_of_the_leader_who_waits_in_its_sockets_is_heard_first() -> None:
    town = LeaseTown("a")
    lease = town.grant(0.3)
    office = town.offices["a"]
    town.wait(0.25)
    town.now += 0.5  # the process was stopped; the lease is overdue
    office.tenure.tick(town.now)
    assert lease not in office.tenure._ending
    assert town.answer(town.keep_alive(lease, "a"))["ok"]  # it was sent meanwhile, and is read now
    kept = town.now
    assert town.lived_s(lease, kept) >= 0.3


def test_after_a_pause_that_nobody_used_the_lease_ends_soon() -> None:
    town = LeaseTown("a")
    lease = town.grant(0.3)
    town.now += 5.0
    assert town.lived_s(lease, town.now) <= tenure.GRACE_S + TICK_S + COMMIT_S


def test_a_leader_that_is_always_late_ends_leases_all_the_same() -> None:
    town = LeaseTown("a")
    lease = town.grant(0.5)
    granted = town.now
    while town.has(lease, "a"):
        town.now += 0.4  # so long does each turn of the loop take
        town.turn()
        assert town.now - granted < 0.5 + 4 * 0.4


def test_while_the_leadership_is_handed_over_and_on_a_full_disk_nothing_is_proposed() -> None:
    town = LeaseTown("a")
    lease = town.grant(0.2)
    town.replicas["a"].full(True)
    town.wait(1.0)
    assert town.has(lease, "a")
    town.replicas["a"].full(False)
    assert town.lived_s(lease, town.now) <= TICK_S + COMMIT_S


def test_many_leases_that_end_at_once_go_in_few_entries_and_all() -> None:
    town = LeaseTown("a")
    waiting = [town.write("a", "lease_grant", ttl=0.5) for _ in range(2500)]
    town.until(lambda: all(asked.done for asked in waiting))
    before = town.replicas["a"].machine.applied
    town.until(lambda: not town.replicas["a"].machine.leases.ttl_ms)
    assert town.replicas["a"].machine.applied - before == 3
    town.wait(2.0)
    office = town.offices["a"].tenure
    assert not office._due and not office._ending and not office._deadlines


def test_leases_that_are_revoked_long_before_their_time_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenure, "IDLE_MAX", 5)
    town = LeaseTown("a")
    kept = town.grant(1000)
    for _ in range(50):
        lease = town.grant(1000)
        assert town.answer(town.write("a", "lease_revoke", lease=lease))["ok"]
    office = town.offices["a"].tenure
    town.grant(1000)
    office.tick(town.now)
    assert len(office._due) <= 10 and kept in office._deadlines


def test_the_time_left_is_known_to_the_leader_alone() -> None:
    town = LeaseTown()
    lease = town.grant(10.0)
    leader = town.leads()
    left = {name: office.tenure.remaining_s(lease, town.now) for name, office in town.offices.items()}
    mine = left.pop(leader)
    assert mine is not None and 9.5 < mine <= 10.0
    assert list(left.values()) == [None, None]


# ---------------------------------------------------------------- sessions


def test_a_session_that_nobody_uses_is_forgotten_after_an_hour_of_the_leader_s_time() -> None:
    town = LeaseTown(session_unused_s=3.0)
    leader = town.leads()
    idle, busy = (int(str(town.answer(town.write(leader, "session_open"))["client"])) for _ in range(2))
    opened = town.now
    for seq in range(1, 11):
        town.wait(0.5)
        town.answer(town.write(leader, "incr", key="n", client=busy, seq=seq))
        there = dict(town.replicas[leader].machine.sessions.last_uses())
        assert busy in there
        assert (idle in there) or town.now - opened >= 3.0
    assert idle not in there
    reply = town.answer(town.write(leader, "incr", key="n", client=idle, seq=1))
    assert reply["error"] == "session_expired"
    town.wait(0.5)
    assert len({(r.machine.applied, r.machine.table.digest) for r in town.replicas.values()}) == 1


def test_a_new_leader_gives_every_session_its_hour_again() -> None:
    town = LeaseTown(session_unused_s=2.0)
    old = town.leads()
    client = int(str(town.answer(town.write(old, "session_open"))["client"]))
    town.wait(1.5)
    town.isolate(old)
    new = town.leader(other_than=old)
    led_since = town.now
    town.until(lambda: client not in dict(town.replicas[new].machine.sessions.last_uses()))
    assert town.now - led_since >= 2.0


def test_a_keepalive_at_who_does_not_lead_fails_and_says_so() -> None:
    town = LeaseTown()
    lease = town.grant(10.0)
    follower = next(name for name in town.replicas if name != town.leads())
    reply = town.answer(town.keep_alive(lease, follower))
    assert reply["error"] == NoLeader.code
    assert issubclass(NoLeader, DdbError)
