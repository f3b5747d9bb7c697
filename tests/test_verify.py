"""`ddb verify`: it says yes to what is right, no to what is not, and neither where it can't know; and it leaves nothing
behind."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ddb import cli, progress, verify
from ddb.checker import check
from ddb.errors import DdbError
from ddb.findings import Findings
from ddb.history import from_lines
from ddb.workload import MIX, Family, Fault, Script, mix_shown, parse_mix
from tests.fake_server import FakeServer, failure
from tests.harness import REPOSITORY, Cluster, environment, wait
from tests.histories import Database, got, op
from tests.test_up import gone

Reply = dict[str, Any] | None
Tamper = Callable[[dict[str, Any], Reply], Reply]


class Town:
    """A whole database behind a fake server; `tamper` gets each request with the right reply, and may give another.

    Where the reply is None, the connection is closed instead.
    """

    def __init__(self, tamper: Tamper | None = None) -> None:
        self.database = Database()
        self.tamper = tamper or (lambda request, reply: reply)
        self.lock = threading.Lock()
        self.server = FakeServer(self.answer)

    def answer(self, request: dict[str, Any]) -> Reply:
        if request["op"] == "status":
            return {"ok": True, "node": "n1", "id": "1", "role": "leader", "term": 1, "members": [], "leader": None}
        with self.lock:
            own = {name: value for name, value in request.items() if name not in ("timeout", "read")}
            try:
                right = self.database(own)
            except DdbError as error:
                right = failure(error.code)
            return self.tamper(request, right)

    @property
    def keys(self) -> list[str]:
        with self.lock:
            reply = self.database({"op": "scan", "prefix": ""})
        return [item["key"] for item in reply["items"]]

    def __enter__(self) -> Town:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()


class Ran:
    """What a command line printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def ddb_verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `ddb verify` in this process against a town (or an address)."""

    def run(town: Town | str, *argv: str) -> Ran:
        address = town if isinstance(town, str) else town.server.address
        code = cli.main(["verify", "--server", address, *argv])
        return Ran(code, *capsys.readouterr())

    return run


BRIEF = ("--seconds", "0.6", "--seed", "7")


def every(count: int, kind: str, change: Tamper) -> Tamper:
    """Applies `change` to every so many replies to requests of a kind."""
    seen = 0

    def tamper(request: dict[str, Any], reply: Reply) -> Reply:
        nonlocal seen
        if request["op"] != kind:
            return reply
        seen += 1
        return change(request, reply) if seen % count == 0 else reply

    return tamper


class Stale:
    """Answers, now and then, a get as it was answered before, although something was written since."""

    def __init__(self) -> None:
        self.before: dict[str, Reply] = {}
        self.gets = 0
        self.lies = 0

    def __call__(self, request: dict[str, Any], reply: Reply) -> Reply:
        if request["op"] != "get" or request.get("read") == "stale":
            return reply
        self.gets += 1
        before = self.before.get(request["key"], reply)
        self.before[request["key"]] = reply
        if self.gets % 20 == 0 and before != reply:
            self.lies += 1
            return before
        return reply


# ------------------------------------------------------------ yes, and no


def test_a_right_database_is_found_to_be_so_and_left_as_it_was(ddb_verify: Callable[..., Ran]) -> None:
    with Town() as town:
        town.database({"op": "put", "key": "city", "value": "Oslo"})
        ran = ddb_verify(town, *BRIEF)
        assert (ran.code, ran.err) == (0, "")
        assert re.match(r"Linearizable: \d[\d,]* operations judged, and all can be explained\.\n", ran.out)
        assert re.search(r"^seed +7$", ran.out, re.MULTILINE)
        assert town.keys == ["city"]
        asked = {request["op"] for request in town.server.requests}
        assert {"get", "put", "delete", "incr", "txn", "batch", "scan", "count"} <= asked


def test_a_stale_read_is_found_and_shown_on_the_terminal_and_as_a_page(
    ddb_verify: Callable[..., Ran], tmp_path: Path
) -> None:
    page = tmp_path / "picture.html"
    stale = Stale()
    with Town(stale) as town:
        ran = ddb_verify(town, *BRIEF, "--html", str(page))
        assert town.keys == []
    assert stale.lies > 0
    assert ran.code == 1
    assert ran.out.startswith("Not linearizable: some replies can't be right.\n")
    assert "◀ can't be explained" in ran.out and "▶" in ran.out
    assert f"was asked of {town.server.address}." in ran.out or "was asked of the leader" in ran.out
    assert "verify/" not in ran.out, "the prefix that all keys share says nothing"
    assert ran.err == f"ddb: The picture is in {page}.\n"
    assert_stands_alone(page.read_text(encoding="utf-8"))


def assert_stands_alone(text: str) -> None:
    """A page that is well-formed, has a picture, and needs nothing from elsewhere."""
    open_tags: list[str] = []
    tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {"src", "href", "onload"} & {name for name, _ in attrs}
            if tag not in ("meta", "line", "rect"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("td", "th", "tr", "li"):
                while open_tags[-1] in ("td", "th", "tr", "li"):
                    open_tags.pop()
            assert open_tags.pop() == tag

    assert text.startswith("<!doctype html>")
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert not open_tags
    assert {"svg", "rect", "table"} <= set(tags) and not {"script", "link", "img", "iframe"} & set(tags)
    assert "url(" not in text and "@import" not in text
    assert "ddb verify: not linearizable" in text and 'class="culprit"' in text


def test_a_write_that_was_acknowledged_and_lost_is_found(ddb_verify: Callable[..., Ran]) -> None:
    town = Town()

    def forget(request: dict[str, Any], reply: Reply) -> Reply:
        town.database({"op": "delete", "key": request["key"]})
        return reply

    town.tamper = every(40, "put", forget)
    with town:
        assert ddb_verify(town, *BRIEF).code == 1


def test_a_write_that_nobody_reads_before_the_end_is_missed_all_the_same(ddb_verify: Callable[..., Ran]) -> None:
    town = Town()

    def forget(request: dict[str, Any], reply: Reply) -> Reply:
        town.database({"op": "delete", "key": request["key"]})
        return {"ok": True}  # and no version that tells

    town.tamper = every(1, "put", forget)
    with town:
        ran = ddb_verify(town, *BRIEF, "--mix", "put")
    assert ran.code == 1 and "end: get " in ran.out


def test_two_writes_with_one_revision_are_a_contradiction(ddb_verify: Callable[..., Ran], tmp_path: Path) -> None:
    page = tmp_path / "picture.html"
    revs: list[int] = []

    def again(request: dict[str, Any], reply: Reply) -> Reply:
        assert reply is not None
        revs.append(reply["rev"])
        return {**reply, "rev": revs[-2]} if len(revs) == 50 else reply

    with Town(every(1, "incr", again)) as town:
        ran = ddb_verify(town, "--seconds", "1", "--seed", "7", "--mix", "incr", "--html", str(page))
    assert ran.code == 1
    assert f"two writes have revision {revs[48]}" in ran.out
    assert "two writes have revision" in page.read_text(encoding="utf-8")


def test_a_stale_read_that_says_it_is_stale_may_be_old_but_not_wrong(ddb_verify: Callable[..., Ran]) -> None:
    old: dict[str, Reply] = {}

    def late(request: dict[str, Any], reply: Reply) -> Reply:
        return old.setdefault(request["key"], reply) if request.get("read") == "stale" else reply

    def wrong(request: dict[str, Any], reply: Reply) -> Reply:
        found = reply is not None and request.get("read") == "stale" and reply["found"]
        return {**reply, "value": "another"} if found and reply is not None else reply

    mix = ("--mix", "put=5,stale=5")
    with Town(late) as town:
        assert ddb_verify(town, *BRIEF, *mix).code == 0
    with Town(wrong) as town:
        ran = ddb_verify(town, *BRIEF, *mix)
    assert ran.code == 1 and "has two answers to its value" in ran.out


# --------------------------------------------------------- what is unknown


def test_what_is_unknown_may_have_happened_or_not(ddb_verify: Callable[..., Ran]) -> None:
    with Town(every(15, "put", lambda request, reply: None)) as town:  # done, and not answered
        ran = ddb_verify(town, *BRIEF)
    assert ran.code == 0 and re.search(r"^unknown +[1-9]", ran.out, re.MULTILINE)

    town = Town()
    count = 0

    def lose(request: dict[str, Any]) -> Reply:  # neither done nor answered
        nonlocal count
        count += request["op"] == "put"
        return None if request["op"] == "put" and count % 15 == 0 else town.answer(request)

    town.server.answer = lose
    with town:
        ran = ddb_verify(town, *BRIEF)
    assert ran.code == 0 and re.search(r"^unknown +[1-9]", ran.out, re.MULTILINE)


def test_an_unknown_write_that_happens_twice_is_found(ddb_verify: Callable[..., Ran]) -> None:
    town = Town()

    def twice(request: dict[str, Any], reply: Reply) -> Reply:
        town.database({name: value for name, value in request.items() if name != "timeout"})
        return None

    town.tamper = every(20, "incr", twice)
    with town:
        ran = ddb_verify(town, *BRIEF, "--mix", "incr=5,get=5")
    assert ran.code == 1 and "unknown" in ran.out


def test_a_refusal_is_no_evidence_and_a_dirty_one_is_found(ddb_verify: Callable[..., Ran]) -> None:
    refuse = every(10, "put", lambda request, reply: failure("read_only"))
    town = Town()
    count = 0

    def clean(request: dict[str, Any]) -> Reply:
        nonlocal count
        count += request["op"] == "put"
        return failure("read_only") if request["op"] == "put" and count % 10 == 0 else town.answer(request)

    town.server.answer = clean
    with town:
        ran = ddb_verify(town, *BRIEF)
        assert ran.code == 0 and re.search(r"^failed +[1-9]", ran.out, re.MULTILINE)
    with Town(refuse) as town:
        assert ddb_verify(town, *BRIEF).code == 1


def test_too_much_to_try_is_no_pass(ddb_verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CONFIGURATIONS_MAX", 1)
    with Town() as town:
        ran = ddb_verify(town, *BRIEF)
    assert ran.code == 1 and ran.out.startswith("Undecided: ")


# --------------------------------------------------------------- the report


def test_json_says_all_of_it_in_one_object(ddb_verify: Callable[..., Ran]) -> None:
    with Town(Stale()) as town:
        ran = ddb_verify(town, *BRIEF, "--json")
    found = json.loads(ran.out)
    assert ran.code == 1 and ran.out.count("\n") == 1
    assert (found["ok"], found["linearizable"], found["seed"]) == (False, False, 7)
    assert sum(found["outcomes"].values()) == found["operations"] == sum(found["asked"].values())
    culprit = found["counterexample"]["culprit"]
    assert culprit["request"]["key"] in found["counterexample"]["keys"]
    assert from_lines([json.dumps(culprit)])
    with Town() as town:
        found = json.loads(ddb_verify(town, *BRIEF, "--json").out)
    assert (found["ok"], found["linearizable"], found["counterexample"]) == (True, True, None)
    assert 0 < found["judged"] <= found["operations"]


def test_a_page_is_only_written_where_there_is_something_to_show(
    ddb_verify: Callable[..., Ran], tmp_path: Path
) -> None:
    with Town() as town:
        assert ddb_verify(town, *BRIEF, "--html", str(tmp_path / "picture.html")).code == 0
    assert not list(tmp_path.iterdir())


def test_a_long_run_is_judged_in_rounds_with_keys_of_their_own(
    ddb_verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ROUND_OPERATIONS", 80)
    monkeypatch.setattr(verify, "FAMILY_OPERATIONS", 30)
    judged: list[set[str]] = []

    def spy(history: list[Any], **options: Any) -> Any:
        families = {o.request["key"].rpartition("/")[0] for o in history if "key" in o.request}
        assert len(history) <= 80 + 3 * len(families)
        judged.append(families)
        return check(history, **options)

    monkeypatch.setattr(verify, "check", spy)
    with Town() as town:
        ran = ddb_verify(town, "--seconds", "1", "--keys", "3")
        assert town.keys == []
    assert ran.code == 0 and f"in {len(judged)} rounds" in ran.out
    assert len(judged) > 2 and len(judged[0]) > 2
    assert sum(map(len, judged)) == len(set().union(*judged)), "a key is of one round"


def test_the_rate_is_kept(ddb_verify: Callable[..., Ran]) -> None:
    with Town() as town:
        ran = ddb_verify(town, "--seconds", "1", "--rate", "50", "--clients", "2", "--json")
    found = json.loads(ran.out)
    assert found["operations"] - 6 <= 50 + 2  # without the last look at six keys; the first step begins at once


# ---------------------------------------------------- where it can't judge


@pytest.mark.parametrize(
    "argv",
    [
        ("--server", "nonsense"), ("--mix", "sing=3"), ("--mix", "get=x"), ("--mix", "get=0"), ("--faults", "flood"),
        ("--faults", "--nodes", "2"), ("--rate", "0"), ("--clients", "0"), ("--seconds", "0"), ("--keys", "0"),
        ("--html", "/nowhere/at/all.html"), ("--html", "/"), ("--seed", "-1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"ddb[^\n]+\n", said.err)


def test_a_cluster_that_is_not_there_is_one_sentence(ddb_verify: Callable[..., Ran]) -> None:
    with FakeServer() as server:
        address = server.address
    ran = ddb_verify(address, "--seconds", "1")
    assert (ran.code, ran.out) == (5, "")
    assert ran.err == f"ddb: No server answered: {address} can't be reached (connection refused).\n"


def test_a_cluster_without_a_leader_is_one_sentence(
    ddb_verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PATIENCE_S", 0.2)
    with FakeServer(lambda request: failure("no_leader")) as server:
        ran = ddb_verify(server.address, "--seconds", "1")
    assert (ran.code, ran.out, ran.err) == (5, "", "ddb: The fake server says no_leader.\n")


def test_servers_of_two_clusters_are_refused(ddb_verify: Callable[..., Ran]) -> None:
    def of(cluster: str) -> Callable[[dict[str, Any]], Reply]:
        return lambda request: {"ok": True, "count": 0, "node": cluster, "id": cluster, "cluster": cluster, "rev": 1}

    with FakeServer(of("one")) as one, FakeServer(of("two")) as two:
        ran = ddb_verify(f"{one.address},{two.address}", "--seconds", "1")
        assert "put" not in one.ops + two.ops
    assert (ran.code, ran.out) == (1, "") and "are not of one cluster" in ran.err and ran.err.count("\n") == 1


def test_what_is_no_database_is_one_sentence(ddb_verify: Callable[..., Ran]) -> None:
    with FakeServer(lambda request: failure("bad_request")) as server:  # a registry, say
        ran = ddb_verify(server.address, "--seconds", "1")
    assert (ran.code, ran.out, ran.err) == (1, "", "ddb: The fake server says bad_request.\n")
    with FakeServer() as server:  # it says ok to everything
        ran = ddb_verify(server.address, *BRIEF)
    assert ran.code == 1 and "Traceback" not in ran.out + ran.err


@pytest.mark.parametrize(
    "nonsense", [{"rev": "x"}, {"items": 7}, {"items": ["x"]}, {"results": None}, {"version": 0.5}]
)
def test_an_answer_that_makes_no_sense_is_one_sentence(
    ddb_verify: Callable[..., Ran], nonsense: dict[str, Any]
) -> None:
    def tamper(request: dict[str, Any], reply: Reply) -> Reply:
        return {**reply, **nonsense} if request["op"] in ("get", "scan") and reply and "more" not in reply else reply

    with Town(tamper) as town:
        ran = ddb_verify(town, *BRIEF)
    assert ran.code == 1 and ran.out.startswith("Nothing was judged.\n")
    assert re.fullmatch(r"ddb: The cluster answered what makes no sense: [^\n]+\n", ran.err)


def test_a_cluster_that_dies_meanwhile_ends_the_load_and_what_was_seen_is_judged(
    ddb_verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "SILENCE_S", 0.3)
    monkeypatch.setattr(verify, "PATIENCE_S", 0.3)
    town = Town()

    def die(request: dict[str, Any], reply: Reply) -> Reply:
        if len(town.server.requests) == 200:
            threading.Thread(target=town.server.close).start()
        return reply

    town.tamper = die
    ran = ddb_verify(town, "--seconds", "60", "--seed", "7")
    assert ran.code == 5
    assert ran.out.startswith("Linearizable: ")
    assert re.fullmatch(r"ddb: The cluster acknowledged nothing for 0\.3 s\. The last failure: [^\n]+\n", ran.err)


def test_keys_that_can_not_be_removed_are_told(ddb_verify: Callable[..., Ran]) -> None:
    with Town(every(1, "scan", lambda request, reply: failure("read_only"))) as town:
        ran = ddb_verify(town, *BRIEF, "--mix", "put,get")
        assert town.keys
    assert ran.code == 1
    assert re.fullmatch(
        r"ddb: The keys under verify/\w{8}/ could not be removed: The fake server says read_only\.\n", ran.err
    )


def test_the_keys_are_removed_even_where_verify_itself_fails(
    ddb_verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(verify, "check", fail)
    with Town() as town:
        with pytest.raises(RuntimeError, match="a bug"):
            ddb_verify(town, *BRIEF)
        assert town.keys == [] and "put" in town.server.ops


# ------------------------------------------------------------------ Ctrl-C


class Process:
    """`ddb verify` as a process of its own."""

    def __init__(self, server: str, directory: Path, *argv: str, **extra: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ddb", "verify", "--server", server, *argv],
            env=environment(TMPDIR=str(directory), **extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8", start_new_session=True,
        )  # fmt: skip

    def end(self, timeout_s: float = 60) -> Ran:
        out, err = self.process.communicate(timeout=timeout_s)
        return Ran(self.process.returncode, out, err)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts `ddb verify` as a process; it is ended after the test."""
    started: list[Process] = []

    def one(server: str, *argv: str, **extra: str) -> Process:
        started.append(Process(server, tmp_path, *argv, **extra))
        return started[-1]

    yield one
    for process in started:
        process.process.kill()
        process.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_load_and_what_was_seen_is_judged(number: int, start: Callable[..., Process]) -> None:
    with Town() as town:
        running = start(town.server.address, "--seconds", "600")
        wait(lambda: len(town.server.requests) > 100, 20, "there is load")
        running.process.send_signal(number)
        ran = running.end()
        assert town.keys == []
    assert (ran.code, ran.err) == (0, "") and ran.out.startswith("Linearizable: ")


