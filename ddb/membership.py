"""Who should be a member: the leader's next change of the configuration, if any.

Laws:

* The log decides who is a member. The registry only shows who would like to be one, and where members are.
* One change at a time, and never into a configuration without a live majority.
* A member that is silent is kept: it may come back. Only when a newcomer stands ready, caught up, is a voter that has been dead for
  `replace_after_s` given up for it.

Theory. Called again and again by the leader, `next_change` compares what is with what should be and names one step;
the state is all in the configuration, so a new leader simply goes on. The order of the steps: correct addresses;
take in newcomers as learners, which cost a quorum nothing (dissertation §4.2.1); drop learners that never came up;
give up a long-dead voter for a newcomer; promote who has caught up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ddb.messages import Configuration, Member


@dataclass(frozen=True, slots=True)
class Sighting:
    """A node that the registry lists, or that has introduced itself."""

    id: str
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Standing:
    """What the leader knows of a member: for how long it has not been heard (since it was elected, if never), whether its
    log is up to date; whether a connection to it stands, over which it has answered this leader at least once; and
    whether its word counts: one in doubt is no help to a majority (raft.py)."""

    silent_s: float
    caught_up: bool
    connected: bool = True
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Patience:
    """After how many seconds of silence a voter may be dying, so that nobody is promoted meanwhile; a member counts as
    dead; a dead voter may be replaced; a dead learner is dropped."""

    unsure_after_s: float = 0.5
    dead_after_s: float = 2.0
    replace_after_s: float = 30.0
    drop_learner_after_s: float = 30.0


def next_change(
    config: Configuration,
    leader: str,
    sightings: Mapping[str, Sighting],
    standings: Mapping[str, Standing],
    patience: Patience,
) -> Configuration | None:
    """The configuration to propose next; None where everything is as it should be.

    `sightings` are by id, `standings` too, of all members but the `leader`.
    """
    return (
        _correct_address(config, sightings)
        or _take_in(config, sightings)
        or _drop_learner(config, sightings, standings, patience)
        or _swap_or_promote(config, leader, standings, patience)
    )


def survives(config: Configuration, leader: str, standings: Mapping[str, Standing], patience: Patience) -> bool:
    """Whether a majority of the voters of `config` is there, and can commit this very change.

    One that has only just fallen silent is not believed to be there: nobody could take the change back.
    """
    sure = 0
    for voter in config.voters:
        standing = standings.get(voter)
        sure += voter == leader or (standing is not None and standing.counts and _speaks(standing, patience))
    return 2 * sure > len(config.voters)


def _alive(standing: Standing | None, patience: Patience) -> bool:
    return standing is not None and standing.silent_s < patience.dead_after_s


def _speaks(standing: Standing | None, patience: Patience) -> bool:
    """Whether there is no reason to think that it is dying. A newcomer that comes in a dead voter's place may well stand
    ready before the voter counts as dead; promoted beside it, it would never take its place."""
    return standing is not None and standing.connected and standing.silent_s < patience.unsure_after_s


def _correct_address(config: Configuration, sightings: Mapping[str, Sighting]) -> Configuration | None:
    for member in config.members:
        seen = sightings.get(member.id)
        if seen is not None and (seen.address != member.address or seen.name != member.name):
            return config.with_member(replace(member, address=seen.address, name=seen.name))
    return None


def _take_in(config: Configuration, sightings: Mapping[str, Sighting]) -> Configuration | None:
    for id in sorted(sightings):
        if config.member(id) is None and id not in config.removed:
            seen = sightings[id]
            return config.with_member(Member(id, seen.name, seen.address, voter=False))
    return None


def _drop_learner(
    config: Configuration, sightings: Mapping[str, Sighting], standings: Mapping[str, Standing], patience: Patience
) -> Configuration | None:
    """A learner that is gone may come back: it is forgotten, not banned."""
    for member in config.members:
        standing = standings.get(member.id)
        gone = standing is not None and standing.silent_s >= patience.drop_learner_after_s
        if not member.voter and gone and member.id not in sightings:
            return replace(config, members=tuple(m for m in config.members if m.id != member.id))
    return None


def _swap_or_promote(
    config: Configuration, leader: str, standings: Mapping[str, Standing], patience: Patience
) -> Configuration | None:
    ready = [
        m for m in config.members
        if not m.voter and (s := standings.get(m.id)) is not None and s.caught_up and s.counts and _alive(s, patience)
    ]  # fmt: skip
    if not ready:
        return None
    newcomer = min(ready, key=lambda m: (m.name, m.id))
    silent = [v for v in config.voters if v != leader and not _speaks(standings.get(v), patience)]
    if not silent:
        changed = config.with_member(replace(newcomer, voter=True))
        return changed if survives(changed, leader, standings, patience) else None
    # Giving up the dead first and promoting then leaves as many failures to spare as the other order would, and
    # keeps at most one of two members with the same name. While the dead may yet return, the newcomer waits.
    for voter in silent:
        standing = standings.get(voter)
        if standing is not None and standing.silent_s >= patience.replace_after_s:
            changed = config.without(voter)
            return changed if survives(changed, leader, standings, patience) else None
    return None
