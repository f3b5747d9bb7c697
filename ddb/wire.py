"""Bytes on the wire: what counts as JSON, and how one message ends and the next begins.

Laws:

* Strict in, compact out. `decode` accepts exactly what docs/protocol.md calls JSON, on every Python and under
  every interpreter setting; `encode(decode(encode(x))) == encode(x)`, so replicas that re-encode agree.
* A message is refused from its *declared* length, before it is held.
* No input costs more than linear time, however it is cut into chunks.
* Nothing here touches a socket or a clock.

Theory. Each request passes through `decode` once and each value through `encode` at most once, so a microsecond
here is a tenth of the machine. Two facts make it quick. A `json.JSONDecoder` is expensive to make and cheap to
use, so one is made for all. And the rules that the standard decoder does not know (RFC 8259 leaves depth and
size open in §9, and lone surrogates in §8.2) can only be broken by texts with a telling mark: no `\\u` in the
bytes, no surrogate; no 129 opening brackets, no 129 levels. The marks are looked for at the speed of
`memchr`; only where one is found does a slower look follow.

`FrameBuffer` and `LineBuffer` cut a stream into payloads. Both are fed what arrived and return what is complete;
when the stream is beyond repair they say so in `error`, *beside* the payloads that came whole before the damage:
those are answered first.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from json import encoder as _json_encoder
from typing import Any, Final, Protocol

from ddb.errors import BadFrame, BadRequest, DdbError, TooLarge

DEPTH_MAX: Final = 128
"""How many arrays and objects may stand inside one another."""

WRAPPING_LEVELS: Final = 8
"""How many levels a log entry may wrap around a client's value."""

DIGITS_MAX: Final = 4300
"""How many digits an integer may have: CPython's own default limit (its answer to CVE-2020-10735)."""

LENGTH_DIGITS_MAX: Final = 20
"""A frame length of more digits is no length at all, but garbage."""

Quote = Callable[[str], bytes]
"""What encodes a text as a JSON string."""

_WHITESPACE: Final = " \t\n\r"
_HIGH_OR_LOW = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB]..\\u[dD][c-fC-F]|(u))", re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")

_NOT_UTF8 = "The message is not UTF-8; send JSON in UTF-8."
_TOO_DEEP = f"The JSON is nested more than {DEPTH_MAX} levels deep; make it flatter."
_TOO_LONG = f"An integer has more than {DIGITS_MAX} digits; send it as a string."
_LONE = "A string holds an unpaired surrogate escape; write characters beyond U+FFFF as a pair."


# ---------------------------------------------------------------- JSON in


def _refuse_constant(name: str) -> Any:
    raise BadRequest(f"{name} is not JSON; send a finite number, a string or null.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadRequest("A number is too large for a double; send it as a string.")
    return value


# The compiled scanner under JSONDecoder.decode; it is what json/decoder.py itself calls.
_scan: Callable[[str, int], tuple[Any, int]]
_scan = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]


def decode(payload: bytes) -> dict[str, Any]:
    """The JSON object in `payload`, checked as docs/protocol.md demands of a request.

    Raises BadRequest, with a sentence for each way to be wrong.
    """
    value = decode_value(payload)
    if type(value) is not dict:
        raise BadRequest('The message is not a JSON object; send one like {"op":"ping"}.')
    return value


def decode_value(payload: bytes) -> Any:
    """Any JSON value, under the same rules as `decode`. Raises BadRequest."""
    try:
        text = payload.decode()
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError):
        return _decode_slowly(payload)
    size = len(payload)
    if end != len(text) and text[end:].strip(_WHITESPACE):
        raise BadRequest(f"After the JSON value something else follows, at character {end + 1}.")
    if 92 in payload:  # a backslash: one memchr, where looking for b"\\u" would cost ten times as much
        _check_surrogates(payload)
    if size > 2 * DEPTH_MAX and (91 in payload or payload.find(b"{", 1) > 0):  # more than one flat object
        _check_depth(payload)
    if size > DIGITS_MAX and sys.get_int_max_str_digits() != DIGITS_MAX:
        return _with_own_digits(_decode_checked, payload)
    return value