def test_ctrl_c_does_not_turn_a_no_into_a_yes(start: Callable[..., Process]) -> None:
    stale = Stale()
    with Town(stale) as town:
        running = start(town.server.address, "--seconds", "600", "--clients", "4")
        wait(lambda: stale.lies > 20, 20, "there were lies")  # one may happen to be right
        running.process.send_signal(signal.SIGINT)
        assert running.end().code == 1


def test_a_second_ctrl_c_ends_everything_but_the_cleaning(start: Callable[..., Process]) -> None:
    hanging = threading.Event()
    town = Town()

    def hang(request: dict[str, Any]) -> Reply:
        if request["op"] == "get":
            hanging.wait(30)
        return town.answer(request)

    town.server.answer = hang
    with town:
        running = start(town.server.address, "--seconds", "600", "--mix", "put=1,get=1", "--timeout", "60")
        wait(lambda: town.keys and "get" in town.server.ops, 20, "a get hangs")
        running.process.send_signal(signal.SIGINT)
        running.process.send_signal(signal.SIGTERM)  # another one, for two of the same may become one on their way
        wait(lambda: "scan" in town.server.ops, 20, "it cleans")
        ran = running.end()
        hanging.set()
        assert town.keys == []
    assert (ran.code, ran.out) == (130, "") and "Traceback" not in ran.err


