"""The claims of other test files, called without pytest: for these few hundred tests it would cost more than they do.

A claim is named as pytest would name it, "test_raft_paper.py::test_a_vote_survives_a_restart"; all its parameters are
gone through. A script is a claim, too: "scripts/figure_8.txt". What a test wants as an argument is one of its parameters, a
fixture of its module, `tmp_path` or `monkeypatch`.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.test_scripts import SCRIPTS, perform

TESTS = Path(__file__).parent.parent


def check(claim: str) -> None:
    """Hold ddb to `claim`. Raises whatever the test raises where it fails."""
    file, _, name = claim.partition("::")
    if not name:
        text = (TESTS / file).read_text()
        assert perform(text) == text, f"{file} tells another story"
        return
    module = module_of(claim)
    test: Callable[..., None] = getattr(module, name)
    for arguments in _cases(module, test):
        with ExitStack() as stack:
            for wanted in inspect.signature(test).parameters:
                if wanted not in arguments:
                    arguments[wanted] = stack.enter_context(_fixture(module, wanted))
            test(**arguments)


def module_of(claim: str) -> ModuleType:
    """The module that makes `claim`. Who forks imports it before."""
    file, separator, _ = claim.partition("::")
    return importlib.import_module(f"tests.{file.removesuffix('.py')}" if separator else perform.__module__)


def claims_of(file: str) -> list[str]:
    """All claims of a test file, or of the directory of scripts."""
    if file == "scripts":
        return [f"scripts/{path.name}" for path in SCRIPTS]
    tests = vars(module_of(f"{file}::"))
    return [f"{file}::{name}" for name, test in tests.items() if name.startswith("test_") and callable(test)]


def _cases(module: ModuleType, test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """What `pytest.mark.parametrize` gives the arguments, case by case."""
    marks = getattr(module, "pytestmark", [])
    marks = [*getattr(test, "pytestmark", []), *(marks if isinstance(marks, list) else [marks])]
    axes: list[list[dict[str, Any]]] = []
    for mark in marks:
        if mark.name == "parametrize":
            names, values = mark.args
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
            axes.append([_named(names, value) for value in values])
    for chosen in itertools.product(*axes):
        yield {name: value for one in chosen for name, value in one.items()}


def _named(names: list[str], value: Any) -> dict[str, Any]:
    given = getattr(value, "values", None)
    if given is not None and not callable(given):  # a pytest.param
        value = given if len(names) > 1 else given[0]
    return dict(zip(names, value, strict=True)) if len(names) > 1 else {names[0]: value}


@contextmanager
def _fixture(module: ModuleType, name: str) -> Iterator[Any]:
    if name == "tmp_path":
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
    elif name == "monkeypatch":
        with pytest.MonkeyPatch.context() as patch:
            yield patch
    elif name == "request":
        yield SimpleNamespace(param="bully")
    else:
        made: Any = getattr(module, name)
        function = inspect.unwrap(made)
        with ExitStack() as stack:
            wanted = {n: stack.enter_context(_fixture(module, n)) for n in inspect.signature(function).parameters}
            if inspect.isgeneratorfunction(function):
                yield stack.enter_context(contextmanager(function)(**wanted))
            else:
                yield function(**wanted)