def decode_trusted(payload: bytes) -> Any:
    """Any JSON value in bytes that this program made itself: a log record, a peer's message, a reply.

    Such a text may wrap a client's value a few levels deeper than a client itself may go, so depth is not looked
    at. Raises BadRequest where the bytes are not JSON.
    """
    try:
        text = payload.decode()
        value, end = _scan(text, 0)
        if end == len(text):
            return value
    except (ValueError, StopIteration, RecursionError):
        pass
    return _with_own_digits(_decode_checked, payload)


def check_own(payload: bytes, flat: bool = False) -> None:
    """Raise BadRequest where no ddb would have made `payload`, though `decode_trusted` can read it: a line feed, which
    would break a log of lines, half of a surrogate pair, or a depth that can't be encoded again. `flat`: it is known
    not to be deep."""
    if b"\n" in payload:
        raise BadRequest("A text from another node is not in one line.")
    if 92 in payload:
        _check_surrogates(payload)
    if not flat and len(payload) > 2 * DEPTH_MAX:
        _check_depth(payload, DEPTH_MAX + WRAPPING_LEVELS)


def _decode_slowly(payload: bytes) -> Any:
    """What the quick way stumbled over: leading blanks, an interpreter's lower limit on digits, or a fault."""
    value = _with_own_digits(_decode_checked, payload)
    _check_surrogates(payload)
    _check_depth(payload)
    return value


def _decode_checked(payload: bytes) -> Any:
    try:
        text = payload.decode()
        value, end = _scan(text, len(text) - len(text.lstrip(_WHITESPACE)))
    except UnicodeDecodeError:
        raise BadRequest(_NOT_UTF8) from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"The message is not JSON: {error.msg} at character {error.pos + 1}.") from None
    except StopIteration as stop:
        position = 0 if stop.value is None else stop.value
        raise BadRequest(f"The message is not JSON: a value is missing at character {position + 1}.") from None
    except RecursionError:
        raise BadRequest(_TOO_DEEP) from None
    except ValueError:
        raise BadRequest(_TOO_LONG) from None
    if end != len(text) and text[end:].strip(_WHITESPACE):
        raise BadRequest(f"After the JSON value something else follows, at character {end + 1}.")
    return value


def _with_own_digits(work: Callable[[Any], Any], argument: Any) -> Any:
    """Do `work(argument)` under the protocol's limit on digits, whatever PYTHONINTMAXSTRDIGITS says.

    The limit belongs to the whole interpreter, so it is put back at once. Servers set it for good at their start.
    """
    limit = sys.get_int_max_str_digits()
    if limit == DIGITS_MAX:
        return work(argument)
    sys.set_int_max_str_digits(DIGITS_MAX)
    try:
        return work(argument)
    finally:
        sys.set_int_max_str_digits(limit)


def _check_surrogates(payload: bytes) -> None:
    """Raise BadRequest where a \\u escape of valid JSON is half of a surrogate pair (RFC 8259 §8.2)."""
    if _HIGH_OR_LOW.search(payload) and any(escape.group(1) for escape in _ESCAPE.finditer(payload)):
        raise BadRequest(_LONE)


def _check_depth(payload: bytes, levels: int = DEPTH_MAX) -> None:
    """Raise BadRequest where valid JSON is nested deeper than `levels`.

    With strings, scalars and the kind of bracket taken away, each round removes the innermost pairs; what is left
    after as many rounds was deeper. All of it runs at the speed of bytes.replace.
    """
    if payload.count(b"{") + payload.count(b"[") <= levels:
        return
    brackets = _STRING.sub(b"", payload).translate(_SQUARE, _NOT_BRACKETS)
    for _ in range(levels):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise BadRequest(_TOO_DEEP)


# --------------------------------------------------------------- JSON out


def _refuse_type(value: Any) -> Any:
    raise BadRequest(f"A {type(value).__name__} is not a JSON value.")


_quote: Callable[[str], str]
_quote = _json_encoder.c_encode_basestring or _json_encoder.py_encode_basestring  # type: ignore[attr-defined]


def _make_encoder() -> Callable[[Any, int], Any]:
    """The standard library's C encoder, made once: `JSONEncoder.encode` makes one anew for each call."""
    make = getattr(_json_encoder, "c_make_encoder", None)
    if make is not None:
        made: Callable[[Any, int], Any] = make(None, _refuse_type, _quote, None, ":", ",", False, False, False)
        return made
    plain = json.JSONEncoder(
        ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"), default=_refuse_type
    )
    return lambda value, _level: plain.iterencode(value)


