"""What is made of the figures is right: limits, shares, medians, ratios, charts; and all tools run on a real cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench import cost, goals, growth, limits, metered, outages, peers, plots, prototype, report, servers, systems
from bench.load import numbers
from bench.options import main as load_main
from bench.plan import Plan
from tests.harness import REPOSITORY, Cluster, environment
from tests.test_architecture import HOUSE


def bench(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment())


def figures(ops: float, p50: float = 1.0, **more: Any) -> dict[str, Any]:
    row = {
        "private_mib": [6, 8],
        "p50_ms": p50,
        "p95_ms": p50,
        "p99_ms": 2 * p50,
        "p99.9_ms": 3 * p50,
        "max_ms": 4 * p50,
        "errors": {},
    }
    return {**row, "ops_per_s": ops, "load_cpu_percent": 10.0, "memory_mib": [7, 9], "clients": 64, **more}


def result() -> dict[str, Any]:
    rows = []
    for work in ("put, 1 client", "put, 64 clients", "linearizable get, 64 clients"):
        for i, ops in enumerate((900.0, 1000.0, 5000.0)):
            rows.append({**figures(3 * ops), "work": work, "system": "ddb", "round": i + 1})
            rows.append({**figures(ops, 4.0), "work": work, "system": "etcd", "round": i + 1})
    million = {
        "keys": 1_000_000, "load_s": 1.0, "memory_mib": [60, 70], "private_mib": [50, 60], "disk_mib": [9, 9],
        "restart_s": 0.5, "restart_all_s": 1.0, "memory_restarted_mib": [55, 66], "join_s": 2.0,
    }  # fmt: skip
    loop = {f"{kind} {c}×{p}": {"per_s": 10_000.0, "p50_ms": 1.0} for kind in limits.KINDS for c, p in limits.LOADS}
    return {
        "machine": {"date": "2000-01-01", "cores": 2, "processor": "x", "memory_gib": 4, "disk": "ext4", "system": "Linux",
                    "python": "CPython 3"},
        "command": "python -m bench.peers --dir /secret --out /secret/x --rounds 3",
        "systems": [{"name": n, "version": "1", "client": "c"} for n in ("ddb", "etcd")],
        "rows": rows, "failover": {"ddb": [0.02, 0.01, 0.4], "etcd": [1.0, 1.2]},
        "million": {"ddb": million, "etcd": {**million, "restart_s": 3.0}},
        "limits": {"disk": {"written, 1 file": {"per_s": 5000, "p50_ms": 0.2}},
                   "round_trip": {"per_s": 9, "p50_ms": 0.1}, "loop": loop},
    }  # fmt: skip


# --- the generator


def test_zipfian_keys_have_favourites_all_over_the_range() -> None:
    draw = numbers(Plan(("",), keys=1000, distribution="zipf"), Random(1).random)
    seen = Counter(draw() for _ in range(20_000))
    assert all(0 <= number < 1000 for number in seen)
    (_, first), (_, second) = seen.most_common(2)
    assert 1.6 < first / second < 2.5 and first > 2000
    favourites = sorted(number for number, _ in seen.most_common(10))
    assert favourites[-1] - favourites[0] > 300


def test_uniform_keys_have_none() -> None:
    draw = numbers(Plan(("",), keys=10), Random(1).random)
    seen = Counter(draw() for _ in range(10_000))
    assert set(seen) == set(range(10)) and max(seen.values()) < 1200


def test_no_two_ranks_share_a_key() -> None:
    draws = iter([0.9999999] * 5 + [i / 10_000 for i in range(10_000)])
    draw = numbers(Plan(("",), keys=50, distribution="zipf"), lambda: next(draws))
    assert {draw() for _ in range(10_005)} == set(range(50))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Cluster(tmp_path_factory.mktemp("bench"), 3) as cluster:
        yield cluster


@pytest.mark.parametrize("target", ["leader", "follower", "any"])
def test_the_generator_finds_its_targets_and_tells_what_each_node_took(
    cluster: Cluster, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--clients", "2", "--seconds", "0.3", "--warm-up", "0", "--keys", "200", "--op", "mixed", "--json"]
    assert load_main(["--server", cluster.nodes[1].address, "--target", target, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"] > 0 and not found["errors"]
    if Path("/proc/net/tcp").exists():
        assert set(found["nodes"]) == {node.address for node in cluster.nodes}
        assert all(0 < share["memory_mib"] < 500 for share in found["nodes"].values())


def test_batches_count_as_one_operation_each(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--op", "batch", "--batch", "20", "--keys", "50", "--clients", "1", "--seconds", "0.2", "--warm-up", "0"]
    assert load_main(["--server", cluster.leader().address, *options]) == 0
    assert "of 20 keys each" in capsys.readouterr().out
    with cluster.client() as client:
        assert client.count(prefix="k00000") >= 20


# --- processes


def test_a_listener_is_found_by_its_port() -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("there is no /proc here")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = servers.pid_at(listener.getsockname()[1])
        assert pid is not None and servers.memory_bytes(pid) > 1 << 20


def test_free_ports_are_free_and_different() -> None:
    ports = servers.free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_server_that_does_not_start_is_said_with_what_it_said(tmp_path: Path) -> None:
    server = servers.Server("broken", [sys.executable, "-c", "raise SystemExit('no luck')"], tmp_path)
    server.start()
    with pytest.raises(RuntimeError, match="no luck"):
        server.await_line("ready")


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "STOP_PATIENCE_S", 0.1)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    server = servers.Server("deaf", [sys.executable, "-c", code], tmp_path)
    server.start()
    server.await_line("up")
    servers.stop([server])
    assert server.process.returncode == -9


# --- what is made of figures


def test_what_is_compared_is_the_median() -> None:
    middle = peers.medians(result()["rows"])
    assert middle["put, 64 clients", "ddb"]["ops_per_s"] == 3000 and middle["put, 64 clients", "etcd"]["p99_ms"] == 8


def test_ratios_and_goals_are_of_medians() -> None:
    shown = peers.show(result())
    assert "3.00× 0.25× 0.25×" in shown
    assert "1/55.0" in shown  # 1.1 s to 20 ms
    assert "10 % of the bare loop's 10,000/s" not in shown and "30 % of the bare loop's 10,000/s" in shown
    table = goals.show(peers.goals_of(result()))
    restart = next(line for line in table.splitlines() if "ready after kill -9" in line and "etcd" in line)
    assert "0.167×" in restart and " met |" in restart


def test_what_is_not_installed_is_left_out_with_a_word_on_how_to_get_it() -> None:
    said: list[str] = []
    found = peers.makers(["ddb", "etcd"], "/nowhere/etcd", said.append)
    assert list(found) == ["ddb"] and "apt-get install etcd-server" in said[0]


def test_every_goal_is_on_a_work_that_is_measured() -> None:
    works = {work.name for work in peers.WORKS}
    others = {goals.KILLED, goals.MILLION, goals.JOIN.format(1_000_000), goals.CACHE.format(10)}
    others |= {goals.CHECKPOINT.format(keys) for keys in (10_000, 1_000_000)}
    assert {goal.work for goal in goals.GOALS} <= works | others and set(prototype.THEN) <= works
    assert len(works) == len(peers.WORKS)


def test_a_chart_is_well_formed_names_its_lines_and_is_the_same_every_time() -> None:
    chart = plots.Chart("a < b", "x", "y", {"one": [(1, 5), (256, 70)], "two": [(1, 6), (256, 71)], "none": []})
    drawn = plots.svg(chart)
    root = ElementTree.fromstring(drawn)
    words = [element.text for element in root.iter() if element.text and element.text.strip()]
    assert {"a < b", "x", "y", "one", "two", "256"} <= set(words) and "none" not in words
    assert drawn == plots.svg(chart)
    ends = [float(e.attrib["y"]) for e in root.iter() if e.text in ("one", "two")]
    assert abs(ends[0] - ends[1]) >= plots.NAMES_APART


def test_points_stand_where_their_figures_say() -> None:
    across = plots.scale(1, 100, 0, 200, log=True)
    assert [round(across(x)) for x in (1, 10, 100)] == [0, 100, 200]
    assert plots.ticks(0, 11_000, log=False)[-1] >= 11_000
    assert plots.ticks(0.3, 45, log=True) == [0.1, 1.0, 10.0, 100.0]
    assert [plots.number(n) for n in (0.5, 256, 1024, 10_000, 1_000_000, 5e6)] == [
        "0.5",
        "256",
        "1,024",
        "10 k",
        "1 M",
        "5 M",
    ]


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        plots.svg(plots.Chart("t", "x", "y", {}))


def test_the_document_gets_figures_charts_and_commands_without_places(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / "peers.json").write_text(json.dumps(result()))
    rows = [{**figures(1000.0 / at), "part": "keys", "at": at, "op": op} for op in ("put", "get") for at in (10, 100)]
    grown = {"machine": result()["machine"], "command": "python -m bench.growth", "growth": rows}
    (tmp_path / "growth.json").write_text(json.dumps(grown))
    files = [str(tmp_path / name) for name in ("peers.json", "growth.json")]
    for _ in range(2):  # the second time replaces the first
        assert report.main([*files, "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "python -m bench.peers --rounds 3\n" in text and "secret" not in text
    charts = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(charts) >= 4 and len(set(charts)) == len(charts)
    for chart in charts:
        ElementTree.parse(tmp_path / chart)


def test_a_file_that_is_no_result_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert report.main([str(tmp_path / "x.json")]) == 1
    assert "no result" in capsys.readouterr().err


# --- where time goes


def test_every_function_that_decides_a_stage_exists() -> None:
    source = {name: (REPOSITORY / "ddb" / f"{name}.py").read_text() for name in HOUSE}
    assert set(metered.BY_FILE) <= set(HOUSE)
    for (file, name), stage in metered.BY_FUNCTION.items():
        assert stage in metered.STAGES and f"def {name.rpartition('.')[2]}(" in source[file], (file, name)
        owner = name.rpartition(".")[0]
        assert not owner or f"class {owner}" in source[file], (file, name)


def test_a_stack_belongs_to_the_innermost_function_that_decides() -> None:
    def frame_in(file: str, name: str, call: str) -> dict[str, Any]:
        space: dict[str, Any] = {"sys": sys}
        exec(compile(f"def {name}(inner):\n    return {call}", f"/x/{file}.py", "exec"), space)
        return space

    inner = frame_in("layers", "row", "sys._getframe()")["row"]
    answer = frame_in("kv", "answer", "inner(None)")["answer"]
    other = frame_in("kv", "put", "inner(None)")["put"]
    assert metered.stage_of(answer(inner)) == "read"
    assert metered.stage_of(other(inner)) == "apply"
    assert metered.stage_of(None) == "other"


def test_stages_add_up_to_what_the_loop_took() -> None:
    seen = {"samples": {"send": 30, "decode": 10}, "loop_s": 0.4, "process_s": 0.5}
    found = cost.stages(seen, 1000)
    assert found["send"] == pytest.approx(300) and found["decode"] == pytest.approx(100)
    assert found["loop, all"] == pytest.approx(sum(found[stage] for stage in metered.STAGES))
    assert found["log thread"] == pytest.approx(100)


@pytest.mark.parametrize("text", ["put", "put:0:1", "put:1:1,", "scan:1:1"])
def test_works_that_make_no_sense_are_refused(text: str) -> None:
    assert bench("cost", "--works", text).returncode == 2


# --- all of it, for real and short


def test_the_limits_are_measured(tmp_path: Path) -> None:
    said: list[str] = []
    found = limits.measure(tmp_path, 0.2, said.append)
    assert all(f["per_s"] > 0 and f["p50_ms"] > 0 for f in [*found["disk"].values(), found["round_trip"]])
    assert set(found["loop"]) == {f"{kind} {c}×{p}" for kind in limits.KINDS for c, p in limits.LOADS}
    assert "loopback round trip" in limits.show(found) and not list(tmp_path.iterdir())


def test_peers_runs_with_what_is_here_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "SETTLE_S", 0.1)
    out, data = tmp_path / "peers.json", tmp_path / "data"
    arguments = [
        "--systems", "ddb", "--only", "stale,failover,million", "--rounds", "1", "--seconds", "0.2",
        "--failovers", "1", "--rehearsal", "0.1", "--million", "500", "--keys", "100", "--dir", str(data), "--out", str(out),
    ]  # fmt: skip
    assert peers.main(arguments) == 0
    found = json.loads(out.read_text())
    assert found["rows"] and not any(row["errors"] for row in found["rows"])
    assert 0 < found["failover"]["ddb"][0] < 10 and 0 < found["million"]["ddb"]["join_s"] < 30
    assert not list(data.iterdir())


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(limits, "measure", lambda *_: {"sentinel": 1})
    monkeypatch.setattr(limits, "show", lambda _: "")
    monkeypatch.setattr(peers, "running", fail)
    out = tmp_path / "peers.json"
    assert peers.main(["--systems", "ddb", "--only", "limits,put", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["limits"] == {"sentinel": 1}


def test_growth_runs(tmp_path: Path) -> None:
    said = bench("growth", "--only", "batches", "--batches", "1,10", "--seconds", "0.2", "--dir", str(tmp_path))
    assert said.returncode == 0, said.stderr
    assert [line.split("|")[2].strip() for line in said.stdout.splitlines() if line.startswith("| batches")] == [
        "1",
        "10",
    ]
    assert growth.sizes("1,10") == [1, 10]


def test_cost_tells_where_the_time_of_a_put_goes(tmp_path: Path) -> None:
    said = bench("cost", "--works", "put:8:1", "--seconds", "0.8", "--dir", str(tmp_path), "--json")
    assert said.returncode == 0, said.stderr
    [row] = json.loads(said.stdout)["cost"]
    assert not row["errors"]
    for role in ("leader", "follower"):
        assert row["samples"][role] > 0 and row["stages_us"][role]["loop, all"] > 0
    assert row["stages_us"]["leader"]["other"] < 0.2 * row["stages_us"]["leader"]["loop, all"]
    if row["system_calls"]:
        assert row["system_calls"]["leader"]["sendto"] > 1


@pytest.mark.parametrize("name", ["etcd", "zookeeper"])
def test_a_peer_that_is_installed_is_measured(name: str, tmp_path: Path) -> None:
    here = systems.find_etcd(None) if name == "etcd" else systems.has_zookeeper()
    if not here:
        pytest.skip(f"{name} is not installed")
    said = bench(
        "peers", "--systems", name, "--only", "stale,failover", "--rounds", "1", "--seconds", "0.2", "--failovers", "1",
        "--rehearsal", "0.1", "--keys", "100", "--dir", str(tmp_path), "--out", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert all(row["ops"] > 0 and not row["errors"] for row in found["rows"]) and all(found["failover"].values())
