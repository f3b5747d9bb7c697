"""Answers that are lost on a connection that stays, while the leader's log is compacted: who is there is helped, who isn't
costs nothing."""

from __future__ import annotations

import pytest

from tests.raft_net import Net


def unheard(probing: bool) -> Net:
    """n1 leads; n3 hears it and can't be heard, and what the leader still waits to hear of has been compacted."""
    net = Net(3)
    net.elect("n1")
    net.put()
    net.settle()
    if probing:
        net.disconnect("n1", "n3")
    net.cut.add(("n3", "n1"))
    for _ in range(8):
        net.put()
        net.settle()
    net.peers["n1"].checkpoint()
    assert net["n1"].log.base_index == 10
    return net


@pytest.mark.parametrize("probing", [False, True])
def test_a_member_whose_answers_were_lost_gets_a_snapshot_once_it_is_heard(probing: bool) -> None:
    net = unheard(probing)
    net.cut.clear()  # nobody was told that anything broke
    net.put()
    assert net.run(1.0, lambda: net.peers["n3"].applied == 11)


@pytest.mark.parametrize("probing", [False, True])
def test_no_snapshot_is_made_for_a_member_that_is_not_heard(probing: bool) -> None:
    net = unheard(probing)
    assert not net.run(5.0, lambda: net["n1"].progress["n3"].snapshot)
    assert net.leader == "n1"
