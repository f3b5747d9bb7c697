"""What a command does: the state machine that the replicated log drives.

Laws:

* Deterministic. The same batches, applied in order to the same table, give the same rows, replies and digest on
  every node and every Python. Time and chance come in with the batch; nothing here reads a clock.
* All or nothing. A command that is refused has changed nothing, however far it had come.
* A command that this version doesn't know stops the node. Skipping it would let the copies drift apart.

Theory. A *row* is what is stored under a key: the value as compact JSON, the revision of its last change, the
revision that created it, how often it was written since (its *version*), and a checksum over all of these and
the key. Rows are plain tuples of bytes and ints, which the garbage collector does not walk: a million of them
cost it nothing, a million objects 155 ms at a time.

The *digest* of a table is the sum, modulo 2**64, of the squares of its rows' (and records') checksums. A sum needs no order and
is kept up to date by adding the new row's square and taking the old one's away; the square keeps two
differences from cancelling, as they would in a plain sum of CRCs. Equal logs give equal digests, so
members compare them, and a snapshot is verified against its own.

Where a txn fails halfway, the changes it made are taken back one by one, newest first. That is simpler than an overlay
that every read must look through, and costs only those who fail.

Beside the rows stand sessions and leases (sessions.py, leasebook.py), in the records of a ledger that the digest covers, too.
A write of a session is wrapped: `["once", CLIENT, SEQ, COMMAND]`. What is inside is applied as if it stood alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final, Protocol, cast
from zlib import crc32

from ddb.codec import decode_batch
from ddb.commands import READS, WRITES, prefix_end, prepare, prepare_read
from ddb.errors import BadRequest, Overloaded, SessionExpired, TooLarge, invariant
from ddb.leasebook import Leases, ttl_json
from ddb.ledger import Ledger
from ddb.messages import Batch, Command
from ddb.sessions import Sessions, check_reply
from ddb.wire import Quote, decode_trusted, encode, encode_string, failure, quoter

__all__ = [
    "READS",
    "WRITES",
    "Change",
    "Machine",
    "MemoryTable",
    "Readable",
    "Row",
    "Table",
    "answer",
    "checksum",
    "digest_of",
    "holds",
    "prefix_end",
    "prepare",
    "prepare_read",
]

Row = tuple[bytes, int, int, int, int]
"""value (compact JSON), rev, created (rev), version, crc"""

Change = tuple[int, str, Row | None, Row | None, int]
"""rev, key, the row now (None: deleted), the row before (None: there was none), the session that wrote (0: none)"""

DIGEST_MASK: Final = 2**64 - 1
REPLY_BYTES_MAX: Final = 16 << 20  # of one txn's results
SCAN_BYTES_MAX: Final = 4 << 20  # of one scan's items
BATCH_REPLY_BYTES_MAX: Final = 32 << 20  # of all the larger replies to one batch; every node makes them all at once
SMALL_REPLY_BYTES: Final = 4 << 10  # such replies are always given


class Readable(Protocol):
    """Rows that can be looked at."""

    def row(self, key: str) -> Row | None:
        """The row under `key`, or None."""
        ...

    def rows(self, start: str = "", end: str | None = None, reverse: bool = False) -> Iterator[tuple[str, Row]]:
        """The keys from `start` up to and without `end` (None: to the last) with their rows, in the order of code
        points or backwards. To be used up, or dropped, before the next change."""
        ...

    def count(self, start: str = "", end: str | None = None) -> int:
        """How many keys `rows(start, end)` has."""
        ...


class Table(Readable, Protocol):
    """Where the machine keeps its rows, and beside them the ledger. `digest`, of both, is the machine's to change and the
    table's to keep. `cold`: what was looked up last had to be read from a disk, so what comes next is worth a `prefetch`.

    `recent` has rows that changed lately, if it has any. Whoever finds a row there may put another in its place there and
    then, without `row` and `put`, which spares a third of a write's time; and says how much `grown` the rows are by that."""

    digest: int
    ledger: Ledger
    cold: bool
    recent: dict[str, Row | None]

    def prefetch(self, keys: Collection[str]) -> None:
        """Many `keys` will be asked for soon: look them up together, where that is quicker."""
        ...

    def put(self, key: str, row: Row, old: Row | None) -> None:
        """Store `row` under `key`, in the place of `old`, which is what `row(key)` returned just now."""
        ...

    def remove(self, key: str, old: Row) -> None:
        """Remove `key`; `old` is what `row(key)` returned just now."""
        ...

    def grown(self, by_bytes: int) -> None:
        """Values that were replaced in `recent` are longer by so many bytes than those before, together."""
        ...


