"""What the members are told, in bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from ddb.codec import decode_message, encode_batch
from ddb.messages import Append
from ddb.peers import Peers

BATCH = encode_batch(8, 3, 0, [b'["noop"]'])
APPEND = Append("a", "b", 3, 7, 2, 6, 5, (BATCH,), (6, 99), False)
OTHERS: dict[str, Any] = {
    "dst": "c", "term": 4, "prev_index": 8, "commit": 7, "round": 6, "batches": (), "digest": None, "confirmed": True,
}  # fmt: skip


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(OTHERS, 2)))
def test_each_follower_is_told_its_own_though_bytes_are_shared(first: str, second: str) -> None:
    nothing: Any = None
    peers = Peers(nothing, nothing, "a", None)
    one, two = replace(APPEND, **{first: OTHERS[first]}), replace(APPEND, **{second: OTHERS[second]})
    for m in (APPEND, one, APPEND, two, one, two):
        assert decode_message(peers._encode(m), m.src, m.dst) == m
