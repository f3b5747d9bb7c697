"""What ddb is to reach beside others on the same two cores, and whether a result shows it.

Laws: a goal is a ratio within one run, or a figure of ddb's own on the class of machine that performance.md names; it is met or
not, and the value is always shown with it. A goal without a figure is shown too, as not measured: nothing is left out
because it was not to be had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench import prototype
from bench.cluster import table

FOLLOWER = "linearizable get, {} clients, at a follower"
STALE = "stale get, 64 clients, any node"
BATCH_KEYS = 100
BATCH = f"batch of {BATCH_KEYS} puts, 16 clients"
KILLED = "leader killed, write to write"
MILLION = "1,000,000 keys"
CHECKPOINT = "checkpoint, {:,} keys, 64 clients"
JOIN = "new node under load, {:,} keys"
CACHE = "data {} times the cache"
ONCE = "data of the cache's size"

Found = dict[tuple[str, str, str], float]


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` of `work`: at most or at least `bound` times that of `system`, or `bound` itself where there is none."""

    work: str
    figure: str
    least: bool
    bound: float
    system: str | None = None

    def value(self, found: Found) -> float | None:
        """What there is instead, from the figures that were `found`; None where it was not measured."""
        own = found.get((self.work, "ddb", self.figure))
        other = 1.0 if self.system is None else found.get((self.work, self.system, self.figure))
        return None if own is None or not other else own / other

    def met(self, value: float) -> bool:
        """Whether `value` is enough."""
        return value >= self.bound if self.least else value <= self.bound


GOALS = (
    Goal("put, 1 client", "p50_ms", False, 0.6, "etcd"),
    Goal("put, 1 client", "p50_ms", False, 0.75, "ZooKeeper"),
    Goal("put, 1 client", "ops_per_s", True, 0.7, prototype.NAME),
    Goal("put, 64 clients", "ops_per_s", True, 3, "etcd"),
    Goal("put, 64 clients", "p99_ms", False, 0.4, "etcd"),
    Goal("put, 64 clients", "ops_per_s", True, 1.4, "ZooKeeper"),
    Goal("put, 64 clients", "p99_ms", False, 0.8, "ZooKeeper"),
    Goal("put, 64 clients", "ops_per_s", True, 0.6, prototype.NAME),
    Goal("put, 256 clients", "ops_per_s", True, 4, "etcd"),
    Goal("put, 256 clients", "ops_per_s", True, 1.8, "ZooKeeper"),
    Goal("put, 256 clients", "ops_per_s", True, 0.6, prototype.NAME),
    Goal("put, 64 clients × 16 pipelined", "ops_per_s", True, 80_000),
    Goal(BATCH, "keys_per_s", True, 150_000),
    *(
        Goal(f"linearizable get, {n} clients", "ops_per_s", True, bound, system)
        for n in (64, 256) for system, bound in (("etcd", 3), ("ZooKeeper", 1.4), (prototype.NAME, 0.6))
    ),
    *(
        Goal(FOLLOWER.format(n), "ops_per_s", True, bound, system)
        for n in (64, 256) for system, bound in (("etcd", 2), ("ZooKeeper", 1))
    ),
    Goal(STALE, "ops_per_s", True, 2, "etcd"),
    Goal(STALE, "ops_per_s", True, 1, "ZooKeeper"),
    Goal(KILLED, "median_s", False, 1 / 20, "etcd"),
    Goal(KILLED, "median_s", False, 1 / 8, "ZooKeeper"),
    Goal(KILLED, "median_s", False, 0.05),
    Goal(MILLION, "restart_s", False, 1 / 3, "etcd"),
    Goal(MILLION, "restart_s", False, 1.0),
    Goal(MILLION, "memory_mib", False, 0.7, "etcd"),
    Goal(MILLION, "join_s", False, 1 / 2, "etcd"),
    *(Goal(CHECKPOINT.format(n), "stall", False, 3) for n in (10_000, 1_000_000)),
    Goal(JOIN.format(1_000_000), "mb_per_s", True, 60),
    Goal(JOIN.format(1_000_000), "served", True, 0.7),
    Goal(CACHE.format(10), "memory_mib", False, 1.5, ONCE),
)  # fmt: skip
OF = {"etcd": "etcd's", "ZooKeeper": "ZooKeeper's", prototype.NAME: "the prototype's", ONCE: "that with 1 times"}
SHOWN = {
    "p50_ms": "p50, ms", "p99_ms": "p99, ms", "ops_per_s": "operations a second", "median_s": "median, s",
    "keys_per_s": "keys a second", "restart_s": "a follower ready after kill -9, s", "memory_mib": "memory of the largest node, MiB",
    "join_s": "new node's first linearizable read, s", "stall": "p99.9, as a multiple of that without",
    "mb_per_s": "MB a second", "served": "throughput meanwhile, as a share of before",
}  # fmt: skip