# ------------------------------------------------------------ what is asked


def asked(seed: int, count: int = 500) -> list[dict[str, Any]]:
    """What a client asks that is alone with a database."""
    database, script = Database(), Script("c1", MIX, random.Random(seed))
    requests = []
    for number in range(count):
        request = script.next(Family(f"{number // 100}/"))
        reply = database({name: value for name, value in request.items() if name != "read"})
        assert reply["ok"] is True, (request, reply)
        script.heard(request, reply)
        requests.append({**request, "reply": reply})
    return requests


def test_the_same_seed_asks_the_same() -> None:
    assert asked(3) == asked(3)
    assert asked(3) != asked(4)


def test_a_condition_asks_for_what_was_seen_so_it_holds_where_nobody_came_in_between() -> None:
    conditional = [r for r in asked(5, 2000) if isinstance(r.get("if"), dict) and r["op"] != "txn"]
    blind = [r for r in conditional if "exists" in r["if"]]
    seeing = [r for r in conditional if "exists" not in r["if"]]
    assert {name for r in seeing for name in r["if"]} == {"rev", "version", "value"}
    assert len(seeing) > len(blind)
    assert sum(r["reply"]["applied"] for r in seeing) > 0.5 * len(seeing)  # a transaction may have come in between
    assert {r["reply"]["applied"] for r in blind} == {True, False}


