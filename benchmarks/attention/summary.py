"""A record of the attention benchmark in a few lines: rates, speed-ups, memory, shortest video."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.attention.inputs import PAPERS_CLUSTERS
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.removed import REMOVED

Row = dict[str, Any]
_DENSITIES = (0.2, 0.1)
_FORMS = {
    "centroid": "centroid form",
    "gaussian": "Gaussian form",
}
_NOT_MEASURED = "not measured"


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The rows of a record but those of forms that the operator had once."""
    return [row for row in record["rows"] if row["form"] not in REMOVED]


def is_default(row: Row) -> bool:
    """True for a row of the plan that a user has without options, but for its density."""
    return (row["clusters"], row["form"]) == ("default", AttentionPlan.compensation)


def summary_table(record: dict[str, Any]) -> str:
    """Markdown: what, measured; pairs are of density 0.2 and 0.1.

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
            f"{row['attend_over_dense_rate']:.2f}" if row else None
            for row in (wan(form, density) for density in _DENSITIES)
        ]
        lines.append((f"Wan 14B, {name}: useful rate of the attend stage over dense", pair(rates)))
    others = [
        f"{row['other_stages_over_dense']:.1%}{_reused(row, _reused_other_stages, '.1%')}"
        if row
        else None
        for row in (wan("centroid", d) for d in _DENSITIES)
    ]
    what = "Wan 14B, centroid form: all stages but attend, fraction of the dense time"
    lines.append((what, pair(others)))
    for shape, model in (("wan14b-720p", "Wan 14B"), ("hunyuan-720p", "HunyuanVideo")):
        for form, name in _FORMS.items():
            rows = [found.get((shape, PAPERS_CLUSTERS, form, density)) for density in _DENSITIES]
            speedups = [
                f"{row['speedup']:.2f}x{_reused(row, reused_speedup, '.2f', 'x')}" if row else None
                for row in rows
            ]
            lines.append((f"{model}, {name}: whole operator over dense", pair(speedups)))
    extra = [
        r["extra_memory"] for r in timed if r["clusters"] == PAPERS_CLUSTERS and r["size"][3] == 128
    ]
    most = f"{max(extra):.2f}" if extra else _NOT_MEASURED
    lines.append(("extra peak memory over the bytes of Q, K, V and output, at most", most))
    what = "fewest tokens (head dim 128, default clusters) at which density 0.2 beats dense"
    lines.append((what, f"{_shortest(timed, _ms)} (cold: {_shortest(timed, cold_ms)})"))
    price = wan("centroid", 1.0)
    paid = f"{1 / price['attend_over_dense_rate']:.2f}x" if price else _NOT_MEASURED
    lines.append(("density 1 through the attend kernel, time over dense", paid))
    head = "| density 0.2 / 0.1, 300 / 1000 clusters | measured |"
    return "\n".join([head, "|---|---|", *(f"| {' | '.join(line)} |" for line in lines)])


def _reused(row: Row, figure: Callable[[Row], float], form: str, unit: str = "") -> str:
    """A figure of calls that reuse their blocks, in brackets, where it was measured."""
    if "reused_samples_ms" not in row:
        return ""
    return f" (reused {figure(row):{form}}{unit})"


def reused_speedup(row: Row) -> float:
    """Dense time over that of a call that reuses clusters and block mask."""
    return dense_ms(row) / statistics.median(row["reused_samples_ms"])


def _reused_other_stages(row: Row) -> float:
    stages = row["reused_stages_ms"]
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
    """Milliseconds of a cold call."""
    return statistics.median(row["cold_samples_ms"])


def _ms(row: Row) -> float:
    return statistics.median(row["samples_ms"])