def values(
    middle: Mapping[tuple[str, str], Mapping[str, float]],
    gaps: Mapping[str, Sequence[float]],
    million: Mapping[str, Mapping[str, Any]],
    limits: Mapping[str, Any] | None = None,
    upkeep: Mapping[str, Any] | None = None,
    growth: Sequence[Mapping[str, Any]] = (),
) -> Found:
    """Every figure that a goal may be on, by work, system and name. Any of the arguments may be empty."""
    found = {(work, system, name): value for (work, system), row in middle.items() for name, value in row.items()}
    if (batches := found.get((BATCH, "ddb", "ops_per_s"))) is not None:
        found[BATCH, "ddb", "keys_per_s"] = BATCH_KEYS * batches
    for work, then in prototype.scaled(limits or {}).items():
        found[work, prototype.NAME, "ops_per_s"] = then.now_per_s
    found |= {(KILLED, system, "median_s"): median(all_s) for system, all_s in gaps.items() if all_s}
    for system, row in million.items():
        work = f"{row['keys']:,} keys"
        found[work, system, "memory_mib"] = max(row["memory_mib"])
        found |= {(work, system, name): row[name] for name in ("restart_s", "join_s") if name in row}
    return found | _of_upkeep(upkeep or {}) | _of_growth(growth)


def _of_upkeep(upkeep: Mapping[str, Any]) -> Found:
    found: Found = {}
    for row in upkeep.get("checkpoints", ()):
        if row["stall"] is not None:
            found[CHECKPOINT.format(row["keys"]), "ddb", "stall"] = row["stall"]
    for row in upkeep.get("join", ()):
        found |= {(JOIN.format(row["keys"]), "ddb", name): row[name] for name in ("mb_per_s", "served")}
    return found


def _of_growth(growth: Sequence[Mapping[str, Any]]) -> Found:
    """Memory with data so many times the cache, and with data once the cache."""
    memory: dict[int, float] = {}
    for row in growth:
        if row["part"] == "cache":
            memory[row["at"]] = max(memory.get(row["at"], 0.0), *row["private_mib"])
    found: Found = {}
    for times, mib in memory.items():
        found[CACHE.format(times), "ddb", "memory_mib"] = mib
        if 1 in memory:
            found[CACHE.format(times), ONCE, "memory_mib"] = memory[1]
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _measured(goal: Goal, value: float) -> str:
    """The value, with as many digits as it takes to see on which side of the bound it is."""
    short = _number(value)
    return short if goal.met(float(short.replace(",", ""))) == goal.met(value) else f"{value:,.6g}"


def show(found: Found, goals: Sequence[Goal] = GOALS) -> str:
    """Each goal with what was measured, as a table, and how many are met."""
    rows = []
    for goal in goals:
        value = goal.value(found)
        whose = "" if goal.system is None else f"× {OF.get(goal.system, goal.system)}"
        bound = f"{'≥' if goal.least else '≤'} {_number(goal.bound)}{whose}"
        said = "-" if value is None else f"{_measured(goal, value)}{'×' if whose else ''}"
        verdict = "not measured" if value is None else "met" if goal.met(value) else "not met"
        rows.append([goal.work, SHOWN[goal.figure], bound, said, verdict])
    verdicts = [row[-1] for row in rows]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "not met", "not measured") if v in verdicts)
    return f"{table(('work', 'figure', 'goal', 'measured', ''), rows, left=2)}\n\nOf {len(rows)} goals: {counted}."
