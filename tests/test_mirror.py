"""`ddb mirror`: the copy is the source at some revision, wherever it was killed, and whatever the source forgets."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ddb import mirror
from ddb.client import Client, connect
from ddb.mirror import NOTES, Mirror, Overtaken
from tests.harness import Cluster, environment, wait


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Cluster]]:
    """A source that keeps little, and a target."""
    source = Cluster(tmp_path_factory.mktemp("source"), 1, registry=False, retain=200, checkpoint_every=100)
    target = Cluster(tmp_path_factory.mktemp("target"), 1, registry=False)
    with source, target:
        yield source, target


def rows(client: Client, prefix: str = "") -> dict[str, Any]:
    return {item.key: item.value for item in client.scan_all(prefix) if not item.key.startswith(NOTES)}


def mirrored(source: Client, target: Client, prefix: str = "", into: str = "", anew: bool = False) -> list[str]:
    """One run to the end; what it said."""
    said: list[str] = []
    Mirror(source, target, prefix, into, said.append, lambda text: None).run(once=True, anew=anew)
    return said


def test_a_copy_is_the_source_and_what_was_there_before_goes(source: Client, target: Client) -> None:
    for n in range(10):
        source.put(f"user/{n}", {"n": n})
    source.put("other", b"\x00bytes")
    target.put("user/3", "stale")
    target.put("stranger", "goes")
    mirrored(source, target)
    assert rows(target) == rows(source)


def test_only_a_prefix_and_into_another_one(source: Client, target: Client) -> None:
    source.put("user/1", 1)
    source.put("other", 2)
    target.put("eu/user/9", "goes")
    target.put("eu/else", "stays")
    target.put("user/9", "stays")
    mirrored(source, target, "user/", "eu/")
    assert rows(target) == {"eu/user/1": 1, "eu/else": "stays", "user/9": "stays"}


def test_the_next_run_writes_only_what_has_changed_since(source: Client, target: Client) -> None:
    for n in range(20):
        source.put(f"k{n:02}", n)
    mirrored(source, target)
    before = target.status()["log"]["last"]
    source.put("k05", "new")
    source.delete("k06")
    said = mirrored(source, target)
    assert rows(target) == rows(source)
    assert not any("Copying" in sentence for sentence in said)
    assert "2 keys written or deleted" in said[-1]
    assert target.status()["log"]["last"] - before <= 4


def test_what_the_source_forgot_is_copied_again_and_said_so(source: Client, target: Client) -> None:
    source.put("a", 1)
    mirrored(source, target)
    source.delete("a")
    for n in range(600):
        source.put("b", n)
    source.snapshot()
    said = mirrored(source, target)
    assert rows(target) == rows(source) == {"b": 599}
    assert any("keeps no changes from revision" in sentence for sentence in said)
    assert "So everything is copied again." in said


def test_a_copy_that_was_cut_off_goes_on_behind_what_it_has(
    source: Client, target: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PAGE_ITEMS", 10)
    for n in range(50):
        source.put(f"k{n:02}", n)

    class Cut(Exception):
        pass

    call, txns = target.call, 0

    def cut(request: dict[str, Any], **more: Any) -> dict[str, Any]:
        nonlocal txns
        if request["op"] == "txn":
            txns += 1
            if txns > 2:
                raise Cut
        return call(request, **more)

    monkeypatch.setattr(target, "call", cut)
    with pytest.raises(Cut):
        mirrored(source, target)
    monkeypatch.setattr(target, "call", call)
    assert len(rows(target)) == 20
    source.put("k03", "changed behind the copy's back")
    said = mirrored(source, target)
    assert said[0] == "Copying everything, from behind 'k19'."
    assert rows(target) == rows(source)


def test_a_step_without_an_answer_is_done_once(source: Client, target: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddb.errors import OutcomeUnknown

    call, lost = target.call, [True, False, True]

    def unsure(request: dict[str, Any], **more: Any) -> dict[str, Any]:
        if request["op"] != "txn" or not lost:
            return call(request, **more)
        if lost.pop(0):
            call(request, **more)  # it was done, and nobody heard
        raise OutcomeUnknown("silence")

    monkeypatch.setattr(target, "call", unsure)
    for n in range(3):
        source.put(f"k{n}", n)
    mirrored(source, target)
    source.put("k1", "new")
    mirrored(source, target)
    assert rows(target) == rows(source)


def test_two_mirrors_of_the_same_never_mix(source: Client, target: Client) -> None:
    source.put("a", 1)
    first = Mirror(source, target, "", "", lambda text: None, lambda text: None)
    first.run(once=True)
    note = first._read()
    assert note is not None
    source.put("a", 2)
    mirrored(source, target)
    source.put("a", 3)
    with pytest.raises(Overtaken):
        first._catch_up(note)
    assert rows(target) == {"a": 2}


def test_a_cluster_is_not_mirrored_into_what_is_mirrored(source: Client) -> None:
    argv = [
        sys.executable,
        "-m",
        "ddb",
        "--server",
        source.servers[0],
        "mirror",
        source.servers[0],
        "a/",
        "--into",
        "a/",
    ]
    ran = subprocess.run(argv, env=environment(), capture_output=True, timeout=30)
    assert ran.returncode == 2 and b"the copy would be copied" in ran.stderr


def test_it_follows_live_and_a_killed_one_is_taken_up_again(source: Client, target: Client) -> None:
    for n in range(5):
        source.put(f"k{n}", n)
    argv = [sys.executable, "-m", "ddb", "--server", source.servers[0], "mirror", target.servers[0]]

    def is_mirrored() -> bool:
        return rows(target) == rows(source)

    for round_ in range(2):
        with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
            try:
                wait(is_mirrored, what="the copy")
                source.batch([{"op": "put", "key": f"k{n}", "value": ["live", round_, n]} for n in range(4)])
                source.delete("k4")
                wait(is_mirrored, what="what has changed since")
            finally:
                process.kill()
        source.put("k9", f"while nobody followed {round_}")
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
        try:
            wait(is_mirrored, what="what was missed")
        finally:
            process.terminate()


def test_pieces_hold_whole_revisions(source: Client, target: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "STEP_OPS", 4)
    work = Mirror(source, target, "", "", lambda text: None, lambda text: None)
    changed = [
        {"event": "delete", "key": f"k{n}", "rev": rev} for n, rev in enumerate([5, 5, 5, 7, 7, 9, 9, 9, 9, 9, 12])
    ]
    pieces = [([op["key"] for op in ops], rev) for ops, rev in work._revisions(changed)]
    assert pieces == [(["k0", "k1", "k2"], 5), (["k3", "k4"], 7), ([f"k{n}" for n in range(5, 10)], 9), (["k10"], 12)]


def test_it_waits_for_a_cluster_that_is_away(pair: tuple[Cluster, Cluster], source: Client, target: Client) -> None:
    source.put("a", 1)
    argv = [sys.executable, "-m", "ddb", "--server", source.servers[0], "mirror", target.servers[0]]
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
        try:
            wait(lambda: rows(target) == rows(source), what="the copy")
            for cluster in pair:
                cluster.nodes[0].kill()
                if cluster is pair[1]:
                    source.put("a", "while the target was away")
                cluster.nodes[0].start()
                source.put("b", "behind it")
                wait(lambda: rows(target) == rows(source), 20, what="what was missed")
            assert process.poll() is None
        finally:
            process.kill()


def test_a_revision_of_the_source_comes_all_at_once(source: Client, target: Client) -> None:
    stop = threading.Event()

    def write() -> None:
        with connect(source.servers[0]) as writer:
            n = 0
            while not stop.is_set():
                n += 1
                writer.batch([{"op": "put", "key": key, "value": n} for key in ("a", "b", "c")])

    source.batch([{"op": "put", "key": key, "value": 0} for key in ("a", "b", "c")])
    mirrored(source, target)
    writing = threading.Thread(target=write)
    writing.start()
    try:
        seen, end = set[object](), time.monotonic() + 60
        for _ in range(20):
            mirrored(source, target)
            values = set(rows(target).values())
            assert len(values) == 1
            seen |= values
        while len(seen) <= 5:  # how often the writer has its turn meanwhile is the machine's affair
            assert time.monotonic() < end, seen
            mirrored(source, target)
            seen |= set(rows(target).values())
    finally:
        stop.set()
        writing.join()
