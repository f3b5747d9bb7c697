"""What the load is to be, and what came of it: values that travel between processes.

Law: a figure is always of the measured seconds alone, and an operation that failed is in no latency.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

OPS = ("put", "get", "mixed", "batch")
READS = ("linearizable", "stale")
KEYS = ("uniform", "zipf")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. `mixed` is half puts, half gets; `batch` is `batch_keys` puts in one request, all or none.

    `read` is what a get asks for; `keys` different keys are in use, drawn as `distribution` says. `dialect` names the
    database. `timed`: note when each was answered, too.
    """

    servers: tuple[str, ...]
    clients: int = 64
    op: str = "put"
    value_bytes: int = 256
    seconds: float = 5.0
    warm_up_s: float = 1.0
    pipeline: int = 1
    keys: int = 10_000
    read: str = "linearizable"
    processes: int = 1
    fill: bool = True
    seed: int = 1
    batch_keys: int = 100
    distribution: str = "uniform"
    dialect: str = "ddb"
    timed: bool = False


@dataclass(slots=True)
class Result:
    """What happened in the measured seconds: a latency for each operation that succeeded.

    Of a plan that is `timed`, `answered_at` tells for each latency when its reply came, on `time.perf_counter`'s clock.
    """

    seconds: float
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    answered_at: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    memory_bytes: int = 0

    def add(self, other: Result) -> None:
        """Take what another process measured in the same seconds into this."""
        self.latencies_s.extend(other.latencies_s)
        self.answered_at.extend(other.answered_at)
        self.errors.update(other.errors)
        self.cpu_s += other.cpu_s
        self.memory_bytes += other.memory_bytes

    def summary(self) -> dict[str, Any]:
        """The figures: operations a second, latencies in ms, errors by code, share of a core and memory of the load."""
        ordered = sorted(self.latencies_s)
        figures: dict[str, Any] = {"ops": len(ordered), "ops_per_s": round(len(ordered) / self.seconds, 1)}
        for name, quantile in QUANTILES.items():
            figures[f"{name}_ms"] = round(1000 * ordered[int(quantile * len(ordered))], 3) if ordered else None
        figures["max_ms"] = round(1000 * ordered[-1], 3) if ordered else None
        figures["errors"] = dict(self.errors)
        figures["load_cpu_percent"] = round(100 * self.cpu_s / self.seconds, 1)
        figures["load_memory_mib"] = round(self.memory_bytes / (1 << 20), 1)
        return figures
