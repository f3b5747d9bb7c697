r"""The log's records: one line of text each.

Laws: pure; a line either checks out whole or is no record; a batch's bytes are never re-encoded.

Theory. A record is

    LENGTH GROUP CRC JSON LF
    97 85 3e77b549 {"first":1,"last":2,"term":1,"at":1690000000000,"entries":[["put","city","Oslo"],["delete","a"]]}

* LENGTH: the bytes of JSON, in decimal. JSON contains no line feed, so a line is a record and a record is a line.
* GROUP: the offset in this file at which the *group* begins that the record belongs to. A group is what one write put
  down and one fdatasync made durable; the next group is written only after that. So a record of a group that begins
  at 500 proves that every byte before 500 was once durable. It is what tells a torn write (sectors of the last, never
  acknowledged group missing, in any order) from damage to what was acknowledged.
* CRC: CRC-32 of `GROUP SPACE JSON`, eight lower-case hex digits.

A string inside the JSON may well look like a record, and even have a right checksum, but never be one: from the
middle of a JSON string on, the quotes of the rest don't pair up, so the rest is no JSON object. `search` therefore
demands valid JSON.

What the JSON may be:

    {"ddb":1,"segment":2,"term":5,"vote":"…"|null,"doubt":false,"after":[INDEX,TERM]}     Header: first in each file
    {"term":5,"vote":"…"|null,"doubt":false}                                             HardState
    {"first":1,"last":2,"term":1,"at":…,"entries":[…]}  or  {…,"config":{…}}             Batch
    {"cut":{"index":INDEX,"term":TERM}}      the entries after INDEX are void; the next batch takes their place
    {"reset":{"index":INDEX,"term":TERM}}    all entries so far are void; the log goes on after a snapshot at INDEX
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

from ddb.messages import Batch, Configuration, HardState

FORMAT: Final = 1
FILL: Final = b"\n"  # what reserved space is filled with: a blank line is no record, and the file stays text
PREFIX_BYTES_MAX: Final = 40  # LENGTH, GROUP, CRC, their spaces and the LF

_PREFIX = re.compile(rb"([1-9][0-9]{0,9}) (0|[1-9][0-9]{0,11}) ([0-9a-f]{8}) (?=\{)")
_BATCH = re.compile(rb'\{"first":([0-9]+),"last":([0-9]+),"term":([0-9]+),"at":([0-9]+),"(entries|config)":')


@dataclass(frozen=True, slots=True)
class Line:
    """A record as it lies in its file: bytes `start` to `end`, the LF included, in the group that begins at `group`."""

    start: int
    end: int
    group: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A segment's first record: what was true when it began, so that the segments before it may go.

    `after` is the (index, term) of the entry that precedes the segment's first batch.
    """

    segment: int
    hard_state: HardState
    after: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """The entries after `index`, whose own term is `term`, are void."""

    index: int
    term: int


@dataclass(frozen=True, slots=True)
class Reset:
    """All entries so far are void; the log goes on after a snapshot at `index`, `term`."""

    index: int
    term: int


Record = Header | HardState | Batch | Cut | Reset


def encode_group(payloads: Sequence[bytes], start: int) -> list[bytes]:
    """The lines that put `payloads` down as one group at offset `start` of a file."""
    group = b"%d " % start
    seed = crc32(group)
    return [b"%d %b%08x %b\n" % (len(payload), group, crc32(payload, seed), payload) for payload in payloads]


def line_at(buffer: bytes, start: int) -> Line | None:
    """The record that begins at `start` of `buffer`, or None where none does that checks out."""
    match = _PREFIX.match(buffer, start)
    if match is None:
        return None
    length, group, crc = match.groups()
    begin = match.end()
    end = begin + int(length)
    if end >= len(buffer) or buffer[end] != 10:
        return None
    payload = buffer[begin:end]
    if crc32(payload, crc32(group + b" ")) != int(crc, 16):
        return None
    return Line(start, end + 1, int(group), payload)


def lines(buffer: bytes) -> Iterator[Line]:
    """The records from the beginning of `buffer` on, as far as each follows from the one before.

    Each belongs to the group of the one before, or begins a group of its own.
    """
    at = group = 0
    while (line := line_at(buffer, at)) is not None:
        if line.group not in (group, line.start):
            return
        yield line
        at, group = line.end, line.group


def search(buffer: bytes, start: int) -> Iterator[Line]:
    """All that checks out as a record anywhere from `start` of `buffer` on, whatever lies between."""
    at = start
    while (match := _PREFIX.search(buffer, at)) is not None:
        at = match.start() + 1  # digit by digit: a record's LENGTH may follow digits that are garbage
        line = line_at(buffer, match.start())
        if line is not None and _is_object(line.payload):
            yield line
            at = line.end


def _is_object(payload: bytes) -> bool:
    try:
        return isinstance(json.loads(payload), dict)
    except (ValueError, RecursionError):
        return False


def encode(record: Header | HardState | Cut | Reset) -> bytes:
    """The JSON of `record`. A batch needs no encoding: it is its `data`."""
    return json.dumps(_fields(record), separators=(",", ":"), ensure_ascii=False).encode()


def _fields(record: Header | HardState | Cut | Reset) -> dict[str, Any]:
    match record:
        case Header(segment, state, after):
            return {"ddb": FORMAT, "segment": segment, **_fields(state), "after": list(after)}
        case HardState(term, vote, doubt):
            return {"term": term, "vote": vote, "doubt": doubt}
        case Cut(index, term):
            return {"cut": {"index": index, "term": term}}
        case Reset(index, term):
            return {"reset": {"index": index, "term": term}}


def decode(payload: bytes) -> Record:
    """The record that `payload` is; a batch of entries without `commands` and `data`, for its bytes stay in the file.

    Raises ValueError where it is none of them.
    """
    match = _BATCH.match(payload)
    if match is not None:
        first, last, term, at_ms = map(int, match.groups()[:4])
        config = None
        if match[5] == b"config":
            config = _configuration(payload)
        return Batch(first, last, term, b"", at_ms, None, config)
    try:
        value = json.loads(payload)
        if "ddb" in value:
            if value["ddb"] != FORMAT:
                raise ValueError(f"it is of log format {value['ddb']}, and this version knows only {FORMAT}")
            return Header(value["segment"], _hard_state(value), (value["after"][0], value["after"][1]))
        if "cut" in value:
            return Cut(value["cut"]["index"], value["cut"]["term"])
        if "reset" in value:
            return Reset(value["reset"]["index"], value["reset"]["term"])
        return _hard_state(value)
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"no record of a log: {payload[:80]!r}") from error


def _hard_state(value: dict[str, Any]) -> HardState:
    return HardState(value["term"], value["vote"], value["doubt"])


def _configuration(payload: bytes) -> Configuration:
    try:
        return Configuration.from_json(json.loads(payload)["config"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no configuration: {payload[:80]!r}") from error
