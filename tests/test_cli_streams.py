"""Standard streams that are full, closed or gone: a sentence and an exit code, never a traceback, and nothing half done."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddb import cli, console
from tests.fake_server import FakeServer
from tests.harness import environment

FULL = Path("/dev/full")
CLOSED = "ddb: Standard input or output is closed.\n"
ITEM = {"key": "a", "value": "x" * 100, "rev": 7, "created": 3, "version": 2}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    match request["op"]:
        case "get":
            return {"ok": True, "found": request["key"] == "a", **(ITEM if request["key"] == "a" else {})}
        case "scan":
            return {"ok": True, "items": [ITEM] * 300, "more": False, "rev": 7}
    return {"ok": True, "rev": 12, "value": 1, "count": 1, "client": 3}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as one:
        one.answer = answer
        yield one


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def ran(server: FakeServer, request: pytest.FixtureRequest) -> Any:
    """Runs a command line behind which the shell closes or redirects streams."""

    def run(line: str, redirections: str = "", **options: Any) -> tuple[int, str, str]:
        python, address = shlex.quote(sys.executable), server.address
        script = f"{python} -m ddb --server {address} {line} {redirections}"
        env = environment(PYTHONUNBUFFERED=request.param)
        settings = {"capture_output": True, "text": True, "timeout": 30, "stdin": subprocess.DEVNULL, **options}
        done = subprocess.run(["sh", "-c", script], env=env, **settings)
        return done.returncode, done.stdout, done.stderr

    return run


needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


@needs_full
@pytest.mark.parametrize("line", ["get a", "scan", "scan -o json", "put a b", "incr a", "completion zsh"])
def test_what_a_full_disk_does_not_take_is_told_in_a_sentence(ran: Any, line: str) -> None:
    assert ran(line, ">/dev/full") == (1, "", "ddb: No space left on device.\n")


@needs_full
def test_a_script_on_a_full_disk_fails(ran: Any) -> None:
    code, _, said = ran("shell", ">/dev/full", input="get a\n", stdin=None)
    assert (code, said) == (1, "ddb: No space left on device.\n")


@needs_full
@pytest.mark.parametrize(("line", "code"), [("get nothing", 3), ("put", 2), ("get a", 0)])
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_where_nobody_can_be_told_why_the_exit_code_tells_it(ran: Any, line: str, code: int, redirection: str) -> None:
    assert ran(line, redirection)[0] == code


@pytest.mark.parametrize("line", ["get a", "scan", "put a b"])
def test_a_closed_output_is_a_sentence(ran: Any, line: str) -> None:
    assert ran(line, ">&-") == (1, "", CLOSED)


@pytest.mark.parametrize("line", ["put a -", "get -", "txn -", "import -", "shell"])
def test_a_closed_input_is_no_empty_one(ran: Any, server: FakeServer, line: str) -> None:
    assert ran(line, "<&-") == (1, "", CLOSED)
    assert not {request["op"] for request in server.requests} - {"session_open", "session_close", "status"}


def test_a_closed_input_that_nobody_wants_does_no_harm(ran: Any) -> None:
    assert ran("get a", "<&-") == (0, "x" * 100 + "\n", "")


def test_no_connection_gets_the_number_of_a_closed_stream(ran: Any, server: FakeServer) -> None:
    """Or what is said to a closed stream would be said to the server."""
    assert ran("get nothing", "<&- >&- 2>&-")[0] == 3
    assert [request["op"] for request in server.requests] == ["get"]


def test_a_reader_that_went_away_before_anything_was_said_is_no_error_of_the_command(server: FakeServer) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "scan"]
    try:
        done = subprocess.run(
            argv, stdout=writing, stderr=subprocess.PIPE, env=environment(PYTHONUNBUFFERED=""), timeout=30
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", "latin-1:strict"])
def test_a_script_is_utf_8_whatever_the_locale_says(server: FakeServer, encoding: str) -> None:
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "shell"]
    env = environment(PYTHONIOENCODING=encoding, LC_ALL="C")
    script = 'put ø "→"\n'.encode() + b"put \xff x\n"
    done = subprocess.run(argv, input=script, capture_output=True, env=env, timeout=30)
    assert (done.returncode, done.stdout) == (2, b"revision 12\n")
    assert done.stderr.count(b"\n") == 1 and b"is not UTF-8" in done.stderr
    written = [(r["key"], r["value"]) for r in server.requests if r["op"] == "put"]
    assert written == [("ø", "→")]


def test_a_command_that_the_locale_can_t_name_is_a_sentence(server: FakeServer) -> None:
    server.answer = lambda request: (
        {"ok": True, "lease": 5, "ttl": 10.0}
        if request["op"] == "lease_grant"
        else {"ok": True, "items": [{**ITEM, "key": f"ddb/lock/l/{5:016x}"}], "more": False, "rev": 9, "deleted": 1}
    )
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "shell"]
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    script = "lock l -- true →\n"
    done = subprocess.run(argv, input=script.encode(), capture_output=True, env=env, timeout=30)
    assert done.stderr.decode() == "ddb: true can't be run: this locale has no '→'.\n" and done.returncode == 126


@pytest.mark.parametrize("line", ["put k -", "put k @FILE -t bytes", "get -", "get @FILE", "txn -"])
def test_an_input_without_an_end_is_refused_before_it_fills_the_memory(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.setattr(console, "INPUT_BYTES_MAX", 3 << 20)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        code = cli.main(["--server", server.address, *line.replace("FILE", "/dev/zero").split()])
    name = "/dev/zero" if "FILE" in line else "Standard input"
    assert (code, *capsys.readouterr()) == (2, "", f"ddb: {name} holds more than 3 MiB; `import` takes that much.\n")
    assert not server.requests
