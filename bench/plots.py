"""Line charts as SVG, drawn with nothing but text.

Laws: a chart is readable by itself (title, both axes with their units, a name at each line), in print and by the
colour-blind: lines differ in their marks, too. The same figures give the same bytes, so a chart that did not change shows no
difference in a commit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 130, 40, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's
NAMES_APART = 14
DECADE = 10

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """What is to be drawn: a line for each name. `x_labels` stand at the x positions where these are no numbers."""

    title: str
    x_title: str
    y_title: str
    lines: Mapping[str, Points]
    log_x: bool = True
    log_y: bool = False
    x_labels: Mapping[float, str] | None = None


def svg(chart: Chart) -> str:
    """The chart as one SVG document. Raises ValueError where there is no point to draw."""
    points = [point for line in chart.lines.values() for point in line]
    if not points:
        raise ValueError(f"nothing to draw for {chart.title}")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks = (
        sorted(set(xs)) if chart.x_labels is not None or len(set(xs)) <= 8 else ticks(min(xs), max(xs), chart.log_x)
    )
    y_ticks = ticks(min(ys) if chart.log_y else 0.0, max(ys), chart.log_y)
    across = scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, chart.log_x)
    up = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, chart.log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(WIDTH / 2, 22, chart.title, "middle", 'font-size="15"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, chart.x_title, "middle"),
        text(16, (TOP + HEIGHT - BOTTOM) / 2, chart.y_title, "middle",
             f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2:.1f})"'),
    ]  # fmt: skip
    for y in y_ticks:
        parts.append(rule(LEFT, up(y), WIDTH - RIGHT, up(y)))
        parts.append(text(LEFT - 6, up(y) + 4, number(y), "end"))
    for x in x_ticks:
        parts.append(rule(across(x), HEIGHT - BOTTOM, across(x), HEIGHT - BOTTOM + 4))
        label = number(x) if chart.x_labels is None else chart.x_labels[x]
        parts.append(text(across(x), HEIGHT - BOTTOM + 18, label, "middle"))
    ends = {name: up(sorted(line)[-1][1]) for name, line in chart.lines.items() if line}
    places = apart(ends)
    for i, (name, line) in enumerate(chart.lines.items()):
        if line:
            placed = [(across(x), up(y)) for x, y in sorted(line)]
            parts.append(drawn(placed, i))
            parts.append(
                text(placed[-1][0] + 10, places[name] + 4, name, "start", f'fill="{COLOURS[i % len(COLOURS)]}"')
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """A function from a figure between `low` and `high` to its place between `start` and `end`."""
    change = math.log10 if log else float
    a, b = change(low), change(high)
    return lambda value: start + (change(value) - a) / ((b - a) or 1.0) * (end - start)


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round figures from at most `low` to at least `high`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [float(f"1e{power}") for power in range(first, max(last, first + 1) + 1)]
    step = float(f"1e{math.floor(math.log10((high - low) or 1.0))}")
    for factor in (0.2, 0.5, 1.0, 2.0):
        if (high - low) / (step * factor) <= 6:
            break
    count = math.ceil((high - low) / (step * factor) - 1e-9) or 1
    return [round(low + i * step * factor, 10) for i in range(count + 1)]


def number(value: float) -> str:
    """A figure for an axis: 1,024, 10 k, 1 M."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if value >= size and value % (size / 10) == 0:
            return f"{value / size:g}{unit}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def apart(ends: Mapping[str, float]) -> dict[str, float]:
    """Where the lines' names go: beside their ends, but not on one another."""
    places: dict[str, float] = {}
    last = -math.inf
    for name, y in sorted(ends.items(), key=lambda item: item[1]):
        last = places[name] = max(y, last + NAMES_APART)
    return places


def text(x: float, y: float, content: str, anchor: str, more: str = "") -> str:
    """Words."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(content)}</text>'.replace(" >", ">")


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin grey line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#cccccc"/>'


def drawn(places: Sequence[tuple[float, float]], i: int) -> str:
    """A line with its marks: discs, squares, diamonds, rings in turn."""
    colour = COLOURS[i % len(COLOURS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, y in places:
        if i % 4 == 1:
            parts.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>')
        elif i % 4 == 2:
            parts.append(f'<path d="M{x:.1f},{y - 5:.1f} l5,5 l-5,5 l-5,-5 z" fill="{colour}"/>')
        else:
            fill = colour if i % 4 == 0 else "#ffffff"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/>')
    return "\n".join(parts)
