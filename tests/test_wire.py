"""wire: strict JSON in, compact JSON out, and messages cut from a stream however it is chunked."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb import wire
from ddb.errors import BadFrame, BadRequest, NotLeader, TooLarge

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=25,
)


@pytest.fixture(params=[0, 640, 4300, 10_000])
def digits_limit(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every kind of PYTHONINTMAXSTRDIGITS: none, the lowest, the default, a higher one."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(request.param)
    yield request.param
    sys.set_int_max_str_digits(before)


# --- decode


@given(st.dictionaries(TEXT, JSON))
def test_what_json_writes_is_read_as_json_reads_it(value: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        assert wire.decode(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(JSON)
def test_encoding_is_idempotent(value: Any) -> None:
    once = wire.encode(value)
    assert wire.encode(wire.decode_value(once)) == once
    assert wire.decode_value(once) == value


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"", "not JSON"),
        (b"   ", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a":}', "not JSON"),
        (b'{"a":1,}', "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b'{"a":1 "b":2}', "not JSON"),
        (b'{"a":01}', "not JSON"),
        (b'{"a":+1}', "not JSON"),
        (b'{"a":.5}', "not JSON"),
        (b'{"a":"tab\there"}', "not JSON"),
        (b'{"a":"\\x41"}', "not JSON"),
        (b'{"a":"\\u12"}', "not JSON"),
        (b'\xef\xbb\xbf{"a":1}', "not JSON"),
        (b'{"a":1}{"b":2}', "something else follows"),
        (b'{"a":1}\x00', "something else follows"),
        (b' {"a":1} x', "something else follows"),
        (b"[]", "not a JSON object"),
        (b'"op"', "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":Infinity}', "Infinity is not JSON"),
        (b'{"a":-Infinity}', "-Infinity is not JSON"),
        (b'{"a":1e400}', "too large for a double"),
        (b'{"a":-1e400}', "too large for a double"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),  # a surrogate written in UTF-8's manner
        (b'{"a":"\xc0\x80"}', "not UTF-8"),  # an overlong form
        (b'{"a":"\\ud800"}', "unpaired surrogate"),
        (b'{"a":"\\udc00"}', "unpaired surrogate"),
        (b'{"a":"\\udc00\\ud800"}', "unpaired surrogate"),
        (b'{"a":"\\ud800\\u0041"}', "unpaired surrogate"),
        (b'{"a":"\\ud83d\\\\ude00"}', "unpaired surrogate"),
        (b'{"a":"\\\\\\ud800"}', "unpaired surrogate"),
        (b'{"\\ud800":1}', "unpaired surrogate"),
        (b'{"a":"\\ud800","a":1}', "unpaired surrogate"),
        (b' {"a":"\\ud800"}', "unpaired surrogate"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "levels deep"),
        (b"[" * 100_000, "levels deep"),
        (b'{"a":' + b"9" * 10_000 + b"}", "more than 4300 digits"),
        (b'{"a":-' + b"9" * 4301 + b"}", "more than 4300 digits"),
    ],
)
def test_each_way_to_be_wrong_gets_its_sentence(payload: bytes, sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        wire.decode(payload)
    assert sentence in caught.value.message
    assert len(caught.value.message) < 200
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize(
    ("payload", "value"),
    [
        (b' \r\n\t{"a":1} \n', {"a": 1}),
        (b'{"a":"\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a":"\\uD83D\\uDE00"}', {"a": "\U0001f600"}),
        (b'{"a":"\\\\ud800"}', {"a": "\\ud800"}),  # an escaped backslash, then letters
        (b'{"a":"\\\\\\\\ud800"}', {"a": "\\\\ud800"}),
        (b'{"a":"\\u0000\\u007f"}', {"a": "\x00\x7f"}),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b'{"a":1e308,"b":1e-400}', {"a": 1e308, "b": 0.0}),
        (b'{"":{}}', {"": {}}),
    ],
)
def test_odd_but_right_json_is_taken(payload: bytes, value: Any) -> None:
    assert wire.decode(payload) == value


def nested(levels: int, kind: str) -> bytes:
    """`levels` containers in one another, as one JSON text."""
    opening, closing = ("[", "]") if kind == "array" else ('{"[{":', "}")
    return (opening * levels + ("" if kind == "array" else "1") + closing * levels).encode()


@pytest.mark.parametrize("kind", ["array", "object"])
def test_128_levels_pass_and_129_do_not(kind: str) -> None:
    wire.decode_value(nested(128, kind))
    wire.decode_value(b" " + nested(128, kind))
    for payload in (nested(129, kind), b" " + nested(129, kind)):
        with pytest.raises(BadRequest, match="128 levels"):
            wire.decode_value(payload)


def test_width_and_brackets_in_strings_are_not_depth() -> None:
    wide = {"rows": [[[n]] for n in range(1000)], "text": '[{"' * 1000, "[" * 500: "\\"}
    assert wire.decode(wire.encode(wide)) == wide


def test_4300_digits_pass_under_every_interpreter_setting(digits_limit: int) -> None:
    payload = b'{"a":-' + b"7" * 4300 + b"}"
    value = wire.decode(payload)
    assert wire.encode(value) == payload
    assert wire.encode(wire.decode_trusted(payload)) == payload
    assert sys.get_int_max_str_digits() == digits_limit


def test_4301_digits_fail_under_every_interpreter_setting(digits_limit: int) -> None:
    with pytest.raises(BadRequest, match="4300 digits"):
        wire.decode(b'{"a":' + b"7" * 4301 + b"}")
    with pytest.raises(BadRequest, match="4300 digits"):
        wire.encode(10**4300)
    assert sys.get_int_max_str_digits() == digits_limit


def test_bytes_of_our_own_may_be_deeper_but_must_be_json() -> None:
    assert wire.decode_trusted(nested(140, "array"))
    assert wire.decode_trusted(b"[1] ") == [1]
    with pytest.raises(BadRequest):
        wire.decode_trusted(b'{"a":1')
    with pytest.raises(BadRequest):
        wire.decode_trusted(b"[1] x")


@given(st.binary(max_size=60) | st.text('{}[]",:\\ud8c019eE+-.ntfalsru ', max_size=60).map(str.encode))
@settings(max_examples=500)
def test_any_bytes_give_a_value_or_a_sentence(payload: bytes) -> None:
    try:
        value = wire.decode_value(payload)
    except BadRequest:
        return
    assert wire.decode_value(wire.encode(value)) == value


# --- encode


@given(TEXT)
def test_a_string_is_quoted_as_json_quotes_it(text: str) -> None:
    assert wire.encode_string(text) == wire.encode(text) == json.dumps(text, ensure_ascii=False).encode()


@given(st.lists(TEXT, max_size=4), st.booleans())
def test_the_strings_of_a_payload_without_escapes_are_quoted_the_short_way(texts: list[str], ascii_only: bool) -> None:
    payload = json.dumps({"texts": texts}, ensure_ascii=ascii_only).encode()
    quote = wire.quoter(payload)
    assert (quote is wire.encode_string) is (b"\\" in payload)
    assert [quote(text) for text in wire.decode(payload)["texts"]] == [wire.encode_string(text) for text in texts]


@given(st.text(st.characters(max_codepoint=0x7F)).map(lambda text: b'{"a":"%b"}' % text.encode()))
def test_whatever_is_taken_for_json_is_quoted_alike_either_way(payload: bytes) -> None:
    try:
        request = wire.decode(payload)
    except BadRequest:
        return
    quote = wire.quoter(payload)
    for text in (*request, *(value for value in request.values() if type(value) is str)):
        assert quote(text) == wire.encode_string(text)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": {1, 2}}, b"bytes", "\ud800", {"\udfff": 1}, {(1, 2): 3}]
)
def test_what_json_lacks_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest):
        wire.encode(value)


def test_a_circle_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(BadRequest, match="deep"):
        wire.encode(circle)


def test_a_lone_surrogate_is_no_string() -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        wire.encode_string("a\ud800")


@given(st.dictionaries(TEXT, JSON), JSON)
def test_a_spliced_reply_is_the_reply_and_the_field(reply: dict[str, Any], id: Any) -> None:
    reply.pop("id", None)
    spliced = wire.splice(wire.encode(reply), b'"id":' + wire.encode(id))
    assert wire.decode_value(spliced) == {**reply, "id": id}


def test_a_failure_carries_code_sentence_and_fields() -> None:
    reply = wire.decode(wire.failure(NotLeader("Ask n2.", leader="127.0.0.1:8051")))
    assert reply == {"ok": False, "error": "not_leader", "message": "Ask n2.", "leader": "127.0.0.1:8051"}


# --- frames and lines


def chunked(stream: bytes, cuts: list[int]) -> list[bytes]:
    """`stream` cut at the given places."""
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[a:b] for a, b in itertools.pairwise(places)]


def feed_all(cutter: wire.Cutter, chunks: list[bytes]) -> list[bytes]:
    """All payloads that `chunks` and the end of the stream complete."""
    return [payload for chunk in chunks for payload in cutter.feed(chunk)] + cutter.finish()


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(0)))
def test_frames_survive_any_chunking(payloads: list[bytes], cuts: list[int]) -> None:
    payloads = [p for p in payloads if p]
    cutter = wire.FrameBuffer(50)
    assert feed_all(cutter, chunked(b"".join(map(wire.frame, payloads)), cuts)) == payloads
    assert cutter.error is None and len(cutter) == 0


@given(st.lists(st.text("ab{}é", max_size=9)), st.booleans(), st.lists(st.integers(0)), st.booleans())
def test_lines_survive_any_chunking(texts: list[str], crlf: bool, cuts: list[int], unended: bool) -> None:
    stream = "".join(text + ("\r\n" if crlf else "\n") for text in texts).encode()
    cutter = wire.LineBuffer(18)
    lines = feed_all(cutter, chunked(stream.rstrip(b"\r\n") if unended else stream, cuts))
    assert lines == [text.encode() for text in texts if text]
    assert cutter.error is None and len(cutter) == 0


@given(st.binary(max_size=80), st.lists(st.integers(0)))
@settings(max_examples=500)
def test_the_verdict_on_garbage_does_not_depend_on_its_chunks(stream: bytes, cuts: list[int]) -> None:
    for make in (wire.FrameBuffer, wire.LineBuffer):
        whole, parts = make(20), make(20)
        assert feed_all(whole, [stream]) == feed_all(parts, chunked(stream, cuts))
        assert type(whole.error) is type(parts.error)


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"-5\nhello\n", BadFrame),
        (b"+5\nhello\n", BadFrame),
        (b" 5\nhello\n", BadFrame),
        (b"5 \nhello\n", BadFrame),
        (b"05\nhello\n", BadFrame),
        (b"0\n\n", BadFrame),
        (b"5\r\nhello\n", BadFrame),
        (b"1_0\nhello12345\n", BadFrame),
        (b"\nhello\n", BadFrame),
        (b"5x", BadFrame),
        (b"\xd9\xa5\nhello\n", BadFrame),  # an Arabic digit five
        (b"9" * 21, BadFrame),
        (b"9" * 21 + b"\n", BadFrame),
        (b"9" * 20 + b"\n", TooLarge),
        (b"1000000000\n", TooLarge),
        (b"101\n", TooLarge),
        (b"4\nhello\n", BadFrame),
        (b"6\nhello\n", BadFrame),  # the stream ends inside the frame
        (b"5\nhello", BadFrame),
        (b"5", BadFrame),
    ],
)
def test_each_bad_frame_is_refused_after_the_good_ones(stream: bytes, error: type[Exception]) -> None:
    for good in (b"", wire.frame(b"{}")):
        cutter = wire.FrameBuffer(100)
        assert feed_all(cutter, [good + stream]) == ([b"{}"] if good else [])
        assert type(cutter.error) is error
        assert cutter.feed(b"2\n{}\n") == []


def test_a_frame_at_the_limit_passes() -> None:
    assert wire.FrameBuffer(100).feed(wire.frame(b"x" * 100)) == [b"x" * 100]


def test_a_line_over_the_limit_is_refused_before_it_ends() -> None:
    cutter = wire.LineBuffer(100)
    assert cutter.feed(b"a\n" + b"x" * 101) == [b"a"]
    assert type(cutter.error) is TooLarge
    assert len(cutter) == 0


def test_a_line_over_the_limit_stops_the_lines_behind_it() -> None:
    cutter = wire.LineBuffer(3)
    assert cutter.feed(b"abc\r\nabcd\nab\n") == [b"abc"]
    assert type(cutter.error) is TooLarge


@pytest.mark.parametrize("chunk_bytes", [7, 1000, 65536])
def test_a_huge_message_in_small_chunks_costs_linear_time(chunk_bytes: int) -> None:
    payload = b"x" * (1 << 20)
    for cutter, stream in (
        (wire.FrameBuffer(1 << 20), wire.frame(payload)),
        (wire.LineBuffer(1 << 20), payload + b"\n"),
    ):
        began = time.process_time()
        got = [p for at in range(0, len(stream), chunk_bytes) for p in cutter.feed(stream[at : at + chunk_bytes])]
        assert got == [payload]
        assert time.process_time() - began < 5.0  # quadratic would be minutes at 7 bytes a chunk


def test_deep_and_wide_json_is_judged_in_linear_time() -> None:
    payload = b"[" + b",".join([nested(127, "array")] * 4000) + b"]"
    began = time.process_time()
    wire.decode_value(payload)
    assert time.process_time() - began < 5.0


# --- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8050", ("127.0.0.1", 8050)),
        ("http://127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("HTTP://db.example:8080/", ("db.example", 8080)),
        ("[::1]:80", ("::1", 80)),
        ("http://[fe80::1]:1/", ("fe80::1", 1)),
        (" localhost:0 ", ("localhost", 0)),
    ],
)
def test_an_address_is_taken_in_each_form(text: str, address: tuple[str, int]) -> None:
    assert wire.parse_address(text) == address
    assert wire.parse_address(wire.format_address(*address)) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":80", "host:x", "host:65536", "host:-1", "host:٣", "::1:80", "[::1]", "[host]:80",
     "https://host:80", "http://host:80/x", "a b:80", "u@h:80", "host:000080", "http://", "[]:80", "a/b:80"],
)  # fmt: skip
def test_what_is_no_address_gets_a_sentence(text: str) -> None:
    with pytest.raises(BadRequest, match="is no address"):
        wire.parse_address(text)
