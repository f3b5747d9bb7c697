"""Who verifies a snapshot that is arriving: the same is found by the thread that asks and by a process of its own, whatever
becomes of that."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from unittest import mock

import pytest

from ddb import inspection
from ddb.arrival import Arrival
from ddb.disk import OsDisk
from ddb.errors import CorruptStore
from ddb.inspection import Aside, Here
from ddb.layers import KeyFilter
from ddb.snapshot import Meta
from tests.harness import Cluster, wait
from tests.test_arrival import database, eager, sha256

__all__ = ["eager"]

ROWS = 3000
CHUNK_BYTES = 20_000
KEYS = [f"key{i:05d}" for i in range(ROWS)]


@pytest.fixture
def sent(tmp_path: Path) -> tuple[Meta, bytes]:
    """A snapshot, and the bytes of its file."""
    meta = database(OsDisk(), tmp_path / "state.db", KEYS)
    return meta, (tmp_path / "state.db").read_bytes()


@pytest.fixture
def begun() -> Iterator[list[Aside]]:
    """The inspections that `arriving` has begun; all of their processes have ended after the test, and been waited for."""
    asides: list[Aside] = []
    yield asides
    for aside in asides:
        aside.close()
        assert aside._process.returncode is not None and not is_running(aside._process.pid)


def arriving(path: Path, content: bytes, begun: list[Aside]) -> Arrival:
    def inspect(path: Path, size_bytes: int) -> Aside:
        begun.append(Aside(OsDisk(), path, size_bytes))
        return begun[-1]

    return Arrival(OsDisk(), path, len(content), sha256(content), inspect)


def deliver(target: Arrival, content: bytes, first: int = 0, last: int | None = None) -> None:
    """Have the chunks from `first` up to `last` (None: all) arrive."""
    chunks = [content[offset : offset + CHUNK_BYTES] for offset in range(0, len(content), CHUNK_BYTES)]
    for number, chunk in list(enumerate(chunks))[first:last]:
        target.take(chunk, number * CHUNK_BYTES)


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def has_all(found: KeyFilter) -> bool:
    return all(map(found.may_hold, KEYS)) and sum(found.may_hold(f"other{i}") for i in range(1000)) < 200


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.usefixtures("eager")
def test_a_process_of_its_own_finds_what_this_one_would(tmp_path: Path, in_order: bool, begun: list[Aside]) -> None:
    keys = list(KEYS)
    if not in_order:
        random.Random(1).shuffle(keys)
    meta = database(OsDisk(), tmp_path / "state.db", keys)
    content = (tmp_path / "state.db").read_bytes()
    target = arriving(tmp_path / "incoming.db", content, begun)
    deliver(target, content)
    found, filter = target.finish()
    here = Here(OsDisk(), target.path, len(content))
    assert (found, filter.tables) == (meta, here.finish()[1].tables) and has_all(filter)
    (aside,) = begun
    assert aside._process.returncode == 0, "it was believed"
    filter.add(["one more"])
    assert filter.may_hold("one more")


@pytest.mark.parametrize("when", ["before it looks", "before the end", "at the end"])
def test_what_a_process_that_was_killed_did_not_say_is_found_here(
    tmp_path: Path, when: str, sent: tuple[Meta, bytes], begun: list[Aside], eager: None
) -> None:
    meta, content = sent
    target = arriving(tmp_path / "incoming.db", content, begun)
    deliver(target, content, last=10)
    (aside,) = begun
    if when == "before it looks":
        aside._process.kill()
    deliver(target, content, first=10)
    if when == "before the end":
        aside._process.kill()
        aside._process.wait()
    if when == "at the end":
        aside._process.send_signal(signal.SIGSTOP)  # all orders are in its pipe, and no answer will be
        os.kill(aside._process.pid, signal.SIGKILL)
    with mock.patch.object(inspection.log, "warning") as warning:
        found, filter = target.finish()
    assert found == meta and has_all(filter)
    warning.assert_called_once_with("process %d ended too early; this one verifies %s", aside._process.pid, target.path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("UPDATE kv SET value = '1' WHERE rev = 2000", "the row of 'key01999' is not what was written"),
        ("DELETE FROM kv WHERE key = 'key00100'", "2999 rows are sound, but they are not the 3000 that were written"),
        ("UPDATE kv SET crc = 'x' WHERE key = 'key00000'", "the row of 'key00000' is not what was written"),
    ],
)
@pytest.mark.usefixtures("eager", "sent")
def test_both_refuse_the_same_and_say_the_same(tmp_path: Path, change: str, sentence: str, begun: list[Aside]) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as connection:
        connection.execute(change)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = (tmp_path / "state.db").read_bytes()
    target = arriving(tmp_path / "incoming.db", content, begun)
    deliver(target, content)
    with pytest.raises(CorruptStore, match=sentence):
        target.finish()
    with pytest.raises(CorruptStore, match=sentence):
        Here(OsDisk(), target.path, len(content)).finish()


@pytest.mark.usefixtures("eager")
def test_an_arrival_that_is_given_up_leaves_neither_file_nor_process(
    tmp_path: Path, sent: tuple[Meta, bytes], begun: list[Aside]
) -> None:
    target = arriving(tmp_path / "incoming.db", sent[1], begun)
    deliver(target, sent[1], last=5)
    assert is_running(begun[0]._process.pid)
    target.drop()
    assert not is_running(begun[0]._process.pid) and not target.path.exists()
    target.drop()


def test_it_ends_when_the_one_that_asked_is_killed(tmp_path: Path, sent: tuple[Meta, bytes]) -> None:
    path = tmp_path / "incoming.db"
    path.write_bytes(sent[1])
    asks = (
        "import sys, time; from pathlib import Path; from ddb.disk import OsDisk; from ddb.inspection import Aside\n"
        f"aside = Aside(OsDisk(), Path({str(path)!r}), {len(sent[1])}); aside.look()\n"
        "print(aside._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", asks], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as one:
        assert one.stdout is not None
        pid = int(one.stdout.readline())
        assert is_running(pid)
        one.kill()
    wait(lambda: not is_running(pid) or is_zombie(pid), what="the process ends")


def is_zombie(pid: int) -> bool:
    """Whether it has ended, and only nobody has asked how: its parent is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return False


