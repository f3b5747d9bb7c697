"""Watches as docs/protocol.md promises them, on real processes: order, resumption, faults, slow readers, three dialects."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.alone import memory_bytes, node_alone, wait_leading
from tests.harness import Cluster, NodeServer, ask, wait
from tests.onlooker import Onlooker
from tests.proving import State, size
from tests.talk import Talk, frame, http, line

Clusters = Callable[..., Cluster]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeServer]:
    """One node alone, which is a complete database."""
    with node_alone(tmp_path_factory.mktemp("watch")) as server:
        yield server


@pytest.fixture
def talk(node: NodeServer) -> Iterator[Talk]:
    with Talk(node.address) as one:
        yield one


def event(talk: Talk) -> dict[str, Any]:
    """The next event but progress."""
    while (told := talk.reply())["event"] == "progress":
        pass
    return dict(told)


# ----------------------------------------------------------------- one node


def test_a_watcher_is_told_each_change_of_its_key_and_of_nothing_else(node: NodeServer, talk: Talk) -> None:
    first = talk.ask(op="watch", key="w1/a")
    assert first == {"ok": True, "watch": True, "rev": first["rev"]}
    revs = [
        ask(node.address, **request)["rev"]
        for request in (
            {"op": "put", "key": "w1/a", "value": {"x": [1, None]}},
            {"op": "put", "key": "w1/ab", "value": 1},
            {"op": "incr", "key": "w1/n"},
            {"op": "delete", "key": "w1/a"},
            {"op": "delete", "key": "w1/a"},
            {"op": "put", "key": "w1/a", "value": 2, "if": {"exists": True}},
            {"op": "put", "key": "w1/a", "value": 3},
        )
    ]
    assert [event(talk) for _ in range(3)] == [
        {"event": "put", "key": "w1/a", "value": {"x": [1, None]}, "rev": revs[0], "version": 1},
        {"event": "delete", "key": "w1/a", "rev": revs[3]},
        {"event": "put", "key": "w1/a", "value": 3, "rev": revs[6], "version": 1},
    ]


def test_a_prefix_includes_the_key_that_equals_it(node: NodeServer, talk: Talk) -> None:
    talk.ask(op="watch", prefix="w2/a")
    for key in ("w2/", "w2/a", "w2/ab", "w2/b"):
        ask(node.address, op="put", key=key, value=1)
    assert [event(talk)["key"] for _ in range(2)] == ["w2/a", "w2/ab"]


def test_all_changes_of_one_entry_have_one_revision_and_their_order(node: NodeServer, talk: Talk) -> None:
    talk.ask(op="watch", prefix="w3/")
    rev = ask(
        node.address, op="txn",
        then=[{"op": "put", "key": "w3/a", "value": 1}, {"op": "put", "key": "w3/b", "value": 2},
              {"op": "delete", "key": "w3/a"}],
    )["rev"]  # fmt: skip
    told = [event(talk) for _ in range(3)]
    assert [(one["event"], one["key"], one["rev"]) for one in told] == [
        ("put", "w3/a", rev), ("put", "w3/b", rev), ("delete", "w3/a", rev),
    ]  # fmt: skip
    with Talk(node.address) as other:
        assert other.ask(**{"op": "watch", "prefix": "w3/", "from": rev})["rev"] == rev - 1
        assert [event(other) for _ in range(3)] == told, "`from` includes the whole revision"


def test_progress_comes_without_a_change(node: NodeServer, talk: Talk) -> None:
    rev = talk.ask(op="watch", key="w4/never")["rev"]
    assert talk.reply() == {"event": "progress", "rev": rev}
    later = ask(node.address, op="put", key="w4/other", value=1)["rev"]
    assert talk.reply() == {"event": "progress", "rev": later}


def test_requests_before_a_watch_are_answered_first_and_those_behind_it_are_ignored(node: NodeServer) -> None:
    with Talk(node.address) as one:
        one.send(
            frame({"op": "put", "key": "w5/a", "value": 1})
            + frame({"op": "watch", "key": "w5/a", "id": "w"})
            + frame({"op": "put", "key": "w5/a", "value": 2})
        )
        put = one.reply()
        assert one.reply() == {"ok": True, "watch": True, "rev": put["rev"], "id": "w"}
        one.send(frame({"op": "put", "key": "w5/a", "value": 3}), b"garbage \0" * 1000)
        ask(node.address, op="put", key="w5/a", value=4)
        assert event(one)["value"] == 4


def test_a_watch_that_fails_lets_its_connection_go_on(node: NodeServer) -> None:
    with Talk(node.address) as one:
        one.send(
            frame({"op": "watch"}) + frame({"op": "ping"}) + frame({"op": "watch", "key": "w6/a", "from": "x"})
            + frame({"op": "get", "key": "w6/a"})
        )  # fmt: skip
        assert [one.reply()["ok"] for _ in range(4)] == [False, True, False, True]


def test_a_client_that_has_nothing_more_to_say_goes_on_listening(node: NodeServer) -> None:
    with Talk(node.address) as one:
        one.send(line({"op": "watch", "key": "w7/a"})).finish()
        assert json.loads(one.line())["watch"]
        ask(node.address, op="put", key="w7/a", value="heard")
        assert json.loads(one.line())["value"] == "heard"


def test_a_watch_of_what_is_to_come_begins_with_that(node: NodeServer, talk: Talk) -> None:
    rev = ask(node.address, op="put", key="w8/a", value=0)["rev"]
    assert talk.ask(**{"op": "watch", "key": "w8/a", "from": rev + 3})["rev"] == rev + 2
    for i in range(1, 5):
        ask(node.address, op="put", key="w8/a", value=i)
    assert [event(talk)["value"] for _ in range(2)] == [3, 4]


def test_many_pipelined_writes_are_told_in_their_order(node: NodeServer, talk: Talk) -> None:
    talk.ask(op="watch", prefix="w9/")
    with Talk(node.address) as writer:
        writer.send(b"".join(frame({"op": "put", "key": f"w9/{i % 10}", "value": i}) for i in range(1000)))
        for _ in range(1000):
            writer.reply()
    told = [event(talk) for _ in range(1000)]
    assert [one["value"] for one in told] == list(range(1000))
    assert [one["rev"] for one in told] == sorted(one["rev"] for one in told)


# --------------------------------------------------------------------- HTTP


def sse(stream: Any) -> dict[str, str]:
    """The next server-sent event: its fields."""
    fields: dict[str, str] = {}
    while (text := stream.readline().decode().rstrip("\n")) or not fields:
        name, _, value = text.partition(": ")
        fields[name] = value
    return fields


def head(stream: Any) -> tuple[int, dict[str, str]]:
    status = int(stream.readline().split()[1])
    headers = {}
    while text := stream.readline().decode().strip():
        name, _, value = text.partition(": ")
        headers[name.lower()] = value
    return status, headers


def events_from(node: NodeServer, target: str, **headers: str) -> Any:
    connection = socket.create_connection((node.host, node.port), timeout=10)
    connection.sendall(http("GET", target, **headers))
    stream = connection.makefile("rb")
    connection.close()  # the stream keeps it open
    return stream


def test_server_sent_events_carry_ids_to_resume_behind(node: NodeServer) -> None:
    with events_from(node, "/watch?prefix=h1/") as stream:
        status, headers = head(stream)
        assert status == 200 and headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-store" and "content-length" not in headers
        first = sse(stream)
        assert first["event"] == "watch" and json.loads(first["data"])["rev"] == int(first["id"])
        ops = [{"op": "put", "key": "h1/é", "value": "line\nfeed"}, {"op": "put", "key": "h1/b", "value": 2}]
        rev = ask(node.address, op="batch", ops=ops)["rev"]
        told = [sse(stream) for _ in range(2)]
        assert [(one["event"], one.get("id")) for one in told] == [("put", None), ("put", str(rev))]
        assert json.loads(told[0]["data"])["value"] == "line\nfeed"
    last = ask(node.address, op="delete", key="h1/b")["rev"]
    with events_from(node, "/watch?prefix=h1/&from=1", last_event_id=str(rev)) as stream:
        head(stream)
        assert sse(stream)["id"] == str(rev)
        gone = sse(stream)
        assert (gone["event"], gone["id"]) == ("delete", str(last)), "the header goes before `from`"
        progress = sse(stream)
        assert progress["event"] == "progress" and int(progress["id"]) >= last


def test_a_watch_over_http_that_can_not_be_is_a_plain_failure(node: NodeServer) -> None:
    with Talk(node.address) as one:
        assert one.send(http("GET", "/watch?from=x")).response().status == 400
        assert one.send(http("GET", "/watch?key=a&prefix=b")).response().status == 400
        assert one.send(http("GET", "/watch", last_event_id="x")).response().status == 400
        reply = one.send(http("HEAD", "/watch")).response("HEAD")
        assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
        assert one.send(http("GET", "/kv/nothing")).response().status == 404, "the connection goes on"


def test_a_watch_by_a_client_that_asks_for_one_reply_only_goes_on_too(node: NodeServer) -> None:
    with events_from(node, "/watch?key=h2", connection="close") as stream:
        head(stream)
        sse(stream)
        ask(node.address, op="put", key="h2", value=1)
        assert json.loads(sse(stream)["data"])["value"] == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_shows_changes_as_they_come(node: NodeServer) -> None:
    with subprocess.Popen(["curl", "-sN", f"http://{node.address}/watch?prefix=h3/"], stdout=subprocess.PIPE) as curl:
        try:
            assert curl.stdout is not None
            assert sse(curl.stdout)["event"] == "watch"
            ask(node.address, op="put", key="h3/a", value="Oslo")
            assert json.loads(sse(curl.stdout)["data"])["value"] == "Oslo"
        finally:
            curl.kill()


def test_history_and_the_past_over_http(node: NodeServer) -> None:
    with Talk(node.address) as one:
        first = ask(node.address, op="put", key="h4", value="Oslo")["rev"]
        ask(node.address, op="put", key="h4", value="Rome")
        assert one.send(http("GET", f"/kv/h4?rev={first}")).response().body == b"Oslo"
        assert one.send(http("GET", "/kv/h4?rev=999999999")).response().status == 400
        changes = one.send(http("GET", "/history?key=h4&reverse=1&limit=1")).response().json
        assert [change["value"] for change in changes["changes"]] == ["Rome"] and changes["more"]


# ------------------------------------------------------------ slow and deaf


def test_watchers_that_never_read_are_dropped_and_others_are_served(tmp_path: Path) -> None:
    with node_alone(tmp_path, "--retain", "200") as node:
        deaf = [Talk(node.address) for _ in range(8)]
        for one in deaf:
            one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            assert one.ask(op="watch", prefix="")["watch"]
        value = "v" * 100_000
        with Onlooker([node], prefix="") as quick, Talk(node.address) as writer:
            writer.ask(op="put", key="warm", value=value)
            before = memory_bytes(node)
            most = before
            for i in range(500):
                assert writer.ask(op="put", key=f"k{i % 5}", value=f"{i} {value}")["ok"]
                if i % 50 == 0:
                    most = max(most, memory_bytes(node))
            rev = writer.ask(op="put", key="last", value=1)["rev"]
            quick.wait_for(rev)
            assert len(quick.events) == 502 and not quick.errors and quick.resumed == 0
            # 50 MB went by for each of the 8: what is kept is a bound for each, and the last 200 entries for all.
            assert max(most, memory_bytes(node)) - before < 120 << 20
        ended = 0
        for one in deaf:
            rest = one.rest().rpartition(b'{"event":"')[2]
            ended += rest.startswith(b'error","error":"overloaded"')
            one.socket.close()
        assert ended == len(deaf)


def test_a_client_that_goes_without_a_word_is_forgotten(tmp_path: Path) -> None:
    with node_alone(tmp_path) as node:
        for _ in range(3):
            with Talk(node.address) as one:
                one.ask(op="watch", prefix="")
        ask(node.address, op="put", key="a", value=1)
        ask(node.address, op="put", key="a", value=2)
        wait(lambda: open_sockets(node) <= 2, what="the watchers' connections are closed")


def open_sockets(node: NodeServer) -> int:
    """How many established connections the node has."""
    text = Path("/proc/net/tcp").read_text()
    port = f":{node.port:04X}"
    return sum(1 for row in text.splitlines()[1:] if row.split()[1].endswith(port) and row.split()[3] == "01")


# ------------------------------------------------------- restarts and faults


def test_what_the_node_was_told_before_its_restart_is_told_after_it(tmp_path: Path) -> None:
    with node_alone(tmp_path, "--retain", "500", "--checkpoint-every", "40") as node:
        with Onlooker([node], prefix="") as onlooker, Onlooker([node], key="k3") as one_key:
            for round_ in range(4):
                with Talk(node.address) as writer:
                    for i in range(100):
                        writer.ask(op="put", key=f"k{i % 7}", value=[round_, i])
                node.kill()
                node.start()
                wait_leading(node)
            last = ask(node.address, op="put", key="end", value=1)["rev"]
            onlooker.wait_for(last)
            one_key.wait_for(last)
        assert [one["value"] for one in onlooker.events[:-1]] == [[r, i] for r in range(4) for i in range(100)]
        assert [one["value"] for one in one_key.events] == [[r, i] for r in range(4) for i in range(100) if i % 7 == 3]
        assert not onlooker.errors and onlooker.resumed >= 1


def test_what_is_not_retained_is_compacted_also_after_a_restart(tmp_path: Path) -> None:
    with node_alone(tmp_path, "--retain", "50", "--checkpoint-every", "20") as node:
        for i in range(300):
            last = ask(node.address, op="put", key="a", value=i)["rev"]

        def settled() -> bool:
            status = ask(node.address, op="status")
            return bool(status["log"]["applied"] - status["snapshot"]["rev"] < 20)

        for _ in range(2):
            wait(settled, what="the last checkpoint that is due is written, so what is kept changes no more")
            with Talk(node.address) as one:
                refused = one.ask(**{"op": "watch", "key": "a", "from": 1})
                assert refused["error"] == "compacted"
                oldest = refused["oldest"]
                assert last - 200 < oldest <= last - 49
                assert one.ask(**{"op": "history", "from": oldest - 1})["error"] == "compacted"
                assert one.ask(**{"op": "watch", "key": "a", "from": oldest})["ok"]
                assert event(one)["rev"] == oldest
            node.kill()
            node.start()
            wait_leading(node)


class Writers:
    """Writes of every kind, by several threads, through all nodes, until the end; each change is one that can be told."""

    def __init__(self, nodes: list[NodeServer], count: int = 3) -> None:
        self.nodes = nodes
        self.acknowledged: list[tuple[int, str, Any]] = []
        self._stopped = False
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        position = number
        count = 0
        while not self._stopped:
            node = self.nodes[position % len(self.nodes)]
            position += 1
            try:
                with Talk(node.address, timeout_s=3.0) as talk:
                    while not self._stopped:
                        count += 1
                        self._write(talk, chance, f"{number}.{count}")
            except (OSError, EOFError, ValueError, AssertionError):
                continue

    def _write(self, talk: Talk, chance: random.Random, value: str) -> None:
        key = f"k{chance.randrange(5)}"
        if chance.random() < 0.3:
            ops = [{"op": "put", "key": key, "value": value}, {"op": "put", "key": f"{key}/x", "value": value}]
            reply = talk.ask(op="batch", ops=ops)
        else:
            reply = talk.ask(op="put", key=key, value=value)
        if not reply["ok"]:
            raise OSError(reply["message"])
        self.acknowledged.append((reply["rev"], key, value))
        time.sleep(0.001)


def agree(onlookers: list[Onlooker], truth: list[dict[str, Any]]) -> None:
    """Each of them was told exactly what happened, of what it wanted."""
    for onlooker in onlookers:
        assert not onlooker.errors, onlooker.errors[:5]
        since = onlooker._since or 1
        ((how, name),) = onlooker.what.items()
        wanted = [
            {k: change[k] for k in ("event", "key", "value", "rev", "version") if k in change}
            for change in truth
            if change["rev"] >= since and (change["key"] == name if how == "key" else change["key"].startswith(name))
        ]
        assert onlooker.events == wanted


def whole_history(node: NodeServer, **what: str) -> list[dict[str, Any]]:
    """All changes that `node` has kept, page by page."""
    found: list[dict[str, Any]] = []
    first = 1
    while True:
        page = ask(node.address, **{"op": "history", "from": first, "limit": 1000, **what})
        assert page["ok"], page
        found += page["changes"]
        if not page["more"]:
            return found
        first = found[-1]["rev"] + 1


@pytest.mark.proof
def test_watchers_on_every_node_see_each_change_once_in_order_through_kills_and_restarts(
    cluster: Clusters, record_property: State
) -> None:
    """Every second round kills the leader; of the others, one kills a follower, and one has a follower leave by itself."""
    rounds = size(8, 100)
    three = cluster(3, retain=size(100_000, 5_000_000), retain_bytes=4 << 30, checkpoint_every=300)
    n1, n2, n3 = three.nodes
    onlookers = [
        Onlooker([n1, n2, n3], prefix="", since=1),
        Onlooker([n2], prefix="k1"),
        Onlooker([n3, n1], key="k2", since=1),
        Onlooker([n3], prefix="k3/"),
    ]
    with onlookers[0], onlookers[1], onlookers[2], onlookers[3], Writers(three.nodes) as writers:
        for number in range(rounds):
            leader = three.wait_ready()
            victim = leader if number % 2 == 0 else three.followers()[number // 4 % 2]
            before = len(writers.acknowledged)
            if number % 4 == 3:
                victim.term()
            else:
                victim.kill()
            wait(lambda b=before: len(writers.acknowledged) > b + 20, 20, "writes go on")
            victim.start()
        three.wait_ready()
        writers.__exit__()
        last = ask(three.leader().address, op="put", key="end", value=1)["rev"]
        for onlooker in onlookers:
            onlooker.wait_for(last)
    truth = whole_history(three.leader())
    agree(onlookers, truth)
    told = {(change["rev"], change["key"], change["value"]) for change in truth if change["event"] == "put"}
    assert told.issuperset(writers.acknowledged) and len(writers.acknowledged) > 100
    assert sum(onlooker.resumed for onlooker in onlookers) > 0
    record_property("kills of the leader", rounds // 2)
    record_property("restarts of followers", rounds // 2)
    record_property("writes acknowledged", len(writers.acknowledged))
    record_property("changes", len(truth))
    record_property("events told to the four watchers", [len(onlooker.events) for onlooker in onlookers])
    record_property("resumed", [onlooker.resumed for onlooker in onlookers])


def test_a_watcher_goes_on_behind_a_snapshot_that_its_node_was_sent(cluster: Clusters) -> None:
    three = cluster(3, retain=3000, checkpoint_every=100)
    leader = three.leader()
    follower = three.followers()[0]
    with Onlooker([follower], prefix="", since=1) as onlooker:
        with Talk(leader.address) as writer:
            for i in range(300):
                writer.ask(op="put", key=f"k{i % 3}", value=i)
            onlooker.wait_for(writer.ask(op="put", key="a", value=1)["rev"])
            follower.wipe()  # it is a new member to the others, but for its name
            for i in range(300, 600):
                writer.ask(op="put", key=f"k{i % 3}", value=i)
            writer.ask(op="snapshot")
        follower.start()
        three.wait_ready(30, voters=3)
        last = ask(leader.address, op="put", key="end", value=1)["rev"]
        onlooker.wait_for(last)
    agree([onlooker], whole_history(leader))
    assert whole_history(follower) == whole_history(leader)
    assert onlooker.resumed >= 1


def test_a_node_that_leaves_says_so_to_its_watchers_and_is_not_held_up(cluster: Clusters) -> None:
    three = cluster(3)
    leader = three.leader()
    with Talk(leader.address) as one, Talk(leader.address) as two:
        one.ask(op="watch", prefix="")
        two.send(http("GET", "/watch"))
        began = time.monotonic()
        assert leader.term() == 0
        assert time.monotonic() - began < 5
        told = event(one)
        assert (told["event"], told["error"]) == ("error", "shutting_down")
        assert b"event: error\ndata:" in two.rest()


def test_history_and_watches_tell_what_sessions_and_leases_do(node: NodeServer, talk: Talk) -> None:
    client = ask(node.address, op="session_open")["client"]
    lease = ask(node.address, op="lease_grant", ttl=60)["lease"]
    talk.ask(op="watch", prefix="s1/")
    put = {"op": "put", "key": "s1/a", "value": 1, "client": client, "seq": 1, "lease": lease}
    revs = [ask(node.address, **put)["rev"] for _ in range(2)]
    ask(node.address, op="put", key="s1/b", value=1, lease=lease)
    gone = ask(node.address, op="lease_revoke", lease=lease)["rev"]
    told = [event(talk) for _ in range(4)]
    assert [(one["event"], one["key"]) for one in told] == [
        ("put", "s1/a"), ("put", "s1/b"), ("delete", "s1/a"), ("delete", "s1/b"),
    ]  # fmt: skip
    assert told[0]["rev"] == revs[0] == revs[1] and told[2]["rev"] == told[3]["rev"] == gone
    changes = ask(node.address, op="history", prefix="s1/")["changes"]
    assert [change.get("client") for change in changes] == [client, None, None, None]
