"""HTTP/1.1 without sockets: bytes to requests, responses to bytes (RFC 9110, RFC 9112).

Laws:

* A request means one thing only. Whatever two implementations might read differently, and so could be smuggled past
  the one in front (RFC 9112 §11.2), is answered with 400 and the end of the connection: a length beside
  `chunked`, a length twice, a bare LF, a folded header, a blank before a colon, a coding that is not `chunked`.
* A body is refused from its declared length; the head is at most 64 KiB.
* Nothing here touches a socket or a clock.

Theory. `HttpCutter` is to HTTP what wire.FrameBuffer is to frames: fed with what arrived, it returns the requests
that are complete, and says in `error` that nothing more can be cut. A *route* turns a request into either a
`Response` at once, or into an `Ask`: a request of the native protocol, and how its reply is to be shown. So the
service behind knows nothing of HTTP.

The standard library's `http.client.parse_headers` is not used: it takes what the first law refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, unquote_to_bytes

from ddb.errors import BadRequest, DdbError, Forbidden, TooLarge
from ddb.wire import failure, too_large

HEAD_BYTES_MAX: Final = 64 << 10
HEADERS_MAX: Final = 100
CHUNK_LINE_BYTES_MAX: Final = 4096
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"})
JSON_TYPE: Final = "application/json"
TEXT_TYPE: Final = "text/plain; charset=utf-8"
EVENTS_TYPE: Final = "text/event-stream"

_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_HEAD_END = re.compile(rb"\n\r?\n")
_NO_REQUEST_LINE: Final = "The request line is not of the form METHOD TARGET HTTP/1.1."
_ORIGIN = re.compile(r"^https?://[^/?#]+", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")

_STATUS: Final[Mapping[str, int]] = {
    "bad_frame": 400,
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "wrong_cluster": 409,
    "session_expired": 409,
    "compacted": 410,
    "too_large": 413,
    "not_leader": 307,
    "no_leader": 503,
    "timeout": 503,
    "overloaded": 503,
    "read_only": 503,
    "shutting_down": 503,
}


class HttpError(DdbError):
    """What HTTP itself forbids; `status` says how it is told."""

    code: ClassVar[str] = "bad_request"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NotFound(HttpError):
    """Nothing is there."""

    code: ClassVar[str] = "not_found"

    def __init__(self, message: str) -> None:
        super().__init__(HTTPStatus.NOT_FOUND, message)


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. Header names are in lower case; `path` is `target` up to the query, still percent-encoded."""

    method: str
    target: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    keep_alive: bool = True
    minor: int = 1  # HTTP/1.minor


@dataclass(frozen=True, slots=True)
class Continue:
    """The client waits for `100 Continue` before it sends the body."""


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response."""

    status: int
    body: bytes = b""
    content_type: str = JSON_TYPE
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """Put `request` to the service; `show` turns its reply, an encoded JSON object, into the response."""

    request: dict[str, Any]
    show: Callable[[bytes], Response]


Handler = Callable[[Request], "Ask | Response"]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers `path`, by method. A path that ends with a slash stands for all paths below it."""

    path: str
    methods: Mapping[str, Handler] = field(default_factory=dict)


# ---------------------------------------------------------- bytes to requests


