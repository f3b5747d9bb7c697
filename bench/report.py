"""From results to `docs/performance.md`: its tables and charts.

    python -m bench.report results.json growth.json cost.json

Law: what stands between the two marks in the document was measured by the commands that stand there too; nobody writes
there by hand. The rest of the document is left alone.

A result is what `bench.peers --out`, `bench.growth --out` and `bench.cost --json` write; any of them may be missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import cost, growth, machine, peers
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


def block(results: Sequence[dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """The measured part of the document, and the charts' files by name."""
    parts, files = [], {}
    for result in results:
        charts: dict[str, Chart] = {}
        if "rows" in result:
            parts += ["### Beside etcd and ZooKeeper", _command(result), peers.show(result)]
            charts = charts_of_peers(result) if result["rows"] else {}
        elif "growth" in result:
            parts += [
                "### Growth",
                _command(result),
                machine.sentence(result["machine"]),
                growth.show(result["growth"]),
            ]
            charts = charts_of_growth(result["growth"])
        elif "cost" in result:
            parts += ["### Where the time goes", "    python -m bench.cost", machine.sentence(result["machine"])]
            parts.append(cost.show(result["cost"]))
        else:
            raise ValueError("a file holds no result of bench.peers, bench.growth or bench.cost")
        for name, chart in charts.items():
            files[f"{name}.svg"] = svg(chart)
            parts.append(f"![{chart.title}]({CHARTS}/{name}.svg)")
    return "\n\n".join(parts), files


def _command(result: dict[str, Any]) -> str:
    """The command that measured, but for where it wrote and found things on that machine."""
    words = result["command"].split()
    private = ("--out", "--dir", "--etcd")
    kept = [w for i, w in enumerate(words) if w not in private and (i == 0 or words[i - 1] not in private)]
    return "    " + " ".join(w for w in kept if not w.startswith(tuple(f"{p}=" for p in private)))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    p.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what the benchmarks wrote")
    p.add_argument("--document", type=Path, default=DOCUMENT, help="with the marks (default: docs/performance.md)")
    a = p.parse_args(arguments)
    try:
        measured, files = block([json.loads(path.read_text()) for path in a.results])
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
    print(f"{a.document}: {len(files)} charts", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