_chunks = _make_encoder()


def encode(value: Any) -> bytes:
    """`value` as compact JSON in UTF-8. Raises BadRequest where it has no such form: NaN, Infinity, a lone
    surrogate, an integer over DIGITS_MAX digits, a type that JSON lacks, a circle."""
    try:
        if sys.get_int_max_str_digits() == DIGITS_MAX:
            return "".join(_chunks(value, 0)).encode()
        return b"".join(_with_own_digits(lambda v: [c.encode() for c in _chunks(v, 0)], value))
    except UnicodeEncodeError:
        raise BadRequest(_LONE) from None
    except RecursionError:
        raise BadRequest(_TOO_DEEP) from None
    except TypeError as error:
        raise BadRequest(f"Not a JSON value: {error}.") from None
    except ValueError as error:
        raise BadRequest(_TOO_LONG if "digits" in str(error) else "NaN and Infinity are not JSON.") from None


def encode_string(text: str) -> bytes:
    """`text` as a JSON string. Raises BadRequest where it holds a lone surrogate."""
    try:
        return _quote(text).encode()
    except UnicodeEncodeError:
        raise BadRequest(_LONE) from None


def _quoted(text: str) -> bytes:
    return b'"%b"' % text.encode()


def quoter(payload: bytes) -> Quote:
    """What encodes the strings that the JSON in `payload` holds: `encode_string`, or something that takes a sixth of its time.

    Valid JSON has no control character within a string, and a quote or a backslash only behind a backslash. So where
    `payload` has no backslash at all, nothing that it decodes to needs one.
    """
    return encode_string if 92 in payload else _quoted


def splice(reply: bytes, field: bytes) -> bytes:
    """`reply`, an encoded JSON object, with the encoded `field` (like b'"id":7') added at its end."""
    if reply == b"{}":
        return b"{%b}" % field
    return b"%b,%b}" % (reply[:-1], field)


def failure(error: DdbError) -> bytes:
    """The reply that tells a client of `error`."""
    return encode({"ok": False, "error": error.code, "message": error.message, **error.fields})


# ------------------------------------------------- one message after another


def frame(payload: bytes) -> bytes:
    """`payload` as a frame: its length in decimal, LF, the payload, LF."""
    return b"%d\n%b\n" % (len(payload), payload)


class Cutter(Protocol):
    """Cuts a stream of bytes into messages: payloads, which are bytes, or http.Request."""

    error: DdbError | None  # once set, nothing more can be cut

    def feed(self, data: bytes) -> list[Any]:
        """Take in what arrived; return the messages that it completes, in order."""
        ...

    def finish(self) -> list[Any]:
        """The stream has ended: return what the end completes, and set `error` if it ended too early."""
        ...

    def __len__(self) -> int:
        """How many bytes are held back, waiting for their rest."""
        ...


class FrameBuffer:
    """Cuts a stream into frames' payloads. `payload_bytes_max` is the longest payload taken."""

    __slots__ = ("_need", "_rest", "error", "payload_bytes_max")

    def __init__(self, payload_bytes_max: int) -> None:
        self.payload_bytes_max = payload_bytes_max
        self.error: DdbError | None = None
        self._rest = bytearray()
        self._need = 0  # no use in looking before this many bytes are there

    def __len__(self) -> int:
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """See Cutter. A payload is returned once the LF behind it has been seen."""
        if self.error is not None:
            return []
        rest = self._rest
        payloads: list[bytes] = []
        start, end = 0, len(data)
        if rest:
            missing = self._need - len(rest)
            if missing > end or not self._need:
                rest += data
                if self._need:
                    return []
                data, end = bytes(rest), len(rest)
                rest.clear()
            else:  # a large frame is whole now; what follows it need not be copied for that
                rest += memoryview(data)[:missing]
                if rest[-1] != 10:
                    self.error = _no_line_feed(self._need - 2 - rest.index(b"\n"))
                    return []
                payloads.append(bytes(memoryview(rest)[rest.index(b"\n") + 1 : -1]))
                self._rest = rest = bytearray()
                start = missing
        self._need = 0
        while start < end:
            lf = data.find(b"\n", start, start + LENGTH_DIGITS_MAX + 1)
            head = data[start:lf] if lf >= 0 else data[start : start + LENGTH_DIGITS_MAX + 1]
            if not head.isdigit() or data[start] == 48 or len(head) > LENGTH_DIGITS_MAX:
                self.error = _bad_length(head)
                return payloads
            if lf < 0:
                break
            length = int(head)
            stop = lf + 1 + length
            if length > self.payload_bytes_max:
                rest += data[start:]  # for raise_limit
                self.error = too_large(length, self.payload_bytes_max)
                return payloads
            if stop >= end:
                self._need = stop + 1 - start
                break
            if data[stop] != 10:
                self.error = _no_line_feed(length)
                return payloads
            payloads.append(data[lf + 1 : stop])
            start = stop + 1
        if start < end:
            rest += memoryview(data)[start:]
        return payloads

    def finish(self) -> list[bytes]:
        """See Cutter. A frame that lacks its end is an error."""
        if self._rest and self.error is None:
            self.error = BadFrame(
                "The stream ended inside a frame; was the length counted in bytes, and the last LF sent?"
            )
        return []

    def raise_limit(self, payload_bytes_max: int) -> None:
        """Take longer payloads from now on, also where the last one seen was refused as too large."""
        self.payload_bytes_max = payload_bytes_max
        if isinstance(self.error, TooLarge):
            self.error = None
            self._need = 0