def checksum(key: str, value: bytes, rev: int, created: int, version: int) -> int:
    """The CRC-32 that a row carries: of the key, LF, the value, LF, and `rev created version` in decimal.

    Compact JSON holds no line feed, so no two rows say the same bytes.
    """
    return crc32(b"%b\n%b\n%d %d %d" % (key.encode(), value, rev, created, version))


def digest_of(rows: Iterator[tuple[str, Row]]) -> int:
    """The digest of a table of these `rows`, from the beginning."""
    return sum(row[4] * row[4] for _, row in rows) & DIGEST_MASK


class Machine:
    """Applies batches to a table, in the order of the log.

    `applied` is the last index applied; `sessions` and `leases` are what the table's ledger says. `on_changes`, when set, is called once after each batch that changed something,
    with the batch and its changes in order; it makes room for watches, and costs nothing while it is None.
    """

    __slots__ = (
        "_attached", "_changes", "_client", "_does", "_quote", "_room", "applied", "leases", "on_changes", "sessions", "table",
    )  # fmt: skip

    def __init__(self, table: Table, applied: int = 0) -> None:
        self.table = table
        self.applied = applied
        self.sessions = Sessions(table.ledger)
        self.leases = Leases(table.ledger)
        self.on_changes: Callable[[Batch, list[Change]], None] | None = None
        self._changes: list[Change] = []
        self._attached: list[tuple[str, int]] = []  # keys whose lease this batch has changed, with the one before
        self._client = 0  # the session whose write is being applied
        self._room = 0  # bytes that the replies to this batch may still take
        self._quote: Quote = encode_string  # what encodes this batch's strings
        self._does: dict[str, Callable[[int, Command], bytes]] = {
            "put": self._put,
            "delete": self._delete,
            "incr": self._incr,
            "batch": self._batch,
            "txn": self._txn,
            "once": self._once,
            "session_open": self._session_open,
            "session_close": self._session_close,
            "session_expire": self._session_expire,
            "lease_grant": self._lease_grant,
            "lease_revoke": self._lease_revoke,
            "lease_expire": self._lease_expire,
            "noop": lambda rev, _: b'{"ok":true,"rev":%d}' % rev,
        }

    def __repr__(self) -> str:
        return f"machine applied={self.applied} digest={self.table.digest:016x}"

    def apply_batch(self, batch: Batch) -> list[bytes]:
        """Apply the entries of `batch` and return their replies, one each, in order.

        A configuration changes no row; its entry still has a reply. Raises InvariantError where the batch isn't the next
        one or holds a command that this version doesn't know; CorruptStore where the table can't be trusted. After
        either, the table is not to be used again.
        """
        rev = batch.first
        if rev != self.applied + 1:  # looked at first: the sentence costs more than the batch
            invariant(False, f"batches are applied in order: {batch} does not follow {self.applied}")
        self.applied = batch.last
        if batch.config is not None:
            return [b'{"ok":true,"rev":%d}' % rev]
        commands = batch.commands if batch.commands is not None else decode_batch(batch.data).commands
        invariant(commands is not None and len(commands) == batch.last - rev + 1, "a batch has its entries")
        self._room = BATCH_REPLY_BYTES_MAX
        self._quote = quoter(batch.data)
        replies = self._run(commands or (), rev, 1)
        table, ledger = self.table, self.table.ledger
        table.digest = (table.digest + ledger.growth) & DIGEST_MASK
        ledger.growth = 0
        self._attached.clear()
        if self._changes:
            if self.on_changes is not None:
                self.on_changes(batch, self._changes)
            self._changes = []
        return replies

    def _run(self, commands: Iterable[Command], rev: int, step: int) -> list[bytes]:
        """Apply entries of the log, the first at `rev` and each `step` (1) further; or, with a step of 0, the parts of one
        entry, which have no replies. Returns the replies."""
        table, changes, client, leased = self.table, self._changes, self._client, self.leases.of
        recent, row_of, put, quote = table.recent, table.row, table.put, self._quote
        recording = self.on_changes is not None or not step  # an entry that fails in a later part is taken back
        special = recording or bool(leased)
        added = grown = 0  # the digest and the values' bytes, by the plain puts below
        replies: list[bytes] = []
        try:
            for command in commands:
                if command[0] == "put" and len(command) == 3:
                    # What `_put` and `_change` do, written out: most writes are plain puts, and each call costs.
                    _, key, value = command
                    if type(value) is not bytes:
                        value = quote(value) if type(value) is str else encode(value)
                    old = recent.get(key)
                    replaces = old is not None
                    if old is not None or (old := row_of(key)) is not None:
                        created, version = old[2], old[3] + 1
                        added -= old[4] * old[4]
                    else:
                        created, version = rev, 1
                    crc = crc32(b"%b\n%b\n%d %d %d" % (key.encode(), value, rev, created, version))
                    row = (value, rev, created, version, crc)
                    if replaces:
                        recent[key] = row
                        grown += len(value) - len(old[0])  # type: ignore[index]
                    else:
                        put(key, row, old)
                    added += crc * crc
                    if special:
                        if recording:
                            changes.append((rev, key, row, old, client))
                        if key in leased:
                            self._attach(key, 0)
                    if step:
                        replies.append(b'{"ok":true,"rev":%d,"version":%d}' % (rev, version))
                elif step:
                    replies.append(self._apply(rev, command))
                    special = recording or bool(leased)
                else:
                    self._does[command[0]](rev, command)
                rev += step
        finally:
            table.digest = (table.digest + added) & DIGEST_MASK
            table.grown(grown)
        return replies

    def _apply(self, rev: int, command: Command) -> bytes:
        do = self._does.get(command[0])
        if do is None:
            invariant(False, f"entry {rev} holds {command[0]!r}, which this version of ddb can't apply; upgrade it")
            raise AssertionError
        mark = len(self._changes), len(self._attached)
        try:
            reply = do(rev, command)
            if len(reply) > SMALL_REPLY_BYTES:
                self._check_room(command[0], reply)
            return reply
        except (BadRequest, TooLarge, Overloaded, SessionExpired) as error:
            self._take_back(*mark)
            return failure(error)

    def _check_room(self, op: str, reply: bytes) -> None:
        """Raise TooLarge or Overloaded for a reply that can't be given or kept; the command is then taken back."""
        if self._client:
            check_reply(reply)
        elif op != "once":  # the session keeps that reply anyway
            self._room -= len(reply)
            if self._room < 0:
                raise Overloaded("Too many long replies are due at once, so nothing was done; try again later.")

    def _change(self, rev: int, key: str, old: Row | None, row: Row | None) -> None:
        """Put `row` in the place of `old` (None: there is none), and remember that."""
        table = self.table
        if row is not None:
            table.put(key, row, old)
            table.digest += row[4] * row[4]
        elif old is not None:
            table.remove(key, old)
        if old is not None:
            table.digest -= old[4] * old[4]
        table.digest &= DIGEST_MASK
        self._changes.append((rev, key, row, old, self._client))

    def _take_back(self, changes: int, attached: int) -> None:
        """Undo all changes of rows and of leases but the first so many of this batch."""
        while len(self._changes) > changes:
            rev, key, row, old, _ = self._changes.pop()
            self._change(rev, key, row, old)
            self._changes.pop()
        while len(self._attached) > attached:
            self.leases.attach(*self._attached.pop())

    def _attach(self, key: str, lease: int) -> None:
        """Attach `key` to `lease` (0: to none), and remember that."""
        old = self.leases.attach(key, lease)
        if old != lease:
            self._attached.append((key, old))

    def _write(self, rev: int, key: str, old: Row | None, value: bytes) -> Row:
        """Put `value` under `key`. Each write counts as a version, also the second one of the same entry."""
        created, version = (rev, 1) if old is None else (old[2], old[3] + 1)
        row = (value, rev, created, version, checksum(key, value, rev, created, version))
        self._change(rev, key, old, row)
        return row

    def _put(self, rev: int, command: Command) -> bytes:
        key, value = command[1], command[2]
        options = command[3] if len(command) > 3 else {}
        lease = options.get("lease", 0)
        if lease:
            self.leases.require(lease)
        old = self.table.row(key)
        if not all(holds(self.table, condition) for condition in options.get("if", ())):
            return _not_applied(b"", old)
        data = value if type(value) is bytes else encode(value)
        row = self._write(rev, key, old, data)
        self._attach(key, lease)
        applied = b',"applied":true' if "if" in options else b""
        return b'{"ok":true%b,"rev":%d,"version":%d}' % (applied, rev, row[3])

    def _delete(self, rev: int, command: Command) -> bytes:
        _, key, *options = command
        old = self.table.row(key)
        if options and not all(holds(self.table, condition) for condition in options[0]["if"]):
            return _not_applied(b',"deleted":0', old)
        if old is not None:
            self._change(rev, key, old, None)
            self._attach(key, 0)
        applied = b',"applied":true' if options else b""
        return b'{"ok":true%b,"deleted":%d,"rev":%d}' % (applied, old is not None, rev)

    def _incr(self, rev: int, command: Command) -> bytes:
        _, key, by = command
        old = self.table.row(key)
        value = (0 if old is None else _integer(key, old[0])) + by
        row = self._write(rev, key, old, encode(value))  # which refuses an integer of too many digits
        return b'{"ok":true,"value":%b,"rev":%d,"version":%d}' % (row[0], rev, row[3])

    def _batch(self, rev: int, command: Command) -> bytes:
        self._run(command[1], rev, 0)
        return b'{"ok":true,"rev":%d}' % rev

    def _txn(self, rev: int, command: Command) -> bytes:
        _, conditions, then, otherwise = command
        succeeded = all(holds(self.table, condition) for condition in conditions)
        results: list[bytes] = []
        room = REPLY_BYTES_MAX
        for operation in then if succeeded else otherwise:
            op = operation[0]
            result = answer(self.table, operation, rev) if op in READS else self._does[op](rev, operation)
            room -= len(result)
            if room < 0:
                raise TooLarge(f"The results of the transaction are over {REPLY_BYTES_MAX} bytes; read less in it.")
            results.append(result)
        return b'{"ok":true,"succeeded":%b,"results":[%b],"rev":%d}' % (
            b"true" if succeeded else b"false", b",".join(results), rev,
        )  # fmt: skip

    # --- sessions and leases ------------------------------------------------------------------------------------

    def _once(self, rev: int, command: Command) -> bytes:
        _, client, seq, inner = command
        reply = self.sessions.recall(client, seq, rev)
        if reply is None:
            self._client = client
            reply = self._apply(rev, inner)
            self._client = 0
            self.sessions.keep(client, seq, rev, reply)
        return reply

    def _session_open(self, rev: int, _: Command) -> bytes:
        self.sessions.open(rev)
        return b'{"ok":true,"client":%d,"rev":%d}' % (rev, rev)

    def _session_close(self, rev: int, command: Command) -> bytes:
        return b'{"ok":true,"closed":%d,"rev":%d}' % (self.sessions.close(command[1]), rev)

    def _session_expire(self, rev: int, command: Command) -> bytes:
        return b'{"ok":true,"expired":%d,"rev":%d}' % (self.sessions.expire(command[1]), rev)

    def _lease_grant(self, rev: int, command: Command) -> bytes:
        self.leases.grant(rev, command[1])
        return b'{"ok":true,"lease":%d,"ttl":%b,"rev":%d}' % (rev, ttl_json(command[1]), rev)

    def _lease_revoke(self, rev: int, command: Command) -> bytes:
        self.leases.require(command[1])
        return b'{"ok":true,"deleted":%d,"rev":%d}' % (self._end_leases(rev, [command[1]]), rev)

    def _lease_expire(self, rev: int, command: Command) -> bytes:
        there = [lease for lease in command[1] if lease in self.leases.ttl_ms]
        return b'{"ok":true,"deleted":%d,"rev":%d}' % (self._end_leases(rev, there), rev)

    def _end_leases(self, rev: int, leases: list[int]) -> int:
        """Forget `leases`, and delete all their keys. Returns how many that were."""
        deleted = 0
        for lease in leases:
            for key in self.leases.end(lease):
                row = self.table.row(key)
                invariant(row is not None, "an attached key is there")
                self._change(rev, key, row, None)
                deleted += 1
        return deleted


