"""Who should be a member: every rule of membership.py, on plain values."""

from __future__ import annotations

from dataclasses import replace

from ddb.membership import Patience, Sighting, Standing, next_change, survives
from ddb.messages import Configuration, Member

PATIENCE = Patience(dead_after_s=2.0, replace_after_s=30.0, drop_learner_after_s=60.0)
ALIVE = Standing(0.1, caught_up=True)
BEHIND = Standing(0.1, caught_up=False)


def config(voters: str, learners: str = "", removed: tuple[str, ...] = ()) -> Configuration:
    members = [Member(id, f"n{id}", f"127.0.0.1:80{id}", id in voters) for id in sorted(voters + learners)]
    return Configuration("c", "bully", tuple(members), removed)


def seen(ids: str) -> dict[str, Sighting]:
    return {id: Sighting(id, f"n{id}", f"127.0.0.1:80{id}") for id in ids}


def change(
    now: Configuration, sightings: dict[str, Sighting] | None = None, **standings: Standing
) -> Configuration | None:
    """The next change that leader "1" of `now` makes; members not named in `standings` are alive and well."""
    known = {m.id: standings.get(f"_{m.id}", ALIVE) for m in now.members if m.id != "1"}
    return next_change(now, "1", sightings or {}, known, PATIENCE)


def test_a_registered_stranger_becomes_a_learner() -> None:
    after = change(config("1"), seen("12"))
    assert after == config("1", "2")


def test_a_removed_id_is_never_taken_in_again() -> None:
    assert change(config("1", removed=("2",)), seen("12")) is None


def test_a_learner_is_promoted_when_it_has_caught_up_and_not_before() -> None:
    assert change(config("1", "2"), _2=BEHIND) is None
    assert change(config("1", "2")) == config("12")


def test_one_learner_is_promoted_at_a_time() -> None:
    after = change(config("1", "23"))
    assert after == config("12", "3")


def test_a_dead_learner_is_not_promoted() -> None:
    assert change(config("1", "2"), _2=Standing(5.0, caught_up=True)) is None


def test_a_learner_in_doubt_is_not_promoted() -> None:
    assert change(config("12", "3"), _3=replace(ALIVE, counts=False)) is None


def test_nobody_is_promoted_beside_a_voter_that_has_never_answered_this_leader() -> None:
    never_heard = Standing(0.1, caught_up=False, connected=False)
    assert change(config("123", "4"), _3=never_heard) is None


def test_nobody_is_promoted_where_the_promotion_could_not_be_committed() -> None:
    doubtful = replace(ALIVE, counts=False)
    assert change(config("123", "4"), _2=doubtful, _3=doubtful) is None


def test_a_learner_that_is_gone_is_dropped_but_not_banned() -> None:
    gone = Standing(61.0, caught_up=False)
    assert change(config("1", "2"), seen("12"), _2=gone) is None, "the registry still lists it"
    after = change(config("1", "2"), seen("1"), _2=gone)
    assert after == config("1")
    assert after.removed == ()


def test_a_newcomer_waits_while_a_dead_voter_may_yet_return() -> None:
    assert change(config("123", "4"), _3=Standing(29.0, caught_up=False)) is None


def test_a_long_dead_voter_is_given_up_for_a_newcomer_that_stands_ready() -> None:
    dead = Standing(30.0, caught_up=False)
    after = change(config("123", "4"), _3=dead)
    assert after == replace(config("12", "4"), removed=("3",))
    assert change(after, _3=dead) == replace(config("124"), removed=("3",))


def test_a_long_dead_voter_stays_while_no_newcomer_stands_ready() -> None:
    dead = Standing(1e6, caught_up=False)
    assert change(config("123"), _3=dead) is None
    assert change(config("123", "4"), _3=dead, _4=BEHIND) is None


def test_no_voter_is_given_up_where_the_rest_would_have_no_living_majority() -> None:
    dead = Standing(1e6, caught_up=False)
    assert change(config("1234", "5"), _2=dead, _3=dead, _4=dead) is None


def test_a_member_that_moved_gets_its_new_address() -> None:
    moved = {"2": Sighting("2", "n2", "127.0.0.1:9999")}
    after = change(config("12"), moved)
    assert after is not None
    member = after.member("2")
    assert member == Member("2", "n2", "127.0.0.1:9999", True)


def test_nothing_is_changed_when_all_is_well() -> None:
    assert change(config("123"), seen("123")) is None


def test_survives_counts_the_leader_and_the_living() -> None:
    dead = Standing(10.0, caught_up=False)
    assert survives(config("123"), "1", {"2": ALIVE, "3": dead}, PATIENCE)
    assert not survives(config("123"), "1", {"2": dead, "3": dead}, PATIENCE)
    assert not survives(config("123"), "1", {}, PATIENCE), "a member never heard of counts as dead"


def test_survives_counts_neither_who_is_in_doubt_nor_who_has_just_fallen_silent() -> None:
    dead = Standing(10.0, caught_up=False)
    for unsure in (replace(ALIVE, counts=False), replace(ALIVE, silent_s=0.6), replace(ALIVE, connected=False)):
        assert not survives(config("123"), "1", {"2": unsure, "3": dead}, PATIENCE)
