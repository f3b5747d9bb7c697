"""A program in a real terminal, for tests: a person's keys go in, and the screen comes out.

With tmux the screen is tmux's own: what a person would see, colours and cursor movements carried out. Without it, what
the program wrote to a pseudo-terminal, less its escape sequences: enough to look for a text.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tests.harness import wait

TMUX = shutil.which("tmux")
COLUMNS, LINES = 100, 40
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]|\x07|\r")
ENTER, TAB, UP, CTRL_C, CTRL_D = "\n", "\t", "\x1b[A", "\x03", "\x04"


class _Kind(Protocol):
    def type(self, keys: str) -> None: ...
    def screen(self) -> str: ...
    def alive(self) -> bool: ...
    def close(self) -> None: ...


class Terminal:
    """`argv` in a terminal. A context manager."""

    def __init__(self, argv: Sequence[str], directory: Path, env: dict[str, str], tmux: bool | None = None) -> None:
        env = {**env, "TERM": "screen" if TMUX else "xterm"}
        with_tmux = TMUX is not None if tmux is None else tmux
        self._kind: _Kind = _Tmux(argv, directory, env) if with_tmux else _Pty(argv, directory, env)

    def type(self, keys: str) -> None:
        """What a person types."""
        self._kind.type(keys)

    def screen(self) -> str:
        """What stands on the screen now."""
        return self._kind.screen()

    def wait_for(self, text: str, timeout_s: float = 10.0) -> None:
        """Wait until `text` stands on the screen."""
        try:
            wait(lambda: text in self.screen(), timeout_s, f"{text!r} on the screen")
        except AssertionError:
            print(self.screen())
            raise

    def interrupt(self, prompt: str) -> None:
        """Ctrl-C, and wait for another `prompt`: what is typed before that, is lost."""
        before = self.screen().count(prompt)
        self.type(CTRL_C)
        try:
            wait(lambda: self.screen().count(prompt) > before, what=f"{prompt!r} after Ctrl-C")
        except AssertionError:
            print(self.screen())
            raise

    def wait_ended(self) -> None:
        """Wait until the program has ended."""
        wait(lambda: not self._kind.alive(), what="the program ends")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._kind.close()


class _Tmux:
    def __init__(self, argv: Sequence[str], directory: Path, env: dict[str, str]) -> None:
        self._socket = directory / "tmux"  # a server of its own, which ends with its only session
        self._env = env
        settings = [f"{name}={value}" for name, value in env.items()]
        command = shlex.join(["env", "-i", *settings, *argv])
        size = ["-x", str(COLUMNS), "-y", str(LINES)]
        self._tmux("-f", os.devnull, "new-session", "-d", "-c", str(directory), *size, command)

    def _tmux(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        assert TMUX is not None
        whole = [TMUX, "-S", str(self._socket), *argv]
        env = {**self._env, "LC_ALL": "C.UTF-8"}
        return subprocess.run(whole, capture_output=True, encoding="utf-8", env=env, check=check, timeout=20)

    def type(self, keys: str) -> None:
        self._tmux("send-keys", "-H", *(f"{byte:x}" for byte in keys.replace("\n", "\r").encode()))

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", check=False).stdout

    def alive(self) -> bool:
        return self._tmux("has-session", check=False).returncode == 0

    def close(self) -> None:
        self._tmux("kill-server", check=False)


class _Pty:
    def __init__(self, argv: Sequence[str], directory: Path, env: dict[str, str]) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv] if shutil.which("setsid") else list(argv),
            cwd=directory, env=env, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self._ours = ours
        self._seen = b""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.replace("\n", "\r").encode())

    def screen(self) -> str:
        with contextlib.suppress(OSError):  # the other side is closed
            while select.select([self._ours], [], [], 0)[0]:
                data = os.read(self._ours, 65536)
                if not data:
                    break
                self._seen += data
        return ESCAPES.sub("", self._seen.decode(errors="replace"))

    def alive(self) -> bool:
        self.screen()  # so that its output doesn't fill up
        return self._process.poll() is None

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._ours)
