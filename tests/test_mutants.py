"""The proof of the proof: known bugs (tests/mutants) are planted one at a time, and each is caught.

Each mutant lives in a forked process of its own, so that nothing of it can leak into another test. What caught it is told in
the table of docs/testing.md, which `python -m tests.mutants` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.mutants import CATALOGUE
from tests.mutants.claims import check, module_of
from tests.mutants.forks import Forks
from tests.mutants.planting import Mutant, Patch, Rotten, mutant, planted
from tests.mutants.simulated import Found, search, simulate
from tests.mutants.table import recorded, render, table

SEEDS_MORE = range(1, 31)  # where the code has changed, the bug may be found in other seeds than the table says
CLAIMED = [bug for bug in CATALOGUE if bug.claim]
CLAIMS = sorted({bug.claim for bug in CLAIMED})
FOUND = recorded()
RUNS = sorted({(found.aim, found.seed) for found in FOUND.values()})
for _claim in CLAIMS:
    module_of(_claim)  # once, here, rather than in each forked process


def work_of(item: pytest.Item) -> tuple[Callable[[], Any], Mutant | None] | None:
    """What the test `item` has done in a process of its own, and with which mutant."""
    call: Any = getattr(item, "callspec", None)
    name, values = getattr(item, "originalname", ""), call.params if call is not None else {}
    if name == test_a_claim_notices_the_mutant.__name__:
        return partial(check, values["bug"].claim), values["bug"]
    if name == test_without_a_mutant_the_claim_holds.__name__:
        return partial(check, values["claim"]), None
    if name == test_the_simulator_finds_the_mutant.__name__:
        return partial(find, FOUND[values["bug"].name]), values["bug"]
    if name == test_without_a_mutant_the_simulator_finds_nothing.__name__:
        return partial(simulate, values["aim"], values["seed"]), None
    return None


def find(found: Found) -> str | None:
    """What the simulator finds now."""
    return simulate(found.aim, found.seed) or str(search(found.aim, SEEDS_MORE) or "") or None


@pytest.fixture(scope="module")
def forks(request: pytest.FixtureRequest) -> Iterator[Forks]:
    """The processes of all chosen tests of this file, in the order of these."""
    made = Forks()
    for item in request.session.items:
        if item.path == request.path and (work := work_of(item)) is not None:
            made.add(item.nodeid, *work)
    yield made
    made.close()


@pytest.fixture
def outcome(forks: Forks, request: pytest.FixtureRequest) -> Any:
    """What came of this test's process."""
    return forks.result(request.node.nodeid)


def test_the_catalogue_is_long_and_names_each_bug_once() -> None:
    names = [bug.name for bug in CATALOGUE]
    assert len(set(names)) == len(names) >= 55


def test_every_mutant_is_caught_by_something() -> None:
    assert [bug.name for bug in CATALOGUE if not bug.claim and bug.name not in FOUND] == []


def test_the_table_of_the_documentation_is_that_of_the_catalogue() -> None:
    assert table() == render(FOUND), "python -m tests.mutants writes it anew"


@pytest.mark.parametrize("bug", CATALOGUE, ids=str)
def test_a_mutant_fits_the_code_and_is_taken_out_again(bug: Mutant) -> None:
    with planted(bug):
        pass


@pytest.mark.parametrize("bug", CLAIMED, ids=str)
def test_a_claim_notices_the_mutant(bug: Mutant, outcome: str | None) -> None:
    assert outcome is not None, f"{bug.claim} does not notice: {bug.wrong}"
    assert "does not end" not in outcome


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_without_a_mutant_the_claim_holds(claim: str, outcome: str | None) -> None:
    assert outcome is None


@pytest.mark.parametrize("bug", [bug for bug in CATALOGUE if bug.name in FOUND], ids=str)
def test_the_simulator_finds_the_mutant(bug: Mutant, outcome: str | None) -> None:
    assert outcome is not None, f"neither {FOUND[bug.name]} nor more seeds notice: {bug.wrong}"
    assert "does not end" not in outcome


@pytest.mark.parametrize(("aim", "seed"), RUNS, ids=str)
def test_without_a_mutant_the_simulator_finds_nothing(aim: str, seed: int, outcome: str | None) -> None:
    assert outcome is None


# --- planting


class Box:
    """Something to plant mutants in."""

    def __init__(self) -> None:
        self.kept = 1

    @property
    def value(self) -> int:
        return self.kept

    @classmethod
    def made(cls) -> Box:
        return cls()

    def shown(self) -> str:
        return super().__repr__()[:0] + f"{self.value}"


HERE = f"{__name__}:Box."


@pytest.mark.parametrize(
    ("bug", "look", "right", "wrong"),
    [
        (mutant("m", "", HERE + "__init__", "= 1", "= 2"), lambda: Box().kept, 1, 2),
        (mutant("m", "", HERE + "value", "self.kept", "-self.kept"), lambda: Box().value, 1, -1),
        (mutant("m", "", HERE + "made", "cls()", "None"), lambda: Box.made() is None, False, True),
        (mutant("m", "", HERE + "shown", "[:0] +", "[:0] + 'x' +"), lambda: Box().shown(), "1", "x1"),
        (
            mutant("m", "", HERE + "__init__", "= 1", "= 2", HERE + "value", "self.kept", "-self.kept"),
            lambda: Box().value,
            1,
            -2,
        ),
        (
            mutant("m", "", HERE + "__init__", "self.kept", "self.other", HERE + "__init__", "= 1", "= self.kept = 3"),
            lambda: Box().value,
            1,
            3,
        ),
    ],
)
def test_a_planted_function_does_something_else_until_it_is_taken_out(
    bug: Mutant, look: Callable[[], object], right: object, wrong: object
) -> None:
    assert look() == right
    with planted(bug):
        assert look() == wrong
    assert look() == right


@pytest.mark.parametrize(
    "patch",
    [
        Patch(HERE + "shown", "nowhere", ""),
        Patch(HERE + "shown", "r", ""),
        Patch(HERE + "gone", "r", ""),
        Patch(f"{__name__}:HERE", "r", ""),
    ],
    ids=["not there", "there twice", "no such function", "no function"],
)
def test_a_mutant_that_does_not_fit_is_rotten(patch: Patch) -> None:
    with pytest.raises(Rotten), planted(Mutant("m", "", (patch,))):
        pass