def _not_applied(more: bytes, old: Row | None) -> bytes:
    if old is None:
        return b'{"ok":true,"applied":false%b,"found":false,"value":null,"rev":0}' % more
    return b'{"ok":true,"applied":false%b,"found":true,"value":%b,"rev":%d}' % (more, old[0], old[1])


def _integer(key: str, value: bytes) -> int:
    if not value.removeprefix(b"-").isdigit():
        raise BadRequest(f"The value under {_name(key)} is not an integer, so it can't be incremented.")
    return decode_trusted(value)  # type: ignore[no-any-return]


def _name(key: str) -> str:
    return repr(key if len(key) <= 60 else key[:57] + "…")


# -------------------------------------------------------------- conditions


def holds(table: Readable, condition: dict[str, Any]) -> bool:
    """Whether a normalised condition (commands.py) holds in `table`.

    An absent key has revision 0 and version 0. It has no value: a `value` condition on it holds with `!=` only,
    and `null` is a value like any other. `<` and `>` compare numbers with numbers, exactly, and strings with
    strings, by code points; between all else there is no order, and neither holds.
    """
    row = table.row(condition["key"])
    op = condition["op"]
    if "rev" in condition:
        return _compare(0 if row is None else row[1], op, condition["rev"])
    if "version" in condition:
        return _compare(0 if row is None else row[3], op, condition["version"])
    if "exists" in condition:
        return _compare(row is not None, op, condition["exists"])
    wanted = condition["value"]
    if row is None:
        return bool(op == "!=")
    if op in ("<", ">"):
        held = decode_trusted(row[0])
        ordered = (type(held) is str and type(wanted) is str) or (_is_number(held) and _is_number(wanted))
        return ordered and _compare(held, op, wanted)
    same = row[0] == encode(wanted) or json_equal(decode_trusted(row[0]), wanted)
    return same is (op == "=")


