"""Starts that can't go well, and ends: one clear sentence and the right exit code, never a traceback. Real processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.harness import Cluster, NodeServer, RegistryServer, Server, environment, wait

Clusters = Callable[..., Cluster]
Run = Callable[..., tuple[int, str]]

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (ERROR|CRITICAL) ")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `python -m ddb.node` (or another module), which must end by itself; returns its exit code and complaint."""

    def go(*flags: object, module: str = "ddb.node", **variables: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, flags)],
            env=environment(**variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=15,
        )
        assert done.stdout == ""
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, complaint(done.stderr)

    return go


def complaint(log: str) -> str:
    """The one line that says why a process ended."""
    found = [line for line in log.splitlines() if STAMP.match(line) or re.match(r"ddb(-\w+)?: ", line)]
    assert len(found) == 1, log
    return found[0]


# What can't be used


def test_a_busy_port_is_named(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for module in ("ddb.node", "ddb.registry"):
            code, said = run("--port", port, "--data-dir", tmp_path / module, module=module)
            assert code == 1 and f"127.0.0.1:{port}" in said and "in use" in said, said


def test_an_address_that_is_not_of_this_machine_is_named(run: Run, tmp_path: Path) -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        code, said = run("--host", host, "--port", 0, "--data-dir", tmp_path / "d")
        assert code == 1 and host in said, said


def test_a_data_directory_in_use_is_refused(run: Run, cluster: Clusters) -> None:
    one = cluster(1)
    for server in one.servers:
        module = "ddb.registry" if isinstance(server, RegistryServer) else "ddb.node"
        code, said = run("--port", 0, "--data-dir", server.directory, module=module)
        assert code == 1 and str(server.directory) in said and "in use by another process" in said, said
    assert one.nodes[0].ask(op="put", key="k", value=1)["ok"], "the one who has it is not harmed"


@pytest.mark.parametrize("module", ["ddb.node", "ddb.registry"])
def test_a_data_directory_that_can_not_be_written_is_refused(run: Run, tmp_path: Path, module: str) -> None:
    (tmp_path / "file").write_text("here")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", "/proc/no/such"):  # root ignores mere modes
        code, said = run("--port", 0, "--data-dir", directory, module=module)
        assert code == 1 and str(directory) in said, said
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize(
    "content", ["", "{}", "not json", '{"id":7}', '{"id":"","cluster":null}', '{"id":"a","what":1}', "[]", "\xff\xfe"]
)
def test_an_identity_that_is_none_is_refused(run: Run, tmp_path: Path, content: str) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "identity.json").write_bytes(content.encode("latin-1"))
    code, said = run("--port", 0, "--data-dir", directory)
    assert code == 1 and str(directory / "identity.json") in said, said
    assert (directory / "identity.json").read_bytes() == content.encode("latin-1"), "nothing is changed"


@pytest.mark.parametrize("content", ["", "{}x", '{"cluster":7}', "[]", "\xff"])
def test_a_registrys_memory_that_is_none_is_refused(run: Run, tmp_path: Path, content: str) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "registry.json").write_bytes(content.encode("latin-1"))
    code, said = run("--port", 0, "--data-dir", directory, module="ddb.registry")
    assert code == 1 and str(directory / "registry.json") in said, said


class Started(NodeServer):
    """A node of its own, outside of a Cluster."""

    def __init__(self, directory: Path, *flags: str) -> None:
        super().__init__("n1", directory)
        self.address = "127.0.0.1:0"
        self.flags = list(flags)


# What is not understood

BAD = [
    ("--port", "DDB_PORT", ["-1", "65536", "http", "80.5", "", "٣"]),
    ("--registry", "DDB_REGISTRY", ["nowhere", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "ftp://h:1", "a b:1"]),
    ("--advertise", "DDB_ADVERTISE", ["nowhere", ":8050", "h:x"]),
    ("--election", "DDB_ELECTION", ["paxos", "Bully", ""]),
    ("--expect", "DDB_EXPECT", ["0", "-3", "100", "three"]),
    ("--replace-after", "DDB_REPLACE_AFTER", ["0", "-1", "soon", "nan", "inf"]),
    ("--max-frame", "DDB_MAX_FRAME", ["0", "1 MiB", "99999999999"]),
    ("--checkpoint-every", "DDB_CHECKPOINT_EVERY", ["0", "-1", "x"]),
    ("--retain", "DDB_RETAIN", ["-1", "x"]),
    ("--retain-bytes", "DDB_RETAIN_BYTES", ["-1", "64 MiB"]),
    ("--cache", "DDB_CACHE", ["0", "-1", "1g"]),
    ("--name", "DDB_NAME", ["two words", "", "x" * 65, "a\nb"]),
]


