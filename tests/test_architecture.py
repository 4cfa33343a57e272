"""The architecture page and the tree agree: files that exist, imports that go down, short files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/architecture.md", "docs/architecture.svg", "CONTRIBUTING.md")
# A room imports from the rooms beside its name, and from itself.
BELOW = {"kernels": (), "passes": ("kernels",), "cost_model": ("kernels",)}
MOST_LINES = 400
FOLDERS = ("svg_ear_compile", *BELOW, "benchmarks", "tests")
FILES = sorted({path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")})


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = set(
        re.findall(r"(?<![\w<>/.-])[\w/.]+\.(?:py|json|md|svg)\b", (ROOT / page).read_text())
    )
    assert named
    by_name = {path.name for path in FILES}
    # Modules may be named without their folder.
    missing = {
        name
        for name in named
        if not (ROOT / name).exists()
        and not (ROOT / page).with_name(name).exists()
        and not ("/" not in name and name in by_name)
    }
    assert not missing


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports: at any depth, in any form."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "svg_ear_compile":
                room = rest.partition(".")[0]
                rooms.add(room if room in BELOW else "svg_ear_compile")
            elif first in (*BELOW, "benchmarks", "tests"):
                rooms.add(first)
    return rooms


@pytest.mark.parametrize("room", BELOW)
def test_no_import_goes_up_a_floor(room: str) -> None:
    files = [path for path in FILES if path.is_relative_to(ROOT / room)]
    assert len(files) > 10
    wrong = {path.name: imported(path) - {room, *BELOW[room]} for path in files}
    assert not {name: rooms for name, rooms in wrong.items() if rooms}


def test_imports_of_all_forms_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from svg_ear_compile import passes, Session\nimport svg_ear_compile.cost_model.budget\n"
        "def f():\n    from svg_ear_compile.kernels.plan import AttentionPlan\n"
    )
    assert imported(path) == {"passes", "svg_ear_compile", "cost_model", "kernels"}


def test_a_long_file_says_why() -> None:
    silent = []
    for path in FILES:
        text = path.read_text()
        docstring = ast.get_docstring(ast.parse(text)) or ""
        if text.count("\n") > MOST_LINES and "onger than " not in docstring:
            silent.append(path.name)
    assert not silent
