"""A mutant, and how it is planted: one or a few functions of ddb, each with a piece of its text replaced.

Laws: the text that is replaced must be there exactly once, so a mutant can't outlive the code that it spoils; and what
was planted is taken out again, whatever happens in between.

Theory. The patched text is compiled in the namespace of the function's own module, and the new code is put into the *same*
function object. So everybody who holds that function (a table of operations, a bound method, a name imported
elsewhere) meets the mutant, and nothing has to be looked up again to take it out.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

FLAGS = __future__.annotations.compiler_flag


class Rotten(AssertionError):
    """A mutant does not fit the code any more."""


@dataclass(frozen=True, slots=True)
class Patch:
    """In the function `where` ("ddb.raft:Raft.tick"), `new` stands in the place of `old`."""

    where: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: `wrong` says in words what goes wrong. `claim` is a test that notices it: "test_raft_paper.py::test_…" or
    "scripts/figure_8.txt"; empty where only the simulator does."""

    name: str
    wrong: str
    patches: tuple[Patch, ...]
    claim: str = ""

    def __str__(self) -> str:
        return self.name


def mutant(name: str, wrong: str, *texts: str, claim: str = "") -> Mutant:
    """A mutant made of patches, given as three texts each: where, old, new."""
    assert texts and len(texts) % 3 == 0, name
    patches = tuple(Patch(*texts[i : i + 3]) for i in range(0, len(texts), 3))
    return Mutant(name, wrong, patches, claim)


@contextmanager
def planted(bug: Mutant) -> Iterator[None]:
    """Within it, ddb has this bug. Raises Rotten where it does not fit."""
    with ExitStack() as stack:
        for where in dict.fromkeys(patch.where for patch in bug.patches):
            function = _function(where)
            patches = [patch for patch in bug.patches if patch.where == where]
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = _patched(function, patches).__code__
        yield


def _function(where: str) -> FunctionType:
    """The plain function at `where`, taken out of its property, classmethod or decorator."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        try:
            found = inspect.getattr_static(found, part)
        except AttributeError:
            raise Rotten(f"there is no {where} (any more)") from None
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(getattr(found, "__func__", found))
    if not isinstance(found, FunctionType):
        raise Rotten(f"{where} is no function")
    return found


def _patched(function: FunctionType, patches: list[Patch]) -> FunctionType:
    """A function like `function`, but with the patches."""
    where = patches[0].where
    source = textwrap.dedent(inspect.getsource(function))
    for patch in patches:
        count = source.count(patch.old)
        if count != 1:
            raise Rotten(f"{where} holds {count} times the text:\n{patch.old}")
        source = source.replace(patch.old, patch.new)
    lines = source.splitlines()
    while not lines[0].startswith("def "):
        del lines[0]  # a decorator: the function inside is what is wanted
    # Inside of a function, so that `super()` and `__class__` have the same place in the new code as in the old one.
    outer = (
        "def outer(__class__):\n" + textwrap.indent("\n".join(lines), "    ") + f"\n    return {function.__name__}\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(outer, f"<{where}, patched>", "exec", FLAGS, dont_inherit=True), function.__globals__, namespace)
    made: FunctionType = namespace["outer"](None)
    if made.__code__.co_freevars != function.__code__.co_freevars:
        raise Rotten(f"{where} is a closure, which can't be patched")
    return made
