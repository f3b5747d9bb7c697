"""One thread, one selector, and the sockets on it.

Laws:

* One thread owns all state. Any other thread may call `post` and `stop`, and nothing else.
* A turn is: what the sockets brought, then what was posted, then `on_turn`, then one send for each connection that
  has something to say. So everything that happened in a turn shares one fsync, one message, one system call.
* What goes wrong in a connection's handler ends that connection, and is logged with a reference. What goes wrong
  in a posted call, a timer or `on_turn` is the program's own fault and comes out of `run`, like an InvariantError
  and a `Fatal` from anywhere: a state that may be half changed must not go on answering.
* `on_close` is posted, once: nobody is called back in the middle of their own call.

Theory. The loop is level-triggered: a socket with more to read is reported again next turn. One `recv` per socket
and turn, of a bounded size, is therefore fair to all sockets without any queue. Output is only appended during the
turn; it goes out at the turn's end, and only where the kernel's buffer is full does the loop wait for it to drain
(watching an idle socket for writability would spin).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any, Final, Protocol

from ddb.errors import InvariantError
from ddb.timers import Timer, TimerThread
from ddb.wire import FrameBuffer, format_address

log = logging.getLogger(__name__)

RECV_BYTES: Final = 1 << 16
"""The most that one connection may bring in one turn."""

RECV_BULK_BYTES: Final = 1 << 18
"""The same in the middle of a large message, and for peers."""

SEND_BYTES: Final = 1 << 20
"""Output is joined to pieces of about this size before it is sent."""

LARGE_BYTES: Final = 1 << 16
"""A piece of output longer than this is not joined with others: copying it would cost more than another send."""

Piece = bytes | memoryview
"""A piece of output."""

PEER_TIMEOUT_S: Final = 10.0
"""After this long without an acknowledgement the kernel ends a connection between nodes (tcp(7), TCP_USER_TIMEOUT)."""

_PEER_PATIENCE: Final = {
    "TCP_USER_TIMEOUT": int(PEER_TIMEOUT_S * 1000),
    "TCP_KEEPIDLE": int(PEER_TIMEOUT_S / 2),  # by default two hours
    "TCP_KEEPINTVL": 1,
    "TCP_KEEPCNT": int(PEER_TIMEOUT_S / 2),
}

LINGER_S: Final = 1.0
"""How long a connection that we end is still read, so that a reset can't overtake our last reply."""

PEER_FRAME_BYTES_MAX: Final = 80 << 20
"""The longest frame between nodes when nothing else is said: a request of the default limit fits several times."""

RESOLVERS_MAX: Final = 8
"""How many host names are looked up at once; each takes a thread for as long as the resolver likes."""


class Fatal(Exception):
    """The process can't go on, for the reason given: raised by a handler, it comes out of `Loop.run`."""


class Watched(Protocol):
    """What stands behind a file descriptor in the selector."""

    def on_events(self, mask: int) -> None:
        """The descriptor is readable or writable, as `mask` says."""
        ...

    def on_broken(self) -> None:
        """`on_events` or `flush` raised an exception, which has been logged: end what it may have harmed."""
        ...

    def close(self) -> None:
        """The loop ends: give the descriptor back."""
        ...


# -------------------------------------------------------------------- loop


