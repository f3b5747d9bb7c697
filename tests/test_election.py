"""election: who asks, what is answered, who stands. Both strategies go through the same tests; then the bully's own rules.

Where one strategy alone is looked at, `View` and the clock are plain values; where members meet, they are whole `Raft`s
(`raft_net`), because what an election must come to is a leader.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb.election import STRATEGIES, Answer, Bully, Election, Move, View
from ddb.messages import ElectionReply, ElectionRequest, RaftMessage, Role
from tests.raft_net import Net, with_log

TIMEOUT_S = 0.75
TICK_S = 0.025
VOTERS = ("a", "b", "c", "d", "e")
both = pytest.mark.parametrize("election", ["bully", "raft"])


def view_of(id: str, log: tuple[int, int] = (1, 1), voters: tuple[str, ...] = VOTERS, **others: object) -> View:
    """The view of member `id`, of the same name, whose log ends in `log` = (term, index): all connected, no leader."""
    view = View(id, (*log, id, id), voters, frozenset(voters) - {id}, hears_leader=False)
    return replace(view, **others)  # type: ignore[arg-type]


def rank(id: str, log: tuple[int, int] = (1, 1)) -> tuple[int, int, str, str]:
    return (*log, id, id)


def strategy(election: str, seed: int = 1) -> Election:
    """A strategy that has just heard a leader, at time 0."""
    made = STRATEGIES[election](TIMEOUT_S, random.Random(seed))
    made.follow(0.0)
    return made


def asking(election: str, view: View) -> Election:
    """A strategy that has heard nobody for 10 s, and has just asked."""
    made = strategy(election)
    assert made.tick(10.0, view) is Move.ASK
    return made


def moves(election: Election, view: View, start: float, seconds: float) -> Iterator[tuple[float, Move]]:
    """What `election` does by itself, with the times."""
    for i in range(round(seconds / TICK_S)):
        now = start + i * TICK_S
        if move := election.tick(now, view):
            yield now, move


# --- one strategy, looked at alone ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("seed", range(20))
def test_a_heard_leader_is_trusted_for_a_time_out_and_no_more_than_two(election: str, seed: int) -> None:
    when, move = next(moves(strategy(election, seed), view_of("a"), 0.0, 10.0))
    assert move is Move.ASK
    assert TIMEOUT_S <= when <= 2 * TIMEOUT_S + TICK_S


@both
@pytest.mark.parametrize("seed", range(20))
def test_a_broken_connection_is_suspicion_enough(election: str, seed: int) -> None:
    suspicious = strategy(election, seed)
    suspicious.suspect(0.1)
    when, _ = next(moves(suspicious, view_of("a"), 0.1, 10.0))
    assert when <= 0.1 + TIMEOUT_S / 10 + TICK_S


@both
def test_every_word_of_the_leader_is_a_new_time_out(election: str) -> None:
    calm, view = strategy(election), view_of("a")
    for i in range(1, 100):
        calm.suspect(i * 0.1)
        calm.follow(i * 0.1)
        assert calm.tick(i * 0.1 + 0.1, view) is None


@both
def test_who_is_alone_stands_without_asking(election: str) -> None:
    assert strategy(election).tick(10.0, view_of("a", voters=("a",))) is Move.STAND


@both
def test_who_may_not_stand_does_nothing_but_answer(election: str) -> None:
    quiet, view = strategy(election), view_of("e", may_stand=False)
    assert list(moves(quiet, view, 1.0, 10.0)) == []
    assert quiet.asked(11.0, view, rank("a")) in (Answer.YIELD, Answer.ALIVE)
    assert quiet.asked(11.0, replace(view, hears_leader=True), rank("a")) is Answer.LEADER


@both
def test_who_hears_a_leader_says_so_to_any_rank(election: str) -> None:
    listener, view = strategy(election), view_of("a", hears_leader=True)
    assert [listener.asked(0.1, view, rank(id, (9, 9))) for id in "be"] == [Answer.LEADER, Answer.LEADER]


@both
def test_who_has_the_better_log_does_not_yield(election: str) -> None:
    member, view = strategy(election), view_of("a", (2, 5))
    assert member.asked(0.1, view, rank("e", (2, 4))) is Answer.ALIVE
    assert member.asked(0.1, view, rank("e", (1, 9))) is Answer.ALIVE
    assert member.asked(0.1, view, rank("e", (2, 6))) is Answer.YIELD


@both
def test_a_majority_must_yield(election: str) -> None:
    view = view_of("e", reachable=frozenset("ab"))
    asker = asking(election, view)
    assert asker.answered(10.01, view, "a", Answer.YIELD) is None
    assert asker.answered(10.02, view, "b", Answer.YIELD) is Move.STAND


@both
def test_half_is_no_majority(election: str) -> None:
    view = view_of("d", voters=("a", "b", "c", "d"), reachable=frozenset("ab"))
    asker = asking(election, view)
    assert asker.answered(10.01, view, "a", Answer.YIELD) is None
    assert asker.answered(10.02, view, "b", Answer.YIELD) is Move.STAND


@both
def test_a_repeated_answer_counts_once(election: str) -> None:
    view = view_of("e", reachable=frozenset("a"))
    asker = asking(election, view)
    assert [asker.answered(10.01, view, "a", Answer.YIELD) for _ in range(5)] == [None] * 5


@both
def test_the_answer_of_no_voter_counts_for_nothing(election: str) -> None:
    view = view_of("e", reachable=frozenset("axyz"))
    asker = asking(election, view)
    assert [asker.answered(10.01, view, id, Answer.YIELD) for id in "axyz"] == [None] * 4


@both
def test_an_answer_to_an_election_that_is_over_counts_for_nothing(election: str) -> None:
    view = view_of("e")
    asker = asking(election, view)
    asker.follow(10.0)
    assert [asker.answered(10.01, view, id, Answer.YIELD) for id in "abcd"] == [None] * 4


@both
def test_who_voted_gives_the_candidate_time_to_win(election: str) -> None:
    voter, view = strategy(election), view_of("a")
    voter.voted(10.0, "b")
    when, _ = next(moves(voter, view, 10.0, 5.0))
    assert 10.0 + TIMEOUT_S / 2 <= when <= 10.0 + 2 * TIMEOUT_S + TICK_S


EVENTS = st.sampled_from(["follow", "suspect", "tick", "asked", "answered", "voted", "lost"])


@both
def test_nobody_ever_waits_for_ever(election: str) -> None:
    """Whatever came before: who may stand and hears nobody asks, or stands, within two time-outs."""

    @settings(deadline=None)
    @given(
        st.integers(0, 9),
        st.lists(st.tuples(EVENTS, st.sampled_from("abde"), st.sampled_from(Answer), st.floats(0, 1))),
    )
    def check(seed: int, events: list[tuple[str, str, Answer, float]]) -> None:
        member, view, now = strategy(election, seed), view_of("c"), 0.0
        acts: dict[str, Callable[[float, str, Answer], object]] = {
            "follow": lambda now, who, answer: member.follow(now),
            "suspect": lambda now, who, answer: member.suspect(now),
            "tick": lambda now, who, answer: member.tick(now, view),
            "asked": lambda now, who, answer: member.asked(now, view, rank(who)),
            "answered": lambda now, who, answer: member.answered(now, view, who, answer),
            "voted": lambda now, who, answer: member.voted(now, who),
            "lost": lambda now, who, answer: member.lost(now),
        }
        for event, who, answer, pause_s in events:
            now += pause_s
            acts[event](now, who, answer)
        assert next(moves(member, view, now, 2 * TIMEOUT_S + 2 * TICK_S), None) is not None

    check()


@both
def test_one_seed_makes_one_story(election: str) -> None:
    def tell(seed: int) -> list[tuple[float, RaftMessage]]:
        net = Net(5, election, seed)
        told: list[tuple[float, RaftMessage]] = []
        net.on_deliver = lambda message: told.append((net.now, message))
        for _ in range(3):
            net.crash(net.elect().id)
            net.run(2)
            for peer in net.peers.values():
                if peer.raft is None:
                    net.start(peer.id)
        return told

    assert tell(1) == tell(1) != tell(2)


# --- many members --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_a_fresh_cluster_gets_a_leader(election: str, size: int) -> None:
    net = Net(size, election)
    assert net.run(3 * TIMEOUT_S, lambda: net.leader is not None)


@both
@pytest.mark.parametrize("seed", range(10))
def test_a_killed_leader_is_replaced_within_half_a_time_out(election: str, seed: int) -> None:
    net = Net(5, election, seed)
    net.crash(net.elect().id)
    assert net.run(TIMEOUT_S / 2, lambda: net.leader is not None)


@both
@pytest.mark.parametrize("seed", range(10))
def test_a_silent_leader_is_replaced_after_a_time_out(election: str, seed: int) -> None:
    net = Net(5, election, seed)
    net.elect()
    net.run(0.2)
    net.crash(net.leading.id, noticed=False)
    assert not net.run(TIMEOUT_S - net.timing.heartbeat_s - 2 * TICK_S, lambda: net.leader is not None)
    assert net.run(2 * TIMEOUT_S, lambda: net.leader is not None)


@both
def test_a_minority_elects_nobody_and_raises_no_term(election: str) -> None:
    net = Net(5, election)
    net.elect("n5")
    net.run(0.2)
    net.isolate("n1", "n2", noticed=True)
    net.run(20)
    assert [(net[id].role, net[id].term) for id in ("n1", "n2")] == [(Role.FOLLOWER, 1)] * 2


@both
def test_who_alone_lost_the_leader_is_told_that_it_lives(election: str) -> None:
    net = Net(5, election)
    net.elect("n3")
    net.run(0.2)
    net.cut |= {("n3", "n5"), ("n5", "n3")}
    answers: list[str] = []
    net.on_deliver = lambda m: answers.append(m.answer) if isinstance(m, ElectionReply) else None
    net.run(5)
    assert set(answers) == {"leader"}
    assert (net.leader, net.leading.term, net["n5"].term) == ("n3", 1, 1)


@both
@pytest.mark.parametrize("behind", ["n1", "n2", "n3"])
def test_whose_log_is_behind_a_majority_never_wins(election: str, behind: str) -> None:
    net = Net(3, election, start=False)
    for id in net.peers:
        with_log(net, id, [1, 1] if id == behind else [1, 1, 2], term=2)
    for id in net.peers:
        net.start(id)
    assert net.elect().id != behind


@both
@pytest.mark.parametrize("seed", range(30))
def test_once_the_network_has_healed_there_is_a_leader_within_a_bound(election: str, seed: int) -> None:
    rng = random.Random(seed)
    net = Net(5, election, seed)
    for _ in range(5):
        net.cut |= {pair for pair in permutations(net.peers, 2) if rng.random() < 0.5}
        net.run(rng.random() * 3)
    net.heal()
    assert net.run(8 * TIMEOUT_S, lambda: net.leader is not None and net.leading.has_committed_in_term)
    leader = net.leader
    net.run(5)
    assert net.leader == leader, "and it stays"


# --- the bully's rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dead", [{"n5"}, {"n5", "n4"}, {"n5", "n3"}, {"n5", "n1"}, {"n5", "n2"}], ids="+".join)
def test_the_highest_name_among_the_living_wins_with_equal_logs(seed: int, dead: set[str]) -> None:
    net = Net(5, "bully", seed)
    net.elect("n5")
    net.run(0.2)
    for id in sorted(dead - {"n5"}):
        net.crash(id)
    net.crash("n5")
    assert net.elect().id == max(net.peers.keys() - dead)
    assert net.leading.term == 2, "in one election"


@pytest.mark.parametrize("seed", range(10))
def test_an_older_log_under_the_highest_name_neither_wins_nor_blocks(seed: int) -> None:
    net = Net(3, "bully", seed)
    net.elect("n2")
    net.run(0.2)
    net.crash("n3")
    net.put(count=3)
    net.run(0.2)
    net.crash("n2")
    net.start("n3")
    assert net.run(1.2 * TIMEOUT_S, lambda: net.leader is not None), "it does not block"
    assert net.leader == "n1", "it does not win"


@pytest.mark.parametrize("ahead", ["n1", "n2", "n3"])
def test_the_best_log_wins_under_any_name(ahead: str) -> None:
    """The others are a majority, and could elect one of themselves; but they are told that a better one is alive."""
    net = Net(3, "bully", start=False)
    for id in net.peers:
        with_log(net, id, [1, 1, 2] if id == ahead else [1, 1], term=2)
    for id in net.peers:
        net.start(id)
    assert net.elect().id == ahead


@pytest.mark.parametrize("noticed", [True, False])
def test_a_returning_highest_name_leaves_a_healthy_leader_alone(noticed: bool) -> None:
    net = Net(3, "bully")
    net.elect("n3")
    net.crash("n3", noticed=noticed)
    assert net.elect().id == "n2"
    net.start("n3")
    net.run(10)
    assert (net.leader, net.leading.term) == ("n2", 2)


@pytest.mark.parametrize("seed", range(10))
def test_a_highest_name_that_can_be_pinged_but_not_win_blocks_nobody(seed: int) -> None:
    """n5's questions and requests reach nobody, and its answers `alive` everybody."""
    net = Net(5, "bully", seed)
    net.elect("n1")
    net.run(0.2)
    net.crash("n1")

    def deaf_to_n5(m: RaftMessage) -> bool:
        return m.src == "n5" and not isinstance(m, ElectionReply)

    for _ in range(round(4 * TIMEOUT_S / TICK_S)):
        net.tick(seconds=TICK_S)
        net.settle(keep=deaf_to_n5)
        net.wire = [m for m in net.wire if not deaf_to_n5(m)]
        if net.leader is not None:
            break
    assert net.leader in ("n2", "n3", "n4")


