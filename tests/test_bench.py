"""The load generator counts what it should, and the benchmark runs from a bare checkout."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import pytest

from bench import dialect
from bench.frames import template
from bench.load import allow_connections, fill, requests, run
from bench.plan import Plan, Result
from tests.fake_server import FakeServer, failure
from tests.harness import REPOSITORY, environment

QUICK = {"clients": 4, "keys": 20, "seconds": 0.2, "warm_up_s": 0.0}


def bench(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, env=environment())


def plan(server: FakeServer, **settings: Any) -> Plan:
    return Plan((server.address,), **{**QUICK, **settings})


def parts(server: FakeServer) -> list[dict[str, Any]]:
    """The puts that the server got, in batches or not."""
    batches = (request.get("ops", [request]) for request in server.requests)
    return [part for batch in batches for part in batch if part["op"] == "put"]


@pytest.mark.parametrize("op", ["put", "get", "mixed"])
def test_every_request_is_a_frame_of_the_protocol(op: str) -> None:
    plan = Plan(("",), op=op, keys=10_000, value_bytes=100)
    following, connection = requests(plan, seed=5), dialect.new(plan)
    seen = set()
    for _ in range(100):
        length, _, rest = following(connection).partition(b"\n")
        assert int(length) == len(rest) - 1 and rest.endswith(b"}\n")
        request = json.loads(rest)
        assert request["op"] in ({"put", "get"} if op == "mixed" else {op})
        assert request["op"] == "get" or len(request["value"]) == 100
        seen.add(request["key"])
    assert len(seen) > 90


def test_stale_reads_are_asked_for() -> None:
    assert b'"read":"stale"' in template(Plan(("",), read="stale"), "get")
    assert b'"read"' not in template(Plan(("",)), "get")


@pytest.mark.parametrize("pipeline", [1, 7])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_measured_is_what_the_server_answered(pipeline: int, processes: int) -> None:
    with FakeServer() as server:
        result = run(plan(server, pipeline=pipeline, processes=processes))
        assert 0 < len(result.latencies_s) == len(server.requests)
        assert not result.errors and min(result.latencies_s) > 0
        figures = result.summary()
        assert figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"] <= figures["p99.9_ms"] <= figures["max_ms"]
        assert figures["ops_per_s"] == pytest.approx(figures["ops"] / 0.2)


def test_more_connections_than_a_shell_allows_can_be_made() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        allow_connections(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
        allow_connections(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_warm_up_is_not_measured() -> None:
    with FakeServer() as server:
        result = run(plan(server, warm_up_s=0.2))
        assert 0 < len(result.latencies_s) < len(server.requests)


def test_replies_that_come_in_pieces_are_put_together() -> None:
    replies = iter(range(10_000_000))

    def answer(request: dict[str, Any]) -> bytes:
        return [b"11", b'\n{"ok":tr', b'ue}\n11\n{"ok":true}\n11\n{"ok":true}\n'][next(replies) % 3]

    with FakeServer(answer) as server:
        result = run(plan(server, clients=1, pipeline=3))
        assert len(result.latencies_s) > 2 and not result.errors


def test_a_reply_that_is_a_failure_is_an_error_and_no_operation() -> None:
    with FakeServer(lambda request: failure("overloaded")) as server:
        result = run(plan(server))
        assert not result.latencies_s and set(result.errors) == {"overloaded"}
        assert result.summary()["p50_ms"] is None


def test_a_lost_connection_is_counted_and_the_next_server_takes_over() -> None:
    with FakeServer(lambda request: None) as dying, FakeServer() as living:
        result = run(Plan((dying.address, living.address), **QUICK))
        assert result.errors == {"connection_lost": 2}
        assert len(result.latencies_s) == len(living.requests) > 0


def test_every_key_is_put_before_it_is_read() -> None:
    with FakeServer() as server:
        run(plan(server, op="get"))
        assert server.ops[0] == "batch" and set(server.ops[1:]) == {"get"}
        assert sorted(part["key"] for part in parts(server)) == [f"k{i:07d}" for i in range(20)]


def test_keys_that_can_not_be_put_are_a_sentence() -> None:
    with FakeServer(lambda request: failure("no_leader")) as server, pytest.raises(RuntimeError, match="no_leader"):
        fill(plan(server))


def test_processes_add_up() -> None:
    one, two = Result(2.0), Result(2.0)
    one.latencies_s.extend([0.001] * 3)
    two.latencies_s.extend([0.003] * 3)
    two.errors["timeout"] += 1
    one.add(two)
    assert one.summary() == {
        "ops": 6, "ops_per_s": 3.0, "p50_ms": 3.0, "p95_ms": 3.0, "p99_ms": 3.0, "p99.9_ms": 3.0, "max_ms": 3.0,
        "errors": {"timeout": 1}, "load_cpu_percent": 0.0, "load_memory_mib": 0.0,
    }  # fmt: skip


def test_the_command_line_prints_a_line_or_an_object() -> None:
    with FakeServer() as server:
        options = ["--server", server.address, "--clients", "2", "--seconds", "0.2", "--warm-up", "0"]
        said = bench("load", *options)
        assert said.returncode == 0 and " ops/s; ms: p50 " in said.stdout
        assert json.loads(bench("load", *options, "--json").stdout)["ops"] > 0


@pytest.mark.parametrize("arguments", [["--server", "x"], ["--server", "h:1", "--clients", "0"], []])
def test_wrong_usage_is_said(arguments: list[str]) -> None:
    said = bench("load", *arguments)
    assert said.returncode == 2 and "usage:" in said.stderr and "Traceback" not in said.stderr


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with FakeServer() as server:
        address = server.address
    said = bench("load", "--server", address, "--seconds", "0.1")
    assert said.returncode == 1 and address in said.stderr and "Traceback" not in said.stderr


def test_the_whole_benchmark_runs_on_a_real_cluster() -> None:
    said = bench("cluster", "--clients", "1,8", "--seconds", "0.3", "--warm-up", "0.1", "--keys", "50", "--json")
    assert said.returncode == 0, said.stderr
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert [(r["op"], r["clients"]) for r in rows] == [(op, n) for op in ("put", "get", "stale") for n in (1, 8)]
    assert all(r["ops"] > 0 and not r["errors"] for r in rows)