class Loop:
    """The selectors loop of one process, or of one test."""

    def __init__(self) -> None:
        self.now = time.monotonic
        self.on_turn: list[Callable[[], None]] = []
        self.dirty: list[Connection] = []  # have output for the end of this turn
        self.resolvers = 0  # threads that look up a host name now
        self._selector = selectors.DefaultSelector()
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._timers = TimerThread(self.post)
        self._stopped = False
        self._closed = False
        self._awake = True  # the loop will look at the posted calls without being woken
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._selector.register(self._bell, EVENT_READ, self)

    # -- for every thread

    def post(self, fn: Callable[..., None], *args: Any) -> None:
        """Have the loop's thread call `fn(*args)`, soon and in the order of posting. From any thread."""
        self._posted.append((fn, args))
        if not self._awake:
            self._wake()

    def stop(self) -> None:
        """Make `run` return after the turn it is in. From any thread, and from a signal handler."""
        self._stopped = True
        if not self._awake:
            self._wake()

    def _wake(self) -> None:
        self._awake = True
        with contextlib.suppress(OSError):  # full: it will wake up; closed: nobody is there
            self._button.send(b"\0")

    # -- for the loop's thread

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> Timer:
        """Call `fn` on the loop's thread after `delay_s` seconds."""
        timer = Timer(self._timers, time.monotonic() + delay_s, fn, None)
        self._timers.arm(timer)
        return timer

    def every(self, interval_s: float, fn: Callable[[], None]) -> Timer:
        """Call `fn` on the loop's thread every `interval_s` seconds, without a backlog after a pause."""
        timer = Timer(self._timers, time.monotonic() + interval_s, fn, interval_s)
        self._timers.arm(timer)
        return timer

    def watch(self, sock: socket.socket, before: int, after: int, who: Watched) -> None:
        """Change what is awaited of `sock` from the event mask `before` to `after`; 0 means nothing."""
        if not before:
            self._selector.register(sock, after, who)
        elif not after:
            self._selector.unregister(sock)
        else:
            self._selector.modify(sock, after, who)

    def connect(
        self,
        address: tuple[str, int],
        *,
        on_open: Callable[[], None],
        on_close: Callable[[], None],
        on_payload: Callable[[bytes], None],
        bind_host: str | None = None,
        timeout_s: float = 3.0,
        frame_bytes_max: int = PEER_FRAME_BYTES_MAX,
    ) -> Connection:
        """Open a connection in the frames dialect to `address`, from `bind_host` when given.

        Returns at once. Later comes either `on_open`, then a call of `on_payload` for each frame, and `on_close` at
        the end; or only `on_close`, after at most `timeout_s` seconds, with the connection's `reason` saying why.
        """
        connection = Connection(self, None, format_address(*address), frame_bytes_max)
        connection.on_close = on_close
        connection.on_payload = on_payload
        _Dialer(connection, address, bind_host, on_open, timeout_s)
        return connection

    def run(self) -> None:
        """Turn until `stop`. Raises what a posted call, a timer or `on_turn` raised; see the module's laws."""
        while not self._stopped:
            self.turn()

    def turn(self, timeout_s: float | None = None) -> None:
        """Do one turn, waiting at most `timeout_s` seconds (None: however long it takes) for something to do."""
        self._awake = False
        if self._posted or self.dirty or self._stopped:
            timeout_s = 0
        events = self._selector.select(timeout_s)
        self._awake = True
        for key, mask in events:
            who: Watched = key.data
            try:
                who.on_events(mask)
            except (InvariantError, Fatal):
                raise
            except Exception:
                self._broken(who)
        posted = self._posted
        for _ in range(len(posted)):
            fn, args = posted.popleft()
            fn(*args)
        for fn in self.on_turn:
            fn()
        if self.dirty:
            self.flush()

    def flush(self) -> None:
        """Send what the connections have to say; `turn` does so at its end."""
        connections, self.dirty = self.dirty, []
        for connection in connections:
            try:
                connection.flush()
            except (InvariantError, Fatal):
                raise
            except Exception:
                self._broken(connection)

    def _broken(self, who: Watched) -> None:
        log_exception("%s is ended after a failure in its handler", who)
        who.on_broken()

    def on_events(self, mask: int) -> None:
        """The bell rang: somebody posted while the loop slept."""
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)

    def on_broken(self) -> None:
        """Nothing in `on_events` can break."""

    def close(self) -> None:
        """Close every connection and listener, and end the timers' thread. May be called twice."""
        if self._closed:
            return
        self._closed = self._stopped = True
        self._timers.close()
        for key in list(self._selector.get_map().values()):
            if key.data is not self:
                key.data.close()
        self._selector.close()
        self._bell.close()
        self._button.close()
        self._posted.clear()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def log_exception(message: str, *args: object) -> str:
    """Log the exception being handled, with its traceback; return the reference it can be found under."""
    reference = secrets.token_hex(4)
    log.exception("reference %s: " + message, reference, *args)
    return reference