def test_who_outranks_the_asker_says_that_it_is_alive_and_asks_itself() -> None:
    bully, view = strategy("bully"), view_of("c")
    assert bully.asked(0.1, view, rank("b")) is Answer.ALIVE
    assert bully.tick(0.1, view) is Move.ASK


def test_who_is_outranked_yields_and_waits_for_the_victory() -> None:
    bully, view = strategy("bully"), view_of("c")
    bully.suspect(0.1)
    assert bully.asked(0.1, view, rank("d")) is Answer.YIELD
    when, move = next(moves(bully, view, 0.1, 10.0))
    assert move is Move.ASK
    assert TIMEOUT_S / 2 <= when - 0.1 <= TIMEOUT_S + TICK_S


def test_the_name_is_the_last_word_and_the_id_behind_it() -> None:
    bully = strategy("bully")
    assert bully.asked(0.1, view_of("c"), (1, 1, "c", "b")) is Answer.ALIVE
    assert bully.asked(0.1, view_of("c"), (1, 1, "c", "d")) is Answer.YIELD
    assert bully.asked(0.1, view_of("c"), (1, 2, "a", "a")) is Answer.YIELD


def test_one_better_that_lives_is_waited_for_though_all_others_yield() -> None:
    view = view_of("d")
    bully = asking("bully", view)
    assert [bully.answered(10.0, view, id, Answer.YIELD) for id in "abc"] == [None] * 3
    assert bully.answered(10.0, view, "e", Answer.ALIVE) is None
    when, move = next(moves(bully, view, 10.0, 10.0))
    assert move is Move.ASK
    assert TIMEOUT_S / 2 <= when - 10.0 <= TIMEOUT_S + TICK_S


