"""The command line's promises: what goes to which stream, and what each exit code means."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ddb import cli, errors
from ddb.overview import wants_colour
from tests.fake_server import FakeServer, failure
from tests.harness import REPOSITORY, environment, wait
from tests.terminal import Terminal


@dataclass
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as one:
        yield one


@pytest.fixture
def ddb(server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process against the fake server."""
    monkeypatch.setenv("DDB_SERVER", server.address)

    def run(*argv: str) -> Ran:
        code = cli.main(list(argv))
        return Ran(code, *capsys.readouterr())

    return run


def item(key: str, value: Any, rev: int = 7) -> dict[str, Any]:
    return {"key": key, "value": value, "rev": rev, "created": 3, "version": 2}


def command(*argv: str | bytes, server: str = "127.0.0.1:1", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs a command line as a process of its own."""
    whole = [sys.executable, "-m", "ddb", "--server", server, *argv]
    return subprocess.run(whole, capture_output=True, env=environment(), timeout=30, **options)


# Values in and out


def test_a_value_is_text_unless_its_type_is_named(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "rev": 12}
    assert ddb("put", "n", "5") == Ran(0, "revision 12\n", "")
    ddb("put", "n", "5", "--type", "json")
    ddb("put", "n", "5", "--type", "bytes")
    assert [r["value"] for r in server.requests] == ["5", 5, {"$b64": "NQ=="}]


@pytest.mark.parametrize(
    ("value", "shown"), [("Oslo", "Oslo\n"), ("", "\n"), ("1\n2", "1\n2\n"), ({"a": [1, "ø"]}, '{"a":[1,"ø"]}\n')]
)
def test_get_shows_text_as_it_is_and_anything_else_as_json(
    server: FakeServer, ddb: Run, value: Any, shown: str
) -> None:
    server.answer = lambda request: {"ok": True, "found": True, **item("k", value)}
    assert ddb("get", "k") == Ran(0, shown, "")


def test_bytes_pass_through_put_and_get_unchanged(server: FakeServer) -> None:
    kept: list[Any] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "put":
            kept.append(request["value"])
            return {"ok": True, "rev": 1}
        return {"ok": True, "found": True, **item("k", kept[-1])}

    server.answer = answer
    raw = bytes(range(256))
    assert command("put", "k", "-", "--type", "bytes", server=server.address, input=raw).returncode == 0
    assert command("get", "k", server=server.address).stdout == raw


def test_a_dash_reads_the_value_from_standard_input(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1}
    command("put", "k", "-", server=server.address, input="på\n".encode())
    command("put", "k", "-", "--type", "json", server=server.address, input=b' {"a": 1}\n')
    assert [r["value"] for r in server.requests] == ["på\n", {"a": 1}]


def test_standard_input_that_is_no_text_gets_a_sentence() -> None:
    ran = command("put", "k", "-", input=b"\xff\xfe")
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr == b"ddb: Standard input is not UTF-8; for other bytes say --type bytes.\n"


@pytest.mark.parametrize(
    "words",
    [
        ["scan", "\udcff"], ["scan", "--start", "\udcff"], ["count", "--end", "\udcff"], ["incr", "\udcff"], ["watch", "\udcff"],
        ["watch", "--key", "\udcff"], ["history", "\udcff"], ["history", "--prefix", "\udcff"], ["diff", "1", "2", "\udcff"],
        ["export", "-", "--prefix", "\udcff"], ["import", "-", "--into", "\udcff"],
    ],
)  # fmt: skip
def test_a_key_that_is_no_text_gets_a_sentence(words: list[str]) -> None:
    ran = command(*words)
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr.count(b"\n") == 1 and b"b'\\xff' is not UTF-8, as all keys are" in ran.stderr


def test_json_prints_the_reply_as_it_came(server: FakeServer, ddb: Run) -> None:
    reply = {"ok": True, "found": True, **item("k", {"$b64": "AQ=="}), "new": "field"}
    server.answer = lambda request: reply
    assert json.loads(ddb("get", "k", "--json").out) == reply
    assert json.loads(ddb("--json", "get", "k").out) == reply


def test_output_is_utf_8_whatever_the_locale_says(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "found": True, **item("k", "Ærø \U0001f30a")}
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "get", "k"]
    env = environment(PYTHONIOENCODING="ascii", LC_ALL="C")
    assert subprocess.run(argv, capture_output=True, env=env, check=True).stdout.decode() == "Ærø \U0001f30a\n"


# Formats


def test_results_come_as_tables_csv_json_or_raw_values(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "found": True, **item("k", "a,b")}
    assert (
        ddb("get", "k", "-o", "table").out == "KEY  VALUE  REV  CREATED  VERSION\nk    a,b      7        3        2\n"
    )
    assert ddb("get", "k", "-o", "csv").out == 'key,value,rev,created,version\r\nk,"a,b",7,3,2\r\n'
    assert ddb("-o", "raw", "get", "k").out == "a,b"
    assert ddb("get", "k", "-o", "json").out == ddb("get", "k", "--json").out
    server.answer = lambda request: {"ok": True, "items": [item("a", 1), item("b", "x")], "more": False, "rev": 9}
    assert ddb("scan", "-o", "raw").out == "1\nx\n"
    assert ddb("scan", "-o", "csv", "--keys-only").out.splitlines() == ["key,rev,created,version", "a,7,3,2", "b,7,3,2"]
    server.answer = lambda request: {"ok": True, "rev": 12, "version": 1, "value": 5, "count": 3}
    assert ddb("put", "k", "v", "-o", "csv").out.splitlines() == ["key,rev,version", "k,12,1"]
    assert ddb("put", "k", "v", "-o", "raw").out == "12\n"
    assert ddb("incr", "k", "-o", "raw").out == "5\n"
    assert ddb("count", "-o", "table").out.splitlines() == ["COUNT  REV", "    3   12"]


def test_a_format_that_a_command_does_not_have_is_a_usage_error(ddb: Run) -> None:
    for argv in (["get", "k", "-o", "xml"], ["-o", "csv", "verify"], ["verify", "-o", "csv"], ["-o", "raw", "status"]):
        ran = ddb(*argv)
        assert (ran.code, ran.out) == (2, "") and re.fullmatch(r"ddb[^\n]*\n", ran.err)


def test_several_keys_are_shown_each_with_its_value(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "found": request["key"] != "c", **item(request["key"], request["key"])}
    ran = ddb("get", "a", "b", "c")
    assert ran == Ran(3, "a\ta\nb\tb\n", "ddb: There is nothing under 'c'.\n")


# Keys and values from elsewhere


def test_keys_and_values_come_from_files_and_standard_input(server: FakeServer, ddb: Run, tmp_path: Path) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1, "deleted": 1, "found": True, **item("k", "v")}
    text, raw, keys = tmp_path / "text", tmp_path / "raw", tmp_path / "keys"
    text.write_text("på\n")
    raw.write_bytes(b"\x00\xff")
    keys.write_text("one\ntwo words\n@odd\n")
    ddb("put", "k", f"@{text}")
    ddb("put", "k", f"@{raw}", "--bytes")
    ddb("put", "k", "AP8=", "-t", "base64")
    ddb("put", "k", "@@handle")
    ddb("put", f"@{text}", "v")
    assert [(r["key"], r["value"]) for r in server.requests] == [
        ("k", "på\n"), ("k", {"$b64": "AP8="}), ("k", {"$b64": "AP8="}), ("k", "@handle"), ("på", "v"),
    ]  # fmt: skip
    server.requests.clear()
    ddb("del", f"@{keys}", "@@three")
    assert [r["key"] for r in server.requests] == ["one", "two words", "@odd", "@three"]
    server.requests.clear()
    command("get", "-", server=server.address, input=b"a\nb\n")
    assert [r["key"] for r in server.requests] == ["a", "b"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["put", "-", "-"], 2),
        (["put", "k", "@"], 2),
        (["put", "k", "@/nonexistent"], 1),
        (["put", "k", "!", "-t", "base64"], 2),
    ],
)
def test_what_can_t_be_read_gets_a_sentence(ddb: Run, argv: list[str], code: int) -> None:
    ran = ddb(*argv)
    assert ran.code == code and re.fullmatch(r"ddb: [^\n]+\n", ran.err)


def test_an_argument_that_is_no_text_is_a_value_at_most(server: FakeServer) -> None:
    server.answer = lambda request: {"ok": True, "rev": 1}
    assert command("get", b"\xff", server=server.address).stderr.startswith(
        b"ddb: A key or value on the command line is"
    )
    assert command("put", "k", b"\xff", "--bytes", server=server.address).returncode == 0
    assert [r["value"] for r in server.requests] == [{"$b64": "/w=="}]


def test_bytes_are_not_let_loose_on_a_terminal(server: FakeServer, tmp_path: Path) -> None:
    server.answer = lambda request: {"ok": True, "found": True, **item("k", {"$b64": "G1sySg=="})}
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "get", "k"]
    with Terminal(argv, tmp_path, environment(), False) as terminal:
        terminal.wait_for('{"$b64":"G1sySg=="}')


# Exit codes


def test_a_missing_key_is_3(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "found": False, "key": "k", "deleted": 0, "rev": 4}
    assert ddb("get", "k") == Ran(3, "", "ddb: There is nothing under 'k'.\n")
    assert ddb("del", "k") == Ran(3, "", "ddb: There was nothing under 'k'.\n")
    assert ddb("get", "k", "--json").code == 3


def test_a_condition_that_does_not_hold_is_4(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "applied": False, "found": True, "value": "x", "rev": 9}
    ran = ddb("put", "k", "v", "--if-rev", "8")
    assert ran == Ran(4, "", "ddb: The condition does not hold, nothing was changed: 'k' is at revision 9.\n")
    server.answer = lambda request: {"ok": True, "applied": False, "found": False, "rev": 0, "deleted": 0}
    assert ddb("del", "k", "--if-exists").code == 4
    server.answer = lambda request: {"ok": True, "succeeded": False, "results": [], "rev": 9}
    assert ddb("txn", '{"if":[{"key":"a","exists":true}]}').code == 4


def test_the_conditions_of_a_write_all_reach_the_server(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "rev": 9}
    ddb("put", "k", "1", "--type", "json", "--if-rev", "8", "--if-version", "2", "--if-value", "0", "--if-exists")
    ddb("put", "k", "v", "--if-absent")
    assert server.requests[0]["if"] == [{"rev": 8}, {"version": 2}, {"value": 0}, {"exists": True}]
    assert server.requests[1]["if"] == [{"exists": False}]


@pytest.mark.parametrize(
    ("code", "exit_code"), [("no_leader", 5), ("timeout", 6), ("bad_request", 1), ("read_only", 1)]
)
def test_a_failure_is_one_sentence_and_its_exit_code(server: FakeServer, ddb: Run, code: str, exit_code: int) -> None:
    server.answer = lambda request: failure(code)
    assert ddb("put", "k", "v", "--timeout", "0.1") == Ran(exit_code, "", f"ddb: The fake server says {code}.\n")
    assert exit_code == errors.BY_CODE[code].exit_code


def test_a_write_without_an_answer_is_6_and_a_read_is_5(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: None
    assert ddb("incr", "n", "--timeout", "0.1").code == 6
    assert ddb("get", "n", "--timeout", "0.1").code == 5


def test_nobody_there_is_5(server: FakeServer, ddb: Run) -> None:
    server.close()
    ran = ddb("get", "k", "--timeout", "0.5")
    assert ran.code == 5
    assert ran.err == f"ddb: No server answered: {server.address} can't be reached (connection refused).\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["get"],
        ["get", "k", "--frobnicate"],
        ["put", "k", "{", "--type", "json"],
        ["put", "k", "NaN", "--type", "json"],
        ["put", "k", "v", "--if-rev", "-1"],
        ["put", "k", "v", "--if-absent", "--if-exists"],
        ["incr", "k", "much"],
        ["scan", "a", "--start", "b"],
        ["scan", "--limit", "0"],
        ["txn", "{}"],
        ["txn", "{nonsense"],
        ["get", "k", "--timeout", "nan"],
        ["get", "k", "--timeo", "1"],
        ["get", "k", "--server", "nowhere"],
        ["get", "k", "--timeout", "-1"],
        ["up", "--nodes", "0"],
        ["up", "--port", "70000"],
        ["up", "--election", "coin"],
    ],
)
def test_bad_usage_is_2_and_one_line(ddb: Run, argv: list[str]) -> None:
    ran = ddb(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"ddb[^\n]*: [^\n]+\n", ran.err)


def test_a_file_that_is_not_there_gets_a_sentence(ddb: Run) -> None:
    assert ddb("txn", "/nonexistent/txn.json") == Ran(1, "", "ddb: No such file or directory: /nonexistent/txn.json.\n")


def test_ctrl_c_is_130(server: FakeServer) -> None:
    server.silent = True
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "put", "k", "v", "--timeout", "60"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait(lambda: server.requests, what="the request arrives")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_while_the_program_is_still_being_loaded_is_130_too(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt  # as if it had come just here")
    env = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    for argv in ([sys.executable, "-m", "ddb"], [sys.executable, "-S", str(REPOSITORY / "bin/ddb")]):
        ran = subprocess.run([*argv, "--help"], env=env, capture_output=True, timeout=30)
        assert (ran.returncode, ran.stdout, ran.stderr) == (130, b"", b"")


def test_a_reader_that_has_seen_enough_causes_no_traceback(server: FakeServer) -> None:
    page = [item(f"key{n}", "x" * 1000) for n in range(1000)]
    server.answer = lambda request: {"ok": True, "items": page, "more": False, "rev": 1}
    argv = [sys.executable, "-m", "ddb", "--server", server.address, "scan"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"key0\t")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# Commands


def test_scan_shows_a_line_for_each_item_and_goes_on_until_the_end(server: FakeServer, ddb: Run) -> None:
    pages = [
        {"ok": True, "items": [item("a", "one"), item("b", "two\nlines")], "more": True, "rev": 9},
        {"ok": True, "items": [item("c", 3)], "more": False, "rev": 9},
    ]
    server.answer = lambda request: pages[len(server.requests) - 1]
    assert ddb("scan").out == 'a\tone\nb\t"two\\nlines"\nc\t3\n'
    assert server.requests[1]["start"] == "b\0"


def test_scan_takes_no_more_than_its_limit(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: {"ok": True, "items": [item("a", 1)], "more": True, "rev": 9}
    assert ddb("scan", "a", "--limit", "2", "--keys-only", "--reverse").out == "a\na\n"
    assert [r["limit"] for r in server.requests] == [2, 1]
    assert server.requests[1] == {**server.requests[1], "start": "a", "end": "a", "reverse": True, "keys_only": True}


def test_count_incr_and_the_cluster_commands_show_their_result(server: FakeServer, ddb: Run) -> None:
    replies: dict[str, dict[str, Any]] = {
        "count": {"count": 4},
        "incr": {"value": -2, "rev": 8},
        "member_remove": {"rev": 9},
        "member_promote": {"rev": 10},
        "transfer": {"leader": "h:2", "name": "n2"},
        "snapshot": {"rev": 11},
        "ping": {"node": "n1", "time": 5.0},
    }
    server.answer = lambda request: {"ok": True, **replies[request["op"]]}
    assert ddb("count", "user/", "--stale", "--max-lag", "2").out == "4\n"
    assert server.requests[0]["read"] == "stale" and server.requests[0]["max_lag"] == 2
    assert ddb("incr", "n", "-3").out == "-2\n"
    assert server.requests[1]["by"] == -3
    assert ddb("remove", "n3").out == "n3 is no member any more, since revision 9\n"
    assert ddb("promote", "n4").out == "n4 is a voter since revision 10\n"
    assert ddb("transfer").out == "the leader is n2 at h:2\n"
    assert ddb("snapshot").out == "revision 11 is in the snapshot on disk\n"
    assert re.fullmatch(r"n1 answered in \d+\.\d ms\n", ddb("ping").out)


def test_a_transaction_comes_from_the_argument_a_file_or_standard_input(
    server: FakeServer, ddb: Run, tmp_path: Path
) -> None:
    server.answer = lambda request: {"ok": True, "succeeded": True, "results": [{"ok": True, "rev": 5}], "rev": 5}
    text = '{"then":[{"op":"put","key":"a","value":1}]}'
    file = tmp_path / "txn.json"
    file.write_text(text)
    shown = 'succeeded at revision 5\n{"ok":true,"rev":5}\n'
    assert ddb("txn", text) == Ran(0, shown, "")
    assert ddb("txn", str(file)) == Ran(0, shown, "")
    assert command("txn", server=server.address, input=text.encode()).stdout.decode() == shown
    assert [r["then"] for r in server.requests] == [[{"op": "put", "key": "a", "value": 1}]] * 3


def status_of(name: str, role: str, commit: int, applied: int, members: list[dict[str, Any]]) -> dict[str, Any]:
    log = {"first": 1, "last": commit, "commit": commit, "applied": applied, "persisted": commit}
    return {"ok": True, "node": name, "id": name * 2, "role": role, "term": 4, "log": log, "members": members}


def test_status_asks_every_member_and_shows_one_aligned_table(server: FakeServer, ddb: Run) -> None:
    with FakeServer() as other, socket.create_server(("127.0.0.1", 0)) as frozen:
        silent = f"127.0.0.1:{frozen.getsockname()[1]}"
        named = {"n1": server.address, "n2": other.address, "n3": silent}
        members = [{"name": name, "address": address, "role": "voter"} for name, address in named.items()]
        server.answer = lambda request: status_of("n1", "follower", 90, 88, members)
        other.answer = lambda request: status_of("n2", "leader", 100, 100, members)
        ran = ddb("status", "--timeout", "0.2")
        gone = [json.loads(line) for line in ddb("status", "--timeout", "0.2", "--json").out.splitlines()]
    width = max(map(len, named.values()))
    assert ran.code == 0
    assert ran.out.splitlines() == [
        f"NAME  ROLE         TERM  {'ADDRESS':{width}}  LAST  COMMIT  APPLIED  LAG",
        f"n1    follower        4  {server.address:{width}}    90      90       88   12",
        f"n2    leader          4  {other.address:{width}}   100     100      100    0",
        f"n3    unreachable     -  {silent:{width}}     -       -        -    -",
    ]
    assert [(s["ok"], s["node"]) for s in gone] == [(True, "n1"), (True, "n2"), (False, "n3")]
    assert gone[2]["error"] == "unreachable"


def test_status_without_a_leader_is_5(server: FakeServer, ddb: Run) -> None:
    server.answer = lambda request: status_of("n1", "candidate", 3, 3, [])
    ran = ddb("status")
    assert (ran.code, ran.err) == (5, "ddb: There is no leader now.\n")
    assert "candidate" in ran.out


def test_members_shows_what_the_leader_knows(server: FakeServer, ddb: Run) -> None:
    known = {
        "name": "n1",
        "id": "u1",
        "address": "h:1",
        "role": "voter",
        "alive": True,
        "match": 12,
        "last_heard": 0.04,
    }
    unknown = {"name": "n2", "id": "u2", "address": "h:2", "role": "learner"}
    server.answer = lambda request: {"ok": True, "members": [unknown, known]}
    assert ddb("members").out.splitlines() == [
        "NAME  ROLE     ADDRESS  ALIVE  MATCH  HEARD      ID",
        "n1    voter    h:1      yes       12  0.0 s ago  u1",
        "n2    learner  h:2      -          -  -          u2",
    ]


def test_log_shows_commands_as_json_and_configurations_as_names(server: FakeServer, ddb: Run) -> None:
    config = {"members": [{"name": "n2", "voter": False}, {"name": "n1", "voter": True}]}
    entries = [
        {"index": 9, "term": 2, "at": 1, "command": ["put", "k", {"a": 1}]},
        {"index": 10, "term": 3, "at": 2, "config": config},
    ]
    server.answer = lambda request: {"ok": True, "entries": entries}
    shown = '       9 @2  ["put","k",{"a":1}]\n      10 @3  members: n1, n2 (learner)\n'
    assert ddb("log", "--from", "9", "--limit", "2") == Ran(0, shown, "")
    assert {"from": 9, "limit": 2}.items() <= server.requests[0].items()


def test_colours_are_for_terminals_of_people_who_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal())  # type: ignore[arg-type]
    with open(os.devnull) as nowhere:
        assert not wants_colour(nowhere)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself_with_examples_that_parse(ddb: Run, name: str) -> None:
    ran = ddb(name, "--help")
    assert ran.code == 0
    for example in cli.COMMANDS[name].examples:
        assert example in ran.out
        used = [part for part in re.split(r" \| | > | < ", example) if part.startswith(f"ddb {name}")]
        assert used
        assert cli.parse(shlex.split(used[0])[1:]).command == name


@pytest.mark.parametrize("launcher", ["ddb", "ddb-node", "ddb-registry"])
def test_the_launchers_work_from_any_directory_and_through_links(launcher: str, tmp_path: Path) -> None:
    link = tmp_path / launcher
    link.symlink_to(REPOSITORY / "bin" / launcher)
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    ran = subprocess.run([str(link), "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert "usage" in ran.stdout
