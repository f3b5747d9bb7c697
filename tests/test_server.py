"""server and loop: order, bounds, and a sentence for everything, over real sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddb import server as server_module
from ddb import wire
from ddb.errors import InvariantError, StartupError, invariant
from ddb.server import Connection, Fatal, Limits, Loop, Server, Slot
from tests.harness import wait
from tests.serving import TIMEOUT_S, Echo, Running, frames, read_all, read_frames, running, talk

ECHO = {"op": "echo", "value": 1}


# --- order and identity


def test_replies_leave_in_the_order_of_the_requests() -> None:
    with running() as server, server.connect() as client:
        client.sendall(frames(*({"op": "hold", "value": n} for n in range(50)), {"op": "release"}, ECHO))
        replies = read_frames(client, 52)
        assert [reply.get("value") for reply in replies] == [*range(50), None, 1]


def test_the_first_reply_counts() -> None:
    service = Echo()

    def thrice(request: dict[str, Any], slot: Slot) -> None:
        for n in range(3):
            slot.reply(b'{"ok":true,"n":%d}' % n)

    service.other = thrice
    with running(service) as server:
        assert talk(server, b'{"op":"thrice"}\n{"op":"echo"}\n') == b'{"ok":true,"n":0}\n{"ok":true,"value":null}\n'


@pytest.mark.parametrize("id", [None, 7, "a", [1, {"b": "ü"}], {}, False, 1.5])
def test_any_id_is_echoed(id: Any) -> None:
    with running() as server, server.connect() as client:
        client.sendall(frames({**ECHO, "id": id}, {"op": "bug", "id": id}, {"op": "nonsense", "id": id}))
        assert [reply["id"] for reply in read_frames(client, 3)] == [id, id, id]


def test_a_reply_has_no_id_where_the_request_had_none() -> None:
    with running() as server:
        assert talk(server, b'{"op":"echo"}\n') == b'{"ok":true,"value":null}\n'


# --- dialects


@pytest.mark.parametrize("first", [b"0", b"a", b" ", b"\n", b"\x00", b"\xff", b"[", b'"', b"-", b"\x16\x03\x01"])
def test_any_other_first_byte_gets_one_line_that_names_the_dialects(first: bytes) -> None:
    with running() as server:
        said = talk(server, first + b"whatever\n" * 100)
        assert said.count(b"\n") == 1 and all(word in said for word in (b"frames", b"lines", b"HTTP/1.1"))


def test_each_dialect_is_chosen_by_its_first_byte() -> None:
    with running() as server:
        assert talk(server, frames(ECHO)) == b'21\n{"ok":true,"value":1}\n'
        assert talk(server, b'{"op":"echo","value":1}\n') == b'{"ok":true,"value":1}\n'
        assert talk(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b'\r\n\r\n{"ok":true}')


def test_lines_may_end_in_crlf_be_empty_or_lack_the_last_line_feed() -> None:
    with running() as server:
        assert talk(server, b'{"op":"echo"}\r\n\r\n\n{"op":"echo","value":2}') == (
            b'{"ok":true,"value":null}\n{"ok":true,"value":2}\n'
        )


def test_input_may_come_byte_by_byte() -> None:
    for stream in (frames(ECHO), b'{"op":"echo","value":1}\n', b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        with running() as server, server.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(len(stream)):
                client.sendall(stream[at : at + 1])
            client.shutdown(socket.SHUT_WR)
            assert b'{"ok":true' in read_all(client)


# --- bad input


@pytest.mark.parametrize("bad", [b"nonsense", b"[1]", b"{", b'{"a":NaN}', b"\xff", b"{}", b'{"op":7}', b"[" * 100_000])
def test_a_bad_payload_is_told_and_the_connection_goes_on(bad: bytes) -> None:
    with running() as server, server.connect() as client:
        client.sendall(wire.frame(bad) + frames(ECHO))
        wrong, right = read_frames(client, 2)
        assert wrong["error"] == "bad_request" and "Traceback" not in wrong["message"]
        assert right == {"ok": True, "value": 1}


def test_a_bad_line_is_told_and_the_connection_goes_on() -> None:
    with running() as server:
        first, second = talk(server, b'{"op":nonsense}\n{"op":"echo"}\n').splitlines()
        assert b'"bad_request"' in first and second == b'{"ok":true,"value":null}'


@pytest.mark.parametrize("bad", [b"-5\n", b"05\nhello\n", b"5 \nhello\n", b"4\nhello\n", b"x", b"9" * 30])
def test_a_bad_frame_is_told_after_the_good_ones_and_ends_only_its_connection(bad: bytes) -> None:
    with running() as server:
        good, wrong = talk(server, frames(ECHO) + bad).splitlines()[1::2]
        assert good == b'{"ok":true,"value":1}' and b'"bad_frame"' in wrong
        assert b'"value":1' in talk(server, frames(ECHO))


def test_a_bad_frame_waits_for_the_requests_in_flight() -> None:
    service = Echo()
    with running(service) as server, server.connect() as client, server.connect() as other:
        client.sendall(frames({"op": "hold", "value": 1}) + b"x")
        wait(lambda: service.held)
        other.sendall(frames({"op": "release"}))
        assert [b"ok" in line for line in read_all(client).splitlines()] == [False, True, False, True]


def test_a_gigabyte_is_refused_when_announced_and_the_sender_gets_to_read_that() -> None:
    with running() as server, server.connect() as client:
        client.sendall(b"1073741824\n")
        with contextlib.suppress(OSError):  # the server may stop reading at any time
            for _ in range(64):
                client.sendall(b"x" * 65536)
        assert b'"too_large"' in read_all(client)


def test_a_line_over_the_limit_is_refused_before_it_ends() -> None:
    with running(limits=Limits(frame_bytes_max=1000)) as server, server.connect() as client:
        client.sendall(b'{"op":"echo"}\n{' + b" " * 1001)
        assert [b"too_large" in line for line in read_all(client).splitlines()] == [False, True]


@pytest.mark.parametrize("stream", [b"20\n{", b"2", b"GET / HTTP/1.1\r\nHos"])
def test_a_stream_that_ends_in_the_middle_is_told_so(stream: bytes) -> None:
    with running() as server:
        assert b"ended inside" in talk(server, stream)


def test_a_bug_becomes_internal_with_a_reference_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with running() as server, server.connect() as client:
        client.sendall(frames({"op": "bug"}, ECHO))
        bug, fine = read_frames(client, 2)
    assert bug["error"] == "internal" and fine["ok"]
    assert "secret" not in bug["message"] and "Traceback" not in bug["message"]
    reference = bug["message"].rstrip(".").split()[-1]
    assert any(reference in record.getMessage() and record.exc_info for record in caplog.records)


@given(st.lists(st.binary(max_size=200) | st.sampled_from([b"2\n{}\n", b'{"op":"echo"}\n', b"GET / HTTP/1.1\r\n\r\n"])))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_no_garbage_harms_the_next_connection(shared_server: Running, chunks: list[bytes]) -> None:
    with shared_server.connect() as client, contextlib.suppress(ConnectionError):
        for chunk in chunks:
            client.sendall(chunk)
        client.shutdown(socket.SHUT_WR)
        assert b"Traceback" not in read_all(client)
    assert talk(shared_server, frames(ECHO)) == b'21\n{"ok":true,"value":1}\n'


@pytest.fixture(scope="module")
def shared_server() -> Any:
    with running() as server:
        yield server


# --- the end of a connection


def test_a_client_that_shuts_down_its_sending_still_gets_every_reply() -> None:
    service = Echo()
    with running(service) as server, server.connect() as client, server.connect() as other:
        client.sendall(frames({"op": "hold", "value": 1}, ECHO))
        client.shutdown(socket.SHUT_WR)
        wait(lambda: service.held)
        other.sendall(frames({"op": "release"}))
        assert read_all(client).count(b'"value":1') == 2


def test_a_reply_after_the_connection_is_gone_is_dropped() -> None:
    service = Echo()
    with running(service) as server:
        client = server.connect()
        client.sendall(frames({"op": "hold"}))
        wait(lambda: service.held)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.close()
        wait(lambda: not server.server.connections)
        assert b'"ok":true' in talk(server, frames({"op": "release"}))


def test_a_large_reply_reaches_a_slow_reader_whole() -> None:
    with running() as server, server.connect() as client:
        client.sendall(frames({"op": "large", "size": 30_000_000}, ECHO))
        client.shutdown(socket.SHUT_WR)
        head = b"".join(client.recv(1) for _ in range(20))
        large, small = wire.FrameBuffer(1 << 30).feed(head + read_all(client))
        assert large == b'{"ok":true,"value":"%b"}' % (b"x" * 30_000_000) and small == b'{"ok":true,"value":1}'


@pytest.mark.parametrize("size", [65_000, 65_514, 65_515, 65_536, 200_000])
def test_a_large_reply_is_framed_and_has_its_id_like_a_small_one(size: int) -> None:
    large = {"op": "large", "size": size, "id": [1]}
    expected = {"ok": True, "value": "x" * size, "id": [1]}
    with running() as server, server.connect() as client:
        client.sendall(frames({**ECHO, "id": 0}, large, ECHO, large))
        assert read_frames(client, 4)[1::2] == [expected, expected]
        first, second, third = talk(server, wire.encode(large) + b"\n" + wire.encode(ECHO) + b"\n{}\n").splitlines()
        assert wire.decode(first) == expected and second == b'{"ok":true,"value":1}' and b"bad_request" in third


# --- bounds


def test_a_connection_with_too_many_requests_in_flight_is_not_read() -> None:
    service = Echo()
    with running(service, Limits(in_flight_max=10)) as server, server.connect() as client, server.connect() as other:
        sent = frames(*({"op": "hold", "value": n} for n in range(1000)))
        client.sendall(sent)
        values: list[int] = []
        while len(values) < 1000:
            due = min(10, 1000 - len(values))
            wait(lambda due=due: len(service.held) == due)  # type: ignore[misc]
            batch = len(service.held)
            other.sendall(frames({"op": "release"}))
            read_frames(other, 1)
            values += [reply["value"] for reply in read_frames(client, batch)]
        assert values == list(range(1000))
        assert service.most_held == 10


@pytest.mark.parametrize("end", ["garbage", "end of stream"])
def test_requests_that_wait_for_room_are_answered_before_the_end(end: str) -> None:
    with running(limits=Limits(in_flight_max=10)) as server, server.connect() as client:
        client.sendall(frames(*({"op": "echo", "value": n} for n in range(1000))) + (b"x" if end == "garbage" else b""))
        client.shutdown(socket.SHUT_WR)
        replies = [wire.decode(reply) for reply in wire.FrameBuffer(1 << 20).feed(read_all(client))]
        assert [reply.get("value") for reply in replies[:1000]] == list(range(1000))
        assert [reply["error"] for reply in replies[1000:]] == (["bad_frame"] if end == "garbage" else [])


def test_a_client_that_never_reads_does_not_grow_the_servers_memory() -> None:
    limits = Limits(output_bytes_max=1 << 20, in_flight_max=64)
    with running(limits=limits) as server, server.connect() as client:
        client.settimeout(0.2)
        request = frames({"op": "large", "size": 100_000})
        with pytest.raises(TimeoutError):  # the server has stopped reading, so sending blocks
            for _ in range(1_000_000):
                client.sendall(request * 100)
        (connection,) = server.server.connections
        assert connection.output_bytes <= (1 << 20) + 100_100
        assert b'"value":1' in talk(server, frames(ECHO))


def test_a_client_whose_replies_pile_up_unread_is_ended() -> None:
    service = Echo()
    limits = Limits(output_bytes_max=1 << 20, output_bytes_hard_max=16 << 20)
    with running(service, limits) as server, server.connect() as client:
        client.sendall(frames({"op": "hold"}) * 30)
        wait(lambda: len(service.held) == 30)
        (connection,) = server.server.connections
        large = b'{"ok":true,"value":"%b"}' % (b"x" * 1_000_000)

        def reply_to_all() -> None:
            for _, slot in service.held:
                slot.reply(large)

        server.call(reply_to_all)
        assert not server.server.connections
        assert connection.output_bytes == 0 and "does not read" in connection.reason
        assert b'"value":1' in talk(server, frames(ECHO))


def test_a_connection_over_the_maximum_is_told_to_come_later() -> None:
    with running(limits=Limits(connections_max=2)) as server, server.connect() as one, server.connect():
        one.sendall(frames(ECHO))
        read_frames(one, 1)
        wait(lambda: len(server.server.connections) == 2)
        with server.connect() as third:
            assert b'"overloaded"' in read_all(third)
        one.close()
        wait(lambda: len(server.server.connections) == 1)
        assert b'"value":1' in talk(server, frames(ECHO))


def test_a_silent_connection_makes_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_S", 0.02)
    service = Echo()
    with running(service, Limits(connections_max=2)) as server, server.connect() as busy, server.connect() as silent:
        busy.sendall(frames({"op": "hold"}))
        wait(lambda: service.held and len(server.server.connections) == 2)
        wait(lambda: all(connection.still for connection in server.server.connections))
        assert b'"value":1' in talk(server, frames(ECHO))
        assert read_all(silent) == b""
        assert len(service.held) == 1 and not service.held[0][1].connection.closed


def test_unfinished_messages_of_all_connections_share_one_bound() -> None:
    limits = Limits(frame_bytes_max=1 << 20, held_bytes_max=2_500_000)
    with running(limits=limits) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(3)]
        for count, client in enumerate(clients[:2], 1):
            client.sendall(b"1000000\n" + b"x" * 900_000)
            wait(lambda count=count: server.server.held_bytes >= count * 900_000)  # type: ignore[misc]
        with contextlib.suppress(ConnectionError):
            clients[2].sendall(b"1000000\n" + b"x" * 900_000)
        assert b'"overloaded"' in read_all(clients[2])
        assert b'"value":1' in talk(server, frames(ECHO))
        for client in clients:
            client.close()
        wait(lambda: server.server.held_bytes == 0)


def test_an_unfinished_message_that_stands_still_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_S", 0.02)
    with running(limits=Limits(idle_message_s=0.04)) as server, server.connect() as idle, server.connect() as stuck:
        idle.sendall(frames(ECHO))
        stuck.sendall(b"100\n{")
        assert b"did not come in time" in read_all(stuck)
        read_frames(idle, 1)
        idle.sendall(frames(ECHO))  # a connection that rests between messages is left alone
        read_frames(idle, 1)


def test_a_flooding_client_does_not_starve_another() -> None:
    with running() as server, server.connect() as flooder, server.connect() as client:
        over = threading.Event()

        def flood() -> None:
            stream = frames(ECHO) * 2000
            with contextlib.suppress(OSError):
                while not over.is_set():
                    flooder.sendall(stream)

        def drink() -> None:
            with contextlib.suppress(OSError):
                while flooder.recv(1 << 20):
                    pass

        threads = [threading.Thread(target=work) for work in (flood, drink)]
        for thread in threads:
            thread.start()
        client.settimeout(3.0)
        for _ in range(20):
            client.sendall(frames(ECHO))
            assert read_frames(client, 1) == [{"ok": True, "value": 1}]
        over.set()
        flooder.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def test_without_descriptors_the_listener_pauses_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers: list[int] = []
    with running() as server, socket.socket() as client:
        client.settimeout(TIMEOUT_S)
        server.call(lambda: None)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    fillers.append(os.open(os.devnull, os.O_RDONLY))
            client.connect(server.server.address)
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""  # turned away rather than left waiting
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        assert b'"value":1' in talk(server, frames(ECHO))
    assert "ulimit -n" in caplog.text


# --- the listener


def test_a_busy_port_is_one_clear_sentence() -> None:
    with running() as server, pytest.raises(StartupError, match=r"is in use; .* choose another port"):
        Server(Loop(), Echo(), *server.server.address)


@pytest.mark.parametrize(
    ("host", "sentence"), [("192.0.2.1", "no address of this machine"), ("no.such.host.invalid", "no address")]
)
def test_a_host_that_is_not_here_is_one_clear_sentence(host: str, sentence: str) -> None:
    with Loop() as loop, pytest.raises(StartupError, match=sentence):
        Server(loop, Echo(), host, 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 in this interpreter")
def test_ipv6_is_served() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with running(host="::1") as server:
        assert b'"value":1' in talk(server, frames(ECHO))


def test_drain_waits_for_the_requests_in_flight() -> None:
    service = Echo()
    drained = threading.Event()
    with running(service) as server, server.connect() as client, server.connect() as other:
        client.sendall(frames({"op": "hold", "value": 1}))
        wait(lambda: service.held)
        server.call(lambda: server.server.drain(drained.set, TIMEOUT_S))
        with pytest.raises(ConnectionError):
            server.connect()
        assert not drained.wait(0.05)
        other.sendall(frames({"op": "release"}))
        assert drained.wait(TIMEOUT_S)
        assert read_frames(client, 1)


def test_drain_does_not_wait_for_ever() -> None:
    service = Echo()
    drained = threading.Event()
    with running(service) as server, server.connect() as client:
        client.sendall(frames({"op": "hold"}))
        wait(lambda: service.held)
        server.call(lambda: server.server.drain(drained.set, 0.05))
        assert drained.wait(TIMEOUT_S)


# --- what ends the process, and what does not


def test_a_broken_invariant_and_a_fatal_come_out_of_run() -> None:
    for error in (InvariantError("two leaders"), Fatal("fsync failed")):
        service = Echo()

        def fail(request: dict[str, Any], slot: Slot, error: Exception = error) -> None:
            raise error

        service.other = fail
        with running(service) as server, server.connect() as client:
            client.sendall(frames({"op": "fatal"}))
            assert server.join() is error


@pytest.mark.parametrize("where", ["post", "timer", "on_turn"])
def test_a_failure_outside_any_connection_comes_out_of_run(where: str) -> None:
    with Loop() as loop:
        if where == "post":
            loop.post(lambda: invariant(False, "posted"))
        elif where == "timer":
            loop.call_later(0.001, lambda: invariant(False, "due"))
        else:
            loop.on_turn.append(lambda: invariant(False, "turned"))
            loop.post(lambda: None)
        with pytest.raises(InvariantError):
            loop.run()


# --- the loop


def turn_until(loop: Loop, condition: Callable[[], object]) -> None:
    """Turn `loop` until `condition` holds."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        loop.turn(0.05)


