"""A program that uses the client passes mypy --strict, and one that misuses it does not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment

PROGRAM = """
import asyncio
import ddb
from ddb import aio


def main() -> int:
    with ddb.connect("127.0.0.1:8050") as db:
        rev: int = db.put("city", "Oslo", if_={"exists": False}).rev
        item = db.get("city", rev=rev)
        name = item.key if item is not None else "none"
        with db.session(), db.lock("printer", ttl_s=5, wait_s=1) as lock:
            token: int = lock.token
            db.put("page", token, if_=lock.guard)
        with db.watch(prefix="city") as watch:
            for event in watch:
                kind: str = event.kind
                break
        with db.pipeline() as pipe:
            visits = pipe.incr("visits")
        value: int = visits.result.value
        for attempt in db.transaction():
            with attempt as tx:
                tx["left"] = tx.get("left", 3) - 1
        left: int = db.transact(lambda tx: int(tx["left"]))
        with db.lease(10) as lease:
            db.put("here", 1, lease=lease)
        try:
            db.incr(name)
        except ddb.DdbError as error:
            return 1 if error.definite else value + left
        return len(db.history(key="city").changes)


async def work() -> None:
    async with aio.connect(["127.0.0.1:8050"]) as db:
        number: int = (await db.incr("n")).value
        async with db.lock("printer") as lock, db.lease(10) as lease, db.watch("n") as watch:
            print(number, lock.token, lease.id, watch.rev)
            async for event in watch:
                print(event.key)
        lease = await db.lease(3)
        await lease.revoke()


asyncio.run(work())
main()
"""


def mypy(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """What mypy says of a program outside this repository."""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    env = environment(MYPYPATH=str(REPOSITORY))
    return subprocess.run(
        [*command, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_program_that_uses_the_client_is_strictly_typed(tmp_path: Path) -> None:
    done = mypy(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_program_that_misuses_the_client_is_told_so(tmp_path: Path) -> None:
    done = mypy(tmp_path, PROGRAM.replace("rev=rev", 'rev="last"').replace("rev: int =", "rev: str ="))
    assert done.returncode == 1 and done.stdout.count("error:") == 2, done.stdout


def test_the_package_says_that_it_is_typed() -> None:
    assert (REPOSITORY / "ddb/py.typed").exists()
    assert '"py.typed"' in (REPOSITORY / "setup.py").read_text(encoding="utf-8")
