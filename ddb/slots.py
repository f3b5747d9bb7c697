"""One request's place in its connection's queue, and how its reply looks there: in a frame, in a line, in HTTP.

Laws: a slot takes the first reply that it is given; where nobody is left to read, it takes none of the memory.

Theory. The service knows slots and nothing else of connections: it keeps a slot as long as it works on the request, and
replies with an encoded JSON object. The dialect's slot turns that into the bytes that leave. Slots are made per request, so they
hold little; a large reply is framed in pieces, without being copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ddb import http
from ddb.errors import DdbError, Internal
from ddb.loop import LARGE_BYTES, Connection, Piece, log_exception
from ddb.streams import FRAMES, LINES, SSE, Dress, Event, Stream
from ddb.wire import Quote, encode_string, failure, splice


class Owner(Connection):
    """The connection that slots belong to, as they see it (server.ClientConnection)."""

    __slots__ = ("state", "stream")
    state: Any  # the service's own, about this connection
    slots: deque[Slot]
    stream: Stream | None  # what it serves alone, once a slot was opened

    def await_reply(self, slot: Slot) -> None:
        """Take no other request before `slot` has its reply: it may open a stream."""
        raise NotImplementedError

    @property
    def takes_more(self) -> bool:
        """Whether there is room for a reply of any size."""
        raise NotImplementedError

    @property
    def routes(self) -> Sequence[http.Route]:
        """The HTTP paths of the service."""
        raise NotImplementedError

    def slot_done(self, out_bytes: int) -> None:
        """A slot has its reply, of `out_bytes`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Take no more requests; end when all are answered."""
        raise NotImplementedError

    def date(self) -> str:
        """Now, for the Date header."""
        raise NotImplementedError


class Slot:
    """One request's place in the order of its connection's replies. The first reply counts."""

    __slots__ = ("connection", "deadline", "id", "out", "quote")
    dress: ClassVar[Dress] = FRAMES

    def __init__(self, connection: Owner) -> None:
        self.connection = connection
        self.id: bytes | None = None  # the request's "id", encoded
        self.out: bytes | list[Piece] | None = None  # the reply as it goes out
        self.deadline = 0.0  # the service's to set: when it will have given up, in seconds of its clock
        self.quote: Quote = encode_string  # what encodes the request's strings

    @property
    def done(self) -> bool:
        """Whether it has its reply."""
        return self.out is not None

    @property
    def has_room(self) -> bool:
        """Whether a reply of any size may be given now. A read can wait until the client has taken others."""
        return self.connection.takes_more

    def reply(self, body: bytes) -> None:
        """Answer with the encoded JSON object `body`."""
        if self.out is None:
            if len(body) > LARGE_BYTES:
                self._reply_in_pieces(body)
                return
            if self.id is not None:
                body = splice(body, b'"id":%b' % self.id)
            out = self.out = b"%d\n%b\n" % (len(body), body)
            self.connection.slot_done(len(out))

    def fail(self, error: DdbError) -> None:
        """Answer with `error`."""
        self.reply(failure(error))

    def open(self, body: bytes, rev: int) -> Stream:
        """Answer with `body`, and make the connection a stream of what follows the revision `rev`."""
        stream = self.connection.stream = Stream(self.connection, self.dress)
        self.reply(body)
        return stream

    def _reply_in_pieces(self, body: bytes) -> None:
        """The same without a copy of `body`, which would cost more than all else; none at all where nobody waits."""
        self.out = []
        if self.connection.sock is not None:
            inner: list[Piece] = [body]
            if self.id is not None:
                inner = [memoryview(body)[:-1], b',"id":%b}' % self.id]
            self.out = [self._head(sum(map(len, inner))), *inner, b"\n"]
            self.connection.slot_done(sum(map(len, self.out)))

    def _head(self, body_bytes: int) -> bytes:
        return b"%d\n" % body_bytes


class LineSlot(Slot):
    """The same on a connection of lines."""

    __slots__ = ()
    dress: ClassVar[Dress] = LINES

    def reply(self, body: bytes) -> None:
        """See Slot."""
        if self.out is None:
            if len(body) > LARGE_BYTES:
                self._reply_in_pieces(body)
                return
            if self.id is not None:
                body = splice(body, b'"id":%b' % self.id)
            self.out = body + b"\n"
            self.connection.slot_done(len(self.out))

    def _head(self, body_bytes: int) -> bytes:
        return b""


class HttpSlot(Slot):
    """The same on a connection of HTTP: replies become responses."""

    __slots__ = ("message", "show")
    dress: ClassVar[Dress] = SSE

    def __init__(self, connection: Owner) -> None:
        super().__init__(connection)
        self.message: http.Request | None = None
        self.show: Callable[[bytes], http.Response] | None = None

    def translate(self, message: http.Request | http.Continue) -> dict[str, Any] | None:
        """The native request that `message` stands for; None when there is none, and all is said."""
        if isinstance(message, http.Continue):
            self._finish(http.CONTINUE)
            return None
        self.message = message
        if not message.keep_alive:
            self.connection.finish()
        answer = http.answer(self.connection.routes, message)
        if isinstance(answer, http.Response):
            self.respond(answer)
            return None
        self.show = answer.show
        return answer.request

    def reply(self, body: bytes) -> None:
        """See Slot."""
        if self.out is None:
            if self.id is not None:
                body = splice(body, b'"id":%b' % self.id)
            try:
                response = http.Response(200, body) if self.show is None else self.show(body)
            except DdbError as error:
                response = http.refusal(error)
            except Exception:
                response = http.refusal(internal())
            self.respond(response)

    def fail(self, error: DdbError) -> None:
        """See Slot."""
        self.respond(http.refusal(error))

    def open(self, body: bytes, rev: int) -> Stream:
        """See Slot. The response has no length: it ends with the connection (RFC 9112 §6.3)."""
        stream = self.connection.stream = Stream(self.connection, self.dress)
        if self.out is None:
            first = Event(b"watch", body, rev).dressed(self.dress, last=True)
            self._finish(http.stream_head(self.connection.date()) + first)
        return stream

    def respond(self, response: http.Response) -> None:
        """Answer with `response` as it stands."""
        if self.out is None and self.connection.sock is None:
            self.out = b""
        elif self.out is None:
            self._finish(http.render(response, self.message, self.connection.date()))

    def _finish(self, out: bytes) -> None:
        self.out = out
        self.connection.slot_done(len(out))


def internal() -> Internal:
    """Log the exception being handled; return what the client is told of it."""
    reference = log_exception("a request failed")
    return Internal(f"A bug was met; the server's log tells more under the reference {reference}.")
