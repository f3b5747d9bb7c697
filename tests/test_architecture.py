"""The code is built as docs/architecture.md says: the house's floors, its pure rooms, its size, its words."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ddb
from tests.harness import REPOSITORY

PACKAGE = REPOSITORY / "ddb"
LINES_MAX = 700
WORLD = {
    "time", "datetime", "socket", "selectors", "select", "threading", "_thread", "multiprocessing", "subprocess", "os",
    "io", "pathlib", "shutil", "tempfile", "sqlite3", "signal", "asyncio", "secrets", "uuid", "queue", "concurrent",
}  # fmt: skip


@dataclass(frozen=True)
class Room:
    name: str
    floor: int
    position: int
    pure: bool


def _house() -> dict[str, Room]:
    """The rooms by module name, from the table in the documentation."""
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) [\w ]+ \| `(\w+)\.py` \| .+ \| (✓?) ?\|$", text, re.MULTILINE)
    return {name: Room(name, int(floor), n, bool(pure)) for n, (floor, name, pure) in enumerate(rows)}


HOUSE = _house()
FILES = sorted(PACKAGE.glob("*.py"))
PURE = [path for path in FILES if path.stem in HOUSE and HOUSE[path.stem].pure]
SHIPPED = [*FILES, *sorted((REPOSITORY / "bench").glob("*.py")), *sorted((REPOSITORY / "bin").glob("ddb*"))]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: ast.Module) -> Iterator[str]:
    """The full names of what a module imports, those inside functions included, those for types alone not."""
    for node in ast.walk(_without_type_checking(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_type_checking(module: ast.Module) -> ast.Module:
    body = [n for n in module.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(body, [])


def rooms_imported(path: Path) -> set[str]:
    """The rooms of this package that a file imports."""
    found = set()
    for name in imports(tree(path)):
        parts = name.split(".")
        if parts[0] == "ddb":
            found.add(parts[1] if len(parts) > 1 and (PACKAGE / f"{parts[1]}.py").exists() else "__init__")
    return found


def test_every_file_has_its_place_in_the_house() -> None:
    assert set(HOUSE) == {path.stem for path in FILES}


def test_the_floors_stand_on_one_another() -> None:
    floors = [room.floor for room in HOUSE.values()]
    assert floors == sorted(floors) and set(floors) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_what_stands_before_it(path: Path) -> None:
    here = HOUSE[path.stem]
    too_high = {name for name in rooms_imported(path) if HOUSE[name].position >= here.position}
    assert not too_high, f"{path.name} imports {too_high}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_nothing_but_the_standard_library_is_imported(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(tree(path))}
    foreign = roots - set(sys.stdlib_module_names) - {"ddb", "bench", "__future__"}
    assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.stem)
def test_a_pure_room_does_not_reach_for_the_world(path: Path) -> None:
    module = tree(path)
    assert not {name.split(".")[0] for name in imports(module)} & WORLD
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", "chance comes in as an argument"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "input", "print")


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.stem)
def test_a_pure_room_imports_only_pure_rooms(path: Path) -> None:
    assert all(HOUSE[name].pure for name in rooms_imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_print_is_for_the_command_line(path: Path) -> None:
    printing = any(isinstance(n, ast.Name) and n.id == "print" for n in ast.walk(tree(path)))
    assert not printing or path.stem == "cli"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_room(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_public_is_documented(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), f"{path.name} has no docstring"
    found = list(public(module.body))
    told = {name.rpartition(".")[2] for name, node in found if ast.get_docstring(node)}  # once, at the interface
    missing = [name for name, node in found if name.rpartition(".")[2] not in told]
    assert not missing, f"without a docstring in {path.name}: {missing}"


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The public functions and classes of a body, and the public methods of these classes."""
    for node in body:
        setter = isinstance(node, ast.FunctionDef) and any("setter" in ast.unparse(d) for d in node.decorator_list)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not setter:
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


def test_the_version_is_the_changelogs() -> None:
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == ddb.__version__