class HttpCutter:
    """Cuts a stream into requests; see wire.Cutter. `body_bytes_max` is the longest body taken."""

    __slots__ = ("_body", "_head", "_need", "_rest", "_searched", "_step", "body_bytes_max", "error")

    def __init__(self, body_bytes_max: int) -> None:
        self.body_bytes_max = body_bytes_max
        self.error: DdbError | None = None
        self._rest = bytearray()
        self._searched = 0  # no end of the line or head lies before here
        self._head: Request | None = None
        self._body = bytearray()  # of the chunks so far
        self._need = 0  # bytes of the body, or of the chunk with its CRLF
        self._step: Callable[[list[Request | Continue]], bool] = self._cut_head

    def __len__(self) -> int:
        return len(self._rest) + len(self._body)

    def feed(self, data: bytes) -> list[Request | Continue]:
        """See Cutter."""
        out: list[Request | Continue] = []
        if self.error is not None:
            return out
        self._rest += data
        try:
            while self._step(out):
                pass
        except (HttpError, TooLarge) as error:
            self.error = error
            self._rest.clear()
            self._body.clear()
        return out

    def finish(self) -> list[Request | Continue]:
        """See Cutter."""
        if self.error is None and (self._rest.strip(b"\r\n") or self._head is not None):
            self.error = HttpError(400, "The stream ended inside a request.")
        return []

    def _cut_head(self, out: list[Request | Continue]) -> bool:
        rest = self._rest
        while rest[:2] == b"\r\n":  # RFC 9112 §2.2: empty lines before a request are ignored
            del rest[:2]
            self._searched = 0
        found = _HEAD_END.search(rest, self._searched)
        end = found.start() - 1 if found else len(rest)
        if end > HEAD_BYTES_MAX:
            raise HttpError(431, f"The head of the request is over {HEAD_BYTES_MAX} bytes; send fewer headers.")
        if found is None:
            self._check_first_line()
            self._searched = max(0, len(rest) - 2)
            return False
        if rest[max(0, end) : end + 4] != b"\r\n\r\n":
            raise HttpError(400, "Lines of an HTTP head end with CR LF, not with LF alone.")
        head = parse_head(bytes(rest[:end]))
        del rest[: end + 4]
        self._searched = 0
        self._begin_body(head, out)
        return True

    def _check_first_line(self) -> None:
        """Refuse what is no request line as soon as it is there: a person who types it would wait for an answer."""
        end = self._rest.find(b"\n", self._searched)
        if end >= 0 and b"\n" not in self._rest[:end] and not _REQUEST_LINE.fullmatch(self._rest[:end].rstrip(b"\r")):
            raise HttpError(400, _NO_REQUEST_LINE)

    def _begin_body(self, head: Request, out: list[Request | Continue]) -> None:
        """Decide how the body is delimited (RFC 9112 §6.3)."""
        length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
        if coding is not None:
            if length is not None or head.minor == 0:
                raise HttpError(400, "Send either Content-Length or, in HTTP/1.1 only, Transfer-Encoding.")
            if coding.lower() != "chunked":
                raise HttpError(501, "The only transfer coding known here is chunked.")
            self._step = self._cut_chunk_size
        elif length is not None:
            if not (length.isascii() and length.isdigit() and len(length) < 20):
                raise HttpError(400, "Content-Length must be one decimal number.")
            self._need = int(length)
            if self._need > self.body_bytes_max:
                raise too_large(self._need, self.body_bytes_max)
            self._step = self._cut_body
        elif head.method in ("PUT", "POST", "PATCH"):
            raise HttpError(411, f"A {head.method} needs Content-Length, or Transfer-Encoding: chunked.")
        else:
            self._need = 0
            self._step = self._cut_body
        self._head = head
        expect = head.headers.get("expect")
        if expect is not None and head.minor > 0:
            if expect.lower() != "100-continue":
                raise HttpError(417, "The only expectation known here is 100-continue.")
            if not self._rest and (coding is not None or self._need):
                out.append(Continue())

    def _cut_body(self, out: list[Request | Continue]) -> bool:
        if len(self._rest) < self._need:
            return False
        self._complete(bytes(self._rest[: self._need]), out)
        del self._rest[: self._need]
        return True

    def _complete(self, body: bytes, out: list[Request | Continue]) -> None:
        head, self._head = self._head, None
        if head is not None:
            out.append(replace(head, body=body) if body else head)
        self._step = self._cut_head

    # -- chunked bodies (RFC 9112 §7.1)

    def _cut_line(self) -> bytes | None:
        """The next line without its CRLF; None when it is not complete."""
        rest = self._rest
        end = rest.find(b"\n", self._searched)
        if (end if end >= 0 else len(rest)) > CHUNK_LINE_BYTES_MAX:
            raise HttpError(400, f"A line between chunks is over {CHUNK_LINE_BYTES_MAX} bytes.")
        if end < 0:
            self._searched = len(rest)
            return None
        line = bytes(rest[:end])
        del rest[: end + 1]
        self._searched = 0
        if not line.endswith(b"\r"):
            raise HttpError(400, "Lines between chunks end with CR LF, not with LF alone.")
        return line[:-1]

    def _cut_chunk_size(self, out: list[Request | Continue]) -> bool:
        line = self._cut_line()
        if line is None:
            return False
        matched = _CHUNK_SIZE.fullmatch(line)
        if matched is None:
            raise HttpError(400, "A chunk begins with its size in hexadecimal.")
        size = int(matched[1], 16)
        if len(self._body) + size > self.body_bytes_max:
            raise too_large(None, self.body_bytes_max)
        self._need = size + 2
        self._step = self._cut_chunk if size else self._cut_trailer
        return True

    def _cut_chunk(self, out: list[Request | Continue]) -> bool:
        if len(self._rest) < self._need:
            return False
        if self._rest[self._need - 2 : self._need] != b"\r\n":
            raise HttpError(400, "After the bytes of a chunk CR LF must follow.")
        self._body += self._rest[: self._need - 2]
        del self._rest[: self._need]
        self._step = self._cut_chunk_size
        self._need = 0
        return True

    def _cut_trailer(self, out: list[Request | Continue]) -> bool:
        """Trailers are read away; at most as many bytes of them as a head may have."""
        line = self._cut_line()
        if line is None:
            return False
        self._need += len(line)
        if self._need > HEAD_BYTES_MAX:
            raise HttpError(431, "The trailers are too large.")
        if line:
            if _HEADER.fullmatch(line) is None:
                raise HttpError(400, "A trailer is not of the form NAME: VALUE.")
            return True
        body = bytes(self._body)
        self._body.clear()
        self._complete(body, out)
        return True


