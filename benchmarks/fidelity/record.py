"""Records of the bench: a file of clips for each model, and one of times."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fidelity.frontier import Point
from benchmarks.fidelity.grid import Cell
from benchmarks.fidelity.rules import RULES, Rule
from benchmarks.fidelity.times import WAN
from benchmarks.provenance import provenance


class Record:
    """A JSON file of a run, written after every measurement.

    Attributes:
        data: everything in the file.
        rows: what was measured, a part of `data`.

    Raises:
        ValueError: the file is of other settings, another device or another commit.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        fresh = {**provenance(), "settings": settings}
        self.data: dict[str, Any] = {**fresh, "rows": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            for name, value in fresh.items():
                if self.data[name] != value:
                    raise ValueError(
                        f"{path} is of another run ({name}: {self.data[name]!r} instead of "
                        f"{value!r}): choose another --out"
                    )
        self.rows: list[dict[str, Any]] = self.data["rows"]

    def write(self) -> None:
        """Write everything measured so far."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.rename(self.path)


@dataclass(frozen=True)
class Evidence:
    """What the records of a folder say.

    Attributes:
        models: by name, the record of its clips without the rows.
        times: the record of the operator's times, or None.
        points: all cells with their times.
    """

    models: dict[str, dict[str, Any]]
    times: dict[str, Any] | None
    points: list[Point]

    @property
    def shapes(self) -> list[str]:
        """Where the operator was timed, Wan's shape first."""
        rows = self.times["rows"] if self.times else []
        found = dict.fromkeys(row["shape"] for row in rows)
        return sorted(found, key=lambda shape: (shape != WAN, shape))

    @property
    def shape(self) -> str:
        """The shape whose times tables show."""
        return next(iter(self.shapes), "no time measured")


def _operation(rule: Rule) -> Hashable:
    """What rules have in common that take the same time."""
    if rule.timed_as is not None:
        rule = RULES[rule.timed_as]
    return rule.title if rule.compensation is None else (rule.compensation, rule.metric)


def _mean_ms(row: dict[str, Any], reused: float) -> float:
    """Mean milliseconds of a call where that fraction of the calls reuses its blocks."""
    if not reused:
        return float(row["ms"])
    return float(reused * row["reused_ms"] + (1 - reused) * row["ms"])


def _timed_by(rule: str, of: dict[str, Any]) -> tuple[Any, ...]:
    """What a time depends on, of a cell or of a row of times; older ones know no tau."""
    return (
        _operation(RULES[rule]), of["density"], of.get("tau", 0.0), of["queries"], of["keys"]
    )  # fmt: skip


def read(folder: Path, times_path: Path | None = None) -> Evidence:
    """Everything that was measured into a folder, models in the order of their size.

    A cell that several records have, say of peers' rules at an earlier commit, is that of the first
    by file name.

    Args:
        folder: of the records.
        times_path: the record of times, by default `times.json` in the folder.
    """
    times_path = times_path or folder / "times.json"
    times = json.loads(times_path.read_text()) if times_path.exists() else None
    timed: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in times["rows"] if times else []:
        if row["ms"] is not None:
            timed.setdefault(_timed_by(row["rule"], row), []).append(row)
    models: dict[str, dict[str, Any]] = {}
    points = []
    records = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p != times_path]
    known: set[Cell] = set()
    for record in sorted(records, key=lambda r: r["model"]["tokens"]):
        for row in record["rows"]:
            cell = Cell(**row["cell"])
            if cell in known:
                continue
            known.add(cell)
            key = _timed_by(cell.rule, row["cell"])
            # Records of rules that cluster at every step may be older than the field.
            reused = row.get("reused", 0.0)
            at = {t["shape"]: _mean_ms(t, reused) for t in timed.get(key, [])}
            psnr, ssim, flicker = (tuple(row[name]) for name in ("psnr", "ssim", "flicker"))
            reached = row["density_reached"]
            points.append(Point(cell, psnr, ssim, flicker, row["attention_error"], at, reached))
        models.setdefault(record["model"]["name"], {k: v for k, v in record.items() if k != "rows"})
    return Evidence(models, times, points)
