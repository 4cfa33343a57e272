"""Plots of budgets, times and block masks; needs matplotlib (extra ``tune``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm

from svg_ear_compile.capture import CapturedCall, capture_attention
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.cost_model.fit import Comparison
from svg_ear_compile.kernels.plan import AttentionPlan

_STEPS = 40
_DENSE, _EXACT, _COMPENSATED = "#303848", "#d9622b", "#f3ead8"


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    try:
        yield axes
        figure.tight_layout()
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)


def budget(found: Budget, path: Path) -> None:
    """Plot the density of every layer over the denoising steps, from noise to video."""
    schedule = found.schedule
    # Timesteps of the models in public use run down from 1000, or from 1.
    known = max((*schedule.phase_starts, schedule.dense_from or 0.0))
    top = 1.0 if 0.0 < known <= 1.0 else 1000.0
    timesteps = np.linspace(top, 0.0, _STEPS)
    if schedule.ascending:
        timesteps = timesteps[::-1]
    grid = np.ones((len(found.layers), _STEPS))
    for row, layer in enumerate(found.layers):
        for step, timestep in enumerate(timesteps):
            choice = found.choice(layer, float(timestep))
            grid[row, step] = 1.0 if choice is None else choice.density
    if schedule.dense_steps:
        grid = np.concatenate([np.ones((len(grid), schedule.dense_steps)), grid], 1)
    with _figure(path, 8.5, 1.7 + 0.24 * max(6, len(grid))) as axes:
        colours = plt.get_cmap("YlGnBu").with_extremes(over=_DENSE)
        low = max(0.01, float(grid.min()))
        image = axes.imshow(
            grid, aspect="auto", cmap=colours, norm=LogNorm(low, 0.999), interpolation="nearest"
        )
        sparse = grid[:, schedule.dense_steps :]
        for row in range(len(grid)):
            edges = [0, *(np.flatnonzero(np.diff(sparse[row])) + 1), _STEPS]
            for left, right in pairwise(edges):
                value = sparse[row, left]
                text = "dense" if value >= 1 else f"{value:.2g}"
                dark = value >= 1 or np.log(value / low) > 0.55 * np.log(1 / low)
                axes.text(
                    schedule.dense_steps + (left + right - 1) / 2, row, text, ha="center",
                    va="center", fontsize=8, color="white" if dark else "black",
                )  # fmt: skip
        axes.set_yticks(range(len(grid)), list(found.layers), fontsize=8)
        marks = np.linspace(0, _STEPS - 1, 5).round().astype(int)
        axes.set_xticks(schedule.dense_steps + marks, [f"{timesteps[m]:.3g}" for m in marks])
        leading = f"{schedule.dense_steps} leading dense steps, then " * bool(schedule.dense_steps)
        axes.set_xlabel(f"{leading}timestep, from noise to video")
        axes.set_title(f"Density by layer ({found.objective}, {found.outcome})", fontsize=11)
        axes.figure.colorbar(image, ax=axes, extend="max", label="fraction computed exactly")


def frontier(found: Budget, path: Path) -> None:
    """Plot predicted error over time of the frontier, with the chosen budget."""
    with _figure(path, 6.4, 4.4) as axes:
        points = sorted(found.frontier, key=lambda point: point.ms)
        axes.plot(
            [p.ms for p in points], [p.error for p in points], "o-", color="#4878a8",
            label="best for each time, predicted",
        )  # fmt: skip
        for name, outcome, mark, colour in (
            ("chosen, predicted", found.predicted, "D", "#4878a8"),
            ("chosen, measured", found.measured, "*", "#d9622b"),
            ("one density for all, measured", found.uniform, "s", "#888888"),
        ):
            if outcome.ms is not None and outcome.error is not None:
                axes.scatter(
                    [outcome.ms], [outcome.error], marker=mark, s=110, color=colour, label=name,
                    zorder=3, edgecolors="white",
                )  # fmt: skip
        axes.set(
            xlabel="milliseconds of one sparse forward",
            ylabel="relative RMS error of the model's output",
        )
        axes.set_title(f"{found.fingerprint.model}, {found.tokens:,} tokens", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)


def times(found: Sequence[Comparison], title: str, path: Path) -> None:
    """Plot predicted over measured milliseconds of sparse calls and of dense attention."""
    with _figure(path, 5.6, 5.2) as axes:
        kinds: tuple[tuple[str, Callable[[Comparison], bool], str, str], ...] = (
            ("sparse, fitted", lambda c: c.sample.fitted, "o", "#4878a8"),
            ("sparse, not fitted", lambda c: not c.sample.fitted, "D", "#d9622b"),
        )
        for name, belongs, mark, colour in kinds:
            mine = [c for c in found if belongs(c)]
            if not mine:
                continue
            axes.scatter(
                [c.sample.op_ms for c in mine], [c.op_ms for c in mine], marker=mark, s=26,
                color=colour, label=name, alpha=0.85,
            )  # fmt: skip
        axes.scatter(
            [c.sample.dense_ms for c in found], [c.dense_ms for c in found], marker="x", s=24,
            color="#303848", label="dense",
        )  # fmt: skip
        low, high = axes.get_xlim()
        line = np.array([max(low, min(c.sample.dense_ms for c in found) / 2), high])
        axes.plot(line, line, color="black", linewidth=0.8)
        axes.fill_between(line, line / 1.25, line * 1.25, color="black", alpha=0.06, label="±25 %")
        axes.set(xscale="log", yscale="log", xlabel="measured ms", ylabel="predicted ms")
        axes.set_title(title, fontsize=10)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(frameon=False, fontsize=9)


def blocks(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layer: str | None,
    head: int,
    density: float,
    path: Path,
) -> None:
    """Plot the block mask of one head, with clusters as wide as they have tokens.

    Args:
        model: the model.
        args, kwargs: inputs of one forward.
        layer: path of the layer, None for the first that could be sparse.
        head: index of the query head.
        density: density of the plan.
        path: image file to write.

    Raises:
        ValueError: the model has no such layer or head.
    """
    seen: list[str] = []
    drawn = False

    def see(call: CapturedCall) -> None:
        nonlocal drawn
        seen.append(call.layer)
        if drawn or (layer is not None and call.layer != layer):
            return
        if not 0 <= head < call.q.shape[1]:
            raise ValueError(f"head must be below {call.q.shape[1]}, got {head}")
        drawn = True
        _draw_blocks(call, head, density, path)

    capture_attention(model, args, kwargs, see)
    if not drawn:
        raise ValueError(f"no layer {layer!r} could be sparse; those that could: {seen}")


def _draw_blocks(call: CapturedCall, head: int, density: float, path: Path) -> None:
    result = call.sparse(AttentionPlan(density=density))
    kv_head = head // (call.q.shape[1] // call.k.shape[1])
    block_mask = result.block_mask[0, head].cpu()
    rows, columns = result.queries.sizes[0, head].cpu(), result.keys.sizes[0, kv_head].cpu()
    # Clusters are in the order of their initial centroids; sorted by size the plot is readable.
    row_order, column_order = rows.argsort(descending=True), columns.argsort(descending=True)
    block_mask, rows = block_mask[row_order][:, column_order], rows[row_order]
    columns = columns[column_order]
    y, x = (torch.cat([s.new_zeros(1), s.cumsum(0)]).numpy() for s in (rows, columns))
    with _figure(path, 6.4, 5.6) as axes:
        axes.pcolormesh(x, y, block_mask.numpy(), cmap=ListedColormap([_COMPENSATED, _EXACT]))
        axes.invert_yaxis()
        axes.set(
            xlabel="keys, by cluster",
            ylabel="queries, by cluster",
            xlim=(0, x[-1]),
            ylim=(y[-1], 0),
        )
        exact_pairs = (block_mask * rows[:, None] * columns).sum()
        fraction = float(exact_pairs / (rows.sum() * columns.sum()))
        axes.set_title(
            f"{call.layer}, head {head}: {fraction:.0%} of the area exact (orange), the rest "
            f"compensated\n{len(rows)} × {len(columns)} clusters, error {call.error(result):.2g}",
            fontsize=10,
        )