# -------------------------------------------------------------- connection


class Connection:
    """A TCP connection in the frames dialect, and what every other kind of connection builds on.

    `send` only appends; the loop sends at the end of the turn. `on_payload` gets each frame's payload; `on_close`
    is posted once when the connection is over, whoever ended it; `reason` then says why in a few words.
    """

    __slots__ = (
        "_blocked",
        "_closing",
        "_dirty",
        "_interest",
        "_lingering",
        "_on_payload",
        "_out",
        "_paused",
        "_recv_bytes",
        "_tail",
        "cutter",
        "ended",
        "loop",
        "on_close",
        "output_bytes",
        "peer",
        "reason",
        "sock",
    )

    def __init__(self, loop: Loop, sock: socket.socket | None, peer: str, frame_bytes_max: int) -> None:
        self.loop = loop
        self.sock = sock  # None before it is dialled, and after the end
        self.peer = peer
        self.cutter: Any = FrameBuffer(frame_bytes_max)
        self.on_close: Callable[[], None] | None = None
        self.output_bytes = 0  # waiting to be sent
        self.reason = ""
        self.ended = False  # the other side will send no more
        self._on_payload: Callable[[bytes], None] | None = None
        self._out: list[Piece] = []
        self._tail: memoryview | None = None  # what the kernel did not take yet
        self._blocked = sock is None  # the kernel takes no more now
        self._closing = False
        self._lingering = False
        self._dirty = False
        self._paused = False
        self._interest = 0
        self._recv_bytes = RECV_BYTES
        if sock is not None:
            prepare(sock)
            self.watch()

    def __repr__(self) -> str:
        return f"connection with {self.peer}"

    @property
    def closed(self) -> bool:
        """Whether it is over, or was asked to close."""
        return self._closing

    @property
    def garbled(self) -> bool:
        """Whether something came that is no frame."""
        return self.cutter.error is not None

    @property
    def on_payload(self) -> Callable[[bytes], None] | None:
        """Called with each frame's payload. Setting it makes this a connection between nodes."""
        return self._on_payload

    @on_payload.setter
    def on_payload(self, handler: Callable[[bytes], None] | None) -> None:
        self._on_payload = handler
        if handler is not None:
            self._recv_bytes = RECV_BULK_BYTES
            if self.sock is not None:
                prepare_for_peer(self.sock)
            self.taken_over()

    def taken_over(self) -> None:
        """`on_payload` was set."""

    def open_with(self, sock: socket.socket) -> None:
        """The dialled `sock` is connected: begin. What was sent before goes out now."""
        self.sock = sock
        self._blocked = False
        self.watch()
        self.mark_dirty()

    # -- output

    def send(self, data: bytes) -> None:
        """Send `data` as it stands, at the end of this turn. Ignored after the end."""
        if not self._closing:
            self._out.append(data)
            self.output_bytes += len(data)
            self.mark_dirty()

    def mark_dirty(self) -> None:
        """Have `flush` called at the end of this turn."""
        if not self._dirty:
            self._dirty = True
            self.loop.dirty.append(self)

    def flush(self) -> None:
        """Send what waits, as far as the kernel takes it. The loop calls this."""
        self._dirty = False
        if self._blocked or self.sock is None:
            return
        while self._out or self._tail is not None:
            data = self._next_piece() if self._tail is None else self._tail
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.lose(error)
                return
            self.output_bytes -= sent
            if sent < len(data):
                self._tail = memoryview(data)[sent:]
                self._blocked = True
                self.watch()
                return
            self._tail = None
        if self._closing:
            self._end_politely()

    def _next_piece(self) -> Piece:
        """Take from the output what one call of send should carry."""
        out = self._out
        if len(out) > 1 and self.output_bytes <= LARGE_BYTES:
            joined = b"".join(out)
            out.clear()
            return joined
        size = count = 0
        while count < len(out) and len(out[count]) <= LARGE_BYTES and size < SEND_BYTES:
            size += len(out[count])
            count += 1
        data: Piece = b"".join(out[:count]) if count > 1 else out[0]
        del out[: max(1, count)]
        return data

    # -- input

    def watch(self) -> None:
        """Tell the selector what this connection waits for now."""
        reading = EVENT_READ if not self._paused and not self.ended else 0
        interest = reading | (EVENT_WRITE if self._blocked else 0)
        if interest != self._interest and self.sock is not None:
            self.loop.watch(self.sock, self._interest, interest, self)
            self._interest = interest

    def on_events(self, mask: int) -> None:
        """See Watched."""
        if mask & EVENT_READ and self.sock is not None:
            try:
                data = self.sock.recv(self._recv_bytes)
            except BlockingIOError:
                data = None
            except OSError as error:
                self.lose(error)
                return
            if data:
                if not self._closing:
                    self.receive(data)
            elif data is not None:
                self._input_ended()
        if mask & EVENT_WRITE and self.sock is not None:
            self._blocked = False
            self.flush()
            self.watch()

    def _input_ended(self) -> None:
        self.ended = True
        if self._lingering:
            self.end("closed here")
        else:
            self.watch()
            self.receive_end()

    def receive(self, data: bytes) -> None:
        """Take in `data`, which is not empty."""
        on_payload = self._on_payload
        for payload in self.cutter.feed(data):
            if on_payload is None or self.sock is None:
                return
            on_payload(payload)
        if self.cutter.error is not None:
            self.end(f"sent something that is no frame: {self.cutter.error.message}")

    def receive_end(self) -> None:
        """The other side has shut down its sending. Between nodes that is the end."""
        self.end("closed by the other side")

    # -- the end

    def close(self) -> None:
        """End the connection now; output that waits is lost. May be called twice."""
        self.end("closed here")

    def close_when_flushed(self) -> None:
        """End the connection once all that waits has been sent, so that the other side can read it."""
        if not self._closing:
            self._closing = True
            self.mark_dirty()

    def _end_politely(self) -> None:
        """All is sent. Closing with input unread would reset the connection and take our last words with it
        (RFC 9112 §9.6), so what still comes is read away for a moment."""
        if self.sock is None or self._lingering:
            return
        if self.ended:
            self.end("closed here")
            return
        self._lingering = True
        self._paused = False
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.watch()
        self.loop.call_later(LINGER_S, self.close)

    def lose(self, error: OSError) -> None:
        """The kernel says that the connection is gone."""
        self.end(error.strerror or type(error).__name__)

    def on_broken(self) -> None:
        """See Watched."""
        self.end("failed here")

    def end(self, reason: str) -> None:
        """Close the socket for `reason`, and have `on_close` called. The first call counts."""
        if self.reason:
            return
        self.reason = reason
        self._closing = True
        sock, self.sock = self.sock, None
        if sock is not None:
            if self._interest:
                self.loop.watch(sock, self._interest, 0, self)
                self._interest = 0
            sock.close()
        self._out.clear()
        self._tail = None
        self.output_bytes = 0
        self._on_payload = None
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            self.loop.post(on_close)


