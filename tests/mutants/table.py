"""The table of docs/testing.md: each mutant, and what notices it. It is written by `python -m tests.mutants`, from a run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.mutants import CATALOGUE
from tests.mutants.simulated import AIMS, Found

FILE = Path(__file__).parent.parent.parent / "docs" / "testing.md"
BEGIN = "<!-- mutants: written by python -m tests.mutants -->"
END = "<!-- end of mutants -->"
NOBODY = "–"


def render(found: dict[str, Found]) -> str:
    """The table, where `found` says what the simulator found, by the mutants' names."""
    lines = [
        BEGIN,
        "",
        "| the bug | what goes wrong | a test that notices | the simulator: seeds needed, by which rule |",
        "|---|---|---|---|",
    ]
    for bug in CATALOGUE:
        claim = f"`{bug.claim}`" if bug.claim else NOBODY
        lines.append(f"| {bug.name} | {bug.wrong} | {claim} | {found.get(bug.name, NOBODY)} |")
    return "\n".join([*lines, "", END])


def recorded() -> dict[str, Found]:
    """What the table in the documentation says that the simulator found."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| (\d+) of ([\w ]+): ([^|]+) \|$", table(), re.MULTILINE)
    return {name: Found(aim, int(seed), rule) for name, seed, aim, rule in rows if aim in AIMS}


def table() -> str:
    """The table as it stands in the documentation, its marks included; empty where there is none."""
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    begin, end = text.find(BEGIN), text.find(END)
    return text[begin : end + len(END)] if 0 <= begin < end else ""


def write(found: dict[str, Found]) -> None:
    """Put the table into the documentation, in the place of the one there, or at the end."""
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else "# How ddb is tested\n"
    old, new = table(), render(found)
    text = text.replace(old, new) if old else f"{text.rstrip()}\n\n## Planted bugs\n\n{new}\n"
    FILE.write_text(text, encoding="utf-8")