def test_every_value_is_written_once() -> None:
    def values(request: dict[str, Any]) -> Iterator[Any]:
        if request["op"] == "put":
            yield request["value"]
        for part in ("then", "else", "ops"):
            for inner in request.get(part, ()):
                yield from values(inner)

    written = [value for request in asked(6, 2000) for value in values(request)]
    assert len(written) == len(set(written)) > 500


def test_no_request_touches_two_families() -> None:
    for request in asked(7, 1000):
        text = json.dumps({name: value for name, value in request.items() if name != "reply"})
        assert len(set(re.findall(r'"(\d+)/[abn]?"', text))) == 1, request


def test_a_mix_reads_as_it_is_shown() -> None:
    assert parse_mix(mix_shown(MIX)) == MIX
    assert parse_mix("get, put=3") == {"get": 1, "put": 3}


def test_only_what_the_mix_names_is_asked(ddb_verify: Callable[..., Ran]) -> None:
    with Town() as town:
        assert ddb_verify(town, *BRIEF, "--mix", "incr=3,batch=1,scan=0").code == 0
        load = [r for r in town.server.requests if r["op"] not in ("status", "count", "scan")]
    assert {r["op"] for r in load} == {"incr", "batch", "get"}  # the last look gets


# ------------------------------------------------------- colour, progress


