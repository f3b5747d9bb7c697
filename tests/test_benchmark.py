"""`ddb bench`: its figures are of what was answered, failures are told, and it leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddb import cli
from ddb.benchmark import VERDICTS, Figures, Report, Settings, run
from ddb.errors import DdbError
from tests.fake_server import FakeServer, failure
from tests.harness import REPOSITORY, Cluster, environment, wait
from tests.histories import Database


class Town:
    """A whole database behind a fake server. What `spoil` returns for a request, if anything, is the reply."""

    def __init__(self, **spoiled: Any) -> None:
        self.database, self.lock, self.spoiled = Database(), threading.Lock(), spoiled
        self.server = FakeServer(self.answer)

    def answer(self, request: dict[str, Any]) -> Any:
        op = request["op"]
        if op == "status":
            leads = self.spoiled.get("role", "leader")
            return {"ok": True, "node": "n1", "id": "1", "role": leads, "term": 1, "members": [], "leader": None}
        if op in self.spoiled:
            return self.spoiled[op]
        if op == "ping":
            return {"ok": True, "node": "n1"}
        with self.lock:
            try:
                return self.database({name: request[name] for name in request if name not in ("timeout", "read")})
            except DdbError as error:
                return failure(error.code)

    def __enter__(self) -> Town:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def bench(self, **settings: Any) -> Report:
        return run(Settings((self.server.address,), **{"seconds": 0.3, "clients": 3, **settings}), lambda line: None)

    def keys(self) -> list[str]:
        return [item["key"] for item in self.database({"op": "scan", "prefix": ""})["items"]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("bench"), 3) as cluster:
        yield cluster


def command(cluster: Cluster, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ddb", "bench", "--server", cluster.addresses, *arguments]


def test_a_real_cluster_is_measured_and_left_as_it_was(cluster: Cluster) -> None:
    with cluster.client() as client:
        client.put("mine", 1)
        arguments = command(cluster, "--seconds", "0.5", "--clients", "4", "--keys", "250")
        said = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, env=environment())
        assert said.returncode == 0, said.stderr
        assert [line.split()[0] for line in said.stdout.splitlines()[1:5]] == ["ping", "put", "put", "get"]
        assert " majority's disks took " in said.stdout.splitlines()[-1]
        assert client.count() == 1


def test_json_tells_programs_the_same(cluster: Cluster) -> None:
    arguments = command(cluster, "--seconds", "0.5", "--clients", "2", "--json")
    said = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, env=environment())
    report = json.loads(said.stdout)
    assert report["ok"] and report["nodes"] == 3 and report["disk"]["ms"] > 0
    assert [(f["name"], f["clients"]) for f in report["figures"]] == [
        ("ping", 1), ("put", 1), ("put", 2), ("get", 2), ("stale get", 2),
    ]  # fmt: skip
    assert all(f["ops"] > 0 and not f["errors"] and f["p50_ms"] <= f["max_ms"] for f in report["figures"])


def test_ctrl_c_shows_what_was_measured_and_removes_the_keys(cluster: Cluster) -> None:
    process = subprocess.Popen(
        command(cluster, "--seconds", "60", "--clients", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=REPOSITORY, env=environment(),
    )  # fmt: skip
    try:
        with cluster.client() as client:
            wait(lambda: client.count(prefix="bench/"), what="keys of the benchmark")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
            assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
            assert client.count(prefix="bench/") == 0
    finally:
        process.kill()
        process.wait()


def test_only_keys_of_its_own_are_touched_and_all_are_removed() -> None:
    with Town() as town:
        town.database({"op": "put", "key": "bench/other", "value": 1})
        report = town.bench(keys=7)
        assert report.exit_code == 0 and not report.trouble
        assert town.keys() == ["bench/other"]
        touched = {request["key"] for request in town.server.requests if request["op"] in ("put", "get")}
        assert len(touched) == 7 and all(key.startswith(report.prefix) for key in touched)


def test_a_figure_counts_what_was_answered() -> None:
    with Town() as town:
        report = town.bench()
        counted = {name: sum(len(f.latencies_s) for f in report.figures if f.name == name) for name in ("ping", "put")}
        assert counted == {name: town.server.ops.count(name) for name in counted}


def test_an_operation_that_fails_is_in_no_latency_and_makes_the_exit_code_1() -> None:
    with Town(get=failure("no_leader")) as town:
        report = town.bench()
        gets = [f for f in report.figures if f.name.endswith("get")]
        assert all(not f.latencies_s and set(f.errors) == {"no_leader"} for f in gets)
        assert report.exit_code == 1 and "operations failed" in report.trouble
        assert town.keys() == []


def test_a_server_that_hangs_up_is_a_sentence_and_the_keys_are_removed() -> None:
    with Town(get=None) as town:
        report = town.bench()
        assert report.exit_code == 5 and ("hung up" in report.trouble or "lost" in report.trouble)
        assert town.keys() == []


def test_a_server_that_says_nonsense_is_a_sentence() -> None:
    with Town(get=b"3\n[1]\n") as town:
        assert "is it a ddb server?" in town.bench().trouble


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with Town(get=b"") as town:
        report = town.bench(timeout_s=0.2)
        assert report.exit_code == 6 and "has not answered for 0.2 s" in report.trouble


def test_without_a_leader_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with Town(role="follower") as town:
        assert cli.main(["bench", "--server", town.server.address]) == 5
        assert "no leader" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        address = server.address
    assert cli.main(["bench", "--server", address]) == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and address in said and said.count("No server") == 1


@pytest.mark.parametrize(
    "arguments", [["--seconds", "1e9"], ["--clients", "0"], ["--clients", "100000"], ["--keys", "x"]]
)
def test_load_without_bound_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("put_ms", "word"), [(0.3, "good"), (5, "fair"), (20, "slow"), (500, "bad")])
def test_the_verdict_is_on_what_a_put_takes_beyond_a_ping(put_ms: float, word: str) -> None:
    report = Report("bench/x/")
    report.nodes = 3
    for name, ms in (("ping", 0.1), ("put", put_ms + 0.1)):
        figures = Figures(name, 1, 1.0)
        figures.latencies_s.extend([ms / 1000] * 3)
        report.figures.append(figures)
    verdict = report.verdict()
    assert verdict is not None and verdict[0] == word and f"{put_ms:.2f} ms" in verdict[1]
    assert word in {v[1] for v in VERDICTS}


def test_what_was_not_measured_has_no_verdict() -> None:
    report = Report("bench/x/")
    assert report.verdict() is None and report.to_json()["disk"] is None
    report.figures.append(Figures("put", 1))
    assert report.lines()[1].split() == ["put", "1", "0", "-", "-", "-", "-", "-", "0"]


def test_the_module_needs_no_terminal(tmp_path: Path) -> None:
    with Town() as town:
        arguments = [sys.executable, "-m", "ddb", "bench", "--server", town.server.address, "--seconds", "0.5"]
        said = subprocess.run(
            [*arguments, "--clients", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=30, env=environment()
        )
        assert said.returncode == 0 and said.stderr == "", said.stderr
