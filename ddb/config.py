"""Settings that more than one floor needs, with their units in their names, and how a server is told them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Timing:
    """The cluster's clockwork.

    A leader speaks at least every `heartbeat_s`. Who hears none for `election_timeout_s` holds an election, and a leader
    that a majority has not answered for as long steps down. `tick_s` is how often time is looked at.
    """

    tick_s: float = 0.025
    heartbeat_s: float = 0.1
    election_timeout_s: float = 0.75


@dataclass(frozen=True, slots=True)
class Bounds:
    """Nothing grows without end. What is full says `overloaded`."""

    append_bytes_max: int = 1 << 20  # of batches in one message to a follower, and of entries in a batch
    appends_in_flight_max: int = 4  # unacknowledged messages to one follower
    batches_in_flight_max: int = 2  # of the leader's, not yet committed: later writes gather in the next
    batch_entries_max: int = 4096
    writes_waiting_max: int = 100_000
    reads_waiting_max: int = 100_000
    snapshot_chunk_bytes: int = 256 << 10


class SettingsParser(argparse.ArgumentParser):
    """An argument parser whose options can also be given as environment variables: `--data-dir` as `PREFIX_DATA_DIR`.

    The command line wins. A value that does not fit ends the process with exit code 2 and one sentence that says
    where it came from.
    """

    def __init__(self, prefix: str, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._prefix = prefix

    def setting(self, *flags: str, type: Callable[[str], Any], default: Any, help: str, **more: Any) -> None:
        """Add the option `flags` (the last one names the variable), of what `type` makes of a text."""
        variable = f"{self._prefix}_{flags[-1].lstrip('-').replace('-', '_').upper()}"
        text = os.environ.get(variable)
        if text:
            try:
                default = type(text)
            except (ValueError, argparse.ArgumentTypeError) as error:
                self.error(f"{variable}={text!r} can't be used: {error}")
        self.add_argument(*flags, type=type, default=default, help=f"{help} [{variable}]", **more)

    def error(self, message: str) -> NoReturn:
        """End the process with `message` in one line."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def whole(least: int, most: int) -> Callable[[str], int]:
    """A `type` for settings that are whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text[:20]) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def seconds(least: float, most: float) -> Callable[[str], float]:
    """A `type` for settings that are seconds from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} to {most:g}")
        return value

    return parse
