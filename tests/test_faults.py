"""Real processes on a network that is really cut: a network namespace of the tests' own, and a firewall in it.

While clients write, read and race each other, the network is broken in every shape of tests/shapes.py and in every way of
tests/netns.py. Where a majority is left that can talk, writes go on; afterwards everybody agrees, nothing acknowledged is
lost, and the clients' histories are linearizable.

The default run takes each shape once; `tox -e faults` takes each in every way, under both elections, with three and
with five nodes. Disks, clocks and long ways have files of their own (test_faults_disk.py, …_clock.py, …_delay.py);
test_faults_swarm.py does everything at once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faulting import LONG, judged
from tests.harness import Cluster
from tests.netns import Break, Firewall, Namespace, Unavailable
from tests.shapes import SHAPES, Shape

HELD_S = 1.0  # longer than an election takes: a member that hears nobody has stood for leader
HOSTS = [f"127.0.7.{n}" for n in range(1, 6)]
KINDS = [(5, "bully"), (3, "raft"), (3, "bully"), (5, "raft")]
CASES = list(itertools.product(SHAPES, Break))
ONE_EACH = [(shape, how) for shape, how in zip(SHAPES, itertools.cycle(Break))]


@pytest.fixture(scope="module")
def firewall() -> Iterator[Firewall]:
    """The firewall of a namespace that this thread is in, and all that the tests of this file start."""
    try:
        with Namespace() as found:
            yield found
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=KINDS if LONG else KINDS[:1], ids=lambda kind: f"{kind[0]}-{kind[1]}")
def some(
    request: pytest.FixtureRequest, firewall: Firewall, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A cluster whose nodes can be told apart by their addresses, for one test after the other."""
    count, election = request.param
    directory = tmp_path_factory.mktemp(f"{election}{count}")
    with Cluster(directory, count, hosts=HOSTS[:count], election=election, checkpoint_every=500, retain=50) as cluster:
        yield cluster


def name(case: Shape | Break) -> str:
    """What a test is called by."""
    return case.value if isinstance(case, Break) else case.__name__


@pytest.mark.parametrize("shape,how", CASES if LONG else ONE_EACH, ids=name)
def test_a_network_that_breaks_stops_no_majority_and_spoils_nothing(
    some: Cluster, firewall: Firewall, tmp_path: Path, shape: Shape, how: Break
) -> None:
    leader = some.wait_ready()
    cut = shape(leader, [node for node in some.nodes if node is not leader])
    with judged(some, tmp_path) as load:
        try:
            firewall.cut(cut.ways, how)
            time.sleep(HELD_S)
            if cut.well:
                load.wait_for(20, since_s=time.monotonic())
        finally:
            firewall.heal()


def test_an_old_leader_that_is_cut_off_answers_no_read_that_others_have_overtaken(
    some: Cluster, firewall: Firewall
) -> None:
    old = some.wait_ready()
    others = [node for node in some.nodes if node is not old]
    old.ask(op="put", key="overtaken", value="before")
    try:
        firewall.cut(SHAPES[0](old, others).ways)
        new = some.wait(lambda: next((n for n in others if n.role() == "leader"), None), what="another leader")
        assert new.ask(op="put", key="overtaken", value="after")["ok"]
        assert old.ask(op="get", key="overtaken", timeout=0.5)["error"] in ("no_leader", "timeout")
        assert old.ask(op="get", key="overtaken", read="stale")["value"] == "before"
    finally:
        firewall.heal()
    some.wait_ready()
    assert old.ask(op="get", key="overtaken")["value"] == "after"
