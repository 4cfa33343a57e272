"""Implementations do not import the definition that they are tested against."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "cost_model", "passes", "svg_ear_compile")


def test_only_tests_and_benchmarks_import_the_reference() -> None:
    importers = [
        path.relative_to(ROOT)
        for room in ROOMS
        for path in (ROOT / room).glob("**/*.py")
        if "kernels.reference" in (text := path.read_text()) or "kernels import reference" in text
    ]
    assert importers == []
