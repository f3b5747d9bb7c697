"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddb.client import Client
from tests import proving
from tests.alone import emptied
from tests.harness import Cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember on the test that its body failed, so that a fixture can show the servers' logs."""
    report: Any = yield
    if report.when == "call" and report.failed:
        item.stash[failed_key] = True
    return report


failed_key = pytest.StashKey[bool]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the proofs did, in their long form."""
    for outcome in ("passed", "failed") if proving.LONG else ():
        for report in terminalreporter.getreports(outcome):
            if report.when == "call" and report.user_properties:
                figures = ", ".join(f"{name} {figure}" for name, figure in report.user_properties)
                terminalreporter.write_line(f"{outcome} {report.nodeid}: {figures}; {report.duration:.0f} s")


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster]]:
    """Makes started clusters: `three = cluster(3)`, `cluster(5, election="raft")`, `cluster(3, start=False)`.

    All are ended after the test; where it failed, their logs are printed.
    """
    made: list[Cluster] = []

    def make(n: int = 3, *, start: bool = True, **options: Any) -> Cluster:
        directory = tmp_path / f"cluster{len(made)}"
        directory.mkdir()
        one = Cluster(directory, n, **options)
        made.append(one)
        return one.start() if start else one

    yield make
    for one in made:
        if request.node.stash.get(failed_key, False):
            one.print_logs()
        one.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A database of one node, the same for all tests of a file."""
    with Cluster(tmp_path_factory.mktemp("alone"), 1, registry=False) as cluster:
        yield cluster


@pytest.fixture
def client(alone: Cluster) -> Iterator[Client]:
    """A client of that, with no key in it."""
    yield from emptied(alone)


@pytest.fixture
def source(pair: tuple[Cluster, Cluster]) -> Iterator[Client]:
    """A client of the first of a file's `pair` of clusters, with no key in it."""
    yield from emptied(pair[0])


@pytest.fixture
def target(pair: tuple[Cluster, Cluster]) -> Iterator[Client]:
    """A client of the second one."""
    yield from emptied(pair[1])