def test_who_was_waited_for_in_vain_is_waited_for_no_more() -> None:
    view = view_of("d")
    bully = asking("bully", view)
    bully.answered(10.0, view, "e", Answer.ALIVE)
    assert bully.tick(11.0, view) is Move.ASK
    assert bully.answered(11.0, view, "e", Answer.ALIVE) is None
    assert [bully.answered(11.0, view, id, Answer.YIELD) for id in "abc"] == [None, None, Move.STAND]


def test_who_was_waited_for_in_vain_is_not_made_way_for_again() -> None:
    view = view_of("d")
    bully = asking("bully", view)
    bully.answered(10.0, view, "e", Answer.ALIVE)
    assert bully.tick(11.0, view) is Move.ASK
    assert bully.asked(11.0, view, rank("e")) is Answer.YIELD, "it may try, but nobody holds back for it"
    bully.answered(11.0, view, "e", Answer.ALIVE)
    assert [bully.answered(11.0, view, id, Answer.YIELD) for id in "abc"] == [None, None, Move.STAND]


def test_a_leader_that_was_heard_forgives_those_who_failed() -> None:
    view = view_of("d")
    bully = asking("bully", view)
    bully.answered(10.0, view, "e", Answer.ALIVE)
    assert bully.tick(11.0, view) is Move.ASK
    bully.follow(11.0)
    assert bully.tick(20.0, view) is Move.ASK
    assert bully.answered(20.0, view, "e", Answer.ALIVE) is None
    assert [bully.answered(20.0, view, id, Answer.YIELD) for id in "abc"] == [None] * 3, "waiting for e again"


