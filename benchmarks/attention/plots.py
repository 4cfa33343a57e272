"""Plots of the attention benchmark, from its record alone."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.attention.inputs import plan_of
from benchmarks.attention.measure import STAGE_NAMES
from benchmarks.attention.summary import is_default, rows_of
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.stages import STAGES, Amount, AttentionShape, sparse_amounts
from svg_ear_compile.kernels.gpu.launch import HOPPER

_COLOURS = dict(
    zip(
        STAGE_NAMES,
        ("#1f77b4", "#6baed6", "#c6dbef", "#9467bd", "#8c564b", "#d9622b", "#2ca02c"),
        strict=True,
    )
)
# The cost model's stage that a measured stage carries out.
_AMOUNTS = {"assign": "cluster"} | {stage: stage for stage in STAGES["cuda"][1:]}


def write_plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the rows of a record allow; returns their paths."""
    timed = [row for row in rows_of(record) if "samples_ms" in row]
    staged = [row for row in timed if "stages_ms" in row]
    made = []
    if any(map(is_default, staged)):
        made.append(_stages([row for row in staged if is_default(row)], folder))
    if staged:
        made.append(_roofline(staged, record["roofs"], folder))
    sweep = [
        row
        for row in timed
        if row["form"] != "flex" and row["clusters"] == "default" and row["size"][3] == 128
    ]
    if len({row["size"][2] for row in sweep}) > 2:
        made.append(_lengths(sweep, folder))
    return made


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _stages(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Where the time of default plans goes: a bar for each row, as a fraction of dense time."""
    figure = Figure(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    axis: Axes = figure.subplots()
    names = [f"{r['shape']}  {r['density']:g}" for r in rows]
    left = [0.0] * len(rows)
    for stage in _COLOURS:
        dense = [statistics.median(r["dense_samples_ms"][r["dense_backend"]]) for r in rows]
        width = [100 * r["stages_ms"][stage] / d for r, d in zip(rows, dense, strict=True)]
        axis.barh(range(len(rows)), width, left=left, label=stage, color=_COLOURS[stage])
        left = [a + b for a, b in zip(left, width, strict=True)]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("time in % of the fastest dense attention")
    axis.margins(y=0.01)
    figure.legend(ncols=len(_COLOURS), fontsize=8, loc="outside upper center")
    return _save(figure, folder / "stages.png")


def _roofline(rows: list[dict[str, Any]], roofs: dict[str, float], folder: Path) -> Path:
    """Rate over intensity of every stage, under the measured roofs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis: Axes = figure.subplots()
    peak, copy = roofs["tflops"], roofs["gb_per_second"]
    intensity = [1.0, peak * 1e3 / copy, 1e5]
    axis.loglog(intensity, [min(peak, copy * x / 1e3) for x in intensity], color="black", lw=1)
    axis.text(1e5, peak * 1.05, f"matrix product {peak:.0f} TFLOP/s", ha="right", fontsize=8)
    axis.text(1.2, copy * 1.5e-3, f"copy {copy:.0f} GB/s", rotation=34, fontsize=8)
    labelled: set[str] = set()
    for row in rows:
        for stage, amount in _measured_amounts(row).items():
            ms = row["stages_ms"][stage]
            if ms > 0 and amount.flops and amount.bytes:
                name = stage if stage not in labelled else None
                labelled.add(stage)
                at = (amount.flops / amount.bytes, amount.flops / ms / 1e9)
                axis.loglog(*at, "o", ms=4, color=_COLOURS[stage], label=name)
    axis.set(
        xlabel="FLOP per counted byte (from the cache: a quarter)", ylabel="TFLOP/s of counted work"
    )
    axis.legend(fontsize=8, loc="lower right")
    return _save(figure, folder / "roofline.png")


def _measured_amounts(row: dict[str, Any]) -> dict[str, Amount]:
    batch, heads, tokens, dim = row["size"]
    shape = AttentionShape(batch, heads, heads, tokens, tokens, dim, "bfloat16", row["text"])
    plan = replace(
        plan_of(row["clusters"], row["form"], row["density"]),
        # As measured: a default can have changed since.
        q_clusters=round((tokens - row["text"]) / row["q_sizes"][0]),
        k_clusters=round((tokens - row["text"]) / row["k_sizes"][0]),
        # The metric's moments are measured with the means, not with the assignment.
        cluster_metric="euclidean",
    )
    # The roofline is of the H200 that the records are of.
    device = Device("cuda", "", "", "", "", HOPPER)
    amounts = sparse_amounts(shape, plan, device)
    return {stage: amounts[part] for stage, part in _AMOUNTS.items()}


def _lengths(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Time per head over tokens at head dim 128, dense and sparse."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis: Axes = figure.subplots()
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        heads, tokens = row["size"][0] * row["size"][1], row["size"][2]
        dense = statistics.median(row["dense_samples_ms"][row["dense_backend"]])
        name = f"{row['form']}, density {row['density']:g}"
        curves.setdefault("dense", {})[tokens] = dense / heads
        curves.setdefault(name, {})[tokens] = statistics.median(row["samples_ms"]) / heads
    for name, curve in curves.items():
        style = "k--" if name == "dense" else "-"
        tokens, ms = zip(*sorted(curve.items()), strict=True)
        axis.loglog(tokens, ms, style, marker="o", markersize=3, label=name)
    axis.set(xlabel="tokens", ylabel="ms per head, everything included")
    axis.legend(fontsize=8)
    return _save(figure, folder / "lengths.png")
