"""`ddb up`, as a process: a cluster in one command, that leaves nothing behind and finds its data again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddb import connect
from tests.harness import ask, environment, wait

READY = "Ctrl-C stops all of it."


class Up:
    """`ddb up` on free ports, and what it has said so far."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.said_in = directory / "up.txt"
        command = [sys.executable, "-m", "ddb", "up", "--port", "0", *arguments]
        with self.said_in.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=directory, env=environment(), stdout=output, stderr=output, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.said_in.read_text(encoding="utf-8")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.said
            return READY in self.said

        wait(ready, 30, "ddb up is ready")

    @property
    def addresses(self) -> list[str]:
        """The nodes', as it tells them."""
        found = re.search(r"export DDB_SERVER=(\S+)", self.said)
        assert found is not None
        return found[1].split(",")

    def children(self) -> dict[str, int]:
        """The process ids of what it started, by name."""
        pids = {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it has ended meanwhile
            if parent == self.process.pid and "-m" in words:
                name = words[words.index("--name") + 1] if "--name" in words else "registry"
                pids[name] = pid
        return pids

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts `ddb up` with more arguments, in the same directory each time; all are ended after the test."""
    started: list[Up] = []

    def start(*arguments: str, ready: bool = True) -> Up:
        one = Up(tmp_path, *arguments)
        started.append(one)
        if ready:
            one.wait_ready()
        return one

    yield start
    for one in started:
        children = one.children() if one.process.poll() is None else {}
        one.process.kill()
        one.process.wait()
        for pid in children.values():
            wait(lambda pid=pid: gone(pid), what=f"process {pid} follows ddb up")  # type: ignore[misc]


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks at /proc")


def test_one_command_runs_a_cluster_and_ctrl_c_stops_all_of_it(up: Callable[..., Up]) -> None:
    running = up()
    assert re.search(r"^n1 +leader ", running.said, re.MULTILINE)
    assert len(re.findall(r"^n[23] +follower ", running.said, re.MULTILINE)) == 2
    children = running.children()
    assert sorted(children) == ["n1", "n2", "n3", "registry"]
    assert f"kill -9 {children['n1']} " in running.said
    with connect(running.addresses[2]) as db:
        db.put("city", "Oslo")
    assert running.stop() == 0
    assert all(gone(pid) for pid in children.values())
    assert "Stopped." in running.said and "Traceback" not in running.said


def test_the_same_directory_again_has_the_same_data_and_as_many_nodes(up: Callable[..., Up]) -> None:
    first = up("--nodes", "2")
    with connect(first.addresses) as db:
        db.put("city", "Oslo")
    assert first.stop(signal.SIGTERM) == 0
    again = up()
    assert len(again.addresses) == 2
    with connect(again.addresses) as db:
        item = db.get("city")
    assert item is not None and item.value == "Oslo"


def test_a_cluster_can_be_run_with_more_nodes_than_before_but_not_with_fewer(up: Callable[..., Up]) -> None:
    up("--nodes", "1").stop()
    assert len(up("--nodes", "2").addresses) == 2


def test_fewer_nodes_than_the_directory_holds_are_refused(up: Callable[..., Up], tmp_path: Path) -> None:
    for name in ("n1", "n2", "n3"):
        (tmp_path / "ddb-data" / name).mkdir(parents=True)
    refused = up("--nodes", "2", ready=False)
    assert refused.process.wait(30) == 1
    assert refused.said.startswith("ddb: ddb-data holds a cluster of 3 nodes") and refused.said.count("\n") == 1


def test_a_killed_node_is_reported_with_the_command_that_starts_it_again(up: Callable[..., Up]) -> None:
    running = up()
    killed = running.children()["n2"]
    os.kill(killed, signal.SIGKILL)
    wait(lambda: "start it again with:" in running.said, what="it is reported")
    assert "n2 has ended by SIGKILL.\n" in running.said
    command = re.search(r"start it again with: (.*)", running.said)
    assert command is not None
    shell = subprocess.Popen(
        ["bash", "-c", f"exec env {command[1]}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = running.addresses[1]
        wait(lambda: ask(address, op="status")["leader"], what="n2 is back at its address")
        assert ask(address, op="status")["node"] == "n2"
    finally:
        shell.kill()
        shell.wait()


def test_the_children_end_even_when_it_is_killed_outright(up: Callable[..., Up]) -> None:
    running = up("--nodes", "2")
    children = running.children()
    running.process.kill()
    running.process.wait()
    for name, pid in children.items():
        wait(lambda pid=pid: gone(pid), 15, f"{name} ends")  # type: ignore[misc]


def test_a_busy_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        command = [sys.executable, "-m", "ddb", "up", "--port", str(port - 1), "--registry-port", str(port - 2)]
        ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1 and ran.stdout == ""
    assert re.fullmatch(
        r"ddb: 127\.0\.0\.1:\d+ can't be listened on \([^\n]*\); stop what uses it, [^\n]*\n", ran.stderr
    )


def test_a_directory_that_can_not_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "ddb", "up", "--port", "0", "--dir", "file/data"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "ddb: file/data can't be used for data: Not a directory; give another --dir.\n"


def test_a_server_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "ddb-data").mkdir()
    (tmp_path / "ddb-data" / "n1").write_text("not a directory")
    command = [sys.executable, "-m", "ddb", "up", "--port", "0"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert re.search(r"^ddb: n1 did not start: .*n1.*\(its log: .*n1\.out\)\n", ran.stderr, re.MULTILINE)
    assert "Traceback" not in ran.stderr
