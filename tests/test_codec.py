"""codec: every message comes out as it went in, a batch's bytes are never made twice, and no bytes do harm."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as _given
from hypothesis import strategies as st

from ddb import codec
from ddb.errors import BadRequest
from ddb.messages import (
    NOOP,
    Append,
    AppendReply,
    Batch,
    Call,
    CallReply,
    Command,
    Configuration,
    ElectionReply,
    ElectionRequest,
    Forward,
    ForwardReply,
    InstallSnapshot,
    Member,
    Message,
    ReadReply,
    ReadRequest,
    SnapshotReply,
    SnapshotRequest,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)


def given(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis' `given`, but for the time that an example takes: a busy machine is no mistake."""
    unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    return lambda test: unhurried(_given(*strategies)(test))


WHOLE = st.integers(0, 2**63)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)
# What a value may hold that looks like the codec's own marks, if the codec looked for marks.
TRICKY = st.sampled_from(['"],[', '"sizes":[1]', "]}", '{"m":"append"}', "\n", "\u2028", '\\"', "é", "\0"]) | TEXT


def text_of(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


commands = st.tuples(st.sampled_from(["put", "delete"]), TRICKY, JSON | TRICKY).map(list)
members = st.builds(Member, TEXT, TEXT, TEXT, st.booleans())
configurations = st.builds(
    Configuration, TEXT, st.sampled_from(["bully", "raft"]), st.lists(members).map(tuple), st.lists(TEXT).map(tuple)
)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    first, term, at_ms = draw(WHOLE), draw(WHOLE), draw(WHOLE)
    if draw(st.booleans()):
        return codec.encode_config(first, term, at_ms, draw(configurations))
    entries: list[Command] = draw(st.lists(commands | st.just(NOOP), min_size=1, max_size=4))
    return codec.encode_batch(first, term, at_ms, [text_of(e) for e in entries], entries)


def some(cls: type[Any], *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(cls, st.just("a"), st.just("b"), *parts)


flag = st.booleans()
texts = st.lists(commands.map(text_of), max_size=4).map(tuple)
digests = st.none() | st.tuples(WHOLE, WHOLE)
EVERY: dict[type[Any], st.SearchStrategy[Any]] = {
    Append: some(Append, *[WHOLE] * 5, st.lists(batches(), max_size=3).map(tuple), digests, flag),
    AppendReply: some(AppendReply, WHOLE, flag, *[WHOLE] * 5, flag),
    VoteRequest: some(VoteRequest, *[WHOLE] * 3, flag),
    VoteReply: some(VoteReply, WHOLE, flag, flag),
    ElectionRequest: some(ElectionRequest, *[WHOLE] * 3, TRICKY, WHOLE),
    ElectionReply: some(ElectionReply, WHOLE, st.sampled_from(["leader", "alive", "yield"]), WHOLE),
    TimeoutNow: some(TimeoutNow, WHOLE),
    ReadRequest: some(ReadRequest, WHOLE, WHOLE),
    ReadReply: some(ReadReply, *[WHOLE] * 3),
    InstallSnapshot: some(InstallSnapshot, *[WHOLE] * 5, TEXT, st.binary()),
    SnapshotReply: some(SnapshotReply, *[WHOLE] * 3, flag),
    SnapshotRequest: some(SnapshotRequest, WHOLE),
    Forward: some(Forward, WHOLE, texts),
    ForwardReply: some(ForwardReply, WHOLE, texts),
    Call: some(Call, WHOLE, st.dictionaries(TRICKY, JSON)),
    CallReply: some(CallReply, WHOLE, st.dictionaries(TRICKY, JSON)),
}
ANY = st.one_of(*EVERY.values())


def there_and_back(message: Message) -> Any:
    return codec.decode_message(codec.encode_message(message), "a", "b")


# --- what is right comes through


def test_every_kind_of_message_is_tested_here() -> None:
    assert set(EVERY) == set(typing.get_args(Message))


@pytest.mark.parametrize("kind", EVERY, ids=lambda cls: cls.__name__)
def test_every_message_comes_out_as_it_went_in(kind: type[Any]) -> None:
    @given(EVERY[kind])
    def check(message: Any) -> None:
        assert there_and_back(message) == message

    check()


@given(ANY)
def test_a_message_is_one_json_object_without_a_line_feed(message: Any) -> None:
    payload = codec.encode_message(message)
    assert b"\n" not in payload
    assert isinstance(json.loads(payload), dict)


@given(EVERY[Append])
def test_a_batch_arrives_in_the_very_bytes_that_its_leader_made(message: Append) -> None:
    arrived = there_and_back(message).batches
    assert [b.data for b in arrived] == [b.data for b in message.batches]
    assert [b.commands for b in arrived] == [b.commands for b in message.batches]
    assert [b.config for b in arrived] == [b.config for b in message.batches]


@given(EVERY[Forward])
def test_a_forwarded_write_arrives_encoded_and_decoded(message: Forward) -> None:
    arrived = there_and_back(message)
    assert arrived.entries == message.entries
    assert [text_of(command) for command in arrived.commands] == list(message.entries)


@given(batches())
def test_a_batch_is_known_from_its_bytes_alone(batch: Batch) -> None:
    again = codec.decode_batch(batch.data)
    assert (again, again.commands, again.config, again.at_ms) == (batch, batch.commands, batch.config, batch.at_ms)
    assert b"\n" not in batch.data


def test_messages_look_as_they_are_documented() -> None:
    batch = codec.encode_batch(12, 3, 1690000000000, [b'["put","k","v"]', b'["delete","k"]'])
    assert batch.data == (
        b'{"first":12,"last":13,"term":3,"at":1690000000000,"entries":[["put","k","v"],["delete","k"]]}'
    )
    append = Append("a", "b", 3, 11, 2, 11, 7, (batch,))
    assert codec.encode_message(append) == (
        b'{"m":"append","term":3,"prev":[11,2],"commit":11,"round":7,"sizes":[%d],"batches":[%b]}'
        % (len(batch.data), batch.data)
    )
    assert codec.encode_message(TimeoutNow("a", "b", 3)) == b'{"m":"timeout_now","term":3}'


# --- what is wrong is refused, and does nothing else


def refused_or_read(payload: bytes) -> None:
    """Decoding either succeeds, with something that can be encoded again, or raises BadRequest."""
    try:
        message = codec.decode_message(payload, "a", "b")
    except BadRequest as error:
        assert str(error)
    else:
        codec.encode_message(message)


damages = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 9), st.binary(max_size=9))
"""Where, as a part of the whole; how many bytes go; what comes instead."""


