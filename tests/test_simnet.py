"""The simulated network breaks as TCP does, tells whom TCP would tell, and answers in order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ddb import codec, wire
from ddb.agenda import Agenda
from ddb.errors import BadRequest
from ddb.loop import PEER_TIMEOUT_S
from ddb.messages import (
    Append,
    AppendReply,
    Call,
    ElectionReply,
    ElectionRequest,
    Forward,
    ForwardReply,
    InstallSnapshot,
    Message,
    ReadReply,
    ReadRequest,
    SnapshotReply,
    SnapshotRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from ddb.server import Limits, Slot
from ddb.simhost import PORT, Host, SimWorld
from ddb.simnet import LATENCY_S, RETRANSMISSION_S, Connection, Network

SOON_S = 0.01
CHAT: list[Message] = [
    Append("a", "b", 1, 0, 0, 0, 1, ()),
    AppendReply("a", "b", 1, True, 1, 1),
    VoteRequest("a", "b", 1, 0, 0, False),
    VoteReply("a", "b", 1, True, False),
    ElectionRequest("a", "b", 1, 0, 0, "a", 1),
    ElectionReply("a", "b", 1, "yield", 1),
    TimeoutNow("a", "b", 1),
    ReadRequest("a", "b", 1, 1),
    ReadReply("a", "b", 1, 1, 1),
    InstallSnapshot("a", "b", 1, 1, 1, 0, 1, "", b"x"),
    SnapshotReply("a", "b", 1, 1, 1),
    SnapshotRequest("a", "b", 1),
]
OTHERS: list[Message] = [
    Forward("a", "b", 1, (b'["noop"]',), ()),
    ForwardReply("a", "b", 1, (b'{"ok":true}',)),
    Call("a", "b", 1, {"op": "members"}),
]


class Server:
    """The program of a host: takes whom says hello for a peer, and keeps the other requests, to be answered or not."""

    def __init__(self, world: SimWorld) -> None:
        self.routes = ()
        self.slots: list[Slot] = []
        self.asked: list[Any] = []
        self.heard: list[bytes] = []
        self.inbound: list[Any] = []
        self.news: list[str] = []
        self.loop = world.loop
        self.listener = world.listen(self, "", PORT, Limits())

    def request(self, request: dict[str, Any], slot: Slot) -> None:
        self.asked.append(request)
        if request["op"] == "wrong":
            raise BadRequest("no")
        if request["op"] == "hello":
            connection = slot.connection
            self.inbound.append(connection)
            connection.on_payload = self.heard.append
            connection.on_close = lambda: self.news.append(connection.reason)
        else:
            self.slots.append(slot)

    def close(self) -> None:
        self.listener.close()


class Dialled:
    """A connection that one host has opened, and what came of it."""

    def __init__(self, host: Host, to: str, timeout_s: float = 1.0) -> None:
        self.opened_at: float | None = None
        self.closed_at: float | None = None
        self.heard: list[bytes] = []
        self.host = host
        assert isinstance(host.program, Server)
        self.channel: Connection = host.program.loop.connect(  # type: ignore[assignment]
            (to, PORT), on_open=self._open, on_close=self._close, on_payload=self.heard.append, timeout_s=timeout_s
        )

    def _open(self) -> None:
        self.opened_at = self.host.agenda.now

    def _close(self) -> None:
        assert self.closed_at is None, "on_close is called once"
        self.closed_at = self.host.agenda.now

    def say(self, *payloads: bytes) -> None:
        self.host.happens(self._say, payloads)

    def _say(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.channel.send(wire.frame(payload))

    def close(self) -> None:
        self.host.happens(self.channel.close, ())


class Stand:
    """Three hosts on one network."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.faults = Counter[str]()
        self.network = Network(self.agenda, random.Random(1), self._fault)
        self.hosts = {name: Host(name, self.agenda, self.network, random.Random(2)) for name in "abc"}
        for host in self.hosts.values():
            host.boot = Server
            host.start()

    def _fault(self, kind: str) -> None:
        self.faults[kind] += 1

    def server(self, name: str) -> Server:
        program = self.hosts[name].program
        assert isinstance(program, Server)
        return program

    def wait(self, seconds: float = SOON_S) -> None:
        end = self.agenda.now + seconds
        while self.agenda.step(end):
            pass

    def dial(self, src: str = "a", dst: str = "b", timeout_s: float = 1.0) -> Dialled:
        return Dialled(self.hosts[src], dst, timeout_s)

    def peers(self, src: str = "a", dst: str = "b") -> Dialled:
        """A connection on which `src` has introduced itself to `dst`."""
        dialled = self.dial(src, dst)
        self.wait()
        dialled.say(b'{"op":"hello"}')
        self.wait()
        assert dialled.opened_at is not None and self.server(dst).inbound
        return dialled


