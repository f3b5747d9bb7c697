"""The commands about change and about holding something, against a real node: watch, history, diff, lock, elect, lease."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddb import clichanges
from ddb.client import Client, connect
from tests.fake_server import FakeServer, failure
from tests.harness import Cluster, environment, wait
from tests.terminal import CTRL_C, ENTER, Terminal


def arguments(client: Client, *argv: str) -> list[str]:
    return [sys.executable, "-m", "ddb", "--server", client.servers[0], *argv]


def ddb(client: Client, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    settings = {"capture_output": True, "text": True, "timeout": 30, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(arguments(client, *argv), env=environment(), **settings)


@contextlib.contextmanager
def running(client: Client, *argv: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in the background; killed in the end, whatever happens."""
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(arguments(client, *argv), env=environment(), text=True, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def gone(pid: int) -> bool:
    """Whether no process has this id, but for one that nobody has buried yet."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


# watch


def test_watch_shows_what_happened_from_a_revision_on(client: Client) -> None:
    first = client.put("city/a", "Oslo").rev
    client.put("else", 1)
    client.put("city/b", {"n": 1})
    client.delete("city/a")
    ran = ddb(client, "watch", "city/", "--from", str(first), "--limit", "3")
    assert (
        ran.stdout == f'{first}\tput\tcity/a\tOslo\n{first + 2}\tput\tcity/b\t{{"n":1}}\n{first + 3}\tdelete\tcity/a\n'
    )
    ran = ddb(client, "watch", "--key", "city/b", "--from", str(first), "--limit", "1", "-o", "json")
    assert json.loads(ran.stdout) == {
        "event": "put",
        "key": "city/b",
        "value": {"n": 1},
        "rev": first + 2,
        "version": 1,
    }
    assert ddb(client, "watch", "--from", str(first), "--limit", "1", "-o", "csv").stdout.startswith(
        "rev,event,key,value"
    )
    assert ddb(client, "watch", "--from", str(first), "--limit", "1", "-o", "raw").stdout == "Oslo\n"


def test_watch_tells_at_once_and_ends_with_ctrl_c(client: Client) -> None:
    with running(client, "watch", "live/") as process:
        assert process.stdout is not None
        lines: list[str] = []

        def heard() -> bool:
            client.put("live/x", len(lines))
            os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
            with contextlib.suppress(BlockingIOError, TypeError):
                lines.append(process.stdout.readline())  # type: ignore[union-attr]
            return any("live/x" in line for line in lines)

        wait(heard, what="a change is told")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_what_is_compacted_gets_a_sentence() -> None:
    told = failure("compacted", oldest=7)
    with FakeServer(lambda request: told) as server, connect(server.address) as client:
        ran = ddb(client, "watch", "--from", "1", "--timeout", "0.2")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "ddb: The fake server says compacted.\n"


def test_a_command_is_told_of_each_change_one_at_a_time(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = tmp_path / "handle.py"
    script.write_text(
        "import json, os, sys\n"
        "told = {name: text for name, text in os.environ.items() if name.startswith('DDB_')}\n"
        f"file = open({str(out)!r}, 'a')\n"
        "file.write(json.dumps([sys.argv[1:], told, json.load(sys.stdin)]) + '\\n')\n"
        "sys.exit(int(told['DDB_EVENT'] == 'delete'))\n"
    )
    first = client.put("k", "v 'w' $(touch pwned) ; \"x\"").rev
    client.put("k", {"a": 1})
    client.put("k", "with\0nul")
    client.delete("k")
    command = f"{sys.executable} {script} 'one word' $HOME"
    ran = ddb(client, "watch", "--from", str(first), "--limit", "4", "--exec", command, cwd=tmp_path)
    assert ran.returncode == 1  # one of them ended so
    assert "ended with 1 at revision" in ran.stderr
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one[0] for one in told] == [["one word", "$HOME"]] * 4
    assert not (tmp_path / "pwned").exists()
    variables = [one[1] for one in told]
    put = {"DDB_EVENT": "put", "DDB_KEY": "k"}
    assert variables[0] == {
        **put,
        "DDB_REV": str(first),
        "DDB_VERSION": "1",
        "DDB_VALUE": "v 'w' $(touch pwned) ; \"x\"",
    }
    assert variables[1]["DDB_VALUE"] == '{"a":1}'
    assert "DDB_VALUE" not in variables[2] and told[2][2]["value"] == "with\0nul"
    assert variables[3] == {"DDB_EVENT": "delete", "DDB_KEY": "k", "DDB_REV": str(first + 3)}


def test_what_a_variable_can_t_hold_stands_in_the_input_only() -> None:
    message = {"event": "put", "key": "a\0b", "value": "x" * 200_000, "rev": 1, "version": 1}
    assert set(clichanges.variables(message)) == {"DDB_EVENT", "DDB_REV", "DDB_VERSION"}


@pytest.mark.parametrize("command", ["", "'", "/nonexistent/program"])
def test_a_command_that_can_t_be_run_is_a_usage_error(client: Client, command: str) -> None:
    first = client.put("k", 1).rev
    ran = ddb(client, "watch", "--from", str(first), "--exec", command)
    assert ran.returncode == 2
    assert re.fullmatch(r"ddb: [^\n]+\n", ran.stderr)


# history, diff, get --rev


def test_history_tells_who_wrote_what_and_when(client: Client) -> None:
    first = client.put("h/a", 1).rev
    client.put("h/a", 2)
    client.put("h/b", "x")
    client.delete("h/a")
    reply = json.loads(ddb(client, "history", "h/a", "--from", str(first), "-o", "json").stdout)
    assert [(c["event"], c.get("value"), c["rev"]) for c in reply["changes"]] == [
        ("put", 1, first), ("put", 2, first + 1), ("delete", None, first + 3),
    ]  # fmt: skip
    table = ddb(client, "history", "--prefix", "h/", "--from", str(first), "--reverse", "--limit", "2").stdout
    heading, *rows = table.splitlines()
    assert heading.split() == ["REV", "AT", "TERM", "CLIENT", "EVENT", "KEY", "VALUE", "VERSION"]
    assert [row.split()[0] for row in rows] == [str(first + 3), str(first + 2)]
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", rows[0])
    assert ddb(client, "history", "h/a", "--from", str(first), "-o", "csv").stdout.count("\n") == 4
    ran = ddb(client, "history", "nothing/there")
    assert (ran.returncode, ran.stdout) == (0, "") or "REV" in ran.stdout
    assert "Nothing has changed there" in ran.stderr


def test_history_goes_on_over_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    first = client.put("p", 0).rev
    for n in range(1, 30):
        client.put("p", n)
    for extra in ([], ["--reverse"]):
        out = ddb(client, "history", "p", "--from", str(first), "--limit", "25", "-o", "csv", *extra).stdout
        assert len(out.splitlines()) == 26


def test_diff_shows_what_differs_and_nothing_else(client: Client) -> None:
    client.put("d/gone", "old")
    client.put("d/same", "x")
    client.put("d/back", "x")
    old = client.put("d/changed", 1).rev
    client.put("d/changed", 2)
    client.delete("d/gone")
    client.put("d/back", "y")
    client.put("d/new", {"n": 1})
    client.put("d/brief", 1)
    client.delete("d/brief")
    new = client.put("d/back", "x").rev
    out = ddb(client, "diff", str(old), str(new), "d/").stdout
    assert out == '- d/changed\t1\n+ d/changed\t2\n- d/gone\told\n+ d/new\t{"n":1}\n'
    lines = [json.loads(line) for line in ddb(client, "diff", str(old), str(new), "-o", "json").stdout.splitlines()]
    assert lines[0] == {"change": "changed", "key": "d/changed", "old": 1, "new": 2}
    assert ddb(client, "diff", str(new), str(new)).stdout == ""
    assert ddb(client, "diff", str(new), str(old)).returncode == 2


def test_get_shows_a_key_as_it_was(client: Client) -> None:
    first = client.put("g", "one").rev
    client.put("g", "two")
    assert ddb(client, "get", "g", "--rev", str(first)).stdout == "one\n"
    assert ddb(client, "get", "g", "--rev", str(first - 1)).returncode in (1, 3)
    assert ddb(client, "get", "g", "--rev", "999999999").returncode == 1


# lock, elect, lease

SHOW = "import os; print(os.environ['DDB_LOCK'], os.environ['DDB_TOKEN'], os.environ['DDB_LOCK_KEY'])"
FOREVER = "import time, sys; print('begun', flush=True); time.sleep(1000)"


def test_a_command_runs_while_the_lock_is_held_and_its_exit_code_is_the_result(client: Client) -> None:
    ran = ddb(client, "lock", "job", "--ttl", "5", "--", sys.executable, "-c", f"{SHOW}; raise SystemExit(7)")
    assert ran.returncode == 7
    name, token, key = ran.stdout.split()
    assert name == "job" and int(token) > 0
    assert client.get(key) is None  # given back
    again = ddb(client, "lock", "job", "--", sys.executable, "-c", SHOW)
    assert int(again.stdout.split()[1]) > int(token)
    assert ddb(client, "lock", "job", "--", "/nonexistent/program").returncode == 127
    assert ddb(client, "lock", "job", "--", "/etc/passwd").returncode == 126
    assert (
        ddb(client, "lock", "job", "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").returncode == 137
    )


def test_a_lock_that_somebody_else_holds_is_waited_for_or_given_up(client: Client) -> None:
    with client.lock("taken", value="Ada"):
        ran = ddb(client, "lock", "taken", "--wait", "0", "--", "true")
        assert (ran.returncode, ran.stdout) == (4, "")
        assert ran.stderr == "ddb: 'taken' was not to be had within 0 s; it is held by Ada.\n"
        with running(client, "lock", "taken", "--", "echo", "mine") as process:
            assert process.stdout is not None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            client.lease_revoke(client.leases()[0].id)
            assert process.stdout.read() == "mine\n"
            assert process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_passed_on(client: Client, number: signal.Signals) -> None:
    code = f"import signal, sys; signal.signal({number:d}, lambda *_: sys.exit(42)); " + FOREVER
    with running(client, "lock", "signals", "--", sys.executable, "-c", code) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(10) == 42
    assert not client.leases()


def test_a_command_at_a_terminal_can_be_typed_to_and_gets_ctrl_c_once(client: Client, tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; caught = []; signal.signal(signal.SIGINT, lambda *_: caught.append(1)); "
        "print('typed', input('type: '), flush=True)\nwhile not caught: time.sleep(0.01)\n"
        "time.sleep(0.3); print('caught', len(caught), flush=True)"
    )
    argv = arguments(client, "lock", "terminal", "--", sys.executable, "-c", code)
    with Terminal(argv, tmp_path, environment(), False) as terminal:
        terminal.wait_for("type: ")
        terminal.type("hello" + ENTER)
        terminal.wait_for("typed hello")
        terminal.type(CTRL_C)
        terminal.wait_for("caught 1")
        terminal.wait_ended()


def test_a_lost_lock_kills_the_command_and_what_it_started(client: Client) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
        "print(p.pid, flush=True); p.wait()"
    )
    with running(client, "lock", "lost", "--ttl", "1", "--", sys.executable, "-c", code) as process:
        assert process.stdout is not None and process.stderr is not None
        grandchild = int(process.stdout.readline())
        (lease,) = client.leases()
        client.lease_revoke(lease.id)
        assert process.wait(10) == 1
        assert process.stderr.read() == "ddb: 'lost' may have been lost, so the command was killed.\n"
    wait(lambda: gone(grandchild), what="the grandchild is gone")


def test_a_holder_that_is_killed_while_it_waits_leaves_the_line(client: Client) -> None:
    with client.lock("line"):
        with running(client, "lock", "line", "--", "true") as process:
            wait(lambda: len(client.leases()) == 2, what="it stands in line")
            process.terminate()
            assert process.wait(10) == 130
        wait(lambda: len(client.leases()) == 1, what="it has left the line")


def test_without_a_command_it_is_held_until_ctrl_c(client: Client) -> None:
    with running(client, "lock", "plain") as process:
        assert process.stdout is not None
        assert re.fullmatch(r"held, token \d+; Ctrl-C ends it\n", process.stdout.readline())
        assert not client.lock("plain").acquire(wait_s=0)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    lock = client.lock("plain")
    assert lock.acquire(wait_s=5)
    lock.release()


def test_options_behind_the_dashes_are_the_command_s(client: Client) -> None:
    ran = ddb(
        client, "lock", "dashes", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", "--help", "--", "-x"
    )
    assert ran.stdout == "['--help', '--', '-x']\n"


def test_one_leads_and_the_others_see_who(client: Client) -> None:
    with running(client, "elect", "mayor", "--observe") as observer:
        assert observer.stdout is not None
        assert observer.stdout.readline() == "nobody leads\n"
        ran = ddb(client, "elect", "mayor", "--value", "Ada", "--", sys.executable, "-c", SHOW)
        token = ran.stdout.split()[1]
        assert observer.stdout.readline() == f"Ada leads, token {token}\n"
        assert observer.stdout.readline() == "nobody leads\n"
    out = ddb(client, "elect", "mayor", "--observe", "--limit", "1", "-o", "json").stdout
    assert json.loads(out) == {"token": None, "value": None}
    assert ddb(client, "elect", "mayor", "--observe", "--", "true").returncode == 2


def test_leases_are_granted_kept_listed_and_revoked(client: Client) -> None:
    lease = ddb(client, "lease", "grant", "60").stdout.strip()
    assert ddb(client, "put", "leased", "x", "--lease", lease).returncode == 0
    listed = ddb(client, "lease", "list", "-o", "csv").stdout.splitlines()
    assert listed[0] == "lease,ttl,keys,remaining"
    assert any(line.startswith(f"{lease},60,1,") for line in listed)
    assert ddb(client, "lease", "keepalive", lease, "--once").stdout == f"{lease} is kept alive, 60 s at a time\n"
    assert re.fullmatch(r"revoked at revision \d+, and 1 keys with it\n", ddb(client, "lease", "revoke", lease).stdout)
    assert client.get("leased") is None
    for action in ("keepalive", "revoke"):
        ran = ddb(client, "lease", action, lease)
        assert ran.returncode == 1 and re.fullmatch(r"ddb: [^\n]+\n", ran.stderr)


def test_a_lease_is_kept_alive_until_ctrl_c_and_then_runs_out(client: Client) -> None:
    lease = ddb(client, "lease", "grant", "1").stdout.strip()
    client.put("alive", "x", lease=int(lease))
    with running(client, "lease", "keepalive", lease) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{lease} is kept alive, 1 s at a time; Ctrl-C ends it\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        assert client.get("alive") is not None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    wait(lambda: client.get("alive") is None, what="it has run out")


@pytest.mark.parametrize(
    "argv",
    [["lease"], ["lease", "grant"], ["lease", "grant", "x"], ["lease", "grant", "0"], ["lease", "grant", "inf"],
     ["lease", "grant", "nan"], ["lease", "grant", "1e9"], ["lease", "revoke", "x"], ["lease", "revoke", "²"],
     ["lease", "revoke", "9" * 5000], ["lease", "keepalive", "0" * 5000], ["lease", "list", "5"], ["lock"],
     ["lock", "", "--", "true"], ["elect", ""], ["elect", "", "--observe"], ["lock", "x" * 5000, "--", "true"],
     ["lock", "/" * 1400, "--", "true"], ["lock", "\udcff", "--", "true"], ["lock", "a", "--value", "\udcff"], ["lock", "a", "--ttl", "0", "--", "true"], ["watch", "a", "--key", "b"],
     ["history", "a", "--prefix", "b"], ["elect", "a", "--observe", "--value", "x"]],
)  # fmt: skip
def test_bad_usage_is_2_and_one_line(client: Client, argv: list[str]) -> None:
    ran = ddb(client, *argv)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"ddb[^\n]*: [^\n]+\n", ran.stderr)


def test_a_name_that_no_lock_can_have_is_told_in_one_sentence_before_anything_is_asked(client: Client) -> None:
    assert ddb(client, "lock", "", "--", "true").stderr == "ddb: The lock's name must not be empty.\n"
    assert ddb(client, "elect", "").stderr == "ddb: The election's name must not be empty.\n"
    ran = ddb(client, "shell", input='lock "a\0b" -- true\nlock a -- "a\0b"\n', stdin=None)
    assert ran.returncode == 2
    assert ran.stderr == 2 * "ddb: Neither a name nor COMMAND can hold a NUL: no program could be told of it.\n"
    assert not client.leases()


def test_a_cluster_that_is_away_for_too_long_is_a_lost_lock(tmp_path: Path) -> None:
    with Cluster(tmp_path, 1, registry=False) as cluster, connect(cluster.addresses) as client:
        argv = ["lock", "cut", "--ttl", "1", "--timeout", "1", "--", sys.executable, "-c", FOREVER]
        with running(client, *argv) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "begun\n"
            cluster.nodes[0].stop_signal()
            assert process.wait(20) == 1
            cluster.nodes[0].kill()
            said = process.stderr.read()
            assert "ddb: 'cut' may have been lost, so the command was killed.\n" in said
            assert all(line.startswith("ddb: ") for line in said.splitlines())
