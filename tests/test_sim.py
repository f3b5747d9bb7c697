"""The simulator as a whole: one seed, one history; many seeds, no violation; and it has met what it should have met.

`DDB_SIM_SEED` is the first of the fresh seeds (drawn when not given), `DDB_SIM_SEEDS` how many there are.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ddb import sim, simduties, simrules, simtenure, simtown
from ddb.cli import main
from ddb.leadership import Leadership
from ddb.sim import LINEARIZABLE, Options, Result, minimize, run
from ddb.simfaults import KINDS, swarm
from ddb.simreport import Tally, story
from ddb.simrules import MAJORITY
from ddb.simwatch import BEGINS

ROOT = Path(__file__).parent.parent
JOBS = max(1, min(4, os.cpu_count() or 1))
FIRST = int(os.environ.get("DDB_SIM_SEED") or random.randrange(1 << 32))
COUNT = int(os.environ.get("DDB_SIM_SEEDS") or 300)

RARE = {
    "append of what was there",
    "bit flipped in the log",
    "bit flipped in the snapshot",
    "candidate ignored while a leader is heard",
    "conflicting suffix cut",
    "connection timed out",
    "damage refused, then repaired",
    "died between two effects",
    "disk wiped",
    "durable tail lost",
    "elected with uncommitted entries of older terms",  # figure 8 of the paper begins so
    "in doubt",
    "leader stepped down by itself",
    "leadership handed over",
    "lease expired",
    "lease kept alive",
    "lease revoked",
    "learner promoted",
    "message lost",
    "message overtaken",
    "message repeated",
    "registry wiped",
    "session expired",
    "write of a forgotten session refused",
    "write of a session repeated",
    "removed node started anew",
    "snapshot installed",
    "stale leader refused",
    "stale snapshot refused",
    "writes held for a checkpoint",
    "stood aside for a higher rank",
    "torn tail cut",
    "voter removed",
} | {f"fault: {kind}" for kind in KINDS}


def regressions() -> list[Options]:
    """What stands in regression_seeds.txt."""
    found = []
    for line in (Path(__file__).parent / "regression_seeds.txt").read_text().splitlines():
        words = shlex.split(line, comments=True)
        values = dict(zip(words[::2], words[1::2], strict=True))
        if values:
            nodes = int(values["--nodes"]) if "--nodes" in values else None
            found.append(Options(int(values["--seed"]), nodes, values.get("--election")))
    return found


@pytest.fixture(scope="module")
def results() -> list[Result]:
    fresh = [Options(FIRST + number) for number in range(COUNT)]
    with ProcessPoolExecutor(JOBS) as pool:
        return list(pool.map(run, [*regressions(), *fresh], chunksize=4))


def test_no_seed_breaks_a_rule(results: list[Result]) -> None:
    broken = [result for result in results if result.violation is not None]
    assert not broken, "\n".join(line for result in broken[:3] for line in story(result))


def test_a_good_run_has_met_what_is_rare(results: list[Result]) -> None:
    tally = Tally()
    for result in results:
        tally.add(result, 0.0)
    never = sorted(RARE - tally.met.keys())
    assert not never, f"never met from seed {FIRST} on: {never}"
    assert tally.operations > 10 * len(results)


def test_most_histories_can_be_judged(results: list[Result]) -> None:
    undecided = sum(result.met["history too hard to judge"] for result in results)
    helpless = sum(result.met["too many lost their memory: waits for a person"] for result in results)
    assert undecided < len(results) / 20
    assert helpless < len(results) / 50


def trace(seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-m", "ddb", "sim", "--seed", str(seed), "--trace"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout


@pytest.mark.parametrize("seed", [5, 7, 33])
def test_the_same_seed_gives_the_same_trace_in_every_process(seed: int) -> None:
    first = trace(seed, "0")
    assert first.count("\n") > 500
    assert trace(seed, "1") == first


def test_what_is_drawn_for_a_seed_is_drawn_from_it_alone() -> None:
    one, two = run(Options(11)), run(Options(11))
    assert (one.plan, one.faults, one.met, one.steps, one.state) == (
        two.plan,
        two.faults,
        two.met,
        two.steps,
        two.state,
    )
    assert run(Options(12)).steps != one.steps


def test_a_swarm_knows_only_some_faults_and_only_those_it_is_told() -> None:
    kinds = [{fault.kind for fault in swarm(random.Random(seed), 30.0, None)} for seed in range(40)]
    assert set().union(*kinds) == set(KINDS)
    assert min(map(len, kinds)) < 10 < max(map(len, kinds))
    assert {fault.kind for fault in swarm(random.Random(1), 30.0, ("kill", "pause"))} == {"kill", "pause"}
    assert swarm(random.Random(1), 30.0, ()) == []


@pytest.mark.parametrize("election", ["bully", "raft"])
@pytest.mark.parametrize("nodes", [3, 5, 7])
def test_nothing_goes_wrong_where_nothing_is_done_wrong(nodes: int, election: str) -> None:
    result = run(Options(1, nodes=nodes, election=election, faults=()))
    assert result.violation is None
    assert (result.plan.nodes, result.plan.election) == (nodes, election)
    assert result.operations > 40
    assert not any(what.startswith("fault") for what in result.met)


def test_no_two_lives_of_a_node_number_their_questions_alike() -> None:
    simulation = sim.Simulation(Options(1, nodes=3, faults=()))
    town = simulation.town
    numbers = set()
    for _ in range(3):
        while town.node("n1") is None:
            town.agenda.step(1e9)
        node = town.node("n1")
        assert node is not None
        numbers |= {node.replica._tickets, node.service._tickets, node.replica.raft._ask}
        town.kill("n1", power=False, back_in_s=0.1)
    assert len(numbers) == 9


def test_members_that_have_left_are_forgotten_when_there_is_room_on_the_disk() -> None:
    """To forget can wait: a full disk ends no node for it."""
    town = sim.Simulation(Options(1, nodes=3, faults=())).town
    while town.why_not_settled() is not None:
        town.agenda.step(1e9)
    node, host = town.node("n2"), town.hosts["n2"]
    assert node is not None
    members = node.replica.raft.remembered
    assert members == {member.id for member in node.replica.raft.config.members}
    node._change_identity(members=(*sorted(members), "who has left"))
    node._identity_due = True
    host.disk.room_bytes = 0
    until_s = town.agenda.now + 3.0
    while town.agenda.step(until_s):
        pass
    assert host.program is node
    assert node.replica.raft.remembered == {*members, "who has left"}
    host.disk.room_bytes = None
    until_s = town.agenda.now + 10.0
    while town.agenda.step(until_s):
        pass
    assert node.replica.raft.remembered == members == set(node.data.identity.members)


# ------------------------------------------------- a bug, planted


@pytest.fixture
def half_is_a_majority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader commits what half of the voters hold."""

    def advance(self: Leadership) -> None:
        voters = self._member.config.voters
        matches = sorted(self._match(voter) for voter in voters)
        index = matches[len(voters) // 2 + (len(voters) > 2)] if len(voters) > 1 else matches[0]
        if index > self._member.commit and index >= self.term_begin:
            self._member.commit = index
            self._member.doubt = False

    monkeypatch.setattr(Leadership, "advance_commit", advance)


def broken_seed() -> Result:
    for seed in range(20):
        result = run(Options(seed))
        if result.violation is not None and result.violation.rule == MAJORITY:
            return result
    raise AssertionError("a planted bug is not found")


@pytest.mark.usefixtures("half_is_a_majority")
def test_a_violation_names_its_rule_seed_step_events_and_the_way_back() -> None:
    result = broken_seed()
    assert result.violation is not None
    assert result.violation.rule == MAJORITY
    told = list(story(result))
    assert told[0] == f"VIOLATION of the rule: {MAJORITY}"
    assert f"seed {result.options.seed}, step {result.steps}" in told[1]
    assert len(told) > 15
    assert told[-1].strip() == f"python -m ddb sim --seed {result.options.seed} --trace --until {result.steps}"
    again = run(replace(result.options, until=result.steps))
    assert again.violation is not None
    assert str(again.violation) == str(result.violation)
    assert run(replace(result.options, until=result.steps - 1)).violation is None


@pytest.mark.usefixtures("half_is_a_majority")
def test_minimize_leaves_fewer_faults_that_break_the_same_rule(capsys: pytest.CaptureFixture[str]) -> None:
    first = broken_seed()
    small = minimize(first.options, lambda text: None)
    assert small.kept is not None
    assert len(small.kept) < len(first.faults)
    found = run(small)
    assert found.violation is not None
    assert found.violation.rule == MAJORITY
    assert main(["sim", "--seed", str(small.seed), "--minimize"]) == 1
    said = capsys.readouterr().out
    assert "the schedule of faults that is left" in said
    assert f"--keep {','.join(map(str, small.kept))}" in said or not small.kept


def test_stale_reads_that_claim_to_be_fresh_are_found_by_the_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule of consensus is broken where a node answers from its own state; clients alone can tell, by what they read and by
    where their watches begin."""
    from ddb.replica import Replica

    def read(self: Replica, command: object, waiter: object) -> None:
        self._answer_read(command, waiter, b"")  # type: ignore[arg-type]

    monkeypatch.setattr(Replica, "read", read)
    found = {result.violation.rule for result in map(run, map(Options, range(12))) if result.violation is not None}
    assert LINEARIZABLE in found and found <= {LINEARIZABLE, BEGINS}


# ------------------------------------------------- what is said of it


def test_the_documentation_names_every_fault_and_every_rule() -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    for kind, strike in KINDS.items():
        assert f"| `{kind}` | {str(strike.__doc__).splitlines()[0].rstrip('.')} |" in text
    for module in (simrules, simduties, simtenure, simtown, sim):
        for name, rule in vars(module).items():
            if name.isupper() and isinstance(rule, str) and " " in rule:
                assert f"| {rule} |" in text, name


# ------------------------------------------------- the command


def test_the_command_reports_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--seed", "3", "--nodes", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 3: 3 nodes, election ")
    assert "times faster than real time" in said
    assert "\nfaults: " in said


def test_the_command_shows_every_node_where_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--seed", "3", "--nodes", "3", "--faults", "none", "--trace", "--until", "700"]) == 0
    said = capsys.readouterr().out
    assert "the nodes at that step:\n  n1: n1@" in said
    assert " is leader in term " in said
    assert "700 steps" in said


def test_the_command_runs_many_seeds_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    assert main(["sim", "--seed", "1", "--seeds", "4", "--jobs", "2", "--steps", "800", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["runs"], told["violations"]) == (4, [])
    assert told["simulated_s"] > 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--faults", "earthquake"], "There is no fault 'earthquake'"),
        (["--nodes", "2"], "--nodes"),
        (["--keep", "a"], "--keep takes whole numbers"),
        (["--seed", "-1"], "--seed"),
        (["--election", "king"], "--election"),
    ],
)
def test_a_wrong_option_gets_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
