"""Pictures of counter-examples."""

from __future__ import annotations

import itertools
import random
from html.parser import HTMLParser

from ddb.checker import Counterexample, check
from ddb.history import Operation
from ddb.timeline import RECENT_MAX, layout, shown, to_html, to_text
from tests.histories import Load, got, op, simulate, spoil

STALE = [
    op("c1", 0, 1, "put a 1"),
    op("c2", 2, 5, "put a 2"),
    got("c3", 3, 4, "a", 2),
    op("c2", 5.5, None, "put a 3"),
    got("c1", 6, 7, "a", 1),
]


def counterexample(history: list[Operation]) -> Counterexample:
    found = check(history).counterexample
    assert found is not None
    return found


def test_the_picture_shows_who_overlaps_and_who_cannot_be_explained() -> None:
    assert to_text(counterexample(STALE)) == (
        "No order of the 5 operations on a up to this one explains it: c1: get a → 1. "
        "What returned before can be explained, and may have left a 2.\n"
        "\n"
        "  c1  ├ put a=1 ┤                     ╞ get a → 1 ╡  ◀ can't be explained\n"
        "  c2              ├ put a=2 ──────┤ ├ put a=3 ┄┄┄┄┄┄▷\n"
        "  c3                ├ get a → 2 ┤\n"
        "\n"
        "    0 … 1  c1: put a=1 → ok\n"
        "    2 … 5  c2: put a=2 → ok\n"
        "    3 … 4  c3: get a → 2\n"
        "  5.5 … ?  c2: put a=3 → unknown\n"
        "▶   6 … 7  c1: get a → 1\n"
    )


def test_bars_of_one_row_never_overlap_and_the_order_of_moments_is_kept() -> None:
    pictures = 0
    for seed in range(60):
        history = spoil(random.Random(seed), simulate(seed, Load(80, 6, keys=2, unknown=0.1, various=seed % 2 == 0)))
        found = check(history).counterexample
        if found is None:
            continue
        pictures += 1
        chosen = shown(found)
        assert found.culprit in chosen and len(chosen) <= 30
        plan = layout(chosen, found.culprit, True)
        bars = [bar for _, row in plan.rows for bar in row]
        assert len(bars) == len(chosen)
        assert all(one.end < other.start for _, row in plan.rows for one, other in itertools.pairwise(row))
        assert all(len(bar.label) <= bar.end - bar.start - 2 for bar in bars)
        for one in bars:
            for other in bars:
                if not one.open and (one.operation.returned or 0) < other.operation.called:
                    assert one.end < other.start
    assert pictures > 10


def test_what_came_long_before_is_shown_only_if_it_matters() -> None:
    history = [op("c1", n, n + 0.5, f'put a "{n}"') for n in range(500)]
    history.append(got("c2", 501, 502, "a", "7"))
    chosen = [operation.request.get("value") for operation in shown(counterexample(history))]
    assert chosen == ["7", *map(str, range(500 - RECENT_MAX, 500)), None]


class Page(HTMLParser):
    """Reads a page, and notes what is open, what it would load, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_stands_alone_and_is_well_formed() -> None:
    text = to_html(check(STALE), "Check of <a & b>")
    page = Page(text)
    assert page.open == [] and page.loads == []
    assert "script" not in page.tags and "link" not in page.tags and "http" not in text and "@import" not in text
    assert "Check of <a & b>: not linearizable" in page.words
    assert text.count("<rect") == len(STALE) and text.count('class="culprit"') == 1
    assert "prefers-color-scheme:dark" in text


def test_a_page_without_a_counterexample_says_the_verdict() -> None:
    assert "History: linearizable" in Page(to_html(check(STALE[:3]))).words
    assert "History: undecided" in Page(to_html(check(STALE, configurations_max=0))).words
    same = [op("c1", 0, 1, "put a 1", rev=7), op("c2", 0, 1, "put b 1", rev=7)]
    words = Page(to_html(check(same))).words
    assert "revisions contradict each other" in words and "two writes have revision 7" in words


def test_keys_and_values_cannot_break_out_of_the_picture() -> None:
    nasty = '<script>alert("1")</script>&\x1b[31m\n\u202e'
    history = [
        Operation(nasty, {"op": "put", "key": nasty, "value": nasty}, 0, 1, {"ok": True}),
        Operation("c2", {"op": "get", "key": nasty}, 2, 3, {"ok": True, "found": False}),
    ]
    page = Page(to_html(check(history), nasty))
    assert page.open == [] and "script" not in page.tags
    text = to_text(counterexample(history))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert len(text.splitlines()) == 7
