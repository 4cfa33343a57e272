"""What the attention of this project set out to reach, beside what a record says was."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.attention.inputs import PAPERS_CLUSTERS
from svg_ear_compile.kernels.removed import REMOVED

Row = dict[str, Any]
_DENSITIES = (0.2, 0.1)
_FORMS = {
    "centroid": "centroid form",
    "gaussian": "Gaussian form",
}
_WHOLE = {
    "centroid": ("3.0x / 4.6x", "4.0x / 6.5x"),
    "gaussian": ("2.7x / 3.9x", "3.6x / 5.6x"),
}
_NOT_MEASURED = "not measured"


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a record but those of forms that the operator had once."""
    return [row for row in record["rows"] if row["form"] not in REMOVED]


def targets_table(record: dict[str, Any]) -> str:
    """Markdown: what, goal, stretch goal, measured; pairs are of density 0.2 and 0.1.

    Args:
        record: of `python -m benchmarks.attention`. A row that it lacks, or whose gate failed, is
            said to be not measured.
    """
    timed = [row for row in rows_of(record) if "samples_ms" in row and row["form"] != "flex"]
    found = {(r["shape"], r["clusters"], r["form"], r["density"]): r for r in timed}

    def wan(form: str, density: float) -> Row | None:
        return found.get(("wan14b-720p", PAPERS_CLUSTERS, form, density))

    def pair(values: list[str | None]) -> str:
        return " / ".join(value or _NOT_MEASURED for value in values)

    lines = []
    for form, name in _FORMS.items():
        rates = [
            row and f"{row['attend_over_dense_rate']:.2f}"
            for row in (wan(form, density) for density in _DENSITIES)
        ]
        what = f"Wan 14B, {name}: useful rate of the attend stage over dense"
        lines.append((what, "0.78 / 0.70", "0.92 / 0.85", pair(rates)))
    rest = [
        row and f"{row['rest_share']:.1%}{_later(row, _rest_taken_over, '.1%')}"
        for row in (wan("centroid", d) for d in _DENSITIES)
    ]
    what = "Wan 14B, centroid form: everything but the attend stage, share of the dense time"
    lines.append((what, "7 %", "3.5 %", pair(rest)))
    for shape, model in (("wan14b-720p", "Wan 14B"), ("hunyuan-720p", "HunyuanVideo")):
        for form, name in _FORMS.items():
            rows = [found.get((shape, PAPERS_CLUSTERS, form, density)) for density in _DENSITIES]
            speedups = pair(
                [
                    row and f"{row['speedup']:.2f}x{_later(row, taken_over_speedup, '.2f', 'x')}"
                    for row in rows
                ]
            )
            lines.append((f"{model}, {name}: whole op over dense", *_WHOLE[form], speedups))
    extra = [
        r["extra_memory"] for r in timed if r["clusters"] == PAPERS_CLUSTERS and r["size"][3] == 128
    ]
    most = f"{max(extra):.2f}" if extra else _NOT_MEASURED
    lines.append(("extra peak memory over the bytes of Q, K, V and output", "1.0", "0.5", most))
    what = "fewest tokens (head dim 128, default clusters) at which density 0.2 beats dense"
    shortest = f"{_shortest(timed, _ms)} (clustered afresh: {_shortest(timed, cold_ms)})"
    lines.append((what, "16k", "8k", shortest))
    what = "density 1 through the attend kernel, time over dense"
    price = wan("centroid", 1.0)
    paid = f"{1 / price['attend_over_dense_rate']:.2f}x" if price else _NOT_MEASURED
    lines.append((what, "1.25x", "1.05x", paid))
    head = "| density 0.2 / 0.1, 300 / 1000 clusters | goal | stretch goal | measured |"
    return "\n".join([head, "|---|---|---|---|", *(f"| {' | '.join(line)} |" for line in lines)])


def _later(row: Row, figure: Callable[[Row], float], form: str, unit: str = "") -> str:
    """A figure of calls that take over their blocks, in brackets, where it was measured."""
    if "taken_over_samples_ms" not in row:
        return ""
    return f" (blocks taken over {figure(row):{form}}{unit})"


def taken_over_speedup(row: Row) -> float:
    """Dense time over that of a call that takes over its clusters and exact blocks."""
    return dense_ms(row) / statistics.median(row["taken_over_samples_ms"])


def _rest_taken_over(row: Row) -> float:
    stages = row["taken_over_stages_ms"]
    return float(sum(stages.values()) - stages["attend"]) / dense_ms(row)


def _shortest(rows: list[Row], ms: Callable[[Row], float]) -> str:
    """The length from which every measured one is faster than dense, in all forms."""
    pays: dict[int, bool] = {}
    for row in rows:
        if row["clusters"] == "default" and row["density"] == 0.2 and row["size"][3] == 128:
            tokens = row["size"][2]
            pays[tokens] = pays.get(tokens, True) and ms(row) < dense_ms(row)
    shortest = None
    for tokens in sorted(pays, reverse=True):
        if not pays[tokens]:
            break
        shortest = tokens
    if shortest is None:
        return "none measured does" if pays else _NOT_MEASURED
    return f"{shortest:,}{', shorter ones not measured' if shortest == min(pays) else ''}"


def dense_ms(row: Row) -> float:
    """Milliseconds of the fastest dense attention on the inputs of a row."""
    return statistics.median(row["dense_samples_ms"][row["dense_backend"]])


def cold_ms(row: Row) -> float:
    """Milliseconds of a call that clusters afresh."""
    return statistics.median(row["cold_samples_ms"])


def _ms(row: Row) -> float:
    return statistics.median(row["samples_ms"])
