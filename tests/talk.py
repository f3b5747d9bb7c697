"""Raw conversations with a server, for tests that must be able to say anything, right or wrong.

`Talk` is one connection: bytes go out exactly as given, and come back cut as the dialect asks, without any judgement.
Everything has a time limit, so a server that falls silent fails the test instead of hanging it.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 15.0


def frame(content: Any) -> bytes:
    """`content` (bytes as they are, else as JSON) as a frame."""
    payload = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"%d\n%b\n" % (len(payload), payload)


def line(content: Any) -> bytes:
    """`content` (bytes as they are, else as JSON) as a line."""
    return (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n"


def http(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    """An HTTP/1.1 request with a Host, a Content-Length where it has a body, and `headers` (`if_match` → `if-match`)."""
    head = [f"{method} {target} HTTP/1.1", "Host: ddb"]
    if body or method in ("PUT", "POST"):
        head.append(f"Content-Length: {len(body)}")
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", ""]).encode() + body


@dataclass(frozen=True)
class Response:
    """An HTTP response. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Talk:
    """One raw connection to `address` ("HOST:PORT"), closed with the context."""

    def __init__(self, address: str, timeout_s: float = TIMEOUT_S) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=timeout_s)
        self._received = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> Self:
        """Send `parts`, each in a call of its own."""
        for part in parts:
            self.socket.sendall(part)
        return self

    def finish(self) -> Self:
        """Shut down the sending side: the server sees the end of the stream."""
        self.socket.shutdown(socket.SHUT_WR)
        return self

    # -- what comes back

    def line(self) -> bytes:
        """The next line, without its LF. Raises EOFError where the stream ends first."""
        return self._until(b"\n")

    def frame(self) -> bytes:
        """The next frame's payload."""
        size = int(self._until(b"\n"))
        payload = self._exactly(size + 1)
        assert payload.endswith(b"\n"), "a frame ends with a line feed"
        return payload[:-1]

    def reply(self) -> Any:
        """The next frame's payload, decoded."""
        return json.loads(self.frame())

    def ask(self, **request: Any) -> Any:
        """Send one request as a frame, and return its reply."""
        return self.send(frame(request)).reply()

    def response(self, method: str = "GET") -> Response:
        """The next HTTP response, to a request of `method`."""
        head = self._until(b"\r\n\r\n").decode("latin-1")
        status_line, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(status_line.split(" ")[1])
        bodiless = method == "HEAD" or status in (100, 204, 304)
        body = b"" if bodiless else self._exactly(int(headers["content-length"]))
        return Response(status, headers, body)

    def rest(self) -> bytes:
        """All that still comes until the server closes. Raises ConnectionResetError where it resets instead."""
        while data := self.socket.recv(1 << 16):
            self._received += data
        rest = bytes(self._received)
        self._received.clear()
        return rest

    def _until(self, end: bytes) -> bytes:
        while end not in self._received:
            self._receive()
        found, _, rest = bytes(self._received).partition(end)
        self._received[:] = rest
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            self._receive()
        found = bytes(self._received[:size])
        del self._received[:size]
        return found

    def _receive(self) -> None:
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError(f"the server closed the connection after {bytes(self._received)!r}")
        self._received += data
