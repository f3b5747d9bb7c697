"""What `ddb sim` says: one run or many, in words or JSON, and how a violation is replayed.

Laws: the trace and the report of a seed are the same wherever they are printed, but for how long it took; a violation
comes with its rule, its seed, its step, the events before it, and the command that leads there again.
"""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ddb.sim import Options, Result, minimize, run
from ddb.simfaults import KINDS

EVENTS_SHOWN: Final = 20
EVENT_CHARACTERS_MAX: Final = 300
STORIES_MAX: Final = 3
BLOCK_SEEDS: Final = 32  # for each process at a time
FAULT: Final = "fault: "

__all__ = ["Options", "Tally", "fault_kinds", "many", "one", "positions", "story"]

Say = Callable[[str], None]


@dataclass(slots=True)
class Tally:
    """What many runs come to. `failures` are those with a violation."""

    runs: int = 0
    steps: int = 0
    simulated_s: float = 0.0
    took_s: float = 0.0
    operations: int = 0
    met: Counter[str] = field(default_factory=Counter)
    failures: list[Result] = field(default_factory=list)

    def add(self, result: Result, took_s: float) -> None:
        """Count `result`, which took `took_s` seconds of one processor."""
        self.runs += 1
        self.steps += result.steps
        self.simulated_s += result.simulated_s
        self.took_s += took_s
        self.operations += result.operations
        self.met.update(result.met)
        if result.violation is not None:
            self.failures.append(result)

    def lines(self, timed: bool = True) -> Iterator[str]:
        """In words, for people. What is not `timed` is the same for the same seeds, wherever it runs."""
        ratio = self.simulated_s / self.took_s if self.took_s else 0.0
        runs = "1 run" if self.runs == 1 else f"{self.runs:,} runs"
        simulated = f"{self.simulated_s:,.1f} simulated seconds"
        if self.simulated_s >= 3600:
            simulated = f"{self.simulated_s / 3600:,.1f} simulated hours"
        speed = f"; {ratio:,.0f} times faster than real time" if timed else ""
        yield f"{runs}, {self.steps:,} steps, {simulated}, {self.operations:,} operations{speed}"
        faults = {kind.removeprefix(FAULT): n for kind, n in sorted(self.met.items()) if kind.startswith(FAULT)}
        yield "faults: " + (", ".join(f"{n:,} {kind}" for kind, n in faults.items()) or "none")
        rare = {what: n for what, n in sorted(self.met.items()) if not what.startswith(FAULT)}
        yield "met:    " + (", ".join(f"{n:,} {what}" for what, n in rare.items()) or "nothing unusual")

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "runs": self.runs,
            "steps": self.steps,
            "simulated_s": round(self.simulated_s, 3),
            "took_s": round(self.took_s, 3),
            "operations": self.operations,
            "met": dict(sorted(self.met.items())),
            "violations": [failure_to_json(result) for result in self.failures],
        }


def many(options: Options, count: int, jobs: int, say: Say, watch: Say) -> Tally:
    """Run `count` seeds from that of `options` on, in `jobs` processes, and say what came of them, also of some where
    Ctrl-C ends it (KeyboardInterrupt); `watch` is told how far it is."""
    tally = Tally()
    try:
        for result, took_s in _results(options, count, jobs):
            tally.add(result, took_s)
            found = ""
            if tally.failures:
                found = f", {len(tally.failures)} with a violation, the last is seed {tally.failures[-1].options.seed}"
            watch(f"{tally.runs} of {count} seeds, {tally.simulated_s / 3600:.1f} simulated hours{found}")
    finally:
        for line in tally.lines():
            say(line)
        for failure in tally.failures[:STORIES_MAX]:
            for line in story(failure):
                say(line)
    return tally


def _results(options: Options, count: int, jobs: int) -> Iterator[tuple[Result, float]]:
    """The runs of all seeds, each with the seconds it took, a few at a time: a million of them need no memory."""
    if jobs == 1:
        for number in range(count):
            yield _timed(replace(options, seed=options.seed + number))
        return
    with ProcessPoolExecutor(jobs, initializer=_leave_interrupts_to_the_parent) as pool:
        for begin in range(0, count, jobs * BLOCK_SEEDS):
            seeds = range(options.seed + begin, options.seed + min(count, begin + jobs * BLOCK_SEEDS))
            yield from pool.map(_timed, [replace(options, seed=seed) for seed in seeds], chunksize=4)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _timed(options: Options) -> tuple[Result, float]:
    began = time.process_time()
    result = run(options)
    return result, time.process_time() - began


def story(result: Result) -> Iterator[str]:
    """A violation in words: the rule, where, what came before, and how to see it again."""
    violation = result.violation
    assert violation is not None, "there is no story to a run in which every rule held"
    yield f"VIOLATION of the rule: {violation.rule}"
    yield f"seen on {violation.host}, seed {result.options.seed}, step {result.steps}: {violation.what}"
    yield f"the last {EVENTS_SHOWN} events:"
    for event in last_events(result.options):
        yield f"  {event}"
    yield "to see it happen:"
    yield f"  {result.options.command(result.steps)}"


def last_events(options: Options) -> list[str]:
    """The end of the trace that `options` give."""
    events: deque[str] = deque(maxlen=EVENTS_SHOWN)
    run(options, events.append)
    return [e if len(e) <= EVENT_CHARACTERS_MAX else e[:EVENT_CHARACTERS_MAX] + "…" for e in events]


def failure_to_json(result: Result) -> dict[str, Any]:
    """The same for programs."""
    violation = result.violation
    assert violation is not None
    return {
        "seed": result.options.seed,
        "step": result.steps,
        "rule": violation.rule,
        "host": violation.host,
        "what": violation.what,
        "command": result.options.command(result.steps),
    }


def one(options: Options, say: Say, trace: bool, shrink: bool, watch: Say) -> Tally:
    """Simulate one seed, and say what came of it; with `trace` all that happens, with `shrink` which faults it takes."""
    began = time.process_time()
    if shrink:
        options = minimize(options, watch)
    result = run(options, say if trace else None)
    tally = Tally()
    tally.add(result, time.process_time() - began)
    plan = result.plan
    say(f"seed {options.seed}: {plan.nodes} nodes, election {plan.election}, {plan.clients} clients, {plan.keys} keys")
    for line in tally.lines(timed=not trace):
        say(line)
    if shrink and result.violation is not None:
        say("the schedule of faults that is left:")
        for number in options.kept or ():
            say(f"  {result.faults[number]}")
    if options.until is not None:
        say("the nodes at that step:")
        for line in result.state:
            say(f"  {line}")
    for line in story(result) if result.violation is not None else ():
        say(line)
    return tally


def fault_kinds(text: str | None) -> tuple[str, ...] | None:
    """The kinds of faults that `text` names, with commas in between; "none" is none, None is for the seed to draw. Raises
    ValueError."""
    if text is None:
        return None
    kinds = tuple(kind.strip() for kind in text.split(",")) if text != "none" else ()
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"There is no fault {kind!r}; there are {', '.join(KINDS)}, and none.")
    return kinds


def positions(text: str | None) -> tuple[int, ...] | None:
    """The positions in a schedule of faults that `text` names, with commas in between. Raises ValueError."""
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError:
        raise ValueError("--keep takes whole numbers with commas in between.") from None