def test_only_a_large_file_is_worth_a_process_and_none_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "incoming.db"
    assert isinstance(inspection.begin(OsDisk(), path, inspection.ASIDE_MIN_BYTES - 1), Here)
    with caplog.at_level(logging.INFO):
        large = inspection.begin(OsDisk(), path, inspection.ASIDE_MIN_BYTES)
    assert isinstance(large, Aside) and f"process {large._process.pid} verifies the rows" in caplog.text
    large.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert isinstance(inspection.begin(OsDisk(), path, inspection.ASIDE_MIN_BYTES), Here)
    assert "no process can be started" in caplog.text
    monkeypatch.setattr(sys, "executable", "")
    assert isinstance(inspection.begin(OsDisk(), path, inspection.ASIDE_MIN_BYTES), Here)


def test_a_newcomer_has_a_large_snapshot_verified_by_a_process_which_ends(tmp_path: Path) -> None:
    with Cluster(tmp_path, 1) as cluster:
        client = cluster.client()
        for number in range(32):  # more than the log keeps
            client[f"large/{number}"] = "x" * (4 << 20)
        assert cluster.leader().ask(30, op="snapshot")["ok"]
        newcomer = cluster.new_node()
        newcomer.start()
        cluster.wait_ready(60, voters=2)
        assert newcomer.ask(30, op="get", key="large/31", read="stale")["found"]
        pid = re.search(r"process (\d+) verifies the rows of \S+incoming.db", newcomer.log)
        assert pid is not None and not is_running(int(pid[1]))
        assert "installed the snapshot" in newcomer.log and "ended too early" not in newcomer.log
