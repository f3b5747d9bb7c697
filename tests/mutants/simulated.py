"""The simulator as a detector: it replays seed after seed until it finds something wrong.

An *aim* is a choice of faults, and of nothing else, for a bug that the whole swarm meets too rarely. It is named by the
faults, as `python -m ddb sim --faults` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ddb.sim import Options, run

AIMS: Final[dict[str, str]] = {
    "all faults": "",
    "partitions": "isolate,mute,deafen,split,bridge,ring,one-way",
    "messages": "lose,repeat,reorder,kill,pause,isolate",
    "disks": "power,blackout,slow-disk,full-disk,failing-fsync,crash-point",
    "rot": "flip,wipe,lost-tail,power,kill,isolate",
    "members": "join,remove,wipe,transfer,isolate,kill,restart",
    "snapshots": "checkpoint,isolate,kill,power,slow-links,lose,repeat",
    "registry": "registry-down,registry-wiped,registry-slow,join,power",
}
"""By name: the faults that are on."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the simulator found: with this aim, in this seed, the first of those from 1 on; which rule was broken."""

    aim: str
    seed: int
    rule: str

    def __str__(self) -> str:
        return f"{self.seed} of {self.aim}: {self.rule}"


def options(aim: str, seed: int) -> Options:
    """What is simulated."""
    faults = AIMS[aim]
    return Options(seed=seed, faults=tuple(faults.split(",")) if faults else None)


def simulate(aim: str, seed: int) -> str | None:
    """The rule that this run breaks, or what ends it; None where all is well."""
    try:
        violation = run(options(aim, seed)).violation
    except Exception as error:
        return f"it ends with {type(error).__name__}"
    return None if violation is None else violation.rule


def search(aim: str, seeds: range) -> Found | None:
    """The first of `seeds` in which something is wrong."""
    for seed in seeds:
        rule = simulate(aim, seed)
        if rule is not None:
            return Found(aim, seed, rule)
    return None
