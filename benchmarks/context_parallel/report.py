"""Tables and plots of a group's forwards: what was counted, what was measured."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.context_parallel.layouts import Layout, amounts, layouts, misfit
from benchmarks.context_parallel.models import SIZES, shape_of

Record = dict[str, Any]
_GROUPS = (2, 4, 8, 16, 24, 40)
_SHOWN = ("wan14b-720p", "hunyuan-720p")


def counted_table(models: Iterable[str] = _SHOWN, groups: Iterable[int] = _GROUPS) -> str:
    """What one GPU of a group does and receives for one attention, by shape and layout."""
    lines = [
        "| shape | GPUs | layout | heads × tokens of a call | calls | tokens clustered, of an even "
        "part | MB received |",
        "|---|---|---|---|---|---|---|",
    ]
    sentences: dict[str, None] = {}
    sizes = list(groups)
    for model in models:
        shape = shape_of(SIZES[model])
        for layout in (layout for gpus in sizes for layout in layouts(gpus, shape.heads)):
            if (sentence := misfit(layout, shape)) is not None:
                sentences[f"- {model}: {sentence}"] = None
                continue
            found = amounts(layout, shape)
            cells = [
                model, str(layout.gpus), layout.name, f"{found.heads} × {found.tokens:,}",
                str(found.calls), f"{found.clustered}x", f"{found.received / 1e6:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", "What does not fit:", "", *sentences] if sentences else [])])


def seconds(row: Record) -> float:
    """Median of the timed forwards."""
    return statistics.median(row["samples_seconds"])


def layout_of(row: Record) -> Layout:
    return Layout(row["ring"], row["ulysses"])


def measured_table(record: Record) -> str:
    """Seconds, speed-up, efficiency, communication, memory and error, by layout and density."""
    alone = {row["density"]: row for row in record["rows"] if row["gpus"] == 1}
    lines = [
        "| GPUs | layout | density | s a forward (range) | speed-up | efficiency | communication "
        "| peak GiB | error to one GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        median, samples = seconds(row), row["samples_seconds"]
        cells = [
            str(row["gpus"]), layout_of(row).name, _density(row["density"]) + _dense_after_all(row),
            f"{median:.3f} ({min(samples):.3f} to {max(samples):.3f})",
            f"{seconds(alone[1]) / median:.2f}x", f"{efficiency(row, alone):.2f}",
            f"{row['communication']:.1%}", f"{row['peak_bytes'] / 2**30:.1f}",
            f"{row['error']:.1e}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def efficiency(row: Record, alone: dict[float, Record]) -> float:
    """Speed-up over one GPU at the same density, per GPU."""
    return seconds(alone[row["density"]]) / seconds(row) / row["gpus"]


def write_plot(record: Record, path: Path) -> None:
    """Speed-up over one dense GPU against the number of GPUs, a curve per density and layout."""
    alone = {row["density"]: row for row in record["rows"] if row["gpus"] == 1}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis: Axes = figure.subplots()
    curves: dict[tuple[float, str], dict[int, float]] = {}
    for row in record["rows"]:
        # One GPU is where every curve starts.
        kind = layout_of(row).name.split()[0] if min(row["ring"], row["ulysses"]) == 1 else "both"
        kinds = ("Ulysses", "ring", "both") if row["gpus"] == 1 else (kind,)
        for kind in kinds:
            curve = curves.setdefault((row["density"], kind), {})
            curve[row["gpus"]] = seconds(alone[1]) / seconds(row)
    colours = dict(zip(sorted(alone, reverse=True), ("black", "#1f77b4", "#d9622b"), strict=False))
    styles = {"Ulysses": "-", "ring": "--", "both": ":"}
    for (density, kind), curve in curves.items():
        if len(curve) > 1:
            gpus, speedups = zip(*sorted(curve.items()), strict=True)
            axis.loglog(
                gpus, speedups, styles[kind], marker="o", markersize=3, base=2,
                color=colours.get(density, "grey"), label=f"{_density(density)}, {kind}",
            )  # fmt: skip
    ticks = sorted({row["gpus"] for row in record["rows"]})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.set(xlabel="GPUs", ylabel="speed-up over one GPU, dense")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def section(results: Path, folder: Path) -> str:
    """For a page: what was measured, and the counted amounts of larger groups.

    Args:
        results: folder of a GPU's records.
        folder: of the page.
    """
    parts = []
    for path in sorted((results / "context_parallel").glob("*.json")):
        record = json.loads(path.read_text())
        versions = record["versions"]
        plot = os.path.relpath(path.with_suffix(".png"), folder)
        parts += [
            f"{record['model']}, {record['layers']} layers: {record['device']}, torch "
            f"{versions['torch']}, random weights.",
            measured_table(record),
            *record["left"],
            f"![Speed-up against the number of GPUs, {record['model']}]({plot})",
        ]
    if not parts:
        parts.append("No group of GPUs has been measured with this command yet.")
    return "\n\n".join(
        [*parts, "Counted, for one attention and one GPU of a group:", counted_table()]
    )


def _dense_after_all(row: Record) -> str:
    """A remark where the cost model left the calls of a sparse row dense."""
    return " (stayed dense)" if row["density"] < 1 and row["sparse_layers"] == 0 else ""


def _density(density: float) -> str:
    return "dense" if density == 1 else f"{density:g}"