@pytest.fixture
def stand() -> Stand:
    return Stand()


BOTH = [("a", "b"), ("b", "a")]
THERE = [("a", "b")]
BACK = [("b", "a")]


# ------------------------------------------------------------------- opening


def test_a_connection_opens_after_a_way_there_and_back(stand: Stand) -> None:
    dialled = stand.dial()
    stand.wait()
    assert dialled.opened_at is not None and LATENCY_S <= dialled.opened_at <= 3 * LATENCY_S
    assert dialled.closed_at is None


def test_what_is_sent_before_a_connection_stands_arrives_when_it_does(stand: Stand) -> None:
    dialled = stand.dial()
    dialled.say(b'{"op":"hello"}', b"early")
    stand.wait(0.9 * LATENCY_S)
    assert not stand.server("b").asked
    stand.wait()
    assert stand.server("b").heard == [b"early"]


def test_a_dial_is_refused_where_nobody_listens(stand: Stand) -> None:
    stand.server("b").listener.close()
    dialled = stand.dial()
    stand.wait()
    assert dialled.channel.reason == "Connection refused"
    assert dialled.closed_at is not None and dialled.opened_at is None


@pytest.mark.parametrize("links", [BOTH, THERE, BACK])
def test_a_dial_into_a_partition_takes_all_its_time(stand: Stand, links: list[tuple[str, str]]) -> None:
    stand.network.block(links)
    dialled = stand.dial(timeout_s=0.7)
    stand.wait(0.69)
    assert dialled.closed_at is None
    stand.wait(0.02)
    assert (dialled.channel.reason, dialled.opened_at) == ("no answer in time", None)
    assert dialled.closed_at == pytest.approx(0.7)


def test_a_dial_to_a_host_without_power_takes_all_its_time(stand: Stand) -> None:
    stand.hosts["b"].die(power=True)
    dialled = stand.dial()
    stand.wait(2.0)
    assert dialled.channel.reason == "no answer in time"


def test_a_dial_to_a_dead_program_is_refused_at_once(stand: Stand) -> None:
    stand.hosts["b"].die(power=False)
    dialled = stand.dial()
    stand.wait()
    assert dialled.channel.reason == "Connection refused"


def test_a_stopped_program_is_still_dialled_for_its_kernel_answers(stand: Stand) -> None:
    stand.hosts["b"].pause()
    dialled = stand.dial()
    stand.wait()
    assert dialled.opened_at is not None


def test_a_connection_closed_while_it_is_dialled_never_opens(stand: Stand) -> None:
    dialled = stand.dial()
    dialled.close()
    stand.wait()
    assert dialled.opened_at is None and dialled.closed_at is not None
    assert not stand.hosts["a"].ends and not stand.hosts["b"].ends


# --------------------------------------------------------------------- order


def test_bytes_of_one_connection_arrive_in_their_order_whatever_the_links_do(stand: Stand) -> None:
    dialled = stand.peers()
    sent = [b"%d" % number for number in range(300)]
    rng = random.Random(5)
    for number, payload in enumerate(sent):
        if number % 50 == 10:
            stand.network.block(THERE)
        if number % 50 == 30:
            stand.network.unblock(THERE)
        stand.network.slow[("a", "b")] = rng.random() * 0.1
        dialled.say(payload)
        stand.wait(rng.random() * 0.02)
    stand.wait(2.0)
    assert stand.server("b").heard == sent


