"""How far something is that takes its time: one line that changes on a terminal, and elsewhere a line now and then.

Law: what is shown here is gone, or in nobody's way, when the thing is done; it is never a result.
"""

from __future__ import annotations

import os
import time
from typing import Final, TextIO

LINES_S: Final = 10.0  # between two lines where they stay
CHANGES_S: Final = 0.1  # between two changes of a line that doesn't stay
COLUMNS: Final = 80  # where the terminal doesn't say
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """Shows on `stream` how far something is. Use it in a `with` statement: in the end, a changing line is cleared."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changing = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._due_s = time.monotonic() + (0.0 if self._changing else LINES_S)

    def show(self, text: str) -> None:
        """Say `text`, one line, unless the last one was said a moment ago."""
        if time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + (CHANGES_S if self._changing else LINES_S)
        if self._changing:
            self._write(_CLEAR + text[: self._width() - 1])
        else:
            self._write(f"{text}\n")

    def clear(self) -> None:
        """Make room for a line of somebody else's."""
        if self._changing:
            self._write(_CLEAR)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or COLUMNS
        except OSError:
            return COLUMNS

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
