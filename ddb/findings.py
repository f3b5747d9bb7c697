"""What `ddb verify` found: counts, verdicts, what stood in the way; as text, as JSON, and as an exit code.

Laws: "linearizable" is said only of operations that were judged, and only where nothing stood in the way of judging them.
A counter-example is shown with its keys as short as they can be, without the scratch prefix that all of them share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from ddb import timeline
from ddb.checker import Counterexample, Verdict
from ddb.history import Operation, Outcome, to_lines
from ddb.overview import paint

_GOOD: Final = "\x1b[1;32m"
_BAD: Final = "\x1b[1;31m"
_LABEL: Final = "\x1b[2m"
LABEL_CHARACTERS: Final = 14

T = TypeVar("T")

NAMES: Final = {Outcome.DONE: "acknowledged", Outcome.NOT_DONE: "failed", Outcome.UNKNOWN: "unknown"}


class Findings:
    """Grows while `verify` works. `trouble` is a sentence, empty where nothing stood in the way."""

    def __init__(self, seed: int, prefix: str) -> None:
        self.seed = seed
        self.prefix = prefix
        self.seconds = 0.0  # of load
        self.outcomes: Counter[Outcome] = Counter()
        self.kinds: Counter[str] = Counter()
        self.faults: Counter[str] | None = None
        self.judged = 0
        self.judging_s = 0.0
        self.rounds = 0
        self.verdict: Verdict | None = None  # the last one
        self.trouble = ""
        self.directory: Path | None = None  # that was kept as evidence
        self._trouble_code = 0

    def count(self, history: Sequence[Operation]) -> None:
        """Count what was done."""
        self.outcomes.update(operation.outcome for operation in history)
        self.kinds.update(_kind(operation) for operation in history)

    def judge(self, verdict: Verdict, took_s: float) -> None:
        """Note the verdict on one round."""
        self.rounds += 1
        self.judged += verdict.judged
        self.judging_s += took_s
        self.verdict = _shortened(verdict, self.prefix)

    def fail(self, trouble: str, exit_code: int = 1) -> None:
        """Note what stands in the way, a sentence, and what it makes of the exit code; the first one counts."""
        if not self.trouble:
            self.trouble = trouble
            self._trouble_code = exit_code

    @property
    def operations(self) -> int:
        """How many were asked for."""
        return self.outcomes.total()

    @property
    def refuted(self) -> bool:
        """Whether something was found that can't be."""
        return self.verdict is not None and self.verdict.linearizable is not None and not self.verdict.ok

    @property
    def linearizable(self) -> bool | None:
        """The verdict on all of it; None where there is none."""
        if self.refuted:
            return False
        decided = self.verdict is not None and self.verdict.ok and self.outcomes[Outcome.DONE] > 0
        return True if decided else None

    @property
    def exit_code_so_far(self) -> int:
        """0 where nothing bad was found yet."""
        if self.refuted or (self.verdict is not None and not self.verdict.ok):
            return 1
        return self._trouble_code

    @property
    def exit_code(self) -> int:
        """0: linearizable; 1: not, or nobody can tell; otherwise that of the error which stood in the way."""
        return self.exit_code_so_far or (0 if self.linearizable else 1)

    # As text

    def lines(self, colour: bool = False) -> Iterator[str]:
        """The findings for a person: the verdict, a picture of a counter-example, the figures."""
        yield self._headline(colour)
        if self.verdict is not None and self.verdict.counterexample is not None:
            yield ""
            yield from timeline.to_text(self.verdict.counterexample).splitlines()
            at = self.verdict.counterexample.culprit.request.get("at", "the leader, as far as its client knew")
            yield f"The one that can't be explained was asked of {at}."
        if self.verdict is not None and self.verdict.contradictions:
            yield ""
            yield from (f"- {contradiction}" for contradiction in self.verdict.contradictions[:5])
        if self.refuted:
            yield ""
        for label, text in self._figures():
            yield paint(f"{label:<{LABEL_CHARACTERS}}", _LABEL, colour) + text
        if self.directory is not None:
            yield f"The nodes' data and logs are in {self.directory}."

    def _headline(self, colour: bool) -> str:
        verdict = self.verdict
        if self.refuted and verdict is not None:
            what = (
                "the revisions told contradict one another" if verdict.linearizable else "some replies can't be right"
            )
            return f"{paint('Not linearizable', _BAD, colour)}: {what}."
        if verdict is None:
            return "Nothing was judged."
        if not self.outcomes[Outcome.DONE]:
            return "Nothing was judged: no operation was acknowledged."
        if verdict.linearizable is None:
            return f"{verdict} More keys, or fewer clients, make it easier."
        return f"{paint('Linearizable', _GOOD, colour)}: {self.judged:,} operations judged, and all can be explained."

    def _figures(self) -> Iterator[tuple[str, str]]:
        rate = self.operations / self.seconds if self.seconds else 0
        yield "operations", f"{self.operations:,} in {self.seconds:.1f} s, {rate:,.0f} a second"
        yield "acknowledged", f"{self.outcomes[Outcome.DONE]:,}"
        yield "failed", f"{self.outcomes[Outcome.NOT_DONE]:,} (surely not done)"
        yield "unknown", f"{self.outcomes[Outcome.UNKNOWN]:,} (may have been done)"
        yield "asked", ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.most_common())
        if self.faults is not None:
            yield "faults", ", ".join(f"{fault} {count}" for fault, count in self.faults.items()) or "none"
        rounds = f", in {self.rounds} rounds" if self.rounds > 1 else ""
        yield "checker", f"{self.judging_s:.1f} s{rounds}"
        yield "seed", f"{self.seed}"

    def to_html(self) -> str:
        """The page with the picture; only where there is a verdict."""
        assert self.verdict is not None
        return timeline.to_html(self.verdict, "ddb verify")

    def to_json(self) -> dict[str, Any]:
        """All of it for a program."""
        verdict, found = self.verdict, self.verdict.counterexample if self.verdict is not None else None
        return {
            "ok": self.exit_code == 0,
            "linearizable": self.linearizable,
            "operations": self.operations,
            "outcomes": {name: self.outcomes[outcome] for outcome, name in NAMES.items()},
            "asked": dict(self.kinds),
            "faults": None if self.faults is None else dict(self.faults),
            "seconds": round(self.seconds, 3),
            "judged": self.judged,
            "judging_seconds": round(self.judging_s, 3),
            "rounds": self.rounds,
            "seed": self.seed,
            "prefix": self.prefix,
            "trouble": self.trouble or None,
            "directory": None if self.directory is None else str(self.directory),
            "counterexample": None if found is None else _counterexample_json(found),
            "contradictions": [str(contradiction) for contradiction in verdict.contradictions[:20]] if verdict else [],
        }


