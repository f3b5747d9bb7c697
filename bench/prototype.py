"""A prototype's figures, carried over to the machine of today: how much of its speed the whole database keeps.

Laws:

1. The prototype's figures and the limits of the machine it ran on were measured together, once. What it would do today is
   what it did, times what a limit allows today, divided by what the same limit allowed then.
2. Where two limits could be the measure, the one that asks more of ddb is taken.

Theory. The prototype was ddb's replication and nothing else: pure Python, three nodes, a fixed leader, durable (one
thread for the log, fdatasync into space written before), many requests to one batch; no elections, no members that
come and go, no recovery, no check of what it was sent. It shows what the rest costs.

A lone put waits for an fdatasync and two round trips, one after the other, and the rest of its time is the interpreter's:
so each of these is taken as it is today. Many puts, and reads, are bound by the interpreter alone: the limits are the bare loop with 64 connections, and the time of one `json.loads`. The first depends on the
generator too, which was written in Go then and is Python now: it is the lesser of the two where the generator is the
bottleneck, so by law 2 it does not count then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.cluster import table

NAME = "the prototype"

# What the limits were then.
SYNC_MS, TRIP_MS = 0.11, 0.055
BARE_LOOP_PER_S = {"64×1": 106_000.0, "64×16": 474_000.0}
JSON_LOADS_US = 2.1

# What the prototype did then: operations a second, and the bare loop that it is compared with ("": it waits for the disk).
LONE = "put, 1 client"
THEN = {
    LONE: (2_450.0, ""),
    "put, 16 clients": (16_600.0, "64×1"),
    "put, 64 clients": (40_400.0, "64×1"),
    "put, 256 clients": (56_900.0, "64×1"),
    "put, 64 clients × 16 pipelined": (134_600.0, "64×16"),
    "linearizable get, 64 clients": (70_000.0, "64×1"),  # measured with 256 clients: with 64 it was hardly more
    "linearizable get, 256 clients": (70_000.0, "64×1"),
}


@dataclass(frozen=True, slots=True)
class Scaled:
    """What the prototype did, and what it would do today by the limit `by`, in operations a second."""

    then_per_s: float
    by: str
    factor: float

    @property
    def now_per_s(self) -> float:
        """What it would do today."""
        return self.then_per_s * self.factor


def factors(limits: Mapping[str, Any], loop: str) -> dict[str, float]:
    """How much more the machine allows today than then, by limit; only of the limits that were measured."""
    found = {}
    processor = limits.get("processor")
    faster = JSON_LOADS_US / processor["json_loads_us"] if processor else 1.0
    if loop:
        if per_s := limits.get("loop", {}).get(f"bare {loop}", {}).get("per_s"):
            found["bare loop"] = per_s / BARE_LOOP_PER_S[loop]
        if processor:
            found["json.loads"] = faster
    elif (sync := limits.get("disk", {}).get("written, 1 file")) and (trip := limits.get("round_trip")):
        then_ms, waited_ms = 1000 / THEN[LONE][0], SYNC_MS + 2 * TRIP_MS
        now_ms = sync["p50_ms"] + 2 * trip["p50_ms"] + (then_ms - waited_ms) / faster
        found["fdatasync, round trips, json.loads"] = then_ms / now_ms
    return found


def scaled(limits: Mapping[str, Any]) -> dict[str, Scaled]:
    """What the prototype would do today, by work; empty where no limits were measured."""
    found = {}
    for work, (then_per_s, loop) in THEN.items():
        if choice := factors(limits, loop):
            by = max(choice, key=lambda name: choice[name])
            found[work] = Scaled(then_per_s, by, choice[by])
    return found


def show(limits: Mapping[str, Any], own: Mapping[str, Mapping[str, float]]) -> str:
    """ddb's figures, by work, as shares of the prototype's. Empty where there is nothing to compare."""
    rows = [
        [
            work, f"{p.then_per_s:,.0f}", f"{p.factor:.2f} ({p.by})", f"{p.now_per_s:,.0f}",
            f"{own[work]['ops_per_s']:,.0f}", f"{100 * own[work]['ops_per_s'] / p.now_per_s:.0f} %",
        ]
        for work, p in scaled(limits).items() if work in own
    ]  # fmt: skip
    columns = ("ddb and the prototype", "it did, ops/s", "the machine today", "it would do", "ddb does", "share")
    return table(columns, rows, left=1) if rows else ""