def parse_head(head: bytes) -> Request:
    """The request line and headers in `head`, without the empty line. Raises HttpError."""
    request_line, *lines = head.split(b"\r\n")
    matched = _REQUEST_LINE.fullmatch(request_line)
    if matched is None:
        raise HttpError(400, _NO_REQUEST_LINE)
    method, target = matched[1].decode(), matched[2].decode()
    if matched[3] != b"1":
        raise HttpError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if method not in METHODS:
        raise HttpError(501, f"The method {method[:40]} is not known here.")
    minor = min(int(matched[4]), 1)
    headers = _parse_headers(lines)
    if minor and "host" not in headers:
        raise HttpError(400, "HTTP/1.1 requires a Host header.")
    path, query = _split_target(target)
    tokens = {token.strip() for token in headers.get("connection", "").lower().split(",")}
    keep_alive = "close" not in tokens and (minor > 0 or "keep-alive" in tokens)
    return Request(method, target, path, query, headers, b"", keep_alive, minor)


def _parse_headers(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > HEADERS_MAX:
        raise HttpError(431, f"More than {HEADERS_MAX} headers; send fewer.")
    headers: dict[str, str] = {}
    for line in lines:
        matched = _HEADER.fullmatch(line)
        if matched is None:
            raise HttpError(400, "A header is not of the form NAME: VALUE.")
        name, value = matched[1].decode().lower(), matched[2].decode("latin-1").rstrip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in ("content-length", "transfer-encoding", "host"):
            raise HttpError(400, f"The header {name} may stand only once.")
        else:
            headers[name] += ", " + value
    return headers


def _split_target(target: str) -> tuple[str, dict[str, str]]:
    """Path and query of a request target in origin, absolute or asterisk form (RFC 9112 §3.2)."""
    path, _, query = _ORIGIN.sub("", target).partition("?")
    if "#" in target or not (path.startswith("/") or path == "*"):
        raise HttpError(400, "The request target must begin with a slash, and have no fragment; encode # as %23.")
    try:
        return path, dict(parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100))
    except ValueError:
        raise HttpError(400, "The query is not of the form NAME=VALUE&…, percent-encoded UTF-8.") from None