def _kind(operation: Operation) -> str:
    request = operation.request
    if request.get("read") == "stale":
        return "stale"
    return f"{request['op']} if" if "if" in request and request["op"] != "txn" else str(request["op"])


def _counterexample_json(found: Counterexample) -> dict[str, Any]:
    shown = [operation for operation in timeline.shown(found) if operation is not found.culprit]
    culprit, *others = (json.loads(line) for line in to_lines([found.culprit, *shown]))
    return {"message": str(found), "keys": found.keys, "culprit": culprit, "others": others}


# ------------------------------------------------------------- short keys


def _shortened(verdict: Verdict, prefix: str) -> Verdict:
    """The verdict, what it shows without `prefix`; the orders found, which nobody is shown, left out."""
    memory: dict[int, Operation] = {}

    def short(operation: Operation) -> Operation:
        """The same for the same: a picture tells operations apart by identity."""
        if id(operation) not in memory:
            reply = None if operation.reply is None else _without(operation.reply, prefix)
            memory[id(operation)] = replace(operation, request=_without(operation.request, prefix), reply=reply)
        return memory[id(operation)]

    found = verdict.counterexample
    if found is not None:
        found = replace(
            found,
            keys=tuple(key.removeprefix(prefix) for key in found.keys),
            operations=tuple(map(short, found.operations)),
            culprit=short(found.culprit),
            explained=tuple(map(short, found.explained)),
            rows={key.removeprefix(prefix): row for key, row in found.rows.items()},
        )
    told = tuple(
        replace(c, rule=c.rule.replace(prefix, ""), one=short(c.one), other=short(c.other))
        for c in verdict.contradictions
    )
    return replace(verdict, orders=(), counterexample=found, contradictions=told)


def _without(value: T, prefix: str) -> T:
    """A JSON value, `prefix` taken off every text in it."""
    if isinstance(value, str):
        return value.removeprefix(prefix)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {name: _without(inner, prefix) for name, inner in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [_without(inner, prefix) for inner in value]  # type: ignore[return-value]
    return value
