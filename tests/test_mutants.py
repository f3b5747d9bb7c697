"""The proof of the proof: known bugs (tests/mutants) are planted one at a time, and each is caught.

Each mutant lives in a forked process of its own, so that nothing of it can leak into another test.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final

import pytest

from tests.mutants import CATALOGUE
from tests.mutants.claims import check, module_of
from tests.mutants.planting import Mutant, Patch, Rotten, mutant, planted

PATIENCE_S: Final = 30.0
ENDLESS: Final = f"it does not end within {PATIENCE_S:g} s"
CLAIMED = [bug for bug in CATALOGUE if bug.claim]
CLAIMS = sorted({bug.claim for bug in CLAIMED})
for _claim in CLAIMS:
    module_of(_claim)  # once, here, rather than in each forked process


def forked(work: Callable[[], None]) -> str | None:
    """Do `work` in a process of its own; returns what came of it: None where it went well, else the error in a line."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(work, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE_S):
            return ENDLESS
        said: str | None = receiver.recv()
        return said
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(work: Callable[[], None], sender: Connection) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        work()
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}"[:1000])
    else:
        sender.send(None)


def test_the_catalogue_is_long_and_names_each_bug_once() -> None:
    names = [bug.name for bug in CATALOGUE]
    assert len(set(names)) == len(names) >= 55


@pytest.mark.parametrize("bug", CATALOGUE, ids=str)
def test_a_mutant_fits_the_code_and_is_taken_out_again(bug: Mutant) -> None:
    with planted(bug):
        pass


@pytest.mark.parametrize("bug", CLAIMED, ids=str)
def test_a_claim_catches_the_mutant(bug: Mutant) -> None:
    with planted(bug):  # the child inherits it
        said = forked(lambda: check(bug.claim))
    assert said is not None, f"{bug.claim} does not notice: {bug.wrong}"
    assert said != ENDLESS


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_without_a_mutant_the_claim_holds(claim: str) -> None:
    assert forked(lambda: check(claim)) is None


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
