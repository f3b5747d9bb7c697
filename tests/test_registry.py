"""roster and registry: at most one cluster is founded, whatever dies, and what is known is never wrong for long."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddb.disk import OsDisk
from ddb.errors import BadRequest, DdbError, Overloaded, ReadOnly, StartupError, WrongCluster
from ddb.registry import MemoryFile, Registry
from ddb.roster import NODES_MAX, Memory, Roster
from tests.harness import REPOSITORY, RegistryServer, environment, exchange, wait


def node(number: int, cluster: str | None = None, **changes: Any) -> dict[str, Any]:
    """The fields of a `register` request."""
    return {
        "id": f"id{number}",
        "name": f"n{number}",
        "address": f"10.0.0.{number}:8050",
        "cluster": cluster,
        **changes,
    }


def ask(number: int, **more: Any) -> dict[str, Any]:
    """The fields of a `bootstrap` request."""
    return {"id": f"id{number}", "cluster": f"proposal{number}", **more}


def fresh() -> Roster:
    """A roster that has listened, and knows of no cluster. Its clock begins at 0."""
    return Roster(Memory(), 0.0)


# --- who is there


def test_a_node_is_listed_with_its_age_until_it_is_silent_for_the_ttl() -> None:
    roster = Roster(Memory(), 0.0, ttl_s=3.0)
    roster.register(node(1), 10.0)
    assert [n.to_json(11.5) for n in roster.nodes] == [
        {"id": "id1", "name": "n1", "address": "10.0.0.1:8050", "age": 1.5}
    ]
    roster.register(node(2), 12.0)
    assert roster.expire(12.9) == []
    assert [gone.id for gone in roster.expire(13.0)] == ["id1"]
    roster.register(node(2), 14.0)  # speaking again counts
    assert roster.expire(15.0) == []


def test_only_a_new_node_or_a_new_address_is_news() -> None:
    roster = fresh()
    assert roster.register(node(1), 0.0)[1]
    assert not roster.register(node(1), 1.0)[1]
    assert not roster.register(node(1, "c"), 1.0)[1]
    assert roster.register(node(1, "c", address="10.0.0.9:8050"), 2.0)[1]
    assert [n.address for n in roster.nodes] == ["10.0.0.9:8050"]


def test_a_node_that_leaves_is_forgotten_at_once() -> None:
    roster = fresh()
    roster.register(node(1), 0.0)
    gone = roster.unregister("id1")
    assert gone is not None and gone.name == "n1" and roster.nodes == []
    assert roster.unregister("id1") is None


@pytest.mark.parametrize(
    "change",
    [
        {"id": None}, {"id": ""}, {"id": 7}, {"id": "x" * 129}, {"id": "a\nb"}, {"name": ["n"]}, {"name": "\x1b[2J"},
        {"address": None}, {"address": "nowhere"}, {"address": "h:0"}, {"address": "h:99999"}, {"address": 8050},
        {"cluster": 7}, {"cluster": ""},
    ],
)  # fmt: skip
def test_a_field_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    roster = fresh()
    with pytest.raises(BadRequest, match=next(iter(change))):
        roster.register({**node(1), **change}, 0.0)
    assert roster.nodes == []


def test_the_roster_is_bounded() -> None:
    roster = fresh()
    for number in range(NODES_MAX):
        roster.register(node(number, address="h:1"), 0.0)
    with pytest.raises(Overloaded):
        roster.register(node(NODES_MAX, address="h:1"), 0.0)
    roster.register(node(0, address="h:2"), 1.0)  # one that is known may go on


# --- who founds


def test_one_node_is_granted_and_no_other_ever() -> None:
    roster = fresh()
    assert roster.bootstrap(ask(1), 0.0).granted
    assert roster.memory == Memory("proposal1", "id1", False)
    for later_s in (0.0, 10.0, 1e9):
        assert not roster.bootstrap(ask(2), later_s).granted
    assert roster.memory.cluster == "proposal1"


def test_the_node_that_was_granted_is_granted_again_under_the_first_id() -> None:
    roster = fresh()
    roster.bootstrap(ask(1), 0.0)
    assert roster.bootstrap(ask(1, cluster="another"), 1.0).granted
    assert roster.memory.cluster == "proposal1"


def test_nobody_is_granted_once_a_node_of_the_cluster_was_seen() -> None:
    roster = fresh()
    roster.bootstrap(ask(1), 0.0)
    roster.register(node(1, "proposal1"), 1.0)
    assert roster.memory.seen
    assert not roster.bootstrap(ask(1), 2.0).granted


def test_a_roster_without_memory_listens_before_it_grants() -> None:
    roster = Roster(None, 100.0, grace_s=0.75)
    assert not roster.bootstrap(ask(1), 100.7).granted
    assert roster.bootstrap(ask(1), 100.75).granted


def test_a_roster_without_memory_learns_the_cluster_and_grants_no_second() -> None:
    roster = Roster(None, 0.0)
    roster.register(node(5, "old"), 0.2)
    assert roster.memory == Memory("old", None, True)
    assert not roster.bootstrap(ask(1), 99.0).granted
    roster.expire(1e6)
    assert not roster.bootstrap(ask(1), 1e6).granted


def test_a_node_of_another_cluster_is_refused_and_not_listed() -> None:
    roster = Roster(Memory("ours", "id1", True), 0.0)
    with pytest.raises(WrongCluster, match=r"ours.*theirs"):
        roster.register(node(5, "theirs"), 0.0)
    assert roster.nodes == [] and roster.memory.cluster == "ours"


def test_with_expect_the_grant_waits_for_that_many() -> None:
    roster = fresh()
    for number in (1, 2):
        roster.register(node(number), 0.0)
        verdict = roster.bootstrap(ask(1, expect=3), 0.0)
        assert (verdict.granted, verdict.waiting) == (False, number)
    roster.register(node(3), 0.0)
    verdict = roster.bootstrap(ask(2, expect=3), 0.0)
    assert verdict.granted and [n.id for n in verdict.founders] == ["id1", "id2", "id3"]
    assert not roster.bootstrap(ask(1, expect=3), 0.0).granted


def test_with_expect_a_node_that_is_not_registered_is_not_granted() -> None:
    roster = fresh()
    for number in (1, 2, 3):
        roster.register(node(number), 0.0)
    assert not roster.bootstrap(ask(9, expect=3), 0.0).granted


def test_without_expect_no_other_member_is_named() -> None:
    roster = fresh()
    roster.register(node(1), 0.0)
    roster.register(node(2), 0.0)
    assert roster.bootstrap(ask(1), 0.0).founders == ()


@pytest.mark.parametrize("expect", [0, -1, 1.0, "3", True, None, NODES_MAX + 1])
def test_expect_must_be_a_number_of_nodes(expect: Any) -> None:
    with pytest.raises(BadRequest, match="expect"):
        fresh().bootstrap(ask(1, expect=expect), 0.0)


def test_a_lost_founder_does_not_lose_its_grant_but_is_reported() -> None:
    roster = fresh()
    roster.register(node(1), 0.0)
    roster.bootstrap(ask(1), 0.0)
    assert not roster.stuck
    roster.expire(10.0)
    assert roster.stuck
    assert not roster.bootstrap(ask(2), 1e6).granted
    roster.register(node(1, "proposal1"), 1e6)  # it was only stopped
    assert not roster.stuck


# --- the memory on disk


class FakeSlot:
    """Keeps the reply."""

    def __init__(self) -> None:
        self.reply_json: dict[str, Any] = {}

    def reply(self, body: bytes) -> None:
        self.reply_json = json.loads(body)


def call(service: Registry, **request: Any) -> dict[str, Any]:
    """The reply to one request, without a socket."""
    slot = FakeSlot()
    service.request(request, slot)  # type: ignore[arg-type]
    return slot.reply_json


@pytest.fixture
def file(tmp_path: Path) -> Iterator[MemoryFile]:
    """A memory file in a new directory."""
    one = MemoryFile(tmp_path / "data")
    yield one
    one.close()


def test_what_is_saved_is_loaded(file: MemoryFile) -> None:
    assert file.load() is None
    for memory in (Memory(), Memory("c", "id1"), Memory("c", None, True)):
        file.save(memory)
        assert file.load() == memory


def test_the_grant_is_on_disk_before_the_reply(tmp_path: Path) -> None:
    done: list[str] = []

    class Watched(OsDisk):
        def fdatasync(self, handle: int) -> None:
            super().fdatasync(handle)
            done.append("file")

        def rename(self, old: Path, new: Path) -> None:
            super().rename(old, new)
            done.append("name")

        def fsync_dir(self, handle: int) -> None:
            super().fsync_dir(handle)
            done.append("directory")

    file = MemoryFile(tmp_path, Watched())
    try:
        service = Registry(Roster(Memory(), 0.0), file)
        slot = FakeSlot()
        slot.reply = lambda body: done.append("reply")  # type: ignore[method-assign]
        service.request({"op": "bootstrap", **ask(1)}, slot)  # type: ignore[arg-type]
        assert done == ["file", "name", "directory", "reply"]
        assert file.load() == Memory("proposal1", "id1")
    finally:
        file.close()


def test_a_disk_that_refuses_grants_nothing(tmp_path: Path) -> None:
    class Full(OsDisk):
        full = True

        def fdatasync(self, handle: int) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            super().fdatasync(handle)

    disk = Full()
    file = MemoryFile(tmp_path, disk)
    try:
        service = Registry(Roster(Memory(), 0.0), file)
        for number in (1, 2):
            with pytest.raises(ReadOnly, match="disk"):
                call(service, op="bootstrap", **ask(number))
        with pytest.raises(ReadOnly):
            call(service, op="register", **node(7, "elsewhere"))
        assert call(service, op="status")["cluster"] is None
        assert file.load() is None
        disk.full = False
        assert call(service, op="bootstrap", **ask(2))["granted"]
        assert file.load() == Memory("proposal2", "id2")
    finally:
        file.close()


def test_a_cluster_learnt_from_a_node_is_remembered(file: MemoryFile) -> None:
    service = Registry(Roster(None, 0.0), file)
    call(service, op="register", **node(1, "old"))
    assert file.load() == Memory("old", None, True)


def test_a_registry_that_has_listened_writes_that_down(file: MemoryFile) -> None:
    now_s = 0.0
    service = Registry(Roster(None, 0.0), file, lambda: now_s)
    service.tick()
    assert file.load() is None
    now_s = 1.0
    service.tick()
    assert file.load() == Memory()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"cluster":7}', b'{"nonsense":1}', b"\xff"])
def test_a_damaged_memory_is_refused_with_what_to_do(file: MemoryFile, content: bytes) -> None:
    file.path.write_bytes(content)
    with pytest.raises(StartupError, match="restore it, or remove it"):
        file.load()


def test_a_directory_belongs_to_one_registry(file: MemoryFile) -> None:
    with pytest.raises(StartupError, match="in use"):
        MemoryFile(file.path.parent)


# --- operations


def test_every_operation_answers_as_the_protocol_says(file: MemoryFile) -> None:
    service = Registry(Roster(Memory(), 0.0), file, lambda: 2.0)
    listed = {"id": "id1", "name": "n1", "address": "10.0.0.1:8050", "age": 0.0}
    assert call(service, op="register", **node(1)) == {"ok": True, "ttl": 3.0, "nodes": [listed], "cluster": None}
    assert call(service, op="nodes") == {"ok": True, "nodes": [listed], "cluster": None}
    granted = call(service, op="bootstrap", **ask(1))
    assert granted == {"ok": True, "granted": True, "cluster": "proposal1", "waiting": 1}
    refused = call(service, op="bootstrap", **ask(2))
    assert refused == {"ok": True, "granted": False, "cluster": "proposal1", "waiting": 1}
    assert call(service, op="unregister", id="id1") == {"ok": True}
    assert call(service, op="unregister", id="id1") == {"ok": True}
    status = call(service, op="status")
    assert (status["role"], status["nodes"], status["cluster"]) == ("registry", 0, "proposal1")
    assert call(service, op="ping")["node"] == "registry"
    assert call(service, op="ready") == {"ok": True}


@pytest.mark.parametrize("request_", [{}, {"op": 7}, {"op": "put"}, {"op": ["nodes"]}, {"op": "unregister"}])
def test_an_unknown_operation_is_refused(file: MemoryFile, request_: dict[str, Any]) -> None:
    with pytest.raises(DdbError) as caught:
        call(Registry(Roster(Memory(), 0.0), file), **request_)
    assert caught.value.code == "bad_request"


def test_a_lost_founder_is_logged_with_what_to_do(file: MemoryFile, caplog: pytest.LogCaptureFixture) -> None:
    service = Registry(Roster(Memory("c", "id1"), 0.0), file)
    for _ in range(3):
        assert not call(service, op="bootstrap", **ask(2))["granted"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "id1" in warnings[0] and str(file.path) in warnings[0]


# --- as a process


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    """A registry's process, not started yet."""
    one = RegistryServer("registry", tmp_path / "registry")
    yield one
    one.kill()


