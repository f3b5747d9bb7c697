"""What an export looks like: lines of JSON, each telling one thing.

Laws:

1. Put in their order, whatever a key held before, the lines give the state that was exported. So a key may come more than
   once: its last line counts.
2. An export that isn't whole says so by what it lacks: the last line tells how many lines went before it, and their
   checksum.
3. A line that any other program wrote, with `key` and `value`, is as good.

    {"ddb":"export","version":1,"cluster":"…","from":17,"range":{"prefix":"user/"}}
    {"key":"user/1","value":{"age":41}}
    {"key":"user/2","value":"text"}
    {"ddb":"changes","to":23}
    {"key":"user/1","deleted":true}
    {"ddb":"end","rev":23,"consistent":true,"keys":2,"changes":1,"crc32":2914562311,"sha256":"…"}

Theory. A database that goes on being written can be read page by page, but then each page is of another moment. If the
changes made meanwhile are put behind the pages, in order, then whoever repeats all of it has every key as it was at the
last of these changes: a key's line may be too old or too new, but what changed it since the first page stands
behind it, and each change says what the key holds from then on, not how it differs. (So databases take *fuzzy
snapshots*: ARIES, and ZooKeeper's data tree.) Where nobody writes, there are no changes, and the lines are the state.

`sha256` is that of the pages' lines alone, so two databases that hold the same, export the same sum.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ddb import wire
from ddb.commands import KEY_BYTES_MAX
from ddb.errors import BadRequest

VERSION: Final = 1
LINE_BYTES_MAX: Final = 64 << 20
MARK: Final = "ddb"  # the field that a line has which is about the export itself


@dataclass(slots=True)
class Sums:
    """The sums over the lines so far: how many there were, how long, and their checksums."""

    lines: int = 0
    keys: int = 0
    changes: int = 0
    size_bytes: int = 0
    crc: int = 0
    in_changes: bool = False
    pages: Any = field(default_factory=hashlib.sha256, repr=False)

    def add(self, lines: list[bytes], about_keys: bool = True) -> None:
        """Take in whole lines, each with its LF."""
        text = b"".join(lines)
        self.lines += len(lines)
        self.size_bytes += len(text)
        self.crc = zlib.crc32(text, self.crc)
        if not about_keys:
            return
        if self.in_changes:
            self.changes += len(lines)
        else:
            self.keys += len(lines)
            self.pages.update(text)


def head(cluster: str, from_rev: int, range_: Mapping[str, str]) -> bytes:
    """The first line: whose data it is, and the revision of the first page."""
    return _line({MARK: "export", "version": VERSION, "cluster": cluster, "from": from_rev, "range": dict(range_)})


def turn(to_rev: int) -> bytes:
    """The line behind which the changes stand, up to and including those of `to_rev`."""
    return _line({MARK: "changes", "to": to_rev})


def end(sums: Sums, rev: int, consistent: bool) -> bytes:
    """The last line."""
    counted = {"keys": sums.keys, "changes": sums.changes, "crc32": sums.crc, "sha256": sums.pages.hexdigest()}
    return _line({MARK: "end", "rev": rev, "consistent": consistent, **counted})


def put(key: str, value: Any) -> bytes:
    """The line of a key that holds `value`."""
    return b'{"key":%b,"value":%b}\n' % (wire.encode_string(key), wire.encode(value))


def deleted(key: str) -> bytes:
    """The line of a key that is gone."""
    return b'{"key":%b,"deleted":true}\n' % wire.encode_string(key)


def read(line: bytes) -> dict[str, Any]:
    """What a line says. Raises BadRequest with a sentence that begins in the middle: `is not …`."""
    if len(line) > LINE_BYTES_MAX:
        raise BadRequest(f"is longer than {LINE_BYTES_MAX >> 20} MiB")
    try:
        said = wire.decode_value(line)
    except BadRequest as error:
        raise BadRequest(f"is not JSON: {error.message.rstrip('.')}") from None
    if not isinstance(said, dict):
        raise BadRequest("is not a JSON object")
    if MARK in said and "key" not in said:
        return _about_itself(said)
    key = said.get("key")
    if not isinstance(key, str) or not key:
        raise BadRequest('has no "key", a string that is not empty')
    if len(key) > KEY_BYTES_MAX // 4 and len(key.encode()) > KEY_BYTES_MAX:
        raise BadRequest(f"has a key of more than {KEY_BYTES_MAX:,} bytes")
    if ("value" in said) == (said.get("deleted") is True):
        raise BadRequest('must have either "value" or "deleted":true')
    return said


def _about_itself(said: dict[str, Any]) -> dict[str, Any]:
    if said.get(MARK) == "export" and said.get("version") != VERSION:
        raise BadRequest(f"is of an export of version {said.get('version')!r}; this ddb reads version {VERSION}")
    return said


def _line(value: Mapping[str, Any]) -> bytes:
    return wire.encode(value) + b"\n"