@given(ANY, st.lists(damages, min_size=1, max_size=3))
def test_bytes_that_were_damaged_are_refused_or_read(message: Any, damaged: list[tuple[float, int, bytes]]) -> None:
    payload = codec.encode_message(message)
    for where, gone, instead in damaged:
        at = int(where * len(payload))
        payload = payload[:at] + instead + payload[at + gone :]
    refused_or_read(payload)


@given(ANY)
def test_a_message_cut_short_anywhere_is_refused(message: Any) -> None:
    payload = codec.encode_message(message)
    for end in range(0, len(payload), 1 + len(payload) // 50):
        with pytest.raises(BadRequest):
            codec.decode_message(payload[:end], "a", "b")


@given(ANY, st.data())
def test_a_field_of_another_type_is_refused_or_read(message: Any, data: st.DataObject) -> None:
    value = json.loads(codec.encode_message(message))
    name = data.draw(st.sampled_from(sorted(value)))
    value[name] = data.draw(JSON | st.integers() | st.lists(st.integers()))
    refused_or_read(text_of(value))


@given(ANY, st.data())
def test_a_message_that_lacks_a_field_is_refused(message: Any, data: st.DataObject) -> None:
    value = json.loads(codec.encode_message(message))
    optional = {"digest", "confirmed"} if isinstance(message, Append) else set()
    del value[data.draw(st.sampled_from(sorted(value.keys() - optional)))]
    with pytest.raises(BadRequest):
        codec.decode_message(text_of(value), "a", "b")


@given(JSON)
def test_any_other_json_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest):
        codec.decode_message(text_of(value), "a", "b")
    with pytest.raises(BadRequest):
        codec.decode_batch(text_of(value))