def _compare(held: Any, op: str, wanted: Any) -> bool:
    if op == "=":
        return bool(held == wanted)
    if op == "!=":
        return bool(held != wanted)
    return bool(held < wanted) if op == "<" else bool(held > wanted)


def _is_number(value: Any) -> bool:
    return type(value) is int or type(value) is float


def json_equal(a: Any, b: Any) -> bool:
    """Whether two decoded JSON values are equal as JSON: `1` equals `1.0`, `true` is not `1`, the order of an object's
    names makes no difference. Python compares an int with a float by their exact values, however large."""
    if _is_number(a):
        return _is_number(b) and bool(a == b)
    if type(a) is not type(b):
        return False
    if type(a) is list:
        return len(a) == len(b) and all(map(json_equal, a, b))
    if type(a) is dict:
        return len(a) == len(b) and all(name in b and json_equal(value, b[name]) for name, value in a.items())
    return bool(a == b)


# ------------------------------------------------------------------- reads


def answer(table: Readable, command: Command, rev: int) -> bytes:
    """The reply to a read command from `prepare_read`, where `rev` is the last revision that `table` shows.

    Raises CorruptStore where the table can't be trusted.
    """
    op = command[0]
    if op == "get":
        key = command[1]
        row = table.row(key)
        if row is None:
            return b'{"ok":true,"found":false,"key":%b,"value":null,"rev":0,"created":0,"version":0}' % encode_string(
                key
            )
        return b'{"ok":true,"found":true,"key":%b,"value":%b,"rev":%d,"created":%d,"version":%d}' % (
            encode_string(key), row[0], row[1], row[2], row[3],
        )  # fmt: skip
    if op == "count":
        return b'{"ok":true,"count":%d,"rev":%d}' % (table.count(command[1]["start"], command[1]["end"]), rev)
    invariant(op == "scan", f"{op!r} is a read")
    return _scan(table, command[1], rev)


