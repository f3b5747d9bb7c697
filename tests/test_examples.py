"""The example in each public docstring of the client runs, against a real node, and answers what it says.

`db` is a client of that node, `servers` its address. Each docstring begins with an empty database. In aio.py `db` is an
asyncio client, and the examples may `await`.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import importlib
import inspect
import io
import re
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from typing import Any

import pytest

import ddb
from ddb import aio
from tests.harness import REPOSITORY, Cluster

ASYNCIO = ["aio", "aiooperations", "aioblocks", "aioleases", "aiowatching", "aiorecipes"]
BLOCKING = ["client", "operations", "attempts", "pipelines", "leases", "watching", "recipes"]
OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def examples_of(module: str) -> Iterator[tuple[str, str]]:
    """The names and docstrings of what is public in a module: its functions, classes, and their methods."""
    room = importlib.import_module(f"ddb.{module}")
    for name, thing in vars(room).items():
        if name.startswith("_") or getattr(thing, "__module__", "") != room.__name__:
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield name, inspect.getdoc(thing) or ""
        if inspect.isclass(thing):
            for part, value in vars(thing).items():
                if inspect.isfunction(value) and not part.startswith("_"):
                    yield f"{name}.{part}", value.__doc__ or ""


def run(code: types.CodeType, names: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
    """Execute one example, awaiting what it awaits."""
    waits = eval(code, names)  # the examples of this repository, and nobody else's
    if inspect.iscoroutine(waits):
        loop.run_until_complete(waits)


def said_by(example: doctest.Example, names: dict[str, Any], loop: asyncio.AbstractEventLoop) -> str:
    """What an interactive Python shows of one example."""
    shown = io.StringIO()
    show = sys.displayhook
    with contextlib.redirect_stdout(shown):
        try:
            code = compile(example.source, "<example>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            sys.displayhook = lambda value: print(repr(value)) if value is not None else None
            run(code, names, loop)
        except Exception as error:
            if example.exc_msg is None:
                raise AssertionError(f"line {example.lineno}: {example.source}{traceback.format_exc()}") from None
            kind = f"{type(error).__module__}.{type(error).__qualname__}"
            assert example.exc_msg.startswith(f"{kind}:"), f"{example.source} raised {error!r}"
            return ""
        finally:
            sys.displayhook = show
    assert example.exc_msg is None, f"{example.source} raised nothing"
    return shown.getvalue()


def check(text: str, names: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
    for example in doctest.DocTestParser().get_examples(text):
        said = said_by(example, names, loop)
        if example.exc_msg is None:
            right = doctest.OutputChecker().check_output(example.want, said, OPTIONS)
            assert right, f"{example.source}says\n{said}and not\n{example.want}"


def shown(rooms: list[str]) -> list[Any]:
    """The docstrings with examples, as parameters of a test."""
    return [
        pytest.param(text, id=f"{room}.{name}") for room in rooms for name, text in examples_of(room) if ">>>" in text
    ]


def empty(cluster: Cluster) -> None:
    with ddb.connect(cluster.addresses) as db:
        db.batch([{"op": "delete", "key": key} for key in [*db, "none"]])


@pytest.mark.parametrize("text", shown(BLOCKING))
def test_an_example_answers_what_it_says(alone: Cluster, text: str) -> None:
    empty(alone)
    before = set(threading.enumerate())
    with ddb.connect(alone.addresses) as db, contextlib.closing(asyncio.new_event_loop()) as loop:
        check(text, {"db": db, "servers": alone.addresses, "connect": ddb.connect}, loop)
    assert set(threading.enumerate()) <= before, "no thread outlives its block, or its client"


@pytest.mark.parametrize("text", shown(ASYNCIO))
def test_an_example_for_asyncio_answers_what_it_says(alone: Cluster, text: str) -> None:
    empty(alone)
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        db = aio.connect(alone.addresses)
        try:
            check(text, {"db": db, "servers": alone.addresses, "connect": aio.connect}, loop)
        finally:
            loop.run_until_complete(db.close())
        loop.run_until_complete(loop.shutdown_asyncgens())
        assert not asyncio.all_tasks(loop), "no task outlives its client"


@pytest.mark.parametrize("room", [*BLOCKING, *ASYNCIO])
def test_every_public_method_has_an_example(room: str) -> None:
    missing = {name for name, text in examples_of(room) if "." in name and ">>>" not in text}
    assert not missing - SHOWN_ELSEWHERE


SHOWN_ELSEWHERE = {
    "Barrier.release", "DoubleBarrier.leave", "Lease.close", "Lease.give_back", "Session.close", "Watch.start",
    "Later.settle", "Gathering.settle", "Client.ask", "Client.enter", "Client.leave", "Queue.close", "Counter.close",
    "Guest.close", "Numbers.numbered", "Queue.finish",
}  # fmt: skip


def names_of(thing: type) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("room", "twin", "names"),
    [
        ("client", "aio", ["Client", "connect"]),
        ("operations", "aiooperations", ["Operations"]),
        ("attempts", "aioblocks", ["Attempt"]),
        ("pipelines", "aioblocks", ["Pipeline"]),
        ("leases", "aioleases", ["Lease", "Session"]),
        ("watching", "aiowatching", ["Watch"]),
        (
            "recipes",
            "aiorecipes",
            ["Lock", "Semaphore", "Election", "Barrier", "DoubleBarrier", "Queue", "Task", "Counter"],
        ),
    ],
)
def test_the_asyncio_client_has_the_same_names_and_arguments(room: str, twin: str, names: list[str]) -> None:
    for name in names:
        blocking, awaited = (
            getattr(importlib.import_module(f"ddb.{room}"), name),
            getattr(importlib.import_module(f"ddb.{twin}"), name),
        )
        if inspect.isfunction(blocking):
            assert list(inspect.signature(blocking).parameters) == list(inspect.signature(awaited).parameters)
            continue
        extra = names_of(awaited) - names_of(blocking)
        assert not names_of(blocking) - names_of(awaited) and extra <= {"enter", "leave", "give_back"}
        for method in names_of(blocking):
            one, other = getattr(blocking, method), getattr(awaited, method)
            if inspect.isfunction(one):
                assert list(inspect.signature(one).parameters.items())[1:] == [] or [
                    (p.name, p.kind, p.default) for p in inspect.signature(one).parameters.values()
                ] == [(p.name, p.kind, p.default) for p in inspect.signature(other).parameters.values()], (
                    f"{name}.{method}"
                )


ARGUMENTS = {
    "error",
    "lost",
    "max_lag_s",
    "on_lost",
    "prev_kv",
    "timeout_s",
    "wait_s",
    "value",
    "version",
    "rev",
    "exists",
}
OTHERS = {"ddb", "connected", "suspended", "in", "sorted", "with", "event.kind", "read_only", "session"} | ARGUMENTS


def test_what_the_tables_name_as_a_counterpart_is_there() -> None:
    """In the tables of docs/client.md, what stands as code on the right is a name of this client."""
    text = (REPOSITORY / "docs/client.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| (.+) \|$", text, re.MULTILINE)
    rooms = [importlib.import_module(f"ddb.{room}") for room in (*BLOCKING, "results")]
    there = {name for room in rooms for name in vars(room)} | {
        "aio.connect",
        "ddb.connect",
        "ddb.aio.connect",
        "ddb.aio",
    }
    for thing in [thing for room in rooms for thing in vars(room).values() if inspect.isclass(thing)]:
        there |= names_of(thing) | {f"{thing.__name__}.{name}" for name in names_of(thing)}
    named = {found for row in rows for found in re.findall(r"`([\w.]+)[^`]*`", row)}
    unknown = {
        name for name in named if name not in there and name.removeprefix("watch.").removeprefix("queue.") not in there
    }
    assert len(rows) > 60 and unknown <= OTHERS, unknown - OTHERS
