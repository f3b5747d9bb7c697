"""A database in a simulated file: SQLite itself, in memory.

Laws: what a connection sees is what the file holds, or what it held when the transaction began; what a statement commits
is in the file when it returns, or an error says that it is not.

Theory. What is in the file is loaded into a `sqlite3` connection to ":memory:", and written back after each commit. Most
of what a simulated node asks of its database it asks at its start, and of few contents: an empty one, or the one that
the process before it has left. So the memory of a closed connection is kept for the next one to the same file, and what
the same question has been answered about the same content is not asked again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol, cast

SYNCHRONOUS_FULL: Final = 2
NOT_WRITING: Final = frozenset({"SELECT", "PRAGMA", "BEGIN", "ROLLBACK", "EXPLAIN", "VALUES"})
QUESTIONS: Final = ("SELECT", "PRAGMA quick_check", "PRAGMA encoding")  # about the content alone
SETTINGS: Final = ("PRAGMA synchronous=", "PRAGMA cell_size_check=", "PRAGMA trusted_schema=", "PRAGMA cache_size=")
CONTENTS_KEPT: Final = 64

Parameters = Any
Answers = dict[tuple[str, tuple[Any, ...]], list[Any]]


class File(Protocol):
    """What a database is kept in."""

    now: bytearray
    version: int  # changes whenever `now` does


class Disk(Protocol):
    """Where the file is."""

    def expect_up(self) -> None:
        """Raise Crash where the disk is down."""

    def commit(self, file: Any, content: bytes, durable: bool) -> None:
        """A connection has committed `content`. Raises sqlite3.OperationalError where the disk refuses it."""

    def closed(self, handle: int, file: Any, memory: Memory | None) -> None:
        """The connection `handle` to `file` is closed; its `memory` may serve the next one."""


class Memory:
    """A database of SQLite's own, and which version of a file it was loaded with. `settings` are the PRAGMAs that were
    executed, each with its value; `synchronous` is the number that one of them has set."""

    __slots__ = ("loaded", "settings", "sqlite", "synchronous", "version")

    def __init__(self) -> None:
        self.sqlite = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.version = -1
        self.loaded = b""
        self.settings: dict[str, str] = {}
        self.synchronous = SYNCHRONOUS_FULL

    def set(self, sql: str) -> None:
        """Execute the PRAGMA `sql`, unless it would change nothing: every connection begins with the same ones, and each of
        them takes SQLite as long as a row does."""
        name, _, value = sql.partition("=")
        if self.settings.get(name) != value or self.sqlite.in_transaction:
            self.sqlite.execute(sql)
            self.settings[name] = value
            (self.synchronous,) = self.sqlite.execute("PRAGMA synchronous").fetchone()


class SimConnection:
    """A connection to a database in a simulated file: of a sqlite3.Connection, what a program needs. What a statement
    answers is fetched at once, so that it is of one moment even when the file changes meanwhile, as a reader's view is
    in SQLite."""

    __slots__ = ("_answers", "_disk", "_file", "_frozen", "_handle", "_memory", "_sqlite", "_wrote")

    def __init__(self, disk: Disk, handle: int, file: File, memory: Memory, frozen: bool) -> None:
        self._disk = disk
        self._handle = handle
        self._file = file
        self._frozen = frozen
        self._memory: Memory | None = memory
        self._sqlite = memory.sqlite
        self._wrote = False  # in the transaction that is open
        self._answers: tuple[int, Answers] = (-1, {})  # about a version of the file
        memory.set("PRAGMA synchronous=FULL")  # as in a new one
        if frozen:
            self._sqlite.execute("PRAGMA query_only=ON")

    @property
    def in_transaction(self) -> bool:
        """sqlite3.Connection.in_transaction."""
        return self._memory is not None and self._sqlite.in_transaction

    def execute(self, sql: str, parameters: Parameters = (), /) -> sqlite3.Cursor:
        """sqlite3.Connection.execute; of the cursor, only what reads rows is there."""
        if sql.startswith(SETTINGS):
            self._open().set(sql)
            return cast(sqlite3.Cursor, _Rows([]))
        if sql.startswith(QUESTIONS) and not self._wrote:
            return cast(sqlite3.Cursor, _Rows(self._answer(sql, tuple(parameters))))
        memory = self._refreshed()
        cursor = self._sqlite.execute(sql, parameters)
        rows = None if cursor.description is None else _Rows(cursor.fetchall())
        self._wrote = self._sqlite.in_transaction and not sql.startswith("BEGIN")
        self._settle(memory, sql)
        return cursor if rows is None else cast(sqlite3.Cursor, rows)

    def executemany(self, sql: str, parameters: Iterable[Parameters], /) -> sqlite3.Cursor:
        """sqlite3.Connection.executemany."""
        memory = self._refreshed()
        self._wrote = self._sqlite.in_transaction
        cursor = self._sqlite.executemany(sql, parameters)
        self._settle(memory, sql)
        return cursor

    def backup(self, target: SimConnection, **options: Any) -> None:
        """sqlite3.Connection.backup, into another simulated database."""
        self._refreshed()
        memory = target._refreshed()
        self._sqlite.backup(target._sqlite, **options)
        target._settle(memory, "BACKUP")

    def close(self) -> None:
        """sqlite3.Connection.close, which changes nothing on the disk; also when that is down."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        if self._frozen or memory.sqlite.in_transaction:
            memory.sqlite.close()
            self._disk.closed(self._handle, self._file, None)
        else:
            self._disk.closed(self._handle, self._file, memory)

    def _open(self) -> Memory:
        self._disk.expect_up()
        if self._memory is None:
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.")
        return self._memory

    def _answer(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        """What the question `sql` is answered, about what is in the file, or was when the transaction began."""
        memory, version = self._open(), self._file.version
        if self._sqlite.in_transaction and memory.version != version:
            return self._sqlite.execute(sql, parameters).fetchall()
        if self._answers[0] != version:
            self._answers = version, _answers_about(bytes(self._file.now))
        answers = self._answers[1]
        answer = answers.get((sql, parameters))
        if answer is None:
            self._refreshed()
            answer = answers[sql, parameters] = self._sqlite.execute(sql, parameters).fetchall()
        return answer

    def _refreshed(self) -> Memory:
        """The memory in which, outside a transaction, is what is in the file."""
        memory, file = self._open(), self._file
        if memory.version != file.version and not self._sqlite.in_transaction:
            content = bytes(file.now)
            self._sqlite.deserialize(content or _EMPTY)
            memory.loaded, memory.version = content, file.version
        return memory

    def _settle(self, memory: Memory, sql: str) -> None:
        """After a statement: what it committed, if anything, goes into the file."""
        if self._sqlite.in_transaction or sql.split(None, 1)[0].upper() in NOT_WRITING:
            return
        content = _unsigned(self._sqlite.serialize())
        if content == (memory.loaded or _EMPTY):
            return
        file = self._file
        version, memory.version = memory.version, -1  # unless all goes well, what is in memory here did not happen
        if version != file.version:
            raise sqlite_error(sqlite3.SQLITE_BUSY, "database is locked")
        self._disk.commit(file, content, memory.synchronous >= SYNCHRONOUS_FULL)
        memory.loaded, memory.version = content, file.version


class _Rows:
    """What a statement answered, read as from a cursor."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


def sqlite_error(code: int, text: str) -> sqlite3.OperationalError:
    """The error that SQLite raises for `code`."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


def _unsigned(content: bytes) -> bytes:
    """`content` without the number of the SQLite that wrote it last (fileformat2.html §1.3.14): the same everywhere."""
    return content[:96] + bytes(4) + content[100:]


def _empty_database() -> bytes:
    """A database of one page that holds nothing: SQLite loads no empty bytes."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.execute("CREATE TABLE made (and_gone)")
        connection.execute("DROP TABLE made")
        connection.execute("VACUUM")
        return _unsigned(connection.serialize())
    finally:
        connection.close()


_EMPTY: Final = _empty_database()
_CONTENTS: dict[bytes, Answers] = {}


def _answers_about(content: bytes) -> Answers:
    """What has been asked about `content` so far, and answered."""
    answers = _CONTENTS.pop(content, {})
    _CONTENTS[content] = answers  # the latest at the end
    if len(_CONTENTS) > CONTENTS_KEPT:
        del _CONTENTS[next(iter(_CONTENTS))]
    return answers
