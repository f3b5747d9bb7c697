"""What the documentation shows is what happens: every `console` block is run, and must print what stands there.

A document is run from top to bottom, in one shell and one directory, against the cluster that it starts itself (`ddb up`)
or that is started for it. What can't be the same twice is made equal on both sides before they are compared: ports and
process ids are translated, revisions, indexes, terms and times are blanked, and `…` in the document stands for anything.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment, wait

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
DOCUMENTED_PORTS = [8049, 8050, 8051, 8052]
READY = "Ctrl-C stops all of it."
COMMAND_TIMEOUT_S = 30

NC = """#!{python}
# A stand-in for nc, whose versions differ in what they do at the end of their input: this one hangs up its side.
import signal, socket, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as connection:
    connection.sendall(sys.stdin.buffer.read())
    connection.shutdown(socket.SHUT_WR)
    while data := connection.recv(65536):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
"""

CURL = """#!{python}
# A stand-in for curl, where there is none: the few options that the documentation uses.
import argparse, http.client, signal, sys, urllib.parse
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
parser = argparse.ArgumentParser()
parser.add_argument("-s", action="store_true")
parser.add_argument("-N", action="store_true")
parser.add_argument("-X", dest="method")
parser.add_argument("-H", dest="headers", action="append", default=[])
parser.add_argument("-d", dest="data")
parser.add_argument("-o", dest="output")
parser.add_argument("-w", dest="after", default="")
parser.add_argument("url")
args = parser.parse_args()
url = urllib.parse.urlsplit(args.url)
headers = dict(header.split(": ", 1) for header in args.headers)
if args.data is not None:
    headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
connection = http.client.HTTPConnection(url.netloc, timeout=10)
target = url.path + (url.query and "?" + url.query)
connection.request(args.method or ("GET" if args.data is None else "POST"), target, args.data, headers)
response = connection.getresponse()
with open(args.output or "/dev/stdout", "wb") as out:
    while data := response.read1(65536):
        out.write(data)
        out.flush()
print(args.after.replace("%{{http_code}}", str(response.status)).replace("\\\\n", "\\n"), end="")
"""


@dataclass
class Example:
    """One command of a document, what it says that comes out, and where it stands."""

    command: str
    expected: str
    line: int


@dataclass
class Translation:
    """The document's ports and process ids, and what they are in this run."""

    ports: list[int]
    pids: dict[str, str] = field(default_factory=dict)

    def to_run(self, text: str) -> str:
        for documented, real in zip(DOCUMENTED_PORTS, self.ports, strict=True):
            text = re.sub(rf"\b{documented}\b", str(real), text)
        for documented_pid, real_pid in self.pids.items():
            text = re.sub(rf"\b{documented_pid}\b", real_pid, text)
        return text

    def to_document(self, text: str) -> str:
        for documented, real in zip(DOCUMENTED_PORTS, self.ports, strict=True):
            text = re.sub(rf"\b{real}\b", str(documented), text)
        return text


def blocks(text: str, language: str) -> Iterator[tuple[int, str]]:
    """The line numbers and contents of the fenced blocks in `language`."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 2, found[1]


def examples(text: str) -> Iterator[Example]:
    """The commands of all `console` blocks: `$ ` begins one, `> ` goes on with it, the rest is its output."""
    for start, block in blocks(text, "console"):
        current: Example | None = None
        for offset, line in enumerate(block.splitlines()):
            if line.startswith("$ "):
                if current:
                    yield current
                current = Example(line[2:], "", start + offset)
            elif current and line.startswith("> ") and not current.expected:
                current.command += "\n" + line[2:]
            else:
                assert current is not None, f"line {start + offset}: output without a command"
                current.expected += line + "\n"
        if current:
            yield current


def blank(text: str) -> str:
    """`text` without what differs from run to run."""
    text = re.sub(r'("(?:rev|created)":)\d+', r"\1#", text)
    text = re.sub(r"(revision )\d+", r"\1#", text)
    text = re.sub(r"(kill -9 )\d+", r"\1#", text)
    text = re.sub(r"^(id: )\d+$", r"\1#", text, flags=re.MULTILINE)  # of a server-sent event
    text = re.sub(r"^\d+$", "#", text, flags=re.MULTILINE) if '{"ok":' in text else text  # the length of a frame
    text = re.sub(r"^(n\d\s+\w+\s+)\d+(\s+\S+)((?:\s+\d+){4})$", r"\1#\2 # # # #", text, flags=re.MULTILINE)  # status
    return re.sub(r"[ \t]+", " ", text).strip()


def matches(expected: str, actual: str) -> bool:
    """Whether `actual` is `expected`, where `…` is anything."""
    pattern = ".*".join(map(re.escape, blank(expected).split("…")))
    return re.fullmatch(pattern, blank(actual), re.DOTALL) is not None


class Shell:
    """One bash, given one command after another."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "--norc"], cwd=directory, env=env, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str) -> str:
        """What `command` prints, on either stream."""
        assert self._process.stdin and self._process.stdout
        watchdog = threading.Timer(COMMAND_TIMEOUT_S, self.close)
        watchdog.start()
        self._process.stdin.write(f"{command}\nprintf '\\n--done--\\n'\n")
        self._process.stdin.flush()
        output = ""
        for line in self._process.stdout:
            if line == "--done--\n":
                break
            output += line
        watchdog.cancel()
        return output.removesuffix("\n")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Up:
    """`ddb up` in the background."""

    def __init__(self, command: str, directory: Path, env: dict[str, str]) -> None:
        self._log = directory / "up.txt"
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=directory, env=env, stdout=output, stderr=output
            )
        try:
            wait(self._ready, 30, "ddb up is ready")
        except BaseException:
            self.close()
            print(self.output)
            raise

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.output
        return READY in self.output

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()