def prepare(sock: socket.socket) -> None:
    """What every TCP connection wants: no waiting for the loop, none for a full segment, and a sign of death."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):  # not every family of sockets knows these
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def prepare_for_peer(sock: socket.socket) -> None:
    """Nothing arrives to say that a peer vanished behind a dropped route: have the kernel give up on it, also where we only
    listen, and so have nothing on the way that could stay unanswered."""
    for name, value in _PEER_PATIENCE.items():
        with contextlib.suppress(AttributeError, OSError):  # not every system has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ----------------------------------------------------------------- dialling


class _Dialer:
    """Opens one outgoing connection: finds the addresses, tries one after the other, hands the socket over."""

    def __init__(
        self,
        connection: Connection,
        address: tuple[str, int],
        bind_host: str | None,
        on_open: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self._connection = connection
        self._bind_host = bind_host
        self._on_open = on_open
        self._sock: socket.socket | None = None
        self._candidates: list[Any] = []
        self._why = "no address found"
        self._loop = connection.loop
        self._timer = self._loop.call_later(timeout_s, self._give_up)
        try:  # a number needs no resolver, and so no thread
            self._resolved(socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        except (OSError, UnicodeError):
            if self._loop.resolvers < RESOLVERS_MAX:
                self._loop.resolvers += 1
                threading.Thread(target=self._resolve, args=address, name="resolver", daemon=True).start()
            else:
                self._loop.post(self._failed, "too many names are being looked up")

    def _resolve(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self._loop.post(self._looked_up, [], str(error))
        else:
            self._loop.post(self._looked_up, found, self._why)

    def _looked_up(self, candidates: list[Any], why: str) -> None:
        self._loop.resolvers -= 1
        self._why = why
        self._resolved(candidates)

    def _resolved(self, candidates: list[Any]) -> None:
        self._candidates = candidates
        self._try_next()

    def _failed(self, why: str) -> None:
        self._why = why
        self._try_next()

    def _try_next(self) -> None:
        """Start with the next address, or give up when there is none."""
        self._drop()
        while self._candidates and not self._connection.closed:
            family, _, _, _, address = self._candidates.pop(0)
            try:
                sock = self._sock = socket.socket(family, socket.SOCK_STREAM)
                prepare(sock)
                prepare_for_peer(sock)
                self._bind(sock)
                refused = sock.connect_ex(address)
            except OSError as error:
                refused = error.errno or errno.EINVAL
            if refused in (0, errno.EINPROGRESS):
                self._loop.watch(sock, 0, EVENT_WRITE, self)
                return
            self._why = os.strerror(refused)
            if self._sock is not None:
                self._sock.close()
                self._sock = None
        self._timer.cancel()
        self._connection.end(self._why)

    def _bind(self, sock: socket.socket) -> None:
        if self._bind_host is not None:
            with contextlib.suppress(OSError, AttributeError):  # Linux: choose the port only when connecting
                sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
            sock.bind((self._bind_host, 0))

    def on_events(self, mask: int) -> None:
        """See Watched: the attempt has succeeded or failed."""
        sock = self._sock
        if sock is None:
            return
        refused = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not refused and _is_itself(sock):
            refused = errno.ECONNREFUSED
        if refused:
            self._why = os.strerror(refused)
            self._try_next()
            return
        self._loop.watch(sock, EVENT_WRITE, 0, self)
        self._sock = None
        self._timer.cancel()
        if self._connection.closed:
            sock.close()
            self._connection.end("closed here")
        else:
            self._connection.open_with(sock)
            self._on_open()

    def on_broken(self) -> None:
        """See Watched."""
        self._candidates = []
        self._why = "failed here"
        self._try_next()

    def close(self) -> None:
        """See Watched."""
        self.on_broken()

    def _give_up(self) -> None:
        self._candidates = []
        self._why = "no answer in time"
        self._try_next()

    def _drop(self) -> None:
        if self._sock is not None:
            self._loop.watch(self._sock, EVENT_WRITE, 0, self)
            self._sock.close()
            self._sock = None


def _is_itself(sock: socket.socket) -> bool:
    """Whether TCP connected the socket to itself, as it may when nobody listens on a port of the ephemeral range."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:
        return False
