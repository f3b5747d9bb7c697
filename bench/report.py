"""From results to `docs/performance.md`: its goals, tables and charts.

    python -m bench.report results.json growth.json upkeep.json cost.json

Laws: what stands between the two marks in the document was measured by the commands that stand there too; nobody writes
there by hand. The rest of the document is left alone. What a result lacks is "not measured" among the goals, and nowhere else.

A result is what `bench.peers --out`, `bench.growth --out`, `bench.upkeep --out` and `bench.cost --json` write; any of them
may be missing. Of one kind there may be several, with different parts: together they are one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import cost, goals, growth, machine, peers, upkeep
from bench.plots import Chart, svg

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
CHARTS = "performance"  # the folder beside the document
PERCENTILES = ("p50_ms", "p95_ms", "p99_ms", "p99.9_ms")


def charts_of_peers(result: dict[str, Any]) -> dict[str, Chart]:
    """Throughput against clients for each kind of load, and the percentiles at 64 clients; by file name."""
    middle = peers.medians(result["rows"])
    names = [s["name"] for s in result["systems"]]
    found = {}
    for what, file in (("put", "put"), ("linearizable get", "get")):
        works = {f"{what}, {n} client{'s'[: n > 1]}": n for n in (1, 4, 16, 64, 256, 1024)}
        lines = {
            name: [(n, middle[work, name]["ops_per_s"]) for work, n in works.items() if (work, name) in middle]
            for name in names
        }
        if any(len(line) > 1 for line in lines.values()):
            found[f"{file}-clients"] = Chart(f"{what}, three nodes", "clients", "operations a second", lines)
        work = f"{what}, 64 clients"
        spread = {
            name: [(i, middle[work, name][p]) for i, p in enumerate(PERCENTILES, 1)]
            for name in names if (work, name) in middle
        }  # fmt: skip
        if spread:
            labels = {float(i): p.removesuffix("_ms") for i, p in enumerate(PERCENTILES, 1)}
            found[f"{file}-latency"] = Chart(
                f"{work}: latency", "percentile", "milliseconds", spread, False, True, labels
            )
    return found


def charts_of_growth(rows: Sequence[dict[str, Any]]) -> dict[str, Chart]:
    """Latency and throughput against what was changed; by file name."""
    titles = {
        "keys": "keys in the database", "values": "bytes in a value", "nodes": "nodes", "clients": "clients",
        "batches": "puts in a batch",
    }  # fmt: skip
    found = {}
    for part, title in titles.items():
        lines = {
            op: _middle(rows, part, op, "ops_per_s", part == "batches")
            for op in dict.fromkeys(r["op"] for r in rows if r["part"] == part)
        }
        if any(len(line) > 1 for line in lines.values()):
            what = "keys a second" if part == "batches" else "operations a second"
            found[f"growth-{part}"] = Chart(f"{what} against {title}", title, what, lines, log_x=part != "nodes")
    costs = {
        f"{op} {name.removesuffix('_ms')}": _middle(rows, "keys", op, name)
        for op in ("put", "get") for name in ("p50_ms", "p99_ms")
    }  # fmt: skip
    if any(len(line) > 1 for line in costs.values()):
        title = "latency against the size of the data, 64 clients"
        found["growth-keys-latency"] = Chart(title, titles["keys"], "milliseconds", costs, log_y=True)
    return found


def _middle(
    rows: Sequence[dict[str, Any]], part: str, op: str, name: str, each: bool = False
) -> list[tuple[float, float]]:
    """The medians of figure `name` over the rounds, by what was changed; with `each`, times that."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row["part"] == part and row["op"] == op and row[name] is not None:
            values.setdefault(row["at"], []).append(row[name])
    return [(at, median(found) * (at if each else 1)) for at, found in values.items()]


