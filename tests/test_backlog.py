"""A backlog of committed batches: read in groups, and looked up together."""

from __future__ import annotations

from typing import Any

from ddb import backlog
from ddb.codec import decode_batch, encode_batch, encode_config
from ddb.messages import Batch, Configuration
from ddb.wire import encode


def batch(first: int, *commands: list[Any]) -> Batch:
    return encode_batch(first, 1, 0, [encode(command) for command in commands])


def test_groups_hold_all_batches_in_order_with_their_commands_and_little_of_them_at_once() -> None:
    large = "x" * (backlog.GROUP_BYTES_MAX // 3)
    batches = [batch(n, ["put", f"key{n}", large]) for n in range(1, 9)]
    batches.insert(4, encode_config(5, 1, 0, Configuration("c", "bully", ())))
    stored = {b.first: b.data for b in batches}
    without = [Batch(b.first, b.last, b.term, b"", 0, None, b.config) for b in batches]
    found = list(backlog.groups(without, stored.__getitem__))
    assert [b.first for group in found for b in group] == [b.first for b in batches]
    assert max(len([b for b in group if b.config is None]) for group in found) <= 4
    assert [b.commands for group in found for b in group if not b.config] == [
        decode_batch(stored[b.first]).commands for b in without if not b.config
    ]


def test_the_keys_of_plain_writes_are_found_and_other_commands_are_left_alone() -> None:
    commands: list[list[Any]] = [
        ["put", "a", 1],
        ["delete", "b"],
        ["incr", "c", 1],
        ["batch", [["put", "d", 1], ["delete", "e"]]],
        ["once", 3, 1, ["put", "f", 1]],
        ["txn", [], [["put", "g", 1]], []],
        ["session_open"],
        ["noop"],
    ]
    decoded = Batch(1, len(commands), 1, b"", 0, commands)
    assert backlog.keys([decoded]) == set("abcdef")


def test_many_batches_or_large_ones_are_a_backlog() -> None:
    def batches(count: int, size_bytes: int) -> list[Batch]:
        return [Batch(n, n, 1, b"x" * size_bytes) for n in range(1, count + 1)]

    assert not backlog.is_long([]) and not backlog.is_long(batches(15, 1))
    assert backlog.is_long(batches(16, 1))
    assert backlog.is_long(batches(2, 256 << 10)) and not backlog.is_long(batches(2, 255 << 10))
