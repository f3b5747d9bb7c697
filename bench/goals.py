"""What ddb is to reach beside others on the same two cores, and whether a result shows it.

Law: a goal is a ratio within one run, or a figure of ddb's own on the class of machine that performance.md names; it is met or
not, and the value is always shown with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.cluster import table

FOLLOWER = "linearizable get, {} clients, at a follower"
STALE = "stale get, 64 clients, any node"


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` of `work`: at most or at least `bound` times that of `system`, or `bound` itself where there is none."""

    work: str
    figure: str
    least: bool
    bound: float
    system: str | None = None


GOALS = (
    Goal("put, 1 client", "p50_ms", False, 0.6, "etcd"),
    Goal("put, 1 client", "p50_ms", False, 0.75, "ZooKeeper"),
    Goal("put, 64 clients", "ops_per_s", True, 3, "etcd"),
    Goal("put, 64 clients", "p99_ms", False, 0.4, "etcd"),
    Goal("put, 64 clients", "ops_per_s", True, 1.4, "ZooKeeper"),
    Goal("put, 64 clients", "p99_ms", False, 0.8, "ZooKeeper"),
    Goal("put, 256 clients", "ops_per_s", True, 4, "etcd"),
    Goal("put, 256 clients", "ops_per_s", True, 1.8, "ZooKeeper"),
    Goal("put, 64 clients × 16 pipelined", "ops_per_s", True, 80_000),
    Goal("batch of 100 puts, 16 clients", "ops_per_s", True, 1_500),
    Goal("linearizable get, 64 clients", "ops_per_s", True, 3, "etcd"),
    Goal("linearizable get, 64 clients", "ops_per_s", True, 1.4, "ZooKeeper"),
    Goal("linearizable get, 256 clients", "ops_per_s", True, 3, "etcd"),
    Goal("linearizable get, 256 clients", "ops_per_s", True, 1.4, "ZooKeeper"),
    *(Goal(FOLLOWER.format(n), "ops_per_s", True, 2, "etcd") for n in (64, 256)),
    *(Goal(FOLLOWER.format(n), "ops_per_s", True, 1, "ZooKeeper") for n in (64, 256)),
    Goal(STALE, "ops_per_s", True, 2, "etcd"),
    Goal(STALE, "ops_per_s", True, 1, "ZooKeeper"),
    Goal("leader killed", "median_s", False, 1 / 20, "etcd"),
    Goal("leader killed", "median_s", False, 1 / 8, "ZooKeeper"),
    Goal("leader killed", "median_s", False, 0.05),
    Goal("a million keys", "restart_s", False, 1 / 3, "etcd"),
    Goal("a million keys", "restart_s", False, 1.0),
    Goal("a million keys", "memory_mib", False, 0.7, "etcd"),
    Goal("a million keys", "join_s", False, 1 / 2, "etcd"),
)
SHOWN = {
    "p50_ms": "p50, ms", "p99_ms": "p99, ms", "ops_per_s": "operations a second", "median_s": "median, s",
    "restart_s": "ready after kill -9, s", "memory_mib": "memory of the largest node, MiB",
    "join_s": "new node's first linearizable read, s",
}  # fmt: skip


def values(
    middle: dict[tuple[str, str], dict[str, float]], gaps: dict[str, list[float]], million: dict[str, dict[str, Any]]
) -> dict[tuple[str, str, str], float]:
    """Every figure that a goal may be on, by work, system and name."""
    found = {(work, system, name): value for (work, system), row in middle.items() for name, value in row.items()}
    found |= {("leader killed", system, "median_s"): median(all_s) for system, all_s in gaps.items() if all_s}
    for system, row in million.items():
        found["a million keys", system, "memory_mib"] = max(row["memory_mib"])
        found |= {("a million keys", system, name): row[name] for name in ("restart_s", "join_s")}
    return found


def show(found: dict[tuple[str, str, str], float], goals: Sequence[Goal] = GOALS) -> str:
    """The goals on which there are figures, as a table. Empty where there are none."""
    rows = []
    for goal in goals:
        own = found.get((goal.work, "ddb", goal.figure))
        other = 1.0 if goal.system is None else found.get((goal.work, goal.system, goal.figure))
        if own is None or not other:
            continue
        value = own / other
        met = value >= goal.bound if goal.least else value <= goal.bound
        times = "" if goal.system is None else f"× {goal.system}'s"
        bound = (
            f"{'≥' if goal.least else '≤'} {goal.bound:,.3g}{times}" if goal.bound < 1000 else f"≥ {goal.bound:,.0f}"
        )
        is_ = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}{times and '×'}"
        rows.append([goal.work, SHOWN[goal.figure], bound, is_, "yes" if met else "no"])
    return table(("goal", "figure", "to be", "is", "met"), rows, left=2) if rows else ""
