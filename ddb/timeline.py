"""A counter-example as a picture: bars side by side, one row for each client.

Laws: a picture shows the operation that can't be explained, what overlaps with it, what it contradicts and what came
last, and never more than fits on a screen; the page of HTML stands alone, without scripts, fonts or anything from
elsewhere.

Theory. For linearizability only the order of calls and returns counts. So each moment at which anything shown begins or
ends is one step on the axis, just wide enough for the words in the bars, however long it took: a microsecond of
overlap is as plain to see as a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from ddb.checker import Counterexample, Verdict
from ddb.history import Operation, Outcome, ask_in_short, told_in_short
from ddb.search import returned_at

OVERLAPPING_MAX: Final = 10
RELATED_MAX: Final = 4
PENDING_MAX: Final = 3
RECENT_MAX: Final = 5
CHANGES_MAX: Final = 2
LABEL_CHARACTERS_MAX: Final = 40
CHARACTER_PX: Final = 7.3
ROW_PX: Final = 30

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1d2430;--paper:#fcfcfa;--line:#c9ced6;--soft:#6b7483;
  --bar:#dbe7f6;--edge:#5b83b5;--bad:#fbdcd8;--badedge:#c0392b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--paper:#15181d;--line:#3a414c;--soft:#98a2b1;
  --bar:#22374f;--edge:#6d9bd3;--bad:#4d2320;--badedge:#ff7b6b}}
body{margin:2rem auto;padding:0 1rem;max-width:80rem;background:var(--paper);color:var(--ink);
  font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
.picture{overflow-x:auto;border:1px solid var(--line);border-radius:6px;padding:.5rem}
svg{display:block}svg text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:var(--ink)}
.client{font-weight:bold}.row{stroke:var(--line)}
.bar{fill:var(--bar);stroke:var(--edge)}.unknown{fill:none;stroke:var(--edge);stroke-dasharray:4 3}
.culprit{fill:var(--bad);stroke:var(--badedge);stroke-width:2}
table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.culprit{background:var(--bad)}
code{font-family:ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}.soft{color:var(--soft)}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """An operation in the picture: from column `start` to column `end`, and whether it goes on (its outcome is
    unknown)."""

    operation: Operation
    label: str
    start: int
    end: int
    open: bool
    culprit: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of bars that do not overlap, each with its client, and how many columns of characters they need."""

    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    width: int


def shown(counterexample: Counterexample) -> list[Operation]:
    """The operations worth showing, by their calls."""
    culprit = counterexample.culprit
    end = culprit.returned if culprit.returned is not None else culprit.called
    others = [operation for operation in counterexample.operations if operation is not culprit]
    overlapping = [o for o in others if o.called <= end and returned_at(o) >= culprit.called]
    answered = [o for o in overlapping if o.outcome is Outcome.DONE]
    pending = [o for o in overlapping if o.outcome is not Outcome.DONE]
    marks = _marks(culprit.reply or {})
    related = [o for o in others if marks & (_marks(o.request) | _marks(o.reply or {})) and _keys(o) & _keys(culprit)]
    writers = [o for o in related if o.request.get("op") != "get"]
    explained = counterexample.explained
    changes = [o for o in explained if o.request.get("op") != "get"]
    chosen = [culprit, *answered[-OVERLAPPING_MAX:], *pending[-PENDING_MAX:], *writers[:1], *related[-RELATED_MAX:]]
    chosen += [*explained[-RECENT_MAX:], *changes[-CHANGES_MAX:]]
    unique = {id(operation): operation for operation in chosen}
    return sorted(unique.values(), key=lambda operation: (operation.called, operation.client))


