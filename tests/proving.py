"""What the tests that are proofs share: how large they are, and the figures that they state.

A proof is a test marked `proof`. It is small in the default run, and of the size that docs/testing.md tells where
DDB_TEST_PROOFS=long; then what it did is printed at the end. DDB_TEST_PROOFS_SEED draws other lots.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

LONG = os.environ.get("DDB_TEST_PROOFS") == "long"
SEED = int(os.environ.get("DDB_TEST_PROOFS_SEED", "1"))

Size = TypeVar("Size")
State = Callable[[str, object], None]  # pytest's `record_property`: a name, and the figure


def size(brief: Size, long: Size) -> Size:
    """How much is done: the first in the default run, the second in the long form."""
    return long if LONG else brief


def times(long: int) -> range:
    """For `parametrize`: once in the default run, `long` times in the long form."""
    return range(size(1, long))
