"""How a program is told its settings: options, and environment variables that stand for them.

Laws: what can't be used gets one line that says why and where it came from, and exit code 2. There are no
abbreviations: they'd mean something else once an option is added.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, Final, NoReturn

USAGE: Final = 2


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """End the process with `message` in one line."""
        self.exit(USAGE, f"{self.prog}: {message}; see --help\n")


class SettingsParser(OneLineParser):
    """A parser whose options can also be given as environment variables: `--data-dir` as `PREFIX_DATA_DIR`.

    The command line wins.
    """

    def __init__(self, prefix: str, **settings: Any) -> None:
        super().__init__(**settings)
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


def whole(least: int, most: int) -> Callable[[str], int]:
    """A `type` for settings that are whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        digits = text.lstrip("0") or "0"
        if not text.isascii() or not text.isdigit() or not least <= int(digits[:20]) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(digits)

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


def is_utf8(argument: str) -> bool:
    """Whether an argument's bytes were UTF-8: Python keeps others as lone surrogates (PEP 383)."""
    return not any("\udc80" <= character <= "\udcff" for character in argument)


def utf8(argument: str) -> str:
    """A `type` for keys, and parts of keys."""
    if not is_utf8(argument):
        raise argparse.ArgumentTypeError(f"{os.fsencode(argument)!r} is not UTF-8, as all keys are")
    return argument
