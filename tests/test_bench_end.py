"""However a benchmark is told to end, nothing that it started outlives it, and nothing is left on the disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, wait

COMMANDS = {
    "cluster": ["--clients", "4", "--seconds", "60", "--processes", "2"],
    "cost": ["--seconds", "60"],
    "growth": ["--only", "clients", "--seconds", "60"],
    "limits": ["--seconds", "0.5"],
    "peers": ["--systems", "ddb", "--only", "put", "--seconds", "60"],
    "upkeep": ["--only", "checkpoints", "--keys", "100", "--seconds", "60"],
    "watchers": ["--nodes", "1", "--watchers", "10", "--seconds", "60"],
}

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are told apart by /proc")


def living(mark: str) -> dict[int, str]:
    """The command line of each process that was started by one with `mark` in its environment, or is it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"BENCH_MARK={mark}\0" in (path / "environ").read_text(errors="replace"):
                found[int(path.name)] = (path / "cmdline").read_text(errors="replace").replace("\0", " ")
    return found


@contextlib.contextmanager
def running(module: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A benchmark under way, whose servers are started; in the end they are gone, whatever happens."""
    mark = str(directory)
    argv = [sys.executable, "-m", f"bench.{module}", *COMMANDS[module], "--dir", mark]
    quiet = subprocess.DEVNULL
    env = {**environment(), "BENCH_MARK": mark}
    # Whoever runs the tests in the background, or under nohup, ignores signals, and children inherit that.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        process = subprocess.Popen(argv, cwd=REPOSITORY, env=env, stdin=quiet, stdout=quiet, stderr=quiet)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        wait(lambda: len(living(mark)) > 1, what=f"bench.{module} has started something")
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in living(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def loading(directory: Path) -> bool:
    """Whether the load's own processes are there, so that all servers serve."""
    return sum("multiprocessing.spawn" in words for words in living(str(directory)).values()) >= 2


def check_ended(process: subprocess.Popen[bytes], number: signal.Signals, directory: Path) -> None:
    assert process.wait(30) == 128 + number
    wait(lambda: not living(str(directory)), 2.0, what="all that was started is gone")  # but for what isn't buried yet


@pytest.mark.parametrize("module", COMMANDS)
def test_what_a_benchmark_started_ends_with_it(module: str, tmp_path: Path) -> None:
    with running(module, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        check_ended(process, signal.SIGTERM, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_and_a_closed_terminal_end_it_as_well(number: signal.Signals, tmp_path: Path) -> None:
    with running("cluster", tmp_path) as process:
        wait(lambda: loading(tmp_path), what="a load")
        process.send_signal(number)
        check_ended(process, number, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_leave_a_server_behind_that_takes_its_time_to_end(tmp_path: Path) -> None:
    with running("cluster", tmp_path) as process:
        wait(lambda: loading(tmp_path), what="a load")
        servers = [pid for pid, words in living(str(tmp_path)).items() if "-m ddb." in words]
        assert len(servers) == 4
        for pid in servers:
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)  # it waits for them
        process.send_signal(signal.SIGTERM)
        check_ended(process, signal.SIGTERM, tmp_path)