def test_who_can_be_reached_is_waited_for_but_not_for_long() -> None:
    """A voter that is connected and doesn't answer may be the one that outranks: a fifth of a time-out is for it."""
    view = view_of("d")
    bully = asking("bully", view)
    assert [bully.answered(10.0, view, id, Answer.YIELD) for id in "abc"] == [None] * 3
    assert next(moves(bully, view, 10.0, 10.0)) == (pytest.approx(10.0 + TIMEOUT_S / 5, abs=TICK_S), Move.STAND)


def test_who_cannot_be_reached_is_not_waited_for() -> None:
    view = view_of("d", reachable=frozenset("abc"))
    bully = asking("bully", view)
    assert [bully.answered(10.0, view, id, Answer.YIELD) for id in "abc"] == [None, None, Move.STAND]


def test_who_hears_that_a_leader_lives_stands_down_and_asks_again_soon() -> None:
    view = view_of("d")
    bully = asking("bully", view)
    for id in "abc":
        bully.answered(10.0, view, id, Answer.LEADER)
    when, move = next(moves(bully, view, 10.0, 10.0))
    assert (when, move) == (pytest.approx(10.0 + TIMEOUT_S / 8, abs=TICK_S), Move.ASK)


def test_who_lost_stands_aside_for_a_round() -> None:
    bully, view = strategy("bully"), view_of("e")
    bully.lost(1.0)
    assert bully.asked(1.1, view, rank("a")) is Answer.YIELD, "though it outranks the asker"
    when, move = next(moves(bully, view, 1.1, 10.0))
    assert move is Move.ASK
    assert TIMEOUT_S / 2 <= when - 1.0 <= TIMEOUT_S + TICK_S
    assert bully.asked(when, view, rank("a")) is Answer.ALIVE, "in the next round it is what it was"