def register(server: RegistryServer, **fields: Any) -> dict[str, Any]:
    """The reply to one `register`."""
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        return exchange(connection, {"op": "register", **fields})


def granted_after_listening(server: RegistryServer, number: int) -> dict[str, Any]:
    """Ask until the registry has listened long enough to grant."""

    def granted() -> dict[str, Any] | None:
        reply = server.ask(op="bootstrap", **ask(number))
        return reply if reply["granted"] else None

    reply = wait(granted)
    assert reply is not None
    return reply


def test_the_grant_survives_kill_9(server: RegistryServer) -> None:
    server.start()
    granted_after_listening(server, 1)
    server.restart()
    refused = server.ask(op="bootstrap", **ask(2))
    assert (refused["granted"], refused["cluster"]) == (False, "proposal1")
    assert server.ask(op="bootstrap", **ask(1))["granted"], "the reply may have been lost"


def test_of_twenty_that_ask_at_once_one_is_granted(server: RegistryServer) -> None:
    server.start()
    wait(lambda: (server.directory / "registry.json").exists())  # it has listened
    replies: list[dict[str, Any]] = []
    together = threading.Barrier(20)

    def bootstrap(number: int) -> None:
        host, port = server.host, server.port
        with socket.create_connection((host, port), timeout=10) as connection:
            together.wait()
            replies.append(exchange(connection, {"op": "bootstrap", **ask(number)}))

    threads = [threading.Thread(target=bootstrap, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply["granted"] for reply in replies].count(True) == 1
    assert len({reply["cluster"] for reply in replies if reply["cluster"]}) == 1


def test_a_wiped_registry_grants_no_second_cluster(server: RegistryServer) -> None:
    server.start()
    granted_after_listening(server, 1)
    server.wipe()
    server.start()
    host, port = server.host, server.port
    with socket.create_connection((host, port), timeout=10) as connection:
        assert exchange(connection, {"op": "bootstrap", **ask(2)})["granted"] is False
        reply = exchange(connection, {"op": "register", **node(1, "proposal1")})
        assert reply["cluster"] == "proposal1"
        wait(lambda: server.ask(op="status")["uptime"] > 1.0)
        assert exchange(connection, {"op": "bootstrap", **ask(2)})["granted"] is False
    server.restart()
    assert server.ask(op="status")["cluster"] == "proposal1"


def test_comings_and_goings_are_logged(server: RegistryServer) -> None:
    server.flags = ["--ttl", "0.3"]
    server.start()
    register(server, **node(1))
    register(server, **node(1))
    register(server, **node(2))
    server.ask(op="unregister", id="id2")
    assert server.log.count("Registered node id1 at IP 10.0.0.1:8050") == 1
    assert "Forgot node id2" in server.log
    wait(lambda: "Forgot node id1" in server.log)
    assert server.ask(op="nodes")["nodes"] == []


def test_it_speaks_http(server: RegistryServer) -> None:
    server.start()
    register(server, **node(1))
    for path, field in (("nodes", "nodes"), ("status", "uptime"), ("healthz", "ok"), ("readyz", "ok")):
        with urllib.request.urlopen(f"http://{server.address}/{path}", timeout=10) as response:
            assert json.load(response)[field]


def test_sigterm_and_sigint_end_it_cleanly(server: RegistryServer) -> None:
    server.start()
    assert server.term() == 0
    server.start()
    os.kill(server.pid, signal.SIGINT)
    wait(lambda: not server.alive)
    assert server.term() == 0
    assert "Traceback" not in server.log


def run(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the registry to its end, which must be soon."""
    command = [sys.executable, "-m", "ddb.registry", *flags]
    return subprocess.run(
        command, env=environment(**variables), cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (["--port", "x"], {}),
        (["--port", "70000"], {}),
        (["--ttl", "0"], {}),
        (["--ttl", "nan"], {}),
        (["--nonsense"], {}),
        (["stray"], {}),
        ([], {"DDB_REGISTRY_PORT": "x"}),
        ([], {"DDB_REGISTRY_TTL": "-1"}),
    ],
)
def test_a_setting_that_does_not_fit_ends_with_2_and_a_sentence(flags: list[str], variables: dict[str, str]) -> None:
    ended = run(*flags, **variables)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and "Traceback" not in ended.stderr


def test_a_place_where_it_cannot_be_ends_with_1_and_a_sentence(server: RegistryServer, tmp_path: Path) -> None:
    server.start()
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for flags, reason in (
        (["--port", str(server.port), "--data-dir", str(tmp_path / "other")], "in use"),
        (["--port", "0", "--data-dir", str(server.directory)], "in use"),
        (["--port", "0", "--data-dir", str(blocked)], "can't be used"),
        (["--port", "0", "--data-dir", str(tmp_path / "other"), "--host", "192.0.2.1"], "no address of this machine"),
    ):
        ended = run(*flags)
        assert ended.returncode == 1
        assert reason in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert server.ask(op="ping")["ok"]


def test_a_variable_sets_what_no_flag_does(tmp_path: Path) -> None:
    server = RegistryServer("registry", tmp_path / "registry")
    server.environment = environment(DDB_REGISTRY_TTL="1.5")
    try:
        server.start()
        assert server.ask(op="status")["ttl"] == 1.5
    finally:
        server.kill()


def test_help_shows_an_example() -> None:
    ended = run("--help")
    assert ended.returncode == 0 and "example:" in ended.stdout
