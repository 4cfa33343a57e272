"""The frontier: fidelity against time and against density, one curve per rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.fidelity.frontier import Curve, Point, density_curve, time_curve
from benchmarks.fidelity.grid import COARSE, FINE, WARM_UPS
from benchmarks.fidelity.rules import RULES
from svg_ear_compile.kernels.plan import AttentionPlan

_COLOURS = {
    "svg2": "#8c564b",
    "score": "#bcbd22",
    "paper": "#1f77b4",
    "paper_clusters": "#17becf",
    "values": "#9467bd",
    "first_order": "#d9622b",
    "second_order": "#e377c2",
    "gaussian": "#2ca02c",
    "shared": "#98df8a",
    "recomputed": "#c7b299",
    "uniform": "#7f7f7f",
    "top_k_drop": "#ffbb78",
    "sol_top_k": "#d62728",
    "sol_top_k_cubes": "#ff9896",
    "sol_tau": "#393b79",
    "sol_tau_cubes": "#9c9ede",
    "sol_tokens": "#637939",
    "sol_tokens_cubes": "#b5cf6b",
    "kitchen_top_k": "#843c39",
    "kitchen_top_k_cubes": "#d6616b",
    "kitchen_tau": "#1b1c3a",
    "kitchen_tau_cubes": "#6b6ecf",
    "kitchen_tokens": "#31431c",
}


def write_frontier(
    points: Sequence[Point], models: Sequence[str], shapes: Sequence[str], path: Path
) -> None:
    """Write a row of panels for each model: by density, and by operator time at each shape.

    Args:
        points: of all models; the longer warm-up is drawn.
        models: rows, in order.
        shapes: each with a panel, left out where nothing was timed.
        path: of the PNG.
    """
    points = [p for p in points if p.cell.warm_up == WARM_UPS[0]]
    timed = [shape for shape in shapes if any(shape in p.ms for p in points)]
    columns = 1 + len(timed)
    figure = Figure(figsize=(5 * columns, 3.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), columns, squeeze=False)
    for model, row in zip(models, axes, strict=True):
        mine = [p for p in points if p.cell.model == model]
        _panel(row[0], mine, None)
        row[0].set(title=f"model “{model}”", xlabel="density", ylabel="PSNR against dense, dB")
        for shape, axis in zip(timed, row[1:], strict=True):
            _panel(axis, mine, shape)
            axis.set(title=f"operator at {shape}", xlabel="ms")
    # Models differ in the rules that they were measured with.
    lines = {line.get_label(): line for axis in axes[:, 0] for line in _labelled(axis)}
    titles = [RULES[rule].title for rule in _COLOURS if RULES[rule].title in lines]
    figure.legend(
        [lines[title] for title in titles], titles, fontsize=8, loc="outside lower center", ncols=4
    )
    figure.savefig(path, dpi=120)


def _labelled(axis: Axes) -> list[Artist]:
    return axis.get_legend_handles_labels()[0]


def _panel(axis: Axes, points: Sequence[Point], shape: str | None) -> None:
    default = AttentionPlan()
    for rule, colour in _COLOURS.items():
        chosen = [p for p in points if p.cell.rule == rule and (shape is None or shape in p.ms)]
        if not chosen:
            continue
        curve: Curve = (
            density_curve(chosen, rule) if shape is None else time_curve(chosen, rule, shape)
        )
        axis.plot(*zip(*curve, strict=True), "-", color=colour, label=RULES[rule].title)
        for point in chosen:
            at = point.density if shape is None else point.ms[shape]
            fine = (point.cell.queries, point.cell.keys) == FINE
            axis.plot(at, point.mean_psnr, "o", color=colour, ms=4, mfc=colour if fine else "white")
            # Long videos have coarser clusters by default.
            clusters = FINE if shape is None else COARSE
            of_default = (point.cell.queries, point.cell.keys) == clusters
            if (
                rule == default.compensation
                and of_default
                and point.cell.density == default.density
            ):
                axis.plot(at, point.mean_psnr, "*", color="black", ms=13, mfc="none")
                axis.annotate(
                    "default",
                    (at, point.mean_psnr),
                    (6, -12),
                    textcoords="offset points",
                    fontsize=8,
                )
    axis.set_xscale("log")
    ticks = (0.03, 0.05, 0.1, 0.2, 0.4) if shape is None else (25, 50, 75, 100, 150)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