def _scan(table: Readable, range: dict[str, Any], rev: int) -> bytes:
    limit, keys_only = range["limit"], range["keys_only"]
    items: list[bytes] = []
    size = 0
    more = b"false"
    for key, row in table.rows(range["start"], range["end"], range["reverse"]):
        value = b"" if keys_only else b'"value":%b,' % row[0]
        item = b'{"key":%b,%b"rev":%d,"created":%d,"version":%d}' % (encode_string(key), value, row[1], row[2], row[3])
        size += len(item)
        if len(items) == limit or (items and size > SCAN_BYTES_MAX):
            more = b"true"
            break
        items.append(item)
    return b'{"ok":true,"items":[%b],"more":%b,"rev":%d}' % (b",".join(items), more, rev)


# --------------------------------------------------------------- in memory


class MemoryTable:
    """A table in memory, for simulations and tests."""

    def __init__(self) -> None:
        self.digest = 0
        self.ledger = Ledger()
        self.cold = False
        self._rows: dict[str, Row] = {}
        self.recent = cast("dict[str, Row | None]", self._rows)
        self._order: list[str] = []

    def row(self, key: str) -> Row | None:
        """See Table."""
        return self._rows.get(key)

    def prefetch(self, keys: Collection[str]) -> None:
        """See Table."""

    def put(self, key: str, row: Row, old: Row | None) -> None:
        """See Table."""
        if old is None:
            insort(self._order, key)
        self._rows[key] = row

    def remove(self, key: str, old: Row) -> None:
        """See Table."""
        del self._rows[key]
        del self._order[bisect_left(self._order, key)]

    def grown(self, by_bytes: int) -> None:
        """See Table."""

    def rows(self, start: str = "", end: str | None = None, reverse: bool = False) -> Iterator[tuple[str, Row]]:
        """See Table."""
        keys = self._order[self._slice(start, end)]
        return ((key, self._rows[key]) for key in (reversed(keys) if reverse else keys))

    def count(self, start: str = "", end: str | None = None) -> int:
        """See Table."""
        return len(self._order[self._slice(start, end)])

    def _slice(self, start: str, end: str | None) -> slice:
        return slice(bisect_left(self._order, start), None if end is None else bisect_left(self._order, end))