def test_the_verdict_is_coloured_only_where_that_is_wanted() -> None:
    found = Findings(7, "verify/x/")
    found.count(bad := [op("c1", 0, 1, "put a 1"), got("c2", 2, 3, "a", 2)])
    found.judge(check(bad), 0.1)
    assert any("\x1b[1;31mNot linearizable\x1b[0m" in line for line in found.lines(colour=True))
    assert not any("\x1b" in line for line in found.lines(colour=False))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def test_progress_changes_one_line_on_a_terminal_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "CHANGES_S", 0.0)
    terminal = Terminal()
    with progress.Progress(terminal) as shown:
        shown.show("one")
        shown.show("two" * 100)
    assert re.fullmatch(r"\r\x1b\[Kone\r\x1b\[K(two)+t?w?\r\x1b\[K", terminal.getvalue())
    assert len(terminal.getvalue()) < 200


def test_progress_elsewhere_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with progress.Progress(stream) as shown:
        shown.show("too early")
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "LINES_S", 0.0)
    with progress.Progress(stream) as shown:
        shown.show("one")
        shown.show("two")
    assert stream.getvalue() == "one\ntwo\n"


# ----------------------------------------------------------- real clusters


def test_a_real_cluster_is_linearizable_while_its_leader_dies(
    cluster: Callable[..., Cluster], start: Callable[..., Process]
) -> None:
    three = cluster(3)
    running = start(three.nodes[0].address, "--seconds", "4", "--json")
    wait(lambda: three.nodes[0].ask(op="count", prefix="verify/")["count"] > 20, 20, "there is load")
    three.leader().kill()
    ran = running.end()
    found = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, ""), ran.err
    assert found["linearizable"] is True and found["outcomes"]["failed"] > 0 and found["judged"] > 200
    assert three.running[0].ask(op="count", prefix="")["count"] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks at /proc")
