"""`ddb completion`: the scripts complete what the parser knows and the database holds, in the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddb import cli, completion
from ddb.client import Client, connect
from ddb.grammar import grammar
from tests.harness import Cluster, environment, wait
from tests.terminal import Terminal

BASH = shutil.which("bash")
ZSH = shutil.which("zsh")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Cluster(tmp_path_factory.mktemp("cluster"), 1, registry=False) as cluster, connect(cluster.addresses) as one:
        for key in ("user/7/name", "user/7/age", "user/8/name", "city", "cit y", "$HOME", "über", "a:b:c", "a:b:d=e"):
            one.put(key, "x")
        for n in range(0, 9000, 3000):
            one.batch([{"op": "put", "key": f"many/{m:05}/x", "value": m} for m in range(n, n + 3000)])
        yield one


@pytest.fixture
def place(client: Client, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory with files, and an environment where `ddb` is this checkout's."""
    programs, files = tmp_path / "bin", tmp_path / "files"
    programs.mkdir()
    files.mkdir()
    (files / "data.jsonl").touch()
    (programs / "ddb").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ddb "$@"\n')
    (programs / "ddb").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    return files, environment(PATH=path, DDB_SERVER=client.servers[0], HOME=str(tmp_path), LC_ALL="C.UTF-8")


def in_bash(place: tuple[Path, dict[str, str]], *words: str) -> list[str]:
    """What bash would offer for the last of `words`."""
    assert BASH is not None
    text = """
        source <(ddb completion bash) || exit 9
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*"
        _ddb
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    argv = [BASH, "--norc", "-c", text, "bash", *words]
    ran = subprocess.run(argv, cwd=place[0], env=place[1], capture_output=True, timeout=30, check=True)
    assert ran.stderr == b""
    return [line for line in ran.stdout.decode().split("\n") if line]


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ddb", "sc"], ["scan"]),
        (["ddb", "--server", "127.0.0.1:1", "memb"], ["members"]),
        (["ddb", "get", "user/"], ["user/7/", "user/8/"]),
        (["ddb", "get", "user/7/"], ["user/7/age", "user/7/name"]),
        (["ddb", "get", "city", "user/8"], ["user/8/"]),
        (["ddb", "get", "cit"], ["cit\\ y", "city"]),
        (["ddb", "get", "$"], ["\\$HOME"]),
        (["ddb", "get", "-o", "j"], ["json"]),
        (["ddb", "-o", "t"], ["table"]),
        (["ddb", "put", "--type", "b"], ["bytes", "base64"]),
        (["ddb", "put", "a", "-t", "js"], ["json"]),
        (["ddb", "put", "--if-a"], ["--if-absent"]),
        (["ddb", "scan", "--start", "user/8/"], ["user/8/name"]),
        (["ddb", "scan", "--limit", "5", "user/8/"], ["user/8/name"]),
        (["ddb", "put", "city", "u"], []),
        (["ddb", "import", "da"], ["data.jsonl"]),
        (["ddb", "completion", "b"], ["bash"]),
        (["ddb", "nonsense", "x"], []),
    ],
)
def test_bash_offers(place: tuple[Path, dict[str, str]], words: list[str], offered: list[str]) -> None:
    assert in_bash(place, *words) == offered


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_offers_every_command_and_every_option(place: tuple[Path, dict[str, str]]) -> None:
    assert in_bash(place, "ddb", "") == list(cli.COMMANDS)
    for name, usage in grammar(cli.parser()).commands.items():
        if name in ("put", "export", "verify"):  # each takes a process
            flags = [flag for option in usage.options for flag in option.flags if flag.startswith("--")]
            assert in_bash(place, "ddb", name, "--") == flags


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [("ddb ver\t", "ddb verify"), ("ddb get user/8\t", "ddb get user/8/"), ("ddb get a:\t", "ddb get a:b:"),
     ("ddb get a:b:d\t", "ddb get a:b:d=e"), ("ddb get a:b:d=\t", "ddb get a:b:d=e"), ("ddb get cit\\ \t", "cit\\ y"),
     ("ddb --server SERVER get cit\\ \t", "cit\\ y"), ("ddb import da\t", "ddb import data.jsonl")],
)  # fmt: skip
def test_bash_completes(place: tuple[Path, dict[str, str]], typed: str, shown: str) -> None:
    assert BASH is not None
    files, env = place
    (files.parent / "rc").write_text('PS1="ready> "\neval "$(ddb completion bash)"\n')
    address = env["DDB_SERVER"]
    if "SERVER" in typed:
        env["DDB_SERVER"] = "127.0.0.1:1"  # so that the one that is named counts
    with Terminal([BASH, "--rcfile", str(files.parent / "rc"), "-i"], files, env) as terminal:
        terminal.wait_for("ready>")
        terminal.type(typed.replace("SERVER", address))
        terminal.wait_for(shown)


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_no_database_means_no_keys_and_no_noise(place: tuple[Path, dict[str, str]]) -> None:
    files, env = place
    assert in_bash((files, {**env, "DDB_SERVER": "127.0.0.1:1"}), "ddb", "get", "") == []


@pytest.mark.skipif(ZSH is None, reason="there is no zsh")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [("ddb ver\t", "ddb verify"), ("ddb get user/8\t\t", "ddb get user/8/name"), ("ddb put --if-a\t", "ddb put --if-absent"),
     ("ddb get -o j\t", "ddb get -o json"), ("ddb import da\t", "ddb import data.jsonl"),
     ("ddb get cit\t\t", "cit\\ y")],
)  # fmt: skip
def test_zsh_completes(place: tuple[Path, dict[str, str]], typed: str, shown: str) -> None:
    assert ZSH is not None
    files, env = place
    (files.parent / ".zshrc").write_text(
        'autoload -Uz compinit; compinit -u\nPS1="ready> "\neval "$(ddb completion zsh)"\n'
    )
    with Terminal([ZSH, "-i"], files, env) as terminal:
        terminal.wait_for("ready>")
        terminal.type(typed)
        wait(lambda: shown in terminal.screen(), what=f"{shown!r} on the screen")


def test_keys_are_offered_level_by_level(client: Client) -> None:
    assert list(completion.levels(client, "")) == [
        "$HOME",
        "a:b:c",
        "a:b:d=e",
        "cit y",
        "city",
        "many/",
        "user/",
        "über",
    ]
    assert list(completion.levels(client, "user/7/")) == ["user/7/age", "user/7/name"]
    assert list(completion.levels(client, "nothing")) == []


def test_what_many_candidates_have_in_common_is_true_of_all_keys(client: Client) -> None:
    found = list(completion.levels(client, "many/"))
    assert len(found) == completion.CANDIDATES_MAX + 1
    assert all(level.startswith("many/0") for level in found)
    assert found[-1] == "many/08999/"
