"""What chores cost: operations are told apart by what they overlap, and each part runs on a real cluster."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from bench import metered, upkeep
from bench.load import run
from bench.plan import Plan, Result
from bench.upkeep import Background, Window, within
from tests.fake_server import FakeServer


def timed(*operations: tuple[float, float]) -> Result:
    """A result of operations (sent at, answered at)."""
    found = Result(0.0)
    for sent_at, answered_at in sorted(operations, key=lambda o: o[1]):
        found.answered_at.append(answered_at)
        found.latencies_s.append(answered_at - sent_at)
    return found


def test_an_operation_lies_in_a_window_or_overlaps_it() -> None:
    result = timed((0, 1), (1, 3), (2.5, 4), (4, 5), (5.5, 8), (6, 7), (9, 10))
    windows = [Window(2.4, 4.5), Window(6.5, 6.8)]
    inside = within(result, windows, touched=False)
    assert list(inside.latencies_s) == [1.5] and inside.seconds == pytest.approx(2.4)
    overlap = within(result, windows, touched=True)
    assert sorted(overlap.latencies_s) == [1, 1, 1.5, 2, 2.5]


def test_no_window_holds_nothing() -> None:
    assert not within(timed((0, 1)), [], touched=True).latencies_s


def test_replies_are_timed_only_where_it_was_asked_for() -> None:
    with FakeServer() as server:
        plan = Plan((server.address,), clients=2, seconds=0.2, warm_up_s=0.05, keys=10)
        assert not run(plan).answered_at
        result = run(Plan((server.address,), clients=2, seconds=0.2, warm_up_s=0.05, keys=10, timed=True))
        assert len(result.answered_at) == len(result.latencies_s) > 0
        assert list(result.answered_at) == sorted(result.answered_at)


def test_a_load_goes_on_until_the_block_ends() -> None:
    with FakeServer() as server:
        with Background(Plan((server.address,), clients=2, keys=10)) as load:
            first = load.wait(0.1)
            counted = load.count
            load.wait(0.1)
        assert 0 < counted < len(load.result.latencies_s) == len(server.requests) and first.seconds >= 0.1
        assert not load.result.errors


def test_a_load_that_can_not_begin_is_told() -> None:
    with FakeServer() as server:
        address = server.address
    with pytest.raises(OSError), Background(Plan((address,), clients=1)) as load:
        load.wait(10)


def test_the_collectors_pauses_are_noted_between_the_signals(tmp_path: Path) -> None:
    meter = metered.Meter(tmp_path / "m.json")
    gc.collect()
    assert not meter.pauses_s
    gc.callbacks.append(meter.collected)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(meter.collected)
    assert len(meter.pauses_s[2]) == 1 and meter.pauses_s[2][0] > 0


def test_each_chore_is_measured_on_a_real_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "upkeep.json", tmp_path / "data"
    arguments = [
        "--keys", "300", "--entries", "300", "--join-keys", "500", "--pause-keys", "2000", "--clients", "4", "--seconds", "1",
        "--before", "0.5", "--warm-up", "0.1", "--dir", str(data), "--out", str(out),
    ]  # fmt: skip
    assert upkeep.main(arguments) == 0
    found = json.loads(out.read_text())["upkeep"]
    [checkpoints], [join], [pauses] = found["checkpoints"], found["join"], found["pauses"]
    assert checkpoints["checkpoints"] > 0 and checkpoints["stall"] > 0 and not checkpoints["errors"]
    assert checkpoints["without"]["ops"] >= 300 - 4 and checkpoints["during"]["ops"] > 0
    assert join["caught_up_s"] >= join["read_s"] > 0 and join["served"] > 0 and not join["errors"]
    assert join["meanwhile"]["ops"] > 0 and join["after"]["ops"] > 0
    assert set(pauses["pauses"]) == {"filling", "putting"} and pauses["put"]["ops"] > 0
    assert "MB/s of data" in capsys.readouterr().out and not list(data.iterdir())
