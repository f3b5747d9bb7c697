"""A server in this process for tests of the network floor: its loop on a thread, and plain sockets to talk to it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ddb import wire
from ddb.errors import BadRequest
from ddb.http import Route
from ddb.routes import node_routes
from ddb.server import Limits, Loop, Server, Slot

TIMEOUT_S = 10.0


class Echo:
    """Answers `echo` with its `value`; keeps the slots of `hold`, until `release`; fails on `bug`."""

    def __init__(self, routes: tuple[Route, ...] | None = None) -> None:
        self.routes = node_routes() if routes is None else routes
        self.held: list[tuple[dict[str, Any], Slot]] = []
        self.most_held = 0
        self.other: Callable[[dict[str, Any], Slot], None] | None = None

    def request(self, request: dict[str, Any], slot: Slot) -> None:
        match request.get("op"):
            case "echo":
                slot.reply(wire.encode({"ok": True, "value": request.get("value")}))
            case "large":
                slot.reply(b'{"ok":true,"value":"%b"}' % (b"x" * request["size"]))
            case "hold":
                self.held.append((request, slot))
                self.most_held = max(self.most_held, len(self.held))
            case "release":
                for held, one in reversed(self.held):
                    one.reply(wire.encode({"ok": True, "value": held.get("value")}))
                self.held.clear()
                slot.reply(b'{"ok":true}')
            case "bug":
                raise ZeroDivisionError("a secret of the inside")
            case _ if self.other is not None:
                self.other(request, slot)
            case _:
                raise BadRequest("`op` is not known.")


class Running:
    """A server whose loop runs on a thread of its own."""

    def __init__(self, service: Any, limits: Limits | None = None, host: str = "127.0.0.1") -> None:
        self.loop = Loop()
        self.server = Server(self.loop, service, host, 0, limits)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loop")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self.failure = error

    def connect(self) -> socket.socket:
        """A connection to the server."""
        return socket.create_connection(self.server.address, timeout=TIMEOUT_S)

    def call(self, fn: Callable[[], Any]) -> Any:
        """What `fn()` answers on the loop's thread."""
        answered = threading.Event()
        box: list[Any] = []

        def answer() -> None:
            box.append(fn())
            answered.set()

        self.loop.post(answer)
        assert answered.wait(TIMEOUT_S), "the loop does not turn"
        return box[0]

    def join(self) -> BaseException | None:
        """Wait until the loop has ended by itself; what it ended with."""
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        return self.failure

    def close(self) -> None:
        """Stop the loop, end everything."""
        self.loop.stop()
        self._thread.join(TIMEOUT_S)
        self.server.close()
        self.loop.close()


@contextlib.contextmanager
def running(service: Any = None, limits: Limits | None = None, host: str = "127.0.0.1") -> Iterator[Running]:
    """A running server; fails where its loop ended by an exception that nobody asked about."""
    one = Running(service or Echo(), limits, host)
    try:
        yield one
    finally:
        one.close()


def read_all(client: socket.socket) -> bytes:
    """What `client` receives until the server closes."""
    received = bytearray()
    while data := client.recv(1 << 20):
        received += data
    return bytes(received)


def read_frames(client: socket.socket, count: int) -> list[dict[str, Any]]:
    """The next `count` replies, as frames."""
    cutter = wire.FrameBuffer(1 << 30)
    replies: list[bytes] = []
    while len(replies) < count:
        data = client.recv(1 << 20)
        assert data, f"the server closed after {len(replies)} of {count} replies"
        replies += cutter.feed(data)
    assert len(replies) == count and not len(cutter)
    return [wire.decode_trusted(reply) for reply in replies]


def frames(*requests: dict[str, Any]) -> bytes:
    """`requests` as frames."""
    return b"".join(wire.frame(wire.encode(request)) for request in requests)


def talk(server: Running, data: bytes) -> bytes:
    """Send `data`, shut down the sending side, return all that comes back."""
    with server.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)