def test_suspicion_hurries_only_who_is_calm() -> None:
    bully, view = strategy("bully"), view_of("e")
    bully.lost(1.0)
    bully.suspect(1.1)
    assert bully.tick(1.1, view) is None, "who stands aside goes on doing so"
    bully.voted(2.0, "d")
    bully.suspect(2.1)
    assert bully.tick(2.1, view) is None, "who waits for a victory goes on waiting"


def test_who_stands_and_hears_nothing_has_lost() -> None:
    view = view_of("e", reachable=frozenset("ab"))
    bully = asking("bully", view)
    bully.answered(10.0, view, "a", Answer.YIELD)
    assert bully.answered(10.0, view, "b", Answer.YIELD) is Move.STAND
    assert bully.asked(10.1, view, rank("a")) is Answer.ALIVE, "while it may win, it says that it is alive"
    assert bully.tick(10.0 + TIMEOUT_S, view) is None
    assert bully.asked(10.0 + TIMEOUT_S, view, rank("a")) is Answer.YIELD


def test_the_lots_of_the_bully_differ() -> None:
    """Members that waited for the same one would else wake, stand and fail together, for ever."""
    first_asks = set()
    for seed in range(20):
        bully = Bully(TIMEOUT_S, random.Random(seed))
        bully.voted(0.0, "e")
        first_asks.add(next(moves(bully, view_of("a"), 0.0, 5.0))[0])
    assert len(first_asks) > 5


@both
def test_questions_go_to_every_voter_and_to_no_learner(election: str) -> None:
    net = Net(3, election, learners=["x"])
    net.elect("n1")
    net.run(0.2)
    net.isolate("n3", noticed=True)
    while not net.wire:
        net.tick("n3", TICK_S)
    assert {(type(m), m.dst) for m in net.wire} == {(ElectionRequest, "n1"), (ElectionRequest, "n2")}
