"""What the members are told, in bytes, and how long they are waited for."""

from __future__ import annotations

import itertools
import socket
from dataclasses import replace
from typing import Any

import pytest

from ddb.codec import decode_message, encode_batch
from ddb.loop import PEER_TIMEOUT_S, prepare, prepare_for_peer
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


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system has no such options")
def test_the_kernel_gives_up_on_a_peer_that_vanished_also_where_nothing_is_on_the_way() -> None:
    with socket.socket() as sock:
        prepare(sock)
        prepare_for_peer(sock)

        def option(name: str) -> int:
            return sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))

        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        silent_s = option("TCP_KEEPIDLE") + option("TCP_KEEPINTVL") * option("TCP_KEEPCNT")
        assert silent_s <= PEER_TIMEOUT_S == option("TCP_USER_TIMEOUT") / 1000
