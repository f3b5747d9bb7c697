"""Keys that a tool borrows in somebody's cluster, and how it gives them back when it is interrupted.

Law: what was put under a scratch prefix is removed, however the work ended. So the first Ctrl-C may be noted and waited
for; the second one always ends everything at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from ddb.client import Client
from ddb.errors import DdbError, Internal, Unreachable


def remove_all(client: Client, prefix: str, patience_s: float) -> None:
    """Delete all keys that begin with `prefix`. An unknown outcome is no matter: what is left is seen, and deleted.

    Raises a DdbError where it can't be done, Unreachable where it takes longer than twice `patience_s` seconds.
    """
    deadline_s = time.monotonic() + 2 * patience_s
    while True:
        try:
            page = client.call({"op": "scan", "prefix": prefix, "keys_only": True})
            keys = [item["key"] for item in page["items"]]
            if not keys:
                return
            client.batch([{"op": "delete", "key": key} for key in keys])
        except (KeyError, TypeError):
            raise Internal("the answer is none; is it a ddb server?") from None
        except DdbError as error:
            if error.definite or time.monotonic() > deadline_s:
                raise
        if time.monotonic() > deadline_s:
            raise Unreachable(f"after {2 * patience_s:g} s there were still some.")


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP: raise KeyboardInterrupt, but the first one while they are `noted`."""

    def __init__(self) -> None:
        self.asked = False
        self._noting = False
        self._before: dict[int, signal._HANDLER] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """While this lasts, the first signal only sets `asked`."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._noting:
            raise KeyboardInterrupt
        self._noting = False
        self.asked = True