@given(st.binary(max_size=60))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(BadRequest):
        codec.decode_message(noise, "a", "b")
    with pytest.raises(BadRequest):
        codec.decode_batch(noise)


BATCH = b'{"first":1,"last":1,"term":1,"at":0,"entries":[["noop"]]}'


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b'"append"',
        b"{}",
        b'{"m":null}',
        b'{"m":["append"]}',
        b'{"m":"victory","term":1}',
        b'{"m":"' + b"victory" * 10_000 + b'"}',
        b'{"m":"append","term":"' + b"1" * 10_000 + b'"}',
        b'{"m":"timeout_now"}',
        b'{"m":"timeout_now","term":-1}',
        b'{"m":"timeout_now","term":1.0}',
        b'{"m":"timeout_now","term":true}',
        b'{"m":"timeout_now","term":NaN}',
        b'{"m":"timeout_now","term":1}{}',
        b'{"m":"timeout_now","term":' + b"9" * 5000 + b"}",
        b'{"m":"timeout_now","term":' + b"[" * 100_000,
        b'{"m":"vote_reply","term":1,"granted":1,"doubt":false}',
        b'{"m":"election_reply","term":1,"answer":"perhaps","ask":1}',
        b'{"m":"install","term":1,"index":1,"index_term":1,"offset":0,"size":1,"sha256":"","data":"no hex!"}',
        b'{"m":"install","term":1,"index":1,"index_term":1,"offset":0,"size":1,"sha256":"","data":"abc"}',
        b'{"m":"install","term":1,"index":1,"index_term":1,"offset":0,"size":1,"sha256":"","data":"\xc3\xa9"}',
        b'{"m":"call","ticket":1,"request":[]}',
        b'{"m":"append","term":1,"prev":[0],"commit":0,"round":0,"sizes":[],"batches":[]}',
        b'{"m":"append","term":1,"prev":[0,-1],"commit":0,"round":0,"sizes":[],"batches":[]}',
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"digest":[1],"sizes":[],"batches":[]}',
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[57],"batches":[]}',
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[],"batches":[%b]}' % BATCH,
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[56],"batches":[%b]}' % BATCH,
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[58],"batches":[%b]}' % BATCH,
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[56,58],"batches":[%b,%b]}' % (BATCH, BATCH),
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[-1,116],"batches":[%b,%b]}'
        % (BATCH, BATCH),
        b'{"m":"append","term":1,"prev":[0,0],"commit":0,"round":0,"sizes":[57],"batches":[%b],"more":1}' % BATCH,
        b'{"m":"forward","ticket":1,"sizes":[2],"entries":{"a":1}}',
        b'{"m":"forwarded","ticket":-1,"sizes":[],"replies":[]}',
    ],
    ids=lambda payload: repr(payload[:70]),
)
def test_a_peers_nonsense_is_refused(payload: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        codec.decode_message(payload, "a", "b")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"null",
        b"{}",
        b'{"first":1,"last":2,"term":1,"at":0,"entries":[["noop"]]}',
        b'{"first":2,"last":1,"term":1,"at":0,"entries":[]}',
        b'{"first":1,"last":1,"term":1.0,"at":0,"entries":[["noop"]]}',
        b'{"first":true,"last":1,"term":1,"at":0,"entries":[["noop"]]}',
        b'{"first":1,"last":1,"term":1,"at":0,"entries":7}',
        b'{"first":1,"last":1,"term":1,"at":0}',
        b'{"first":1,"last":1,"term":1,"at":0,"config":null}',
        b'{"first":1,"last":1,"term":1,"at":0,"config":{"cluster":"c","election":"bully","members":[7],"removed":[]}}',
        b'{"first":1,"last":2,"term":1,"at":0,"config":{"cluster":"c","election":"bully","members":[],"removed":[]}}',
    ],
)
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        codec.decode_batch(data)
