"""Tables and the plot of the fidelity bench: which models and rules they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from benchmarks import tables
from benchmarks.fidelity.frontier import Point
from benchmarks.fidelity.grid import CLUSTERS, Cell
from benchmarks.fidelity.plots import write_frontier
from benchmarks.fidelity.record import Evidence, read
from benchmarks.fidelity.report import paired_table


def point(
    model: str, rule: str, density: float, *psnr: float, clusters: tuple[int, int] = CLUSTERS[0]
) -> Point:
    return Point(Cell(model, rule, density, *clusters), psnr, (0.9,), (0.0,), 0.05, {})


def evidence(*points: Point, guidance: float = 2.0) -> Evidence:
    models = dict.fromkeys(p.cell.model for p in points)
    return Evidence(
        {name: {"settings": {"guidance": guidance}} for name in models}, None, [*points]
    )


def test_pairs_are_of_the_same_seeds() -> None:
    found = evidence(
        point("a", "paper", 0.1, 20.0, 30.0), point("a", "gaussian", 0.1, 26.0, 34.0),
        point("b", "paper", 0.2, 20.0), point("b", "gaussian", 0.2, 19.0),
        point("b", "gaussian", 0.2, 19.0, clusters=CLUSTERS[1]),
        guidance=5.0,
    )  # fmt: skip
    assert paired_table([found]).splitlines()[2:] == [
        # Seeds differ by 10 dB, their differences by 2.
        "| a, 5 | 2 | 128 / 64 | 25.0 → 30.0 dB (+5.00 ± 12.71) | not measured |",
        "| b, 5 | 1 | 128 / 64 | not measured | 20.0 → 19.0 dB (-1.00) |",
    ]


def test_every_model_and_guidance_that_was_measured_is_shown() -> None:
    table = paired_table([read(tables.FIDELITY), read(tables.FIDELITY / "guidance-5")])
    named = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]}
    assert named == {f"{m}, {g}" for m in ("self", "joint", "third") for g in (2, 5)}


def test_the_readme_shows_models_that_were_measured_at_its_clusters() -> None:
    table = tables.pictures_table(tables.FIDELITY / "guidance-5")
    assert all("|  |" not in line for line in table.splitlines() if line.startswith("| Gaussian"))


def test_the_legend_names_a_rule_that_only_the_second_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    kept = matplotlib.figure.Figure.legend

    def legend(self: Any, handles: Any, labels: Any, **options: Any) -> Any:
        seen.extend(labels)
        return kept(self, handles, labels, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "legend", legend)
    points = [point("a", "paper", 0.1, 20.0), point("b", "shared", 0.1, 20.0)]
    write_frontier(points, ["a", "b"], [], tmp_path / "frontier.png")
    assert seen == ["paper (SVG-EAR)", "Gaussian, shared by branches, recomputed every step"]
