"""`ddb export` and `ddb import`: what goes out comes in again, whoever is killed, and whatever is written meanwhile."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddb import dump, exporter, importer
from ddb.client import Client, connect
from ddb.errors import BadRequest, Compacted, SessionExpired
from tests.harness import Cluster, environment, wait
from tests.proving import State, size

KEYS = size(15_000, 1_000_000)
LINES = KEYS * 4 // 3  # some keys come twice
PATIENCE_S = size(60, 1200)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Cluster]]:
    """Two databases of one node each."""
    one, other = (Cluster(tmp_path_factory.mktemp(name), 1, registry=False) for name in ("one", "other"))
    with one, other:
        yield one, other


def ddb(client: Client, *argv: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ddb", "--server", client.servers[0], *argv]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=PATIENCE_S, input=stdin)


def rows(client: Client) -> dict[str, Any]:
    return {item.key: item.value for item in client.scan_all()}


def last_line(file: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(file.read_bytes().splitlines()[-1])
    return said


ODD: dict[str, Any] = {
    "a": "text", "b": b"\x00\xff", "c": {"n": [1, 2.5, None, True]}, "d": "", "e": "two\nlines \u2028", "ø/\U0001f30a": None,
    'quote"\\': "x" * 100_000, "f": {"$b64": "no base64"}, "g": 10**40,
}  # fmt: skip


def test_what_goes_out_comes_in_again(source: Client, target: Client, tmp_path: Path) -> None:
    for key, value in ODD.items():
        source.put(key, value)
    first, second = tmp_path / "first", tmp_path / "second"
    assert ddb(source, "export", str(first)).returncode == 0
    assert ddb(target, "import", str(first)).returncode == 0
    assert rows(target) == rows(source) == ODD
    assert ddb(target, "export", str(second)).returncode == 0
    assert last_line(first)["sha256"] == last_line(second)["sha256"]
    assert last_line(first)["consistent"] is True
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.import*"))


def test_it_goes_through_a_pipe(source: Client, target: Client) -> None:
    source.put("user/1", "Ann")
    source.put("other", "x")
    out = ddb(source, "export", "-", "--prefix", "user/", "-q")
    assert (out.returncode, out.stderr) == (0, b"")
    into = ddb(target, "import", "-", "--into", "old/", stdin=out.stdout)
    assert (into.returncode, into.stderr.split(b" written")[0]) == (0, b"ddb: 1 keys")
    assert rows(target) == {"old/user/1": "Ann"}


def write_lines(file: Path, lines: int, keys: int) -> dict[str, int]:
    """Put so many lines about so many keys into `file`. Returns what they come to."""
    with file.open("wb") as out:
        out.writelines(dump.put(f"k{n % keys:07}", n) for n in range(lines))
    return {f"k{n % keys:07}": n for n in range(lines)}


def digest(wanted: dict[str, int]) -> str:
    """The sum that an export of this must have: that of its lines, in the order of the keys (dump.py)."""
    return hashlib.sha256(b"".join(dump.put(key, wanted[key]) for key in sorted(wanted))).hexdigest()


def lines_done(note: Path) -> int:
    """How far an import got. Raises OSError where it has kept nothing yet."""
    return int(json.loads(note.read_bytes())["lines"])


@pytest.mark.proof
def test_an_import_that_was_killed_goes_on_where_it_was(target: Client, tmp_path: Path, record_property: State) -> None:
    file, note = tmp_path / "in", tmp_path / "in.import"
    wanted = write_lines(file, LINES, KEYS)
    argv = [sys.executable, "-m", "ddb", "--server", target.servers[0], "import", str(file)]
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
        wait(lambda: lines_done(note) >= size(1, LINES // 2), PATIENCE_S, "it is half-way")
        process.kill()
    lines, session = lines_done(note), json.loads(note.read_bytes())["session"]
    assert 0 < lines < LINES
    ran = ddb(target, "import", str(file))
    assert ran.returncode == 0
    assert f"Going on behind line {lines:,}".encode() in ran.stderr
    assert rows(target) == wanted
    assert not note.exists()
    with pytest.raises(SessionExpired):  # what it had sent, and may turn up late, is refused
        target.call({"op": "put", "key": "k0000000", "value": "late", "client": session, "seq": 10**6})
    record_property("lines", LINES)
    record_property("keys", len(wanted))
    record_property("killed behind line", lines)
    record_property("then", ran.stderr.decode().splitlines()[-1])


@pytest.mark.proof
def test_a_pipe_whose_two_ends_were_killed_half_way_leaves_an_identical_digest_when_it_is_gone_on_with(
    source: Client, target: Client, tmp_path: Path, record_property: State
) -> None:
    file, note = tmp_path / "in", tmp_path / "note"
    lines = write_lines(file, KEYS, KEYS)
    assert ddb(source, "import", str(file)).returncode == 0
    with Piped(source, target, note):
        wait(lambda: lines_done(note) >= size(1, KEYS // 2), PATIENCE_S, "it is half-way")
    behind = lines_done(note)
    assert 0 < behind < KEYS
    with Piped(source, target, note) as piped:
        said = piped.finish()
    assert f"Going on behind line {behind:,}" in said
    first, killed_at = export_killed(source, tmp_path / "first")
    second = tmp_path / "second"
    assert ddb(target, "export", str(second)).returncode == 0
    assert last_line(first)["keys"] == last_line(second)["keys"] == KEYS
    assert last_line(first)["sha256"] == last_line(second)["sha256"] == digest(lines)
    record_property("keys", KEYS)
    record_property("pipe killed behind line", behind)
    record_property("then", said.splitlines()[-1])
    record_property("export killed behind bytes", killed_at)
    record_property("sha256 of both", last_line(first)["sha256"])


class Piped:
    """`ddb export - | ddb import - --state NOTE`, from one database to another; killed in the end."""

    def __init__(self, source: Client, target: Client, note: Path) -> None:
        command = [sys.executable, "-m", "ddb", "--server"]
        self._out = subprocess.Popen(
            [*command, source.servers[0], "export", "-", "-q"], env=environment(), stdout=subprocess.PIPE
        )
        self._in = subprocess.Popen(
            [*command, target.servers[0], "import", "-", "--state", str(note)],
            env=environment(), stdin=self._out.stdout, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._out.stdout is not None
        self._out.stdout.close()  # theirs alone

    def finish(self) -> str:
        """Wait until all is through. Returns what the import said."""
        _, said = self._in.communicate(timeout=PATIENCE_S)
        assert (self._out.wait(), self._in.returncode) == (0, 0), said
        return said

    def __enter__(self) -> Piped:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._in, self._out):
            process.kill()
            process.wait()
        assert self._in.stderr is not None
        self._in.stderr.close()


def export_killed(client: Client, file: Path) -> tuple[Path, int]:
    """An export to `file` that was killed half-way and gone on with. Returns `file`, and how many bytes it had when it was
    killed."""
    part = file.with_name(f"{file.name}.part")
    argv = [sys.executable, "-m", "ddb", "--server", client.servers[0], "export", str(file)]
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL) as process:
        wait(lambda: part.stat().st_size > KEYS * 15, PATIENCE_S, "it is half-way")  # a line has some 30 bytes
        process.kill()
    size_bytes = part.stat().st_size
    ran = ddb(client, "export", str(file))
    assert ran.returncode == 0 and b"Going on" in ran.stderr
    return file, size_bytes


def test_ctrl_c_ends_an_import_whose_cluster_is_away(tmp_path: Path) -> None:
    with Cluster(tmp_path, 1, registry=False) as cluster, connect(cluster.addresses) as client:
        argv = [sys.executable, "-m", "ddb", "--server", cluster.addresses, "import", "-"]
        with subprocess.Popen(argv, env=environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(b"".join(dump.put(f"k{n:05}", n) for n in range(600)))
            process.stdin.flush()
            wait(lambda: client.count() == 500, what="a batch is written")
            cluster.nodes[0].kill()
            process.stdin.write(b"".join(dump.put(f"k{n:05}", n) for n in range(600, 1300)))
            process.stdin.flush()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130


def test_ctrl_c_keeps_what_is_done(target: Client, tmp_path: Path) -> None:
    note = tmp_path / "note"
    argv = [sys.executable, "-m", "ddb", "--server", target.servers[0], "import", "-", "--state", str(note)]
    with subprocess.Popen(argv, env=environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"".join(dump.put(f"k{n:05}", n) for n in range(1200)))
        process.stdin.flush()
        wait(lambda: target.count() >= 1000, what="whole batches are written")
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert process.returncode == 130
    assert json.loads(note.read_bytes())["lines"] == 1000


def test_another_file_under_the_same_name_is_noticed(target: Client, tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.write_bytes(dump.put("a", 1) + b"nonsense\n")
    assert ddb(target, "import", str(file)).returncode == 1
    file.write_bytes(dump.put("b", 2) + dump.put("c", 3))
    ran = ddb(target, "import", str(file))
    assert ran.returncode == 2
    assert ran.stderr.endswith(b"is not what was being imported here; to begin anew, say --restart.\n")
    assert ddb(target, "import", str(file), "--restart").returncode == 0
    assert rows(target) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nonsense", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"key":5,"value":1}', 'has no "key"'),
        (b'{"key":"","value":1}', 'has no "key"'),
        (b'{"key":"a"}', 'must have either "value" or "deleted":true'),
        (b'{"key":"a","value":1,"deleted":true}', 'must have either "value" or "deleted":true'),
        (b'{"key":"%b","value":1}' % (b"x" * 5000), "has a key of more than 4,096 bytes"),
        (b'{"ddb":"export","version":9}', "is of an export of version 9"),
        (b'{"key":"a","value":NaN}', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_line_that_can_t_be_taken_is_named_and_what_stands_before_it_is_in(
    target: Client, tmp_path: Path, line: bytes, why: str
) -> None:
    file = tmp_path / "in"
    file.write_bytes(dump.put("before", 1) + b"\n" + line + b"\n" + dump.put("behind", 1))
    ran = ddb(target, "import", str(file))
    assert ran.returncode == 1
    assert f"{file}:3: the line {why}" in ran.stderr.decode()
    assert rows(target) == {"before": 1}


def test_an_export_that_is_not_whole_is_said_to_be_so(source: Client, target: Client, tmp_path: Path) -> None:
    file = tmp_path / "out"
    for n in range(3):
        source.put(f"k{n}", n)
    ddb(source, "export", str(file))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    ran = ddb(target, "import", str(file))
    assert ran.returncode == 1 and b"is not whole: its end is missing" in ran.stderr
    file.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    ran = ddb(target, "import", str(file))
    assert ran.returncode == 1 and b"has been changed since it was written" in ran.stderr
    file.write_bytes(b"".join(lines + lines))  # cat one two
    assert ddb(target, "import", str(file)).returncode == 0


def test_a_file_that_is_there_is_not_overwritten(source: Client, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("precious")
    ran = ddb(source, "export", str(file))
    assert ran.returncode == 2 and b"is there already" in ran.stderr
    assert file.read_text() == "precious"
    assert ddb(source, "export", str(file), "--force").returncode == 0
    assert ddb(source, "export", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("kept", [0, 40, 0.3, 0.7, 1.0])
def test_an_export_that_was_killed_goes_on_where_it_was(source: Client, tmp_path: Path, kept: float) -> None:
    for n in range(0, 5000, 500):
        source.batch([{"op": "put", "key": f"k{m:05}", "value": m} for m in range(n, n + 500)])
    whole, file = tmp_path / "whole", tmp_path / "out"
    ddb(source, "export", str(whole))
    text = whole.read_bytes()
    size = int(kept * len(text)) if kept <= 1 else int(kept)
    (tmp_path / "out.part").write_bytes(text[:size])
    ran = ddb(source, "export", str(file))
    assert ran.returncode == 0, ran.stderr
    assert (b"Going on" in ran.stderr) == (size > 100)
    assert last_line(file)["sha256"] == last_line(whole)["sha256"]
    assert last_line(file)["keys"] == 5000


def test_two_exports_do_not_write_the_same_file(source: Client, tmp_path: Path) -> None:
    with (tmp_path / "out.part").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ran = ddb(source, "export", str(tmp_path / "out"))
    assert ran.returncode == 2 and b"Another export is writing" in ran.stderr


def test_the_part_of_another_range_is_not_gone_on_with(source: Client, tmp_path: Path) -> None:
    source.put("a", 1)
    source.put("b", 1)
    out = ddb(source, "export", "-", "--prefix", "b").stdout
    (tmp_path / "out.part").write_bytes(out)
    assert b"Going on" not in ddb(source, "export", str(tmp_path / "out")).stderr
    assert last_line(tmp_path / "out")["keys"] == 2


def test_an_export_made_under_load_is_the_state_of_one_moment(
    source: Client, target: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "PAGE_ITEMS", 10)
    monkeypatch.setattr(exporter, "CHANGES_PAGE", 3)
    for n in range(50):
        source.put(f"k{n:02}", n)
    pages = 0

    def disturb(text: str) -> None:  # after each page: before, in and behind what has been read
        nonlocal pages
        pages += 1
        if pages > 4:
            return
        source.batch([{"op": "put", "key": key, "value": pages} for key in ("k01", f"k{pages * 10 + 2:02}", "k49")])
        source.delete(f"k{pages:02}")
        source.delete(f"k{50 - pages:02}")
        source.put(f"new{pages}", pages)

    out = io.BytesIO()
    said = exporter.Exporter(source, {}, 10.0, disturb).to_stream(out)
    assert "changes made meanwhile" in said and "as of revision" in said
    assert pages > 4
    ran = ddb(target, "import", "-", stdin=out.getvalue())
    assert ran.returncode == 0, ran.stderr
    assert rows(target) == rows(source)


def test_what_can_t_be_of_one_moment_says_between_which_it_lies(
    source: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        source.put(f"k{n}", n)
    monkeypatch.setattr(exporter, "PAGE_ITEMS", 2)
    call = source.call

    def forgetful(request: dict[str, Any], **more: Any) -> dict[str, Any]:
        if request["op"] == "history":
            raise Compacted("gone", oldest=10**9)
        return call(request, **more)

    monkeypatch.setattr(source, "call", forgetful)
    out = io.BytesIO()
    said = exporter.Exporter(source, {}, 10.0, lambda text: source.put("k0", text) and None).to_stream(out)
    assert "no state of one moment: each key is as it was at some revision from" in said
    assert json.loads(out.getvalue().splitlines()[-1])["consistent"] is False


def test_a_line_tells_a_value_or_a_deletion() -> None:
    assert dump.read(dump.put("k", None)) == {"key": "k", "value": None}
    assert dump.read(dump.deleted("k")) == {"key": "k", "deleted": True}
    with pytest.raises(BadRequest):
        dump.read(b'{"key":"k","deleted":false}')


@pytest.mark.proof
def test_an_import_and_an_export_outlive_the_leader(tmp_path: Path, record_property: State) -> None:
    file, note = tmp_path / "in", tmp_path / "in.import"
    lines = write_lines(file, LINES, KEYS)
    with Cluster(tmp_path, 3) as cluster, connect(cluster.addresses) as client:
        leader = cluster.leader()
        argv = [sys.executable, "-m", "ddb", "--server", cluster.addresses, "import", str(file)]
        with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
            wait(lambda: lines_done(note) >= size(1, LINES // 2), PATIENCE_S, "it is half-way")
            leader.kill()
            _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert rows(client) == lines
        argv = [sys.executable, "-m", "ddb", "--server", cluster.addresses, "export", str(tmp_path / "out")]
        leader.start()
        with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as process:
            part = tmp_path / "out.part"
            wait(lambda: part.stat().st_size > size(0, KEYS * 15), PATIENCE_S, "it is half-way")
            cluster.leader().kill()
            _, out = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, out
        assert last_line(tmp_path / "out")["keys"] == len(lines)
        assert last_line(tmp_path / "out")["sha256"] == digest(lines)
    record_property("import", err.decode().splitlines()[-1])
    record_property("export", out.decode().splitlines()[-1])


class Pending:
    """A batch on its way, which is done when somebody waits for it."""

    def __init__(self, ops: list[dict[str, Any]]) -> None:
        self.keys = {op["key"] for op in ops}
        self.over = False

    def done(self) -> bool:
        return self.over

    def result(self) -> None:
        self.over = True


class FakeWriter:
    """Takes batches, and looks that none has a key in common with one that is on its way."""

    def __init__(self) -> None:
        self.sent: list[Pending] = []
        self.rows: dict[str, Any] = {}
        self.most = 0

    def begin(self, ops: list[dict[str, Any]]) -> Pending:
        one = Pending(ops)
        under_way = [other for other in self.sent if not other.over]
        assert all(one.keys.isdisjoint(other.keys) for other in under_way)
        self.sent.append(one)
        self.most = max(self.most, len(under_way) + 1)
        self.rows.update({op["key"]: op.get("value") for op in ops})
        return one

    def hurry(self) -> None:
        """Nothing takes time here."""


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300))
def test_no_two_batches_under_way_have_a_key_in_common(numbers: list[int]) -> None:
    writer = FakeWriter()
    text = b"".join(dump.put(f"k{number}", n) for n, number in enumerate(numbers))
    source = importer.Source(io.BytesIO(text), "-")
    work = importer.Importer(source, writer, importer.Note(None, "", ""), "", lambda said: None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "BATCH_OPS", 5)
        work.run()
    assert writer.rows == {f"k{number}": n for n, number in enumerate(numbers)}
    assert all(one.over for one in writer.sent)
    assert writer.most <= importer.UNDER_WAY_MAX


def test_batches_overlap_where_they_may() -> None:
    writer = FakeWriter()
    source = importer.Source(io.BytesIO(b"".join(dump.put(f"k{n}", n) for n in range(5000))), "-")
    importer.Importer(source, writer, importer.Note(None, "", ""), "", lambda said: None).run()  # type: ignore[arg-type]
    assert writer.most == importer.UNDER_WAY_MAX