def test_a_cluster_of_its_own_is_harmed_and_leaves_nothing(start: Callable[..., Process], tmp_path: Path) -> None:
    running = start("127.0.0.1:1", "--faults", "--seconds", "5", "--json", "--seed", "5")
    nodes = wait(lambda: len(found := children(running.process.pid)) == 4 and found, 20, "it has started")
    ran = running.end()
    found = json.loads(ran.out)
    assert ran.code == 0, (ran.out, ran.err)
    assert found["linearizable"] is True and found["judged"] > 300
    assert sum(found["faults"].values()) >= 1 and set(found["faults"]) <= {fault.value for fault in Fault}
    assert all(gone(pid) for pid in nodes)
    assert not list(tmp_path.iterdir()), "the directory is gone"


PLANTED = """
import sys
if "ddb.node" in sys.orig_argv:
    from tests.mutants import CATALOGUE
    from tests.mutants.planting import planted
    bug = planted(next(bug for bug in CATALOGUE if bug.name == "follower serves linearizable reads itself"))
    bug.__enter__()
"""


def test_nodes_with_a_known_bug_are_found_out_and_their_logs_stay(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    running = start("127.0.0.1:1", "--faults", "kill", "--seconds", "3", "--json", PYTHONPATH=path)
    ran = running.end()
    found = json.loads(ran.out)
    assert (ran.code, found["linearizable"]) == (1, False), ran.err
    assert (Path(found["directory"]) / "n1.out").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks at /proc")
def test_a_node_that_ends_by_itself_is_a_flaw_and_its_log_stays(start: Callable[..., Process], tmp_path: Path) -> None:
    running = start("127.0.0.1:1", "--faults", "stop", "--seconds", "600", "--election", "raft")
    wait(lambda: frozen(running.process.pid), 30, "a fault has come")
    victim = next(pid for pid, words in children(running.process.pid).items() if "n2" in words)
    os.kill(victim, signal.SIGKILL)
    ran = running.end()
    assert ran.code == 1
    assert re.search(r"^ddb: n2 ended by itself, by SIGKILL: ", ran.err, re.MULTILINE)
    kept = re.search(r"^The nodes' data and logs are in (.+)\.$", ran.out, re.MULTILINE)
    assert kept is not None and (Path(kept[1]) / "n2.out").exists() and Path(kept[1]).parent == tmp_path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks at /proc")
def test_frozen_nodes_end_even_when_it_is_killed_outright(start: Callable[..., Process]) -> None:
    running = start("127.0.0.1:1", "--faults", "stop", "--seconds", "600")
    wait(lambda: frozen(running.process.pid), 30, "a node is frozen")
    nodes = children(running.process.pid)
    running.process.kill()
    for pid in nodes:
        wait(lambda pid=pid: gone(pid), 15, f"process {pid} ends")  # type: ignore[misc]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks at /proc")
def test_ctrl_c_while_a_node_is_frozen_heals_judges_and_leaves_nothing(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    running = start("127.0.0.1:1", "--faults", "stop", "--seconds", "600")
    wait(lambda: frozen(running.process.pid), 30, "a node is frozen")
    nodes = children(running.process.pid)
    running.process.send_signal(signal.SIGINT)
    ran = running.end()
    assert ran.code == 0 and ran.out.startswith("Linearizable: "), (ran.out, ran.err)
    assert all(gone(pid) for pid in nodes) and not list(tmp_path.iterdir())


def children(parent: int) -> dict[int, list[str]]:
    """The command lines of the servers that the process started, by process id."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if int(state_of(pid)[1]) == parent and "--data-dir" in words and "-m" in words[:2]:
                found[pid] = words
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile
    return found


def state_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def frozen(parent: int) -> list[int]:
    """The servers that SIGSTOP has stopped."""
    return [pid for pid in children(parent) if state_of(pid)[0] == "T"]
