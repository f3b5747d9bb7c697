"""What all tests of real faults share: how long they are, their seed, disks and clocks that fail when they are told to,
and how what happened is judged.

DDB_TEST_FAULTS=long asks for the long form. DDB_TEST_FAULTS_SEED draws other lots.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.harness import Cluster, NodeServer
from tests.load import Load, Register
from tests.witness import Witnesses

LONG = os.environ.get("DDB_TEST_FAULTS") == "long"
SEED = int(os.environ.get("DDB_TEST_FAULTS_SEED", "1"))
HERE = Path(__file__).resolve().parent

Case = TypeVar("Case")


def cases(*every: Case, brief: int) -> list[Case]:
    """Every case in the long form, the first `brief` ones otherwise."""
    return list(every if LONG else every[:brief])


class FailingDisk:
    """The disk of `node`, which has not started yet, behind the library that `shim` made (shim/faults.c)."""

    def __init__(self, node: NodeServer, library: Path) -> None:
        self._file = node.directory.with_suffix(".faults")
        node.environment = {
            **node.environment, "LD_PRELOAD": str(library), "DDB_TEST_FAULTS_FILE": str(self._file)
        }  # fmt: skip

    def order(self, *rules: str) -> None:
        """From now on these rules hold, and no others: `order("sync /log/ errno 5")`."""
        _put(self._file, "".join(rule + "\n" for rule in rules))

    def mend(self) -> None:
        """Let every call pass."""
        self.order()


class Clock:
    """The clocks of `node`, which has not started yet (skew/sitecustomize.py)."""

    def __init__(self, node: NodeServer) -> None:
        self._file = node.directory.with_suffix(".clock")
        path = f"{HERE / 'skew'}{os.pathsep}{node.environment['PYTHONPATH']}"
        node.environment = {**node.environment, "PYTHONPATH": path, "DDB_TEST_CLOCK_FILE": str(self._file)}

    def order(self, off_s: float = 0.0, rate: float = 1.0) -> None:
        """From now on the wall clock is `off_s` seconds off, and all time passes at `rate`."""
        _put(self._file, f"{off_s} {rate}")


def _put(path: Path, text: str) -> None:
    """Write `path` so that whoever reads it sees the old text or the new one."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="ascii")
    scratch.replace(path)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes disks fail, compiled; where that can't be done, the test is skipped."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler here, with which a disk is made to fail")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim" / "faults.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the C compiler here can't make a disk fail: {done.stderr.strip()[:300]}")
    return library


@contextlib.contextmanager
def judged(some: Cluster, directory: Path, seed: int = SEED) -> Iterator[Load]:
    """Clients of three kinds while the body does harm and mends it; then the cluster is held to what they were told.

    After the body every node must run and be reachable. Then writes go on, all nodes agree on leader, index and digest,
    nothing acknowledged is missing, nothing refused is there, no read was stale, the history is linearizable, and no
    node has logged a traceback. The evidence of a history that isn't goes into `directory`.
    """
    prefix = f"load{time.monotonic_ns()}"
    witnesses = Witnesses(some.nodes, seed)
    try:
        with Load(some, writers=4, prefix=prefix) as load, Register(some), witnesses:
            yield load
            load.wait_for(20, since_s=time.monotonic())
            some.wait_ready()
        some.wait_equal()
        load.check(some.nodes)
        witnesses.check(directory / "history.jsonl")
        assert len({status["digest"] for status in some.statuses().values()}) == 1
        assert some.running == some.nodes
        for node in some.nodes:
            assert "Traceback" not in node.log_path.read_text(errors="replace"), node.name
    except BaseException:
        some.print_logs()
        raise