def together(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results by kind: those of one kind as one, its commands in a list. Raises ValueError for what is no result."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        kind = next((k for k in KINDS if k in result), None)
        if kind is None:
            raise ValueError("a file holds no result of bench.peers, bench.growth, bench.upkeep or bench.cost")
        command = result.get("command", f"python -m bench.{kind}")
        one = found.setdefault(kind, {**EMPTY[kind], "commands": []})
        one["commands"].append(command)
        for name, value in result.items():
            one[name] = _joined(one.get(name), value)
    return found


def _joined(first: Any, second: Any) -> Any:
    """`second`, and what `first` has beside it; a row or a system that both have is there once."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first | {name: _joined(first.get(name), value) for name, value in second.items()}
    if isinstance(first, list) and isinstance(second, list):
        return first + [item for item in second if not (isinstance(item, dict) and item in first)]
    return second or first


def figures_of(found: dict[str, dict[str, Any]]) -> goals.Found:
    """Every figure on which there may be a goal, from all results."""
    of_peers = found.get("rows", EMPTY["rows"])
    return goals.values(
        peers.medians(of_peers["rows"]),
        of_peers["failover"],
        of_peers["million"],
        of_peers["limits"],
        found.get("upkeep", {}).get("upkeep"),
        found.get("growth", {}).get("growth", ()),
    )


def block(results: Sequence[dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """The measured part of the document, and the charts' files by name."""
    found = together(results)
    parts, files = ["### What is to be reached", goals.show(figures_of(found))], {}
    for kind, (heading, show, charts_of) in KINDS.items():
        if (result := found.get(kind)) is None:
            continue
        parts += [f"### {heading}", "\n".join(_command(c) for c in result["commands"]), show(result)]
        charts = charts_of(result)
        for name, chart in charts.items():
            files[f"{name}.svg"] = svg(chart)
            parts.append(f"![{chart.title}]({CHARTS}/{name}.svg)")
    return "\n\n".join(part for part in parts if part), files


def _with_machine(show: Callable[[Any], str], name: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: f"{machine.sentence(result['machine'])}\n\n{show(result[name])}"


# What a result's kind is told by: its heading, its tables, and its charts.
KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], str], Callable[[dict[str, Any]], dict[str, Chart]]]] = {
    "rows": ("Beside etcd and ZooKeeper", peers.show, charts_of_peers),
    "upkeep": ("Checkpoints, newcomers, garbage", _with_machine(upkeep.show, "upkeep"), lambda _: {}),
    "growth": ("Growth", _with_machine(growth.show, "growth"), lambda result: charts_of_growth(result["growth"])),
    "cost": ("Where the time goes", _with_machine(cost.show, "cost"), lambda _: {}),
}
EMPTY: dict[str, dict[str, Any]] = {
    "rows": {"systems": [], "rows": [], "failover": {}, "million": {}, "limits": {}},
    "upkeep": {"upkeep": {part: [] for part in upkeep.PARTS}},
    "growth": {"growth": []},
    "cost": {"cost": []},
}


def _command(command: str) -> str:
    """The command that measured, but for where it wrote and found things on that machine."""
    words = command.split()
    private = ("--out", "--dir", "--etcd")
    kept = [w for i, w in enumerate(words) if w not in private and (i == 0 or words[i - 1] not in private)]
    return "    " + " ".join(w for w in kept if not w.startswith(tuple(f"{p}=" for p in private)))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    p.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what the benchmarks wrote")
    p.add_argument("--document", type=Path, default=DOCUMENT, help="with the marks (default: docs/performance.md)")
    a = p.parse_args(arguments)
    here = [path for path in a.results if path.exists()]
    for path in a.results:
        if path not in here:
            print(f"bench.report: {path} is not there: what it would tell is left out", file=sys.stderr)
    try:
        results = [json.loads(path.read_text()) for path in here]
        measured, files = block(results)
        old = a.document.read_text(encoding="utf-8")
        before, begin, rest = old.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{a.document} lacks the marks {BEGIN} and {END}")
        a.document.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}", encoding="utf-8")
        folder = a.document.parent / CHARTS
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    print(goals.show(figures_of(together(results))))
    print(f"{a.document}: {len(files)} charts", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