def test_posted_calls_run_in_order_on_the_loops_thread() -> None:
    calls: list[tuple[int, int]] = []
    with Loop() as loop:

        def poster(number: int) -> None:
            for n in range(1000):
                loop.post(lambda n=n: calls.append((number, n)))

        threads = [threading.Thread(target=poster, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        turn_until(loop, lambda: len(calls) == 4000)
        for thread in threads:
            thread.join()
    for number in range(4):
        assert [n for who, n in calls if who == number] == list(range(1000))


def test_a_sleeping_loop_is_woken_by_a_post() -> None:
    done = threading.Event()
    with Loop() as loop:
        thread = threading.Thread(target=loop.run)
        thread.start()
        for _ in range(200):
            done.clear()
            loop.post(done.set)
            assert done.wait(TIMEOUT_S)
        loop.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_on_turn_comes_after_all_that_was_posted() -> None:
    seen: list[str] = []
    with Loop() as loop:
        loop.on_turn.append(lambda: seen.append("turn"))
        loop.post(seen.append, "a")
        loop.post(seen.append, "b")
        loop.turn(0)
    assert seen == ["a", "b", "turn"]


def test_timers_fire_in_order_and_a_cancelled_one_never() -> None:
    fired: list[str] = []
    with Loop() as loop:
        loop.call_later(0.03, lambda: fired.append("late"))
        loop.call_later(0.01, lambda: fired.append("early"))
        cancelled = loop.call_later(0.02, lambda: fired.append("cancelled"))
        cancelled.cancel()
        cancelled.cancel()
        turn_until(loop, lambda: "late" in fired)
    assert fired == ["early", "late"]


def test_a_timer_that_is_due_can_still_be_cancelled() -> None:
    fired: list[str] = []
    with Loop() as loop:
        timers = [loop.call_later(0.0, lambda: fired.append("fired")) for _ in range(2)]
        loop.call_later(0.001, lambda: fired.append("sentinel"))
        wait(lambda: len(loop._posted) == 3)  # all are due, and the loop has not turned yet
        timers[0].cancel()
        loop.turn(0)
    assert fired == ["fired", "sentinel"]


def test_a_repeating_timer_has_no_backlog_after_a_pause() -> None:
    fired: list[float] = []
    with Loop() as loop:
        timer = loop.every(0.002, lambda: fired.append(time.monotonic()))
        wait(lambda: len(loop._posted) == 1)
        paused_until_s = time.monotonic() + 0.05
        wait(lambda: time.monotonic() > paused_until_s)
        loop.turn(0)
        assert len(fired) == 1
        turn_until(loop, lambda: len(fired) == 5)
        timer.cancel()


def test_cancelled_timers_do_not_pile_up() -> None:
    with Loop() as loop:
        for _ in range(1000):
            loop.call_later(3600, lambda: None).cancel()
        assert len(loop._timers._heap) < 200


# --- connections between nodes


class Peer:
    """What an outgoing connection has seen."""

    def __init__(self, loop: Loop, address: tuple[str, int], **options: Any) -> None:
        self.events: list[Any] = []
        self.connection: Connection = loop.connect(
            address,
            on_open=lambda: self.events.append("open"),
            on_close=lambda: self.events.append("close"),
            on_payload=lambda payload: self.events.append(payload),
            **options,
        )


def test_an_outgoing_connection_opens_talks_and_closes() -> None:
    with running() as server, Loop() as loop:
        peer = Peer(loop, server.server.address)
        peer.connection.send(frames(ECHO))  # before it is open
        assert peer.events == []  # never in the middle of the call
        turn_until(loop, lambda: len(peer.events) == 2)
        assert peer.events == ["open", b'{"ok":true,"value":1}']
        server.call(server.server.close)
        turn_until(loop, lambda: "close" in peer.events)
        assert peer.events.count("close") == 1 and peer.connection.reason


def test_a_refused_connection_closes_with_its_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with Loop() as loop:
        peer = Peer(loop, address)
        turn_until(loop, lambda: peer.events)
        assert peer.events == ["close"] and "refused" in peer.connection.reason


def test_no_answer_is_given_up_in_time() -> None:
    with Loop() as loop, socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # fill the backlog: further connections get no answer
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        peer = Peer(loop, listener.getsockname(), timeout_s=0.05)
        turn_until(loop, lambda: "close" in peer.events)
        assert peer.events == ["close"] and "in time" in peer.connection.reason


def test_a_connection_by_name_tries_every_address() -> None:
    with running() as server, Loop() as loop:
        peer = Peer(loop, ("localhost", server.server.address[1]))  # ::1 refuses where it comes first
        turn_until(loop, lambda: peer.events)
        assert peer.events == ["open"]


def test_a_name_that_is_none_closes_with_its_reason() -> None:
    with Loop() as loop:
        peer = Peer(loop, ("a" * 70 + ".invalid", 1))
        turn_until(loop, lambda: peer.events)
        assert peer.events == ["close"] and peer.connection.reason


def test_a_connection_closed_while_it_opens_never_opens() -> None:
    with running() as server, Loop() as loop:
        peer = Peer(loop, server.server.address)
        peer.connection.close()
        peer.connection.close()
        turn_until(loop, lambda: peer.events)
        for _ in range(3):
            loop.turn(0.02)
        assert peer.events == ["close"]


def test_an_outgoing_connection_comes_from_the_address_it_is_bound_to() -> None:
    with running() as server, Loop() as loop:
        peer = Peer(loop, server.server.address, bind_host="127.0.0.3")
        turn_until(loop, lambda: peer.events)
        assert server.call(lambda: [c.peer.split(":")[0] for c in server.server.connections]) == ["127.0.0.3"]


def taking_over(received: list[bytes], closed: threading.Event) -> Echo:
    """A service whose `hello` hands the connection to a peer."""
    service = Echo()

    def hello(request: dict[str, Any], slot: Slot) -> None:
        slot.connection.on_payload = received.append
        slot.connection.on_close = closed.set
        slot.reply(b'{"ok":true}')

    service.other = hello
    return service


@pytest.mark.parametrize("at_once", [True, False])
def test_a_taken_over_connection_passes_payloads_on_even_longer_ones(at_once: bool) -> None:
    received: list[bytes] = []
    closed = threading.Event()
    limits = Limits(frame_bytes_max=1000, peer_frame_bytes_max=100_000)
    with running(taking_over(received, closed), limits) as server, server.connect() as client:
        payloads = [b"small", b"x" * 50_000, b"\xff not JSON", b"x" * 100_000]
        stream = b"".join(map(wire.frame, payloads))
        if at_once:
            client.sendall(frames(ECHO, {"op": "hello"}) + stream)
            assert len(read_frames(client, 2)) == 2
        else:
            client.sendall(frames({"op": "hello"}))
            read_frames(client, 1)
            client.sendall(stream)
        wait(lambda: len(received) == 4)
        assert received == payloads
        assert server.server.idle
        client.close()
        assert closed.wait(TIMEOUT_S)


def test_a_taken_over_connection_ends_at_garbage() -> None:
    received: list[bytes] = []
    closed = threading.Event()
    with running(taking_over(received, closed)) as server, server.connect() as client:
        client.sendall(frames({"op": "hello"}) + b"x")
        assert closed.wait(TIMEOUT_S)
        assert received == []


def test_a_failing_payload_handler_ends_only_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    closed = threading.Event()
    service = Echo()

    def hello(request: dict[str, Any], slot: Slot) -> None:
        slot.connection.on_payload = lambda payload: payload.missing  # type: ignore[attr-defined]
        slot.connection.on_close = closed.set

    service.other = hello
    with running(service) as server, server.connect() as client:
        client.sendall(frames({"op": "hello"}))
        wait(lambda: any(c.on_payload for c in server.server.connections))
        client.sendall(wire.frame(b"boom"))
        assert closed.wait(TIMEOUT_S)
        assert b'"value":1' in talk(server, frames(ECHO))
    assert any(record.levelno == logging.ERROR and "reference" in record.getMessage() for record in caplog.records)


def test_everything_may_be_closed_twice() -> None:
    server = Running(Echo())
    server.close()
    server.close()
    assert server.failure is None