def _marks(fields: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What may connect two operations: a value, or a revision."""
    return {(name, repr(fields[name])) for name in ("value", "rev") if fields.get(name) not in (None, 0)}


def _keys(operation: Operation) -> set[Any]:
    inner = [o for part in ("ops", "then", "else") for o in operation.request.get(part) or []]
    return {part.get("key") for part in (operation.request, *inner)}


def layout(operations: Sequence[Operation], culprit: Operation, revisions: bool) -> Layout:
    """Where each bar goes, and what it says, `revisions` too if they matter. An operation of unknown outcome reaches to
    the right edge, in a row of its own if it has to."""
    labels = [_label(operation, revisions) for operation in operations]
    ends = [o.returned if o.returned is not None and o.outcome is Outcome.DONE else None for o in operations]
    moments = sorted({o.called for o in operations} | {end for end in ends if end is not None})
    columns: dict[float, int] = {}
    column = 0
    for moment in moments:
        for operation, label, end in zip(operations, labels, ends):
            if end == moment and operation.called < moment:
                column = max(column, columns[operation.called] + len(label) + 3)
        columns[moment] = column
        column += 2
    width = max([column, *(columns[o.called] + len(text) + 4 for o, text in zip(operations, labels))])
    rows: list[tuple[str, list[Bar]]] = []
    for operation, label, end in sorted(
        zip(operations, labels, ends), key=lambda item: (item[0].client, item[0].called)
    ):
        start = columns[operation.called]
        stop = width if end is None else max(columns[end], start + len(label) + 3)
        bar = Bar(operation, label, start, stop, end is None, operation is culprit)
        row = next((bars for client, bars in rows if client == operation.client and bars[-1].end < start), None)
        if row is None:
            rows.append((operation.client, row := []))
        row.append(bar)
    return Layout(
        tuple((client, tuple(bars)) for client, bars in rows), max(b.end for _, bars in rows for b in bars) + 1
    )


def _label(operation: Operation, revisions: bool) -> str:
    text = ask_in_short(operation.request)
    if operation.outcome is Outcome.DONE:
        told = told_in_short(operation, revisions)
        text += "" if told == "ok" else f" → {told}"
    text = _printable(text)
    return text if len(text) <= LABEL_CHARACTERS_MAX else text[: LABEL_CHARACTERS_MAX - 1] + "…"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


# -------------------------------------------------------------------- text


def to_text(counterexample: Counterexample) -> str:
    """The picture for a terminal, with the sentence above it and the exact operations below; lines end with LF."""
    operations = shown(counterexample)
    plan = layout(operations, counterexample.culprit, bool(counterexample.values_alone))
    clients = max(len(client) for client, _ in plan.rows)
    lines = [_printable(str(counterexample)), ""]
    for client, bars in plan.rows:
        cells = [" "] * plan.width
        for bar in bars:
            cells[bar.start : bar.end + 1] = _drawn(bar)
        mark = "  ◀ can't be explained" if any(bar.culprit for bar in bars) else ""
        lines.append(f"  {_printable(client):<{clients}}  {''.join(cells).rstrip()}{mark}")
    lines += ["", *_table(operations, counterexample.culprit)]
    return "\n".join(lines) + "\n"


def _drawn(bar: Bar) -> str:
    left, line, right = ("╞", "═", "╡") if bar.culprit else ("├", "┄" if bar.open else "─", "▷" if bar.open else "┤")
    return f"{left}{f' {bar.label} ':{line}<{bar.end - bar.start - 1}}{right}"


def _table(operations: Iterable[Operation], culprit: Operation) -> list[str]:
    rows = [(_time(o.called), _time(o.returned), _printable(str(o)), o is culprit) for o in operations]
    calls, returns = (max(len(row[n]) for row in rows) for n in (0, 1))  # type: ignore[arg-type]
    return [
        f"{'▶' if bad else ' '} {called:>{calls}} … {returned:<{returns}}  {text}"
        for called, returned, text, bad in rows
    ]


def _time(moment: float | None) -> str:
    return "?" if moment is None else f"{moment:.6f}".rstrip("0").rstrip(".")


# -------------------------------------------------------------------- HTML


def to_html(verdict: Verdict, title: str = "History") -> str:
    """A page that says the verdict, and shows its counter-example if it has one."""
    parts = [f"<h1>{_escaped(title)}: {_headline(verdict)}</h1>", f"<p>{_escaped(str(verdict))}</p>"]
    counterexample = verdict.counterexample
    if counterexample is not None:
        operations = shown(counterexample)
        plan = layout(operations, counterexample.culprit, bool(counterexample.values_alone))
        parts.append(f'<div class="picture">{_svg(plan)}</div>')
        parts.append(
            '<p class="soft">Each bar is an operation, from its call to its return; a dashed one is of unknown outcome. '
            "Only the order of the moments is drawn to scale.</p>"
        )
        parts.append("<h2>The operations shown</h2>")
        parts.append(_html_table(operations, counterexample.culprit))
        if counterexample.explained:
            last = counterexample.explained[-20:]
            parts.append("<h2>What can be explained</h2>")
            parts.append(
                f"<p>An order that explains all that had returned before; the last {len(last)} operations of it:</p>"
            )
            parts.append(_html_table(last, None))
    if verdict.contradictions:
        parts.append("<h2>Contradictions between revisions</h2><ul>")
        parts += [f"<li>{_escaped(str(contradiction))}</li>" for contradiction in verdict.contradictions[:20]]
        parts.append("</ul>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _headline(verdict: Verdict) -> str:
    if verdict.linearizable is None:
        return "undecided"
    if verdict.ok:
        return "linearizable"
    return "revisions contradict each other" if verdict.linearizable else "not linearizable"


def _escaped(text: str) -> str:
    return escape(_printable(text))


def _svg(plan: Layout) -> str:
    margin = (max(len(client) for client, _ in plan.rows) + 2) * CHARACTER_PX
    width, height = margin + (plan.width + 2) * CHARACTER_PX, len(plan.rows) * ROW_PX + 10
    parts = [f'<svg role="img" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}">']
    for number, (client, bars) in enumerate(plan.rows):
        top = number * ROW_PX + 5
        middle = top + ROW_PX / 2
        parts.append(f'<line class="row" x1="{margin:.0f}" x2="{width:.0f}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<text class="client" x="2" y="{middle + 4}">{_escaped(client)}</text>')
        parts += [_svg_bar(bar, margin, top) for bar in bars]
    return "".join(parts) + "</svg>"


def _svg_bar(bar: Bar, margin: float, top: float) -> str:
    left, right = (margin + column * CHARACTER_PX for column in (bar.start, bar.end))
    kind = "culprit" if bar.culprit else "bar unknown" if bar.open else "bar"
    operation = bar.operation
    told = f"{operation}\n{_time(operation.called)} … {_time(operation.returned)}"
    return (
        f"<g><title>{escape(told)}</title>"
        f'<rect class="{kind}" x="{left:.1f}" y="{top + 3}" width="{right - left:.1f}" height="{ROW_PX - 6}" rx="4"/>'
        f'<text x="{left + 1.5 * CHARACTER_PX:.1f}" y="{top + ROW_PX / 2 + 4}">{escape(bar.label)}</text></g>'
    )


def _html_table(operations: Iterable[Operation], culprit: Operation | None) -> str:
    rows = ["<table><tr><th>client</th><th>call</th><th>return</th><th>asked</th><th>told</th></tr>"]
    for o in operations:
        rows.append(
            f"<tr{' class=culprit' if o is culprit else ''}><td>{_escaped(o.client)}</td>"
            f'<td class="n">{_time(o.called)}</td><td class="n">{_time(o.returned)}</td>'
            f"<td><code>{_escaped(ask_in_short(o.request))}</code></td><td><code>{_escaped(told_in_short(o))}</code></td></tr>"
        )
    return "".join(rows) + "</table>"
