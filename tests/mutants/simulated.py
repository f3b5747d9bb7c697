"""The simulator as a detector: it replays seed after seed until it finds something wrong.

An *aim* is a choice of faults, and of nothing else, for a bug that the whole swarm meets too rarely. It is named by the
faults, as `python -m ddb sim --faults` takes them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from ddb.sim import Options, run

AIMS: Final[dict[str, str]] = {
    "all faults": "",
    "partitions": "isolate,mute,deafen,split,bridge,ring,one-way",
    "freezes": "pause,mute,slow-disk,slow-links",
    "messages": "lose,repeat,reorder,kill,pause,isolate",
    "disks": "power,blackout,slow-disk,full-disk,failing-fsync,crash-point",
    "rot": "flip,wipe,lost-tail,power,kill,isolate",
    "members": "join,remove,wipe,transfer,isolate,kill,restart",
    "snapshots": "checkpoint,isolate,kill,power,slow-links,lose,repeat",
    "clocks": "clock-jump,pause,isolate,kill,transfer,slow-disk,lose",
    "registry": "registry-down,registry-wiped,registry-slow,join,power",
}
"""By name: the faults that are on."""

LATER_MAX: Final = 5
DEAR_S: Final = 8.0  # of one processor: not worth it in each run of the tests, where a claim notices, too


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


def search(aim: str, seeds: range, cheap_s: float = 3.0) -> Found | None:
    """The first of `seeds` in which something is wrong; or a later one, where that takes longer than `cheap_s`."""
    found, shortest_s = None, float("inf")
    for seed in seeds:
        began_s = time.process_time()
        rule = simulate(aim, seed)
        took_s = time.process_time() - began_s
        if rule is not None and took_s < shortest_s:
            found, shortest_s = Found(aim, seed, rule), took_s
        if found is not None and (shortest_s <= cheap_s or seed >= found.seed + LATER_MAX):
            break
    return found if shortest_s <= DEAR_S else None
