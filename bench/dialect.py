"""What the load generator needs to know of a protocol, so that one generator measures every database.

Laws: a request is made of bytes prepared beforehand, so that its key is all that is encoded while the clock runs; a reply is
looked at as far as it takes to tell a success from a failure, and no further. So no database is measured with a slower
client than another.
"""

from __future__ import annotations

import importlib
import random
import socket
import string
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from bench.plan import Plan

DIALECTS = {"ddb": "bench.frames", "etcd": "bench.grpc", "zookeeper": "bench.jute"}
FILL_KEYS = 100
KEY_BYTES = 64  # and what is around it, about
FILL_BYTES = 1 << 20  # in one request, about: etcd takes 1.5 MiB


class Dialect(Protocol):
    """One connection's side of a protocol. Keys are numbers; all requests carry the same value, `plan.value_bytes` long."""

    fill_keys_max: int
    """How many keys one `fill` may put."""
    farewell: bytes
    """What is sent before the connection is closed."""

    def greet(self, connection: socket.socket) -> None:
        """Do what comes before the first request; `connection` blocks. Raises OSError."""

    def put(self, number: int) -> bytes:
        """The request that sets key `number`, which is there."""

    def get(self, number: int) -> bytes:
        """The request that reads key `number`."""

    def fill(self, first: int, count: int) -> bytes:
        """The one request that puts `count` keys from `first` on at once, whether they are there or not."""

    def outcomes(self, data: bytes) -> tuple[list[str], bytes]:
        """Cut the replies out of `data`: for each, in order, "" or its error code; and what is left of `data`.

        Raises ConnectionError where the connection can't go on.
        """


def new(plan: Plan) -> Dialect:
    """A dialect for one new connection, of `plan.dialect`."""
    return cast(Dialect, importlib.import_module(DIALECTS[plan.dialect]).Connection(plan))


def value(plan: Plan) -> bytes:
    """The value of all keys: letters and digits, which nothing compresses to next to nothing."""
    letters = random.Random(plan.seed).choices(string.ascii_letters + string.digits, k=plan.value_bytes)
    return "".join(letters).encode()


def fill_keys(plan: Plan) -> int:
    """How many keys of this size one request should put."""
    return max(1, min(FILL_KEYS, FILL_BYTES // (plan.value_bytes + KEY_BYTES)))
