"""What ddb is to reach: each goal is shown with what was measured, or that nothing was, from whatever results there are."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import all as every
from bench import goals, limits, prototype, report
from tests.harness import REPOSITORY, environment, wait
from tests.test_bench_tools import result


def machine_then(**changed: float) -> dict[str, Any]:
    """Limits as they were when the prototype ran, but for what has `changed`."""
    loop = {
        f"bare {ways}": {"per_s": per_s * changed.get("loop", 1)} for ways, per_s in prototype.BARE_LOOP_PER_S.items()
    }
    return {
        "processor": {"json_loads_us": prototype.JSON_LOADS_US * changed.get("json", 1)},
        "disk": {"written, 1 file": {"p50_ms": prototype.SYNC_MS * changed.get("sync", 1)}},
        "round_trip": {"p50_ms": prototype.TRIP_MS},
        "loop": loop,
    }


def verdicts(shown: str, work: str) -> list[str]:
    """The last cells of the table's lines on `work`."""
    return [line.split("|")[-2].strip() for line in shown.splitlines() if line.startswith(f"| {work} ")]


# --- the prototype


def test_on_the_machine_of_then_the_prototype_does_what_it_did() -> None:
    found = prototype.scaled(machine_then())
    assert set(found) == set(prototype.THEN)
    assert all(p.now_per_s == pytest.approx(p.then_per_s) for p in found.values())


def test_of_two_limits_the_one_that_asks_more_is_taken() -> None:
    slow_generator = prototype.scaled(machine_then(loop=0.5))["put, 64 clients"]
    assert slow_generator.by == "json.loads" and slow_generator.factor == pytest.approx(1)
    slow_parser = prototype.scaled(machine_then(json=4, loop=0.9))["put, 64 clients"]
    assert slow_parser.by == "bare loop" and slow_parser.now_per_s == pytest.approx(0.9 * 40_400)


def test_a_lone_put_is_scaled_by_all_that_it_waits_for() -> None:
    then_ms = 1000 / prototype.THEN[prototype.LONE][0]
    slow_disk = prototype.scaled(machine_then(sync=3))
    assert slow_disk[prototype.LONE].factor == pytest.approx(then_ms / (then_ms + 2 * prototype.SYNC_MS))
    assert slow_disk["put, 64 clients"].factor == 1
    slow_parser = prototype.scaled(machine_then(json=2))[prototype.LONE]
    rest_ms = then_ms - prototype.SYNC_MS - 2 * prototype.TRIP_MS
    assert slow_parser.factor == pytest.approx(then_ms / (then_ms + rest_ms))


def test_without_limits_there_is_nothing_to_compare() -> None:
    assert prototype.scaled({}) == {} and prototype.show({}, {"put, 1 client": {"ops_per_s": 1.0}}) == ""


def test_shares_of_the_prototype_are_shown() -> None:
    shown = prototype.show(machine_then(), {"put, 64 clients": {"ops_per_s": 20_200.0}})
    assert shown.count("\n") == 2 and "50 %" in shown


def test_the_processor_is_measured_without_the_generator() -> None:
    assert len(limits.PARSED) == 295 and json.loads(limits.PARSED)["op"] == "put"
    assert 0.1 < limits.processor()["json_loads_us"] < 1000


# --- the goals


def test_a_goal_without_figures_is_not_measured() -> None:
    shown = goals.show({})
    assert shown.count("not measured |") == len(goals.GOALS)
    assert f"Of {len(goals.GOALS)} goals: {len(goals.GOALS)} not measured." in shown


@pytest.mark.parametrize(
    ("least", "value", "verdict"), [(True, 2.0, "met"), (True, 1.9, "not met"), (False, 2.1, "not met")]
)
def test_a_goal_is_met_from_its_bound_on(least: bool, value: float, verdict: str) -> None:
    goal = goals.Goal("w", "ops_per_s", least, 2.0, "etcd")
    found = {("w", "ddb", "ops_per_s"): 10 * value, ("w", "etcd", "ops_per_s"): 10.0}
    assert verdicts(goals.show(found, [goal]), "w") == [verdict]


def test_a_goal_that_is_just_missed_shows_so() -> None:
    goal = goals.Goal("w", "ops_per_s", True, 2.0, "etcd")
    shown = goals.show({("w", "ddb", "ops_per_s"): 1.9981, ("w", "etcd", "ops_per_s"): 1.0}, [goal])
    assert "1.9981×" in shown and "not met" in shown