@pytest.mark.parametrize("flag,variable,values", BAD, ids=[flag for flag, _, _ in BAD])
def test_a_value_that_does_not_fit_is_named_with_where_it_came_from(
    run: Run, flag: str, variable: str, values: list[str]
) -> None:
    from ddb.node import parse

    for value in values:  # in this process: a flag's judgement needs no start
        with pytest.raises(SystemExit) as ended:
            parse([f"{flag}={value}"])
        assert ended.value.code == 2, value
    code, said = run(f"{flag}={values[0]}")
    assert code == 2 and flag in said and values[0] in said, said
    code, said = run(**{variable: values[0]})
    assert code == 2 and variable in said and values[0] in said, said


def test_an_unknown_flag_or_word_is_named(run: Run) -> None:
    for module in ("ddb.node", "ddb.registry"):
        for word in ("--no-such-flag", "word", "--prt=1", "--port"):
            code, said = run(word, module=module)
            assert code == 2 and word.partition("=")[0] in said, said


def test_a_variable_says_what_a_flag_would(tmp_path: Path) -> None:
    node = Started(tmp_path / "d")
    node.environment = environment(DDB_ELECTION="raft", DDB_NAME="overruled")
    try:
        node.start()
        status = wait(lambda: (s := node.status())["role"] == "leader" and s, what="it leads")
        assert (status["election"], status["node"]) == ("raft", "n1")
    finally:
        node.kill()


# A registry that is none


class NotFound(BaseHTTPRequestHandler):
    """A web server that has nothing to say."""

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


def echo(connection: socket.socket) -> None:
    """Send back all that comes."""
    with connection:
        while data := connection.recv(4096):
            connection.sendall(data)


def silent(connection: socket.socket) -> None:
    """Take all that comes, and say nothing."""
    with connection:
        while connection.recv(4096):
            pass


def closing(connection: socket.socket) -> None:
    """Hang up."""
    connection.close()


def nonsense(connection: socket.socket) -> None:
    """Answer in no known language."""
    with connection:
        connection.recv(4096)
        connection.sendall(b"\x00\xff" * 500)


def wrong_replies(connection: socket.socket) -> None:
    """Answer in frames that make no sense."""
    with connection:
        for payload in (b"[]", b'{"ok":true}', b'{"ok":true,"nodes":7,"ttl":"x","cluster":[]}') * 3:
            if not connection.recv(4096):
                return
            connection.sendall(b"%d\n%b\n" % (len(payload), payload))