def test_a_large_frame_is_taken_whole(stand: Stand) -> None:
    dialled = stand.peers()
    dialled.say(b"x" * 3_000_000)
    stand.wait()
    assert [len(payload) for payload in stand.server("b").heard] == [3_000_000]


def test_pipelined_requests_are_answered_in_order(stand: Stand) -> None:
    dialled = stand.dial()
    stand.wait()
    dialled.say(b'{"op":"x","n":0}', b'{"op":"wrong"}', b'{"op":"x","n":2}')
    stand.wait()
    server = stand.server("b")
    first, last = server.slots
    stand.hosts["b"].happens(last.reply, (b'{"n":2}',))
    stand.wait()
    assert dialled.heard == []
    stand.hosts["b"].happens(first.reply, (b'{"n":0}',))
    stand.wait()
    assert [wire.decode(payload).get("n", "error") for payload in dialled.heard] == [0, "error", 2]


def test_a_slot_whose_connection_is_over_counts_as_answered(stand: Stand) -> None:
    dialled = stand.dial()
    stand.wait()
    dialled.say(b'{"op":"x"}')
    stand.wait()
    dialled.close()
    stand.wait()
    (slot,) = stand.server("b").slots
    assert slot.done


def test_a_refusal_leaves_before_the_connection_ends(stand: Stand) -> None:
    dialled = stand.peers()
    (inbound,) = stand.server("b").inbound

    def refuse() -> None:
        inbound.send(wire.frame(b"go"))
        inbound.close_when_flushed()

    stand.hosts["b"].happens(refuse, ())
    stand.wait()
    assert (dialled.heard, dialled.channel.reason) == ([b"go"], "closed by the other side")


def test_what_is_no_frame_ends_the_connection(stand: Stand) -> None:
    dialled = stand.peers()
    stand.hosts["a"].happens(dialled.channel.send, (b"not a frame\n",))
    stand.wait()
    assert stand.server("b").news == ["sent something that is no frame"]
    assert stand.server("b").inbound[0].garbled
    assert dialled.channel.reason == "closed by the other side"


def test_an_error_in_a_handler_ends_that_connection_alone(stand: Stand) -> None:
    first, second = stand.peers("a"), stand.peers("c")

    def broken(payload: bytes) -> None:
        raise BadRequest("this is not for me")

    server = stand.server("b")
    server.inbound[0].on_payload = broken
    first.say(b"1")
    second.say(b"2")
    stand.wait()
    assert server.news == ["failed here"] and server.heard == [b"2"]
    assert (first.channel.reason, second.channel.reason) == ("closed by the other side", "")
    assert stand.hosts["b"].program is server


# ---------------------------------------------------------------- partitions


@pytest.mark.parametrize("links", [BOTH, THERE])
def test_held_bytes_arrive_in_order_after_mending_and_those_sent_meanwhile_behind_them(
    stand: Stand, links: list[tuple[str, str]]
) -> None:
    dialled = stand.peers()
    stand.network.block(links)
    dialled.say(b"1")
    dialled.say(b"2")
    stand.wait(3.0)
    assert stand.server("b").heard == []
    stand.network.unblock(links)
    dialled.say(b"3")
    stand.wait(RETRANSMISSION_S + SOON_S)
    assert stand.server("b").heard == [b"1", b"2", b"3"]
    assert dialled.channel.reason == ""