def test_goals_on_chores_and_memory_find_their_figures() -> None:
    upkeep = {
        "checkpoints": [{"keys": 10_000, "stall": 2.0}, {"keys": 1_000_000, "stall": None}],
        "join": [{"keys": 1_000_000, "mb_per_s": 70.0, "served": 0.6}],
    }
    growth = [{"part": "cache", "at": at, "private_mib": [mib]} for at, mib in ((1, 300), (10, 390), (10, 360))]
    growth.append({"part": "keys", "at": 10_000, "private_mib": [5_000]})
    shown = goals.show(goals.values({}, {}, {}, machine_then(), upkeep, growth))
    assert verdicts(shown, "checkpoint, 10,000 keys") + verdicts(shown, "checkpoint, 1,000,000 keys") == []
    assert verdicts(shown, goals.CHECKPOINT.format(10_000)) == ["met"]
    assert verdicts(shown, goals.CHECKPOINT.format(1_000_000)) == ["not measured"]
    assert verdicts(shown, goals.JOIN.format(1_000_000)) == ["met", "not met"]
    assert verdicts(shown, goals.CACHE.format(10)) == ["met"] and "1.3×" in shown


def test_fewer_keys_than_a_million_say_nothing_of_a_million() -> None:
    million = {"ddb": {"keys": 500, "memory_mib": [1], "restart_s": 0.1, "join_s": 0.1}}
    shown = goals.show(goals.values({}, {}, million))
    assert set(verdicts(shown, goals.MILLION)) == {"not measured"}


# --- the document


def parts_of(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """One result as four, each with a part of it."""
    empty = {"systems": [], "rows": [], "failover": {}, "million": {}, "limits": {}}
    names = [("rows", "systems"), ("failover",), ("million",), ("limits",)]
    command = whole["command"]
    return [
        {**whole, **empty, **{name: whole[name] for name in some}, "command": f"{command} --only {some[0]}"}
        for some in names
    ]


def test_results_with_different_parts_are_one() -> None:
    whole = result()
    assert report.figures_of(report.together(parts_of(whole))) == report.figures_of(report.together([whole]))
    text, charts = report.block(parts_of(whole))
    assert text.count("### Beside etcd and ZooKeeper") == 1 and "put-clients.svg" in charts
    assert [line for line in text.splitlines() if "--only million" in line]


def test_a_missing_file_leaves_its_goals_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([str(tmp_path / "gone.json"), "--document", str(document)]) == 0
    said = capsys.readouterr()
    assert "gone.json is not there" in said.err and said.out.count("not measured |") == len(goals.GOALS)
    assert "not measured |" in document.read_text()


# --- all of it


def stand_in(name: str, code: int = 0) -> every.Part:
    """A part that needs no cluster: a benchmark with so short a life that the interpreter's start is most of it."""
    options = "--only limits --seconds 0.2" if code == 0 else "--only limits --rounds 0"
    return every.Part(name, "peers", options, 1, options, 1)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every, "PARTS", (stand_in("one"), stand_in("two")))
    where = tmp_path / "full"
    where.mkdir()
    (where / "one.json").write_text(json.dumps({**result(), "limits": machine_then()}))
    said: list[str] = []
    assert every.measure(every.PARTS, "full", where, None, said.append) == 0
    assert said[0] == "one: done before" and said[1].startswith("two (1 of 1)")
    assert json.loads((where / "two.json").read_text())["limits"]["loop"]
    assert every.measure(every.PARTS, "full", where, None, said.append) == 0
    assert said[-2:] == ["one: done before", "two: done before"]


def test_a_part_that_fails_is_told_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(every, "PARTS", (stand_in("bad", 2), stand_in("good")))
    assert every.main(["--quick", "--dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "bad: failed with code 2" in said.err and "good: done" in said.err
    where = tmp_path / "quick"
    assert not (where / "bad.json").exists() and (where / "good.json").exists() and not (where / "data").exists()
    assert "bare loop" in (where / "performance.md").read_text() and "goals:" in said.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_part_and_its_servers(number: int, tmp_path: Path) -> None:
    options = "--systems ddb --only put --rounds 1 --seconds 60 --rehearsal 0"
    program = (
        "import sys; from bench import all as every; "
        f"every.PARTS = (every.Part('long', 'peers', {options!r}, 1, '', 1),); "
        f"sys.exit(every.main(['--quick', '--dir', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE
    )
    try:
        wait(lambda: list(tmp_path.glob("quick/data/*/ddb/n3/log")), what="a cluster", timeout_s=30)
        process.send_signal(number)
        assert process.wait(40) == every.INTERRUPTED
        assert not (tmp_path / "quick" / "data").exists() and not (tmp_path / "quick" / "long.json").exists()
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every, "do", lambda *_: every.INTERRUPTED)
    said: list[str] = []
    assert every.measure(every.PARTS, "full", tmp_path, None, said.append) == every.INTERRUPTED
    assert len(said) == 2


@pytest.mark.parametrize("mode", every.MODES)
def test_every_part_takes_its_options(mode: str, tmp_path: Path) -> None:
    import importlib

    for part in every.PARTS:
        words = every.command(part, mode, tmp_path, tmp_path / "x.json", "/opt/etcd")
        assert words[0] == sys.executable
        parser = importlib.import_module(words[2]).parser()
        assert vars(parser.parse_args(words[3:]))["dir"] == tmp_path


def test_all_parts_together_take_as_long_as_is_said() -> None:
    assert sum(part.seconds("quick") for part in every.PARTS) < 8 * 60
    assert sum(part.seconds("full") for part in every.PARTS) < 35 * 60
