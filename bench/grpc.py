"""etcd's protocol, as the load generator speaks it: as little of gRPC over HTTP/2 as one request takes.

Theory. A gRPC call is an HTTP/2 stream: a HEADERS frame, and a DATA frame with one protobuf message behind five bytes. The
headers are the same for every call of a kind, so they are encoded once, with HPACK's literals, which leave no trace in
the decoder's table (RFC 7541 §6.2.2). What changes is the stream's number and the key's digits. A reply is HEADERS, DATA and
trailers, HEADERS again; they need not be decoded, for a call that failed has no DATA (gRPC over HTTP/2,
"Responses"). Windows are opened so wide at the beginning that they never close on us, and we never have more than a few
requests on their way, so they never close on the server either (RFC 9113 §5.2).

Only what a server sends in such a conversation is understood: a PING and SETTINGS are acknowledged, GOAWAY ends the
connection.
"""

from __future__ import annotations

import socket
import struct

from bench import dialect
from bench.plan import Plan

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
WINDOW = (1 << 31) - 1
DEFAULT_WINDOW = 65_535
INITIAL_WINDOW_SIZE = 4
FRAME_BYTES_MAX = 16_384
KEY_AND_HEADS_BYTES = 32
KEY = b"k%07d"
_HEAD = struct.Struct(">IBI")  # length and type share four bytes


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return _HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, WINDOW))
    + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - DEFAULT_WINDOW))
)
SETTINGS_ACK = frame(SETTINGS, ACK, 0, b"")


def headers(path: bytes) -> bytes:
    """The header block of a call (RFC 7541: indexed 3 and 6, literals without indexing)."""

    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    content_type = b"\x0f\x10" + text(b"application/grpc")
    return (
        b"\x83\x86\x04" + text(path) + b"\x01" + text(b"localhost") + content_type
        + b"\x00" + text(b"te") + text(b"trailers")
    )  # fmt: skip


def varint(number: int) -> bytes:
    """Protobuf's integer."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, data: bytes) -> bytes:
    """Protobuf's field of a string, bytes or a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


class Call:
    """One kind of call. Its message has the key `number` in it, for which another may stand."""

    def __init__(self, method: bytes, message: bytes, number: int = 0) -> None:
        block = headers(b"/etcdserverpb.KV/" + method)
        self._first = _HEAD.pack(len(block) << 8 | HEADERS, END_HEADERS, 0)[:5]
        body = b"\0" + struct.pack(">I", len(message)) + message
        self._second = block + _HEAD.pack(len(body) << 8 | DATA, END_STREAM, 0)[:5]
        before, _, self._after = body.partition(KEY % number)
        self._before = before + b"k"

    def request(self, stream: int, number: int) -> bytes:
        """The two frames of the call for key `number`."""
        s = stream.to_bytes(4, "big")
        return b"%b%b%b%b%b%07d%b" % (self._first, s, self._second, s, self._before, number, self._after)


class Connection:
    """See dialect.Dialect. One HTTP/2 connection; a request is a stream."""

    farewell = b""

    def __init__(self, plan: Plan) -> None:
        self._value = field(2, dialect.value(plan))
        serializable = varint(7 << 3) + b"\1" if plan.read == "stale" else b""
        self._put = Call(b"Put", field(1, KEY % 0) + self._value)
        self._get = Call(b"Range", field(1, KEY % 0) + serializable)
        self._stream = -1
        self._owed = b""  # acknowledgements, to go with the next request
        self._heard: set[int] = set()  # streams whose message has come
        self._open: set[int] = set()  # streams that are not decided
        self.fill_keys_max = min(dialect.fill_keys(plan), FRAME_BYTES_MAX // (plan.value_bytes + KEY_AND_HEADS_BYTES))
        if self.fill_keys_max < 1:
            raise ValueError(f"etcd is measured with values of less than {FRAME_BYTES_MAX} bytes: one HTTP/2 frame")

    def greet(self, connection: socket.socket) -> None:
        """Open the windows."""
        connection.sendall(PREFACE)

    def put(self, number: int) -> bytes:
        """See dialect.Dialect."""
        return self._call(self._put, number)

    def get(self, number: int) -> bytes:
        """See dialect.Dialect."""
        return self._call(self._get, number)

    def fill(self, first: int, count: int) -> bytes:
        """See dialect.Dialect; a transaction without a condition."""
        puts = (field(2, field(2, field(1, KEY % number) + self._value)) for number in range(first, first + count))
        return self._call(Call(b"Txn", b"".join(puts), first), first)

    def _call(self, call: Call, number: int) -> bytes:
        self._stream += 2
        self._open.add(self._stream)
        request = call.request(self._stream, number)
        if self._owed:
            request, self._owed = self._owed + request, b""
        return request

    def outcomes(self, data: bytes) -> tuple[list[str], bytes]:
        """See dialect.Dialect."""
        found = []
        start, unpack, heard = 0, _HEAD.unpack_from, self._heard
        while len(data) - start >= 9:
            head, flags, stream = unpack(data, start)
            end = start + 9 + (head >> 8)
            if end > len(data):
                break
            kind = head & 255
            if kind == DATA:
                heard.add(stream)
            elif kind == HEADERS and flags & END_STREAM:
                found.append("" if stream in heard else "grpc_error")
                heard.discard(stream)
                self._open.discard(stream)
            elif kind not in (HEADERS, WINDOW_UPDATE):
                found.extend(self._control(kind, flags, stream, data[start + 9 : end]))
            start = end
        return found, data[start:]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> list[str]:
        """Take what is rare; returns what it decides of requests."""
        if kind == GOAWAY:
            raise ConnectionError("the server says goodbye")
        if kind == RST_STREAM:
            self._heard.discard(stream)
            if stream not in self._open:
                return []  # a server may reset a stream that it has answered, when it did so before it saw its end
            self._open.discard(stream)
            return ["stream_reset"]
        if kind == PING and not flags & ACK:
            self._owed += frame(PING, ACK, 0, payload)
        elif kind == SETTINGS and not flags & ACK:
            self._owed += SETTINGS_ACK
        return []