def free_ports() -> list[int]:
    """Adjoining free ports, for the registry and three nodes; below those that the system deals out to everybody else."""
    for _ in range(100):
        start = random.randrange(12_000, 30_000)
        ports = list(range(start, start + len(DOCUMENTED_PORTS)))
        try:
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return ports
    raise AssertionError("no four free ports in a row")


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory to run a document in, and an environment in which its commands mean this checkout."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(Path(sys.executable).resolve())
    (programs / "nc").write_text(NC.format(python=sys.executable))
    if shutil.which("curl") is None:
        (programs / "curl").write_text(CURL.format(python=sys.executable))
    for program in programs.iterdir():
        if not program.is_symlink():
            program.chmod(0o755)
    directory = tmp_path / "work"
    directory.mkdir()
    return directory, environment(PATH=f"{programs}:{os.environ['PATH']}", COLUMNS="120")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_example_prints_what_the_document_says(document: Path, place: tuple[Path, dict[str, str]]) -> None:
    text = document.read_text(encoding="utf-8")
    todo = list(examples(text))
    programs = list(blocks(text, "python"))
    shown = [content for _, content in blocks(text, "text")]
    assert len(programs) == len(shown)
    if not todo:
        return
    directory, env = place
    translation = Translation(free_ports())
    env["DDB_SERVER"] = f"127.0.0.1:{translation.ports[1]}"  # 8050 is the port that needs no naming
    first = todo.pop(0) if re.search(r"\bup\b", todo[0].command) else Example("python3 -m ddb up", "…", 0)
    up = Up(f"{first.command} --port {translation.ports[1]}", directory, env)
    shell = Shell(directory, env)
    try:
        said = translation.to_document(up.output)
        assert matches(first.expected, said), f"{document.name}:{first.line}: ddb up said\n{said}"
        for documented, real in zip(_pids(first.expected), _pids(said), strict=False):
            translation.pids[documented] = real
        for example in todo:
            actual = translation.to_document(shell.run(translation.to_run(example.command)))
            where = f"{document.name}:{example.line}: {example.command}"
            assert matches(example.expected, actual), f"{where}\nsays\n{example.expected}\nand prints\n{actual}"
        for (line, program), output in zip(programs, shown, strict=True):
            (directory / "example.py").write_text(translation.to_run(program), encoding="utf-8")
            assert shell.run("python3 example.py") == output, f"{document.name}:{line}"
    finally:
        shell.close()
        up.close()


def _pids(text: str) -> list[str]:
    return re.findall(r"kill -9 (\d+)", text)


@pytest.mark.parametrize("document", [*DOCUMENTS, REPOSITORY / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_link_and_program_named_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for program in re.findall(r"^ {4}\./(\S+)", text, re.MULTILINE):
        assert os.access(REPOSITORY / program, os.X_OK), program


def test_every_option_of_a_server_that_the_readme_shows_exists() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ {4}python3 -m (ddb\.\w+)(.*)$", text, re.MULTILINE)
    assert {module for module, _ in shown} == {"ddb.registry", "ddb.node"}
    for module, arguments in shown:
        command = [sys.executable, "-m", module, "--help"]
        usage = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout
        for option in re.findall(r"(?<!\S)--?\w[\w-]*", arguments):
            assert re.search(rf"(?<!\S){option}\b", usage), f"{module} has no {option}"


def test_the_readme_maps_files_that_are_there() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (REPOSITORY / "ddb" / name).exists() or (REPOSITORY / name).exists(), name