def _no_line_feed(length: int) -> BadFrame:
    return BadFrame(f"After the {length} bytes of payload a line feed must follow; count in bytes.")


def _bad_length(head: bytes) -> BadFrame:
    shown = head.decode("ascii", "backslashreplace")
    return BadFrame(f"A frame begins with its length in decimal and a line feed, not with {shown!r}.")


def too_large(size: int | None, limit: int) -> TooLarge:
    """The error for a message of `size` bytes (None: not known) where `limit` bytes are allowed."""
    what = "The message" if size is None else f"A message of {size} bytes"
    return TooLarge(f"{what} is over the limit of {limit} bytes; send it in parts, or raise --max-frame.")


class LineBuffer:
    """Cuts a stream into lines. A CR before the LF and empty lines are ignored."""

    __slots__ = ("_rest", "error", "line_bytes_max")

    def __init__(self, line_bytes_max: int) -> None:
        self.line_bytes_max = line_bytes_max
        self.error: DdbError | None = None
        self._rest = bytearray()

    def __len__(self) -> int:
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """See Cutter."""
        if self.error is not None:
            return []
        rest = self._rest
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            lines = []
        else:
            lines = (bytes(rest) + data[: cut - 1]).split(b"\n")
            rest[:] = data[cut:]
        if len(rest) > self.line_bytes_max:
            rest.clear()
            self.error = too_large(None, self.line_bytes_max)
        return self._checked(lines)

    def finish(self) -> list[bytes]:
        """See Cutter. A last line without its LF counts: a person's `printf` often lacks it."""
        last = bytes(self._rest)
        self._rest.clear()
        return self._checked([last])

    def _checked(self, lines: list[bytes]) -> list[bytes]:
        """The lines that are not empty, up to the first one that is too long."""
        taken: list[bytes] = []
        for line in lines:
            stripped = line.rstrip(b"\r")
            if len(stripped) > self.line_bytes_max:
                self.error = too_large(len(stripped), self.line_bytes_max)
                self._rest.clear()
                break
            if stripped:
                taken.append(stripped)
        return taken


# --------------------------------------------------------------- addresses


@lru_cache(1024)
def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[IPV6]:PORT` or `http://HOST:PORT/`. Raises BadRequest with a sentence."""
    if not isinstance(text, str):
        raise BadRequest(f"An address is a string like HOST:PORT, not of type {type(text).__name__}.")
    rest = text.strip()
    if rest[:7].lower() == "http://":
        rest = rest[7:].removesuffix("/")
    host, colon, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        well_formed = ":" in host
    else:
        well_formed = ":" not in host
    well_formed = well_formed and bool(host and colon) and not re.search(r"[\s/\[\]@?#\x00-\x1f\x7f]", host)
    if not (well_formed and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise BadRequest(
            f"{text!r} is no address; give HOST:PORT, [IPV6]:PORT or http://HOST:PORT, the port below 65536."
        )
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`: `HOST:PORT`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