def test_one_way_blocked_the_other_way_still_carries(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(BACK)
    dialled.say(b"1")
    stand.wait()
    assert stand.server("b").heard == [b"1"]
    stand.hosts["b"].happens(stand.server("b").inbound[0].send, (wire.frame(b"2"),))
    stand.wait(1.0)
    assert dialled.heard == []


def test_two_blocks_take_two_mendings(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(THERE)
    stand.network.block(BOTH)
    dialled.say(b"1")
    stand.network.unblock(BOTH)
    stand.wait(1.0)
    assert stand.server("b").heard == [] and not stand.network.passes("a", "b")
    stand.network.unblock(THERE)
    stand.wait(1.0)
    assert stand.server("b").heard == [b"1"]


def test_a_third_host_notices_nothing(stand: Stand) -> None:
    stand.peers("a", "b")
    other = stand.peers("c", "b")
    stand.network.block(BOTH)
    other.say(b"1")
    stand.wait()
    assert stand.server("b").heard == [b"1"]


@pytest.mark.parametrize("links", [BOTH, THERE, BACK])
def test_a_connection_times_out_where_no_acknowledgement_comes(stand: Stand, links: list[tuple[str, str]]) -> None:
    dialled = stand.peers()
    stand.wait(1.0)
    stand.network.block(links)
    began = stand.agenda.now
    dialled.say(b"1")
    stand.wait(PEER_TIMEOUT_S - 0.1)
    assert dialled.closed_at is None
    stand.wait(0.2)
    assert dialled.channel.reason == "Connection timed out"
    assert dialled.closed_at == pytest.approx(began + PEER_TIMEOUT_S)
    assert stand.faults == {"connection timed out": 1}


def test_a_silent_connection_outlives_any_partition(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(BOTH)
    stand.wait(10 * PEER_TIMEOUT_S)
    stand.network.unblock(BOTH)
    dialled.say(b"1")
    stand.wait(1.0)
    assert stand.server("b").heard == [b"1"] and dialled.channel.reason == ""


@pytest.mark.parametrize("links", [BOTH, THERE, BACK])
def test_an_acknowledgement_in_between_begins_the_patience_anew(stand: Stand, links: list[tuple[str, str]]) -> None:
    dialled = stand.peers()
    for _ in range(4):
        stand.network.block(links)
        dialled.say(b"x")
        stand.wait(0.9 * PEER_TIMEOUT_S)
        stand.network.unblock(links)
        stand.wait(RETRANSMISSION_S + SOON_S)
    stand.network.block(links)
    stand.wait(0.5 * PEER_TIMEOUT_S)
    assert dialled.channel.reason == "" and stand.server("b").heard == [b"x"] * 4
    assert not stand.faults


def test_a_mending_too_short_for_another_attempt_is_none(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(BOTH)
    dialled.say(b"1")
    stand.wait(0.5 * PEER_TIMEOUT_S)
    stand.network.unblock(BOTH)
    stand.network.block(BOTH)
    stand.wait(0.6 * PEER_TIMEOUT_S)
    assert dialled.channel.reason == "Connection timed out" and stand.server("b").heard == []


def test_who_timed_out_says_no_goodbye_and_the_other_learns_it_when_it_sends(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(BOTH)
    dialled.say(b"1")
    stand.wait(PEER_TIMEOUT_S + 1.0)
    stand.network.unblock(BOTH)
    stand.wait(5.0)
    server = stand.server("b")
    assert dialled.closed_at is not None and server.news == [] and server.heard == []
    stand.hosts["b"].happens(server.inbound[0].send, (wire.frame(b"2"),))
    stand.wait()
    assert server.news == ["Connection reset by peer"]


def test_a_goodbye_over_a_blocked_link_arrives_when_it_is_mended(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(THERE)
    dialled.say(b"last words")
    dialled.close()
    stand.wait(1.0)
    assert dialled.closed_at is not None and stand.server("b").news == []
    stand.network.unblock(THERE)
    stand.wait(1.0)
    assert stand.server("b").heard == [b"last words"]
    assert stand.server("b").news == ["closed by the other side"]


def test_a_reset_breaks_both_ends_of_what_was_dialled_one_way(stand: Stand) -> None:
    there, back = stand.peers("a", "b"), stand.peers("b", "a")
    assert stand.network.reset("a", "b") == 1
    stand.wait()
    assert there.channel.reason == "Connection reset by peer" == stand.server("b").inbound[0].reason
    assert back.channel.reason == ""


# --------------------------------------------------------------------- death


def test_a_killed_program_is_noticed_at_once(stand: Stand) -> None:
    dialled = stand.peers()
    stand.hosts["b"].die(power=False)
    stand.wait()
    assert dialled.channel.reason == "closed by the other side"


def test_power_loss_is_not_noticed_until_an_acknowledgement_is_overdue(stand: Stand) -> None:
    dialled = stand.peers()
    stand.hosts["b"].die(power=True)
    stand.wait(5.0)
    assert dialled.channel.reason == ""
    dialled.say(b"1")
    stand.wait(PEER_TIMEOUT_S + SOON_S)
    assert dialled.channel.reason == "Connection timed out"


def test_a_host_that_is_back_resets_what_it_knows_nothing_of(stand: Stand) -> None:
    dialled, silent = stand.peers(), stand.peers("c")
    stand.hosts["b"].die(power=True)
    dialled.say(b"1")
    stand.wait(2.0)
    stand.hosts["b"].start()
    stand.wait(RETRANSMISSION_S + SOON_S)
    assert dialled.channel.reason == "Connection reset by peer"
    assert silent.channel.reason == ""
    silent.say(b"2")
    stand.wait()
    assert silent.channel.reason == "Connection reset by peer"
    assert stand.server("b").heard == [] == stand.server("b").asked


def test_a_host_without_power_resets_nothing_when_a_link_is_mended(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(BOTH)
    dialled.say(b"1")
    stand.hosts["b"].die(power=True)
    stand.network.unblock(BOTH)
    stand.wait(2.0)
    assert dialled.channel.reason == ""
    stand.hosts["b"].start()
    stand.wait(1.0)
    assert dialled.channel.reason == "Connection reset by peer"


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("delay_s", [0.0, 1.0])
def test_nothing_reaches_a_dead_program_nor_the_one_after_it(stand: Stand, power: bool, delay_s: float) -> None:
    dialled = stand.peers()
    dead = stand.server("b")
    stand.network.block(BACK)  # so that the sender does not hear of the death
    dialled.say(b"under way")
    stand.hosts["b"].die(power)
    stand.hosts["b"].start()
    stand.wait(delay_s)
    dialled.say(b"late", b'{"op":"x"}')
    stand.wait(1.0)
    assert dead.heard == [] and dead.news == [] and len(dead.asked) == 1
    assert stand.server("b") is not dead
    assert stand.server("b").heard == [] == stand.server("b").asked


@pytest.mark.parametrize("power", [False, True])
def test_nothing_is_heard_from_a_dead_program(stand: Stand, power: bool) -> None:
    """What has left arrives; what had not, does not, and no late call makes it."""
    dialled = stand.peers()
    server = stand.server("b")
    stand.hosts["b"].happens(server.inbound[0].send, (wire.frame(b"alive"),))
    server.loop.call_later(0.5, lambda: server.inbound[0].send(wire.frame(b"dead")))
    stand.hosts["b"].die(power)
    stand.hosts["b"].start()
    server.inbound[0].send(wire.frame(b"very dead"))
    server.inbound[0].flush()
    stand.wait(2.0)
    assert dialled.heard == [b"alive"]


def test_what_a_kernel_still_had_to_send_is_lost_with_its_power(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(THERE)
    dialled.say(b"1")
    stand.hosts["a"].die(power=False)
    stand.hosts["a"].start()
    stand.hosts["a"].die(power=True)
    stand.network.unblock(THERE)
    stand.wait(2.0)
    assert stand.server("b").heard == [] == stand.server("b").news


def test_a_killed_programs_kernel_sends_what_it_was_given_then_says_goodbye(stand: Stand) -> None:
    dialled = stand.peers()
    stand.network.block(THERE)
    dialled.say(b"1")
    stand.hosts["a"].die(power=False)
    stand.wait(1.0)
    stand.network.unblock(THERE)
    stand.wait(1.0)
    assert stand.server("b").heard == [b"1"]
    assert stand.server("b").news == ["closed by the other side"]


def test_a_program_that_ends_by_itself_closes_what_it_has_left_open(stand: Stand) -> None:
    dialled = stand.peers()  # the server's `close` ends no connection

    def fails() -> None:
        raise OSError("no more")

    stand.hosts["b"].happens(fails, ())
    stand.wait()
    assert dialled.channel.reason == "closed by the other side"


@pytest.mark.parametrize("pause_s", [0.5, 2 * PEER_TIMEOUT_S])
def test_a_paused_host_keeps_its_connections_and_what_comes_waits(stand: Stand, pause_s: float) -> None:
    dialled = stand.peers()
    stand.hosts["b"].pause()
    dialled.say(b"1")
    dialled.say(b"2")
    stand.wait(pause_s)
    assert stand.server("b").heard == [] and dialled.channel.reason == ""
    stand.hosts["b"].resume()
    stand.wait()
    assert stand.server("b").heard == [b"1", b"2"] and not stand.faults


# -------------------------------------------------------------------- chance


def chances(stand: Stand, **likely: float) -> None:
    for name, value in likely.items():
        setattr(stand.network.chances, name, value)


def arrived(stand: Stand, messages: list[Message]) -> list[bytes]:
    dialled = stand.peers()
    dialled.say(*map(codec.encode_message, messages))
    stand.wait(1.0)
    return stand.server("b").heard


@pytest.mark.parametrize("message", CHAT, ids=lambda m: type(m).__name__)
def test_messages_of_the_consensus_get_lost(stand: Stand, message: Message) -> None:
    chances(stand, loss=1.0)
    assert arrived(stand, [message]) == []
    assert stand.faults == {"message lost": 1}


@pytest.mark.parametrize("message", CHAT, ids=lambda m: type(m).__name__)
def test_messages_of_the_consensus_come_twice(stand: Stand, message: Message) -> None:
    chances(stand, repeat=1.0)
    assert arrived(stand, [message]) == 2 * [codec.encode_message(message)]


def test_messages_of_the_consensus_overtake_one_another_and_none_is_lost(stand: Stand) -> None:
    chances(stand, reorder=0.5)
    sent = [ReadRequest("a", "b", 1, number) for number in range(100)]
    heard = arrived(stand, list(sent))
    assert sorted(heard) == sorted(map(codec.encode_message, sent))
    assert heard != list(map(codec.encode_message, sent))


def test_nothing_else_is_lost_repeated_or_overtaken(stand: Stand) -> None:
    chances(stand, loss=1.0, repeat=1.0, reorder=1.0)
    assert arrived(stand, OTHERS) == list(map(codec.encode_message, OTHERS))
    assert not stand.faults


def test_no_message_comes_before_its_senders_introduction(stand: Stand) -> None:
    chances(stand, reorder=1.0, repeat=1.0)
    stand.network.slow[("a", "b")] = 0.3
    dialled = stand.dial()
    stand.wait(1.0)
    dialled.say(b'{"op":"hello"}', *map(codec.encode_message, CHAT))
    stand.wait(2.0)
    assert [request["op"] for request in stand.server("b").asked] == ["hello"]
    assert len(stand.server("b").heard) == 2 * len(CHAT)


def until(stand: Stand, condition: Callable[[], object], within_s: float = 5.0) -> None:
    end = stand.agenda.now + within_s
    while not condition():
        assert stand.agenda.step(end), "it did not happen in time"


def test_a_seed_is_one_history() -> None:
    def history() -> list[tuple[float, bytes]]:
        stand = Stand()
        chances(stand, loss=0.2, repeat=0.2, reorder=0.2)
        dialled = stand.peers()
        dialled.say(*map(codec.encode_message, CHAT * 5))
        heard = stand.server("b").heard
        found = []
        for count in range(1, 20):
            until(stand, lambda count=count: len(heard) >= count)  # type: ignore[misc]
            found.append((stand.agenda.now, heard[count - 1]))
        return found

    assert history() == history()
