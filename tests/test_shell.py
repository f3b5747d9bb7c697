"""The shell: in a real terminal as a person uses it, and fed by a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ddb import cli, shell
from ddb.client import Client
from tests.harness import environment
from tests.terminal import CTRL_D, ENTER, TAB, TMUX, UP, Terminal

KINDS = [
    pytest.param(False, id="pty"),
    pytest.param(True, id="tmux", marks=pytest.mark.skipif(not TMUX, reason="no tmux")),
]


@pytest.fixture
def client(client: Client) -> Client:
    for key in ("user/7/name", "user/7/age", "user/8/name", "city", "two words"):
        client.put(key, f"<{key}>")
    return client


def in_terminal(client: Client, directory: Path, tmux: bool) -> Terminal:
    env = environment(
        DDB_SERVER=client.servers[0], XDG_STATE_HOME=str(directory / "state"), HOME=str(directory), LC_ALL="C.UTF-8"
    )
    return Terminal([sys.executable, "-m", "ddb", "shell"], directory, env, tmux)


def script(client: Client, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *options, "-m", "ddb", "--server", client.servers[0], "shell"]
    return subprocess.run(argv, input=text, capture_output=True, text=True, env=environment(), timeout=30)


# In a terminal


@pytest.mark.parametrize("tmux", KINDS)
def test_commands_options_and_keys_are_completed(client: Client, tmp_path: Path, tmux: bool) -> None:
    with in_terminal(client, tmp_path, tmux) as terminal:
        terminal.wait_for("ddb>")
        terminal.type("sca" + TAB + "user/8" + TAB + "n" + TAB + ENTER)
        terminal.wait_for("<user/8/name>")
        terminal.type("get us" + TAB)
        terminal.wait_for("get user/")
        terminal.type("7" + TAB + TAB + TAB)
        terminal.wait_for("user/7/age")  # both are listed
        terminal.type("n" + TAB + ENTER)
        terminal.wait_for("<user/7/name>")
        terminal.type("get tw" + TAB + ENTER)
        terminal.wait_for("<two words>")
        terminal.type("put x y --if-ab" + TAB + ENTER)
        terminal.wait_for("--if-absent")
        terminal.wait_for("revision")


@pytest.mark.parametrize("tmux", KINDS)
def test_json_goes_on_until_its_braces_are_closed(client: Client, tmp_path: Path, tmux: bool) -> None:
    with in_terminal(client, tmp_path, tmux) as terminal:
        terminal.wait_for("ddb>")
        terminal.type('txn {"then": [' + ENTER)
        terminal.wait_for("...>")
        terminal.type('{"op": "put", "key": "multi", "value": {"n": [1,' + ENTER + "2]}}" + ENTER + "]}" + ENTER)
        terminal.wait_for("succeeded at revision")
        item = client.get("multi")
        assert item is not None and item.value == {"n": [1, 2]}
        terminal.type(UP)  # it comes back in one line
        terminal.wait_for('txn {"then": [ {"op": "put"')


@pytest.mark.parametrize("tmux", KINDS)
def test_ctrl_c_cancels_a_line_and_a_command_but_not_the_shell(client: Client, tmp_path: Path, tmux: bool) -> None:
    with in_terminal(client, tmp_path, tmux) as terminal:
        terminal.wait_for("ddb>")
        terminal.type("put never done")
        terminal.wait_for("never done")
        terminal.interrupt("ddb>")
        terminal.type('txn {"then": [' + ENTER)
        terminal.wait_for("...>")
        terminal.interrupt("ddb>")
        terminal.type("watch live/ --json" + ENTER)
        terminal.wait_for("watch live/ --json")
        terminal.interrupt("ddb>")
        terminal.type("\\watch 0.1 count user/" + ENTER)
        terminal.wait_for("every 0.1 s; Ctrl-C ends it: count user/")
        terminal.interrupt("ddb>")
        terminal.type("get city" + ENTER)
        terminal.wait_for("<city>")
        assert client.get("never") is None
        terminal.type(CTRL_D)
        terminal.wait_ended()


@pytest.mark.parametrize("tmux", KINDS)
def test_the_history_is_there_the_next_time_and_nobody_else_s(client: Client, tmp_path: Path, tmux: bool) -> None:
    with in_terminal(client, tmp_path, tmux) as terminal:
        terminal.wait_for("ddb>")
        terminal.type("get city" + ENTER)
        terminal.wait_for("<city>")
        terminal.type(" put secret s3cret" + ENTER)
        terminal.wait_for("revision")
        terminal.type("exit" + ENTER)
        terminal.wait_ended()
    file = tmp_path / "state" / "ddb" / "history"
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert "get city" in text and "s3cret" not in text
    with in_terminal(client, tmp_path, tmux) as terminal:
        terminal.wait_for("ddb>")
        terminal.type(UP + UP + ENTER)
        terminal.wait_for("<city>")


# By a script


def test_a_script_runs_without_a_prompt_and_ends_with_what_failed(client: Client) -> None:
    ran = script(client, 'get city\nput j {"a":\n[1]} -t json\nget j\nget nothing\ncount user/\n')
    assert ran.stdout.splitlines() == ["<city>", ran.stdout.splitlines()[1], '{"a":[1]}', "3"]
    assert ran.stderr == "ddb: There is nothing under 'nothing'.\n"
    assert ran.returncode == 3
    assert script(client, "count\n\n   \n").returncode == 0


def test_input_that_ends_in_the_middle_of_a_command_runs_nothing(client: Client) -> None:
    ran = script(client, 'put half {"a":\n')
    assert ran.returncode == 1
    assert ran.stderr == "ddb: The input ends in the middle of a command: a quote or a brace is open.\n"
    assert client.get("half") is None


def test_timing_formats_and_repeating(client: Client) -> None:
    ran = script(
        client, "\\timing\ncount user/\n\\timing\n\\o csv\nget city\n\\o\nget city\n\\o xml\n\\watch x get city\n"
    )
    lines = ran.stdout.splitlines()
    assert (
        lines[0] == "timing is on" and lines[1] == "3" and lines[2].startswith("took ") and lines[3] == "timing is off"
    )
    assert lines[4:6] == ["key,value,rev,created,version", lines[5]] and lines[5].startswith("city,<city>,")
    assert lines[6] == "<city>"
    assert ran.stderr.splitlines() == [
        "ddb: \\o takes one of table, json, csv, raw, or nothing.",
        "ddb: \\watch takes a number of seconds and a command, like \\watch 2 count user/.",
    ]


def test_help_explains_every_command_with_an_example(client: Client) -> None:
    ran = script(client, "help\n")
    for name in cli.COMMANDS:
        assert (f"\n{name} " in f"\n{ran.stdout}") == (name not in shell.NOT_HERE)
    ran = script(client, "help put\nhelp \\watch\nhelp timing\nhelp nonsense\n")
    assert "ddb put city Oslo" in ran.stdout and "example: \\watch 2 count user/" in ran.stdout
    assert "example: \\timing" in ran.stdout
    assert ran.stderr == "ddb: 'nonsense' is no command; help lists them.\n"


def test_a_mistake_is_a_sentence_and_the_shell_goes_on(client: Client) -> None:
    ran = script(
        client, "frobnicate\nup\nput\nget city --timeout x\nput city {nonsense} -t json\nget city --timeout 2\n"
    )
    assert ran.stdout == "<city>\n"
    assert len(ran.stderr.splitlines()) == 5
    assert all(line.startswith("ddb") for line in ran.stderr.splitlines())


def test_another_server_may_be_named_for_one_command(client: Client) -> None:
    ran = script(client, "get city --server 127.0.0.1:1\nget city\n")
    assert ran.stdout == "<city>\n" and "127.0.0.1:1 can't be reached" in ran.stderr


def test_without_readline_all_else_works(client: Client, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['readline'] = None\n"
        "from ddb.cli import main\n"
        f"sys.exit(main(['--server', {client.servers[0]!r}, 'shell']))"
    )
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"), HOME=str(tmp_path))
    with Terminal([sys.executable, "-c", code], tmp_path, env, False) as terminal:
        terminal.wait_for("ddb>")
        terminal.type("get city" + ENTER)
        terminal.wait_for("<city>")
        terminal.interrupt("ddb>")
        terminal.type("count user/" + ENTER)
        terminal.wait_for("3")
        terminal.type(CTRL_D)
        terminal.wait_ended()


def test_the_shell_starts_where_nobody_answers(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "ddb", "--server", "127.0.0.1:1", "shell"]
    env = environment(XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
    with Terminal(argv, tmp_path, env, False) as terminal:
        terminal.wait_for("Nobody answers yet")
        terminal.type("get us" + TAB + ENTER)
        terminal.wait_for("can't be reached")
        terminal.type(CTRL_D)
        terminal.wait_ended()


def test_what_is_offered_fits_what_was_typed(client: Client) -> None:
    one = shell.Shell(client, cli.parser(), lambda words: 0)

    def offered(line: str) -> list[str]:
        begin = max(line.rfind(blank) for blank in " \t") + 1
        return one.candidates(line, begin, len(line) - begin)

    assert offered("get 'two w") == ["words'"]
    assert offered('get "two w') == ['words"']
    assert offered("get tw") == ["'two words'"]
    assert offered("\\watch 2 co") == ["count "]
    assert offered("\\ti") == ["\\timing "]
    assert offered("put city -t ba") == ["base64 "]
    assert offered("put city u") == []
    assert offered("nonsense u") == []
    assert offered("help put") == ["put"]
    assert offered("\\o c") == ["csv"]
    assert offered("lease ke") == ["keepalive "]
    assert offered("transfer ") == ["n1 "]


def test_the_history_file_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert shell.history_file() == tmp_path / "x" / "ddb" / "history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert shell.history_file() == tmp_path / ".local" / "state" / "ddb" / "history"