@pytest.fixture
def serving() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Serves each connection with a function, in threads; returns the address."""
    listeners: list[socket.socket] = []

    def serve(talk: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def one(connection: socket.socket) -> None:
            try:
                talk(connection)
            except OSError:
                connection.close()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("talk", [echo, silent, closing, nonsense, wrong_replies], ids=lambda talk: talk.__name__)
def test_what_answers_but_is_no_registry_is_named_once_and_waited_for(
    tmp_path: Path, serving: Callable[[Callable[[socket.socket], None]], str], talk: Callable[[socket.socket], None]
) -> None:
    address = serving(talk)
    waits_for_a_registry(tmp_path, address, seconds=1.5)


def test_a_web_server_is_no_registry(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        waits_for_a_registry(tmp_path, f"127.0.0.1:{web.server_address[1]}", seconds=1.0)
        web.shutdown()


def test_a_node_is_no_registry(tmp_path: Path, cluster: Clusters) -> None:
    other = cluster(1, registry=False).nodes[0]
    waits_for_a_registry(tmp_path, other.address, seconds=1.0)
    assert other.ask(op="put", key="k", value=1)["ok"]


def test_a_registry_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    registry = RegistryServer("registry", tmp_path / "registry")
    registry.start()
    registry.kill()
    node = Started(tmp_path / "n1", "-ra", f"http://{registry.address}")
    try:
        node.start()
        said = wait(lambda: warnings(node), what="it says that the registry is not there")
        assert registry.address in said[0] and "can't be reached" in said[0]
        assert node.ask(op="get", key="k", timeout=0.2)["error"] == "no_leader"
        registry.start()
        wait(lambda: node.role() == "leader", what="it has a cluster")
        assert len(warnings(node)) == 1, node.log
        assert node.ask(op="put", key="k", value=1)["ok"]
    finally:
        node.kill()
        registry.kill()


def warnings(node: Server) -> list[str]:
    """The warnings in its log."""
    assert "Traceback" not in node.log, node.log
    return [line for line in node.log.splitlines() if " WARNING " in line]


def waits_for_a_registry(tmp_path: Path, address: str, seconds: float) -> None:
    """A node that is given `address` says once what is wrong, stays well, serves its own port, and ends when told."""
    node = Started(tmp_path / "lost", "-ra", address)
    try:
        node.start()
        said = wait(lambda: warnings(node), timeout_s=5.0, what="it says what is wrong")
        assert address in said[0], said
        until = time.monotonic() + seconds
        wait(lambda: time.monotonic() > until, what="it has tried some more")
        assert len(warnings(node)) == 1, node.log
        status = node.status()
        assert (status["cluster"], status["leader"]) == (None, None)
        assert node.ask(op="put", key="k", value=1, timeout=0.2)["error"] == "no_leader"
        ends(node, signal.SIGTERM, 2.0)
    finally:
        node.kill()


# Ends


def ends(server: Server, number: signal.Signals, within_s: float) -> None:
    """`number` ends the process with exit code 0 within `within_s`, and it says that it leaves."""
    began_at = time.monotonic()
    os.kill(server.pid, number)
    assert server.wait_ended() == 0, server.log
    assert time.monotonic() - began_at < within_s
    assert "Traceback" not in server.log
    assert re.search(r"left|stopped", server.log), server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_server_in_whatever_state_promptly_with_0(
    cluster: Clusters, number: signal.Signals
) -> None:
    three = cluster(3)
    assert three.registry is not None
    waiting = three.new_node(expect=9)
    waiting.registry = RegistryServer("lonely", three.directory / "lonely")
    waiting.registry.start()
    try:
        waiting.start()
        wait(lambda: "registered" in waiting.log, what="it waits for others")
        ends(waiting, number, 2.0)  # no cluster yet
        ends(waiting.registry, number, 2.0)
    finally:
        waiting.registry.kill()
    ends(three.followers()[0], number, 2.0)
    ends(three.leader(), number, 2.0)
    last = three.running[0]
    wait(lambda: last.role() != "leader", what="the last one sees that it has no majority")
    three.registry.kill()
    ends(last, number, 2.0)  # no leader, no registry
    for node in three.nodes[:3]:
        node.start()
    three.wait(lambda: three.find_leader(), what="they lead again without a registry")
    alone = three.leader()
    assert alone.ask(op="put", key="k", value=1)["ok"]


def test_a_signal_in_the_middle_of_a_start_is_heard(cluster: Clusters) -> None:
    one = cluster(1)
    for server in one.servers:
        for _ in range(5):
            server.kill()
            server.start()  # returns as soon as it listens
            os.kill(server.pid, signal.SIGTERM)
            assert server.wait_ended() == 0, server.log


def test_two_signals_are_one(cluster: Clusters) -> None:
    one = cluster(1)
    for server in one.servers:
        os.kill(server.pid, signal.SIGTERM)
        os.kill(server.pid, signal.SIGINT)
        assert server.wait_ended() == 0, server.log
        assert "Traceback" not in server.log


# How it runs


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system knows no such policy")
def test_a_nodes_turns_are_not_interrupted_by_whom_they_wake(cluster: Clusters) -> None:
    (node,) = cluster(1).nodes
    threads = [int(thread.name) for thread in Path(f"/proc/{node.pid}/task").iterdir()]
    assert len(threads) > 1
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}
    nices = sorted(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads)
    assert nices[0] < nices[-1] == nices[-2], (
        "who writes checkpoints, and who sends snapshots, lets the others go first"
    )