# --------------------------------------------------------- requests to answers


def answer(routes: Sequence[Route], request: Request) -> Ask | Response:
    """What the route for `request` says. Raises HttpError where there is none, and what the route raises."""
    route = _find(routes, request.path)
    if route is None:
        raise NotFound(f"Nothing is at {request.path[:200]}; see docs/protocol.md for what is.")
    method = "GET" if request.method == "HEAD" else request.method
    handler = route.methods.get(method)
    if handler is None:
        allowed = sorted({*route.methods, "OPTIONS", *(("HEAD",) if "GET" in route.methods else ())})
        allow = ("Allow", ", ".join(allowed))
        if method == "OPTIONS":
            return Response(204, headers=(allow,))
        error = HttpError(405, f"{request.method} is not possible at {request.path[:200]}.")
        return Response(405, failure(error), headers=(allow,))
    if method != "GET":
        _refuse_foreign_origin(request)
    return handler(request)


def _find(routes: Sequence[Route], path: str) -> Route | None:
    fits = [r for r in routes if path == r.path or (r.path[1:].endswith("/") and path.startswith(r.path))]
    return max(fits, key=lambda route: len(route.path), default=None)


def _refuse_foreign_origin(request: Request) -> None:
    """Keep a web page that somebody happens to read from writing into a database on their own machine: browsers
    send a POST's Origin (RFC 6454 §7), and no program but a browser does."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Forbidden("A page of another origin may not change anything here.")


def key_of(request: Request, prefix: str) -> str:
    """What follows `prefix` in the path, percent-decoded. Raises BadRequest where it is not UTF-8."""
    try:
        return unquote_to_bytes(request.path[len(prefix) :]).decode()
    except UnicodeDecodeError:
        raise BadRequest("The path is not percent-encoded UTF-8.") from None


# ---------------------------------------------------------- answers to bytes


def status_of(code: str) -> int:
    """The HTTP status for an error's code."""
    return _STATUS.get(code, 500)


def refusal(error: DdbError) -> Response:
    """The response that tells of `error`."""
    return failed(error.status if isinstance(error, HttpError) else status_of(error.code), failure(error))


def failed(status: int, body: bytes, location: str | None = None) -> Response:
    """A failure's response: with `Retry-After` where waiting helps, with `Location` where another node does."""
    if status == HTTPStatus.TEMPORARY_REDIRECT and location is not None:
        return Response(status, body, headers=(("Location", location),))
    if status in (HTTPStatus.TEMPORARY_REDIRECT, HTTPStatus.SERVICE_UNAVAILABLE):
        return Response(HTTPStatus.SERVICE_UNAVAILABLE, body, headers=(("Retry-After", "1"),))
    return Response(status, body)


def render(response: Response, request: Request | None, date: str) -> bytes:
    """`response` to `request` as it goes out (None: a request that could not be read, after which the connection
    closes). `date` is for the Date header (RFC 9110 §6.6.1)."""
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = ""
    lines = [f"HTTP/1.1 {response.status} {phrase}", f"Date: {date}"]
    bodiless = response.status in (204, 304)
    if not bodiless:
        lines += [
            f"Content-Type: {response.content_type}",
            f"Content-Length: {len(response.body)}",
            "X-Content-Type-Options: nosniff",
        ]
    lines += [f"{name}: {value}" for name, value in response.headers]
    if request is None or not request.keep_alive:
        lines.append("Connection: close")
    elif request.minor == 0:
        lines.append("Connection: keep-alive")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    return head if bodiless or (request is not None and request.method == "HEAD") else head + response.body


def stream_head(date: str) -> bytes:
    """The head of a response that goes on as server-sent events until the connection ends."""
    lines = [
        "HTTP/1.1 200 OK", f"Date: {date}", f"Content-Type: {EVENTS_TYPE}", "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff", "Connection: close", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode()


CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
