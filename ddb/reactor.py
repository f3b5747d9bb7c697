"""What a program needs of the loop that it lives on, and of a connection: the seam where virtual time comes in.

Laws: whoever is written against these and nothing else runs on sockets and the machine's clock (loop.py) as well as in
the simulator (simloop.py), and can't tell. Nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Alarm(Protocol):
    """A call in the future."""

    def cancel(self) -> None:
        """Forget the call. May be called at any time, more than once."""


class Channel(Protocol):
    """A connection in the frames dialect. After its end, `reason` says why in a few words."""

    reason: str
    output_bytes: int
    on_close: Callable[[], None] | None

    @property
    def on_payload(self) -> Callable[[bytes], None] | None:
        """Called with each frame's payload; setting it takes the connection over."""

    @on_payload.setter
    def on_payload(self, handler: Callable[[bytes], None] | None) -> None: ...

    @property
    def garbled(self) -> bool:
        """Whether something came that is no frame."""

    def send(self, data: bytes) -> None:
        """Send `data` as it stands, at the end of this turn. Ignored after the end."""

    def end(self, reason: str) -> None:
        """End the connection now, for `reason`; output that waits is lost. The first call counts."""

    def close(self) -> None:
        """The same without a reason worth telling. May be called twice."""

    def close_when_flushed(self) -> None:
        """End the connection once all that waits has been sent."""


class Reactor(Protocol):
    """The loop. All calls but `post` and `stop` belong to its own thread."""

    on_turn: list[Callable[[], None]]

    @property
    def now(self) -> Callable[[], float]:
        """The steady clock, in seconds."""

    def post(self, fn: Callable[..., None], *args: Any) -> None:
        """Have `fn(*args)` called, soon and in the order of posting. From any thread."""

    def call_later(self, delay_s: float, fn: Callable[[], None]) -> Alarm:
        """Call `fn` after `delay_s` seconds."""

    def every(self, interval_s: float, fn: Callable[[], None]) -> Alarm:
        """Call `fn` every `interval_s` seconds."""

    def connect(
        self,
        address: tuple[str, int],
        *,
        on_open: Callable[[], None],
        on_close: Callable[[], None],
        on_payload: Callable[[bytes], None],
        bind_host: str | None = None,
        timeout_s: float = 3.0,
    ) -> Channel:
        """Open a connection to `address`; see loop.Loop."""

    def flush(self) -> None:
        """Send what the connections have to say now, rather than at the turn's end."""

    def stop(self) -> None:
        """Make `run` return."""

    def run(self) -> None:
        """Turn until `stop`."""

    def close(self) -> None:
        """End everything on it. May be called twice."""
