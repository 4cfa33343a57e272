"""`python -m benchmarks.tuning.validate --out FOLDER`: predicted against measured times.

Calibrates the device if it is not calibrated, then times whole sparse calls and dense attention at
shapes, densities, forms and cluster counts that were not used to fit, on inputs of another
generator. Writes every sample as JSON and the plot of predicted against measured milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.attention.data import video_like
from svg_ear_compile import calibrate, pictures
from svg_ear_compile.cost_model import calibration as calibrations
from svg_ear_compile.cost_model.calibrate import Comparison, compare, fastest_dense_ms, measure
from svg_ear_compile.cost_model.calibration import Calibration, Sample
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

# (batch, heads, video tokens, text tokens, head dim); those of benchmarks/attention and a sweep.
GPU_SHAPES = {
    "wan14b-720p": (1, 40, 75600, 0, 128),
    "hunyuan-720p": (1, 24, 118800, 256, 128),
    "wan1.3b-480p": (1, 12, 32760, 0, 128),
    "cogvideox-5b": (2, 48, 17550, 226, 64),
    "sweep-12k": (1, 24, 12288, 0, 128),
    "sweep-65k": (1, 24, 65536, 0, 128),
}
CPU_SHAPES = {
    "1.5k-d64": (1, 4, 1500, 0, 64),
    "3k-d64-text": (2, 2, 3000, 77, 64),
    "4.5k-d128": (1, 2, 4500, 0, 128),
    "7k-d64": (1, 1, 7000, 0, 64),
}
FORMS: tuple[Compensation, ...] = ("centroid", "first_order", "second_order")


def samples_of(shape: tuple[int, int, int, int, int], device: str) -> list[Sample]:
    """Densities 0.1 and 0.2, both forms, default and other cluster counts."""
    batch, heads, tokens, text, dim = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = video_like(batch, heads, tokens, dim, text=text, device=device, dtype=dtype)
    dense = fastest_dense_ms(q, k, v)
    other = (300, 1000) if tokens >= 10000 else (max(tokens // 200, 2), max(tokens // 90, 2))
    found = []
    for q_clusters, k_clusters in ((None, None), other):
        for form in FORMS:
            for density in (0.1, 0.2):
                plan = AttentionPlan(
                    density=density,
                    compensation=form,
                    q_clusters=q_clusters,
                    k_clusters=k_clusters,
                )
                found.append(measure(q, k, v, plan, dense, text=text))
    return found


def summary(compared: list[Comparison]) -> dict[str, float]:
    """Median and worst relative error of whole calls and of dense attention."""
    op = [abs(c.op_error) for c in compared]
    dense = [abs(c.dense_ms / c.sample.dense_ms - 1) for c in compared]
    return {
        "op_median": statistics.median(op), "op_worst": max(op),
        "dense_median": statistics.median(dense), "dense_worst": max(dense),
    }  # fmt: skip


def calibration(device: str) -> Calibration:
    """That of this machine, measured now if need be."""
    found = calibrations.load(describe(device))
    return found if found.origin == "measured" else calibrate(device)


def main() -> None:
    """Measure, compare, write; the table last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", help="comma-separated, all by default")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = calibration(device)
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    chosen = given.shapes.split(",") if given.shapes else list(shapes)
    rows: list[tuple[str, Comparison]] = []
    for name in chosen:
        rows += [(name, c) for c in compare(known, samples_of(shapes[name], device))]
        print(f"{name}: {summary([c for n, c in rows if n == name])}", flush=True)
    found = summary([c for _, c in rows])
    given.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": asdict(known.device),
        "calibration_seconds": known.seconds,
        "summary": found,
        "rows": [
            {"shape": name, "predicted_ms": c.op_ms, "predicted_dense_ms": c.dense_ms}
            | asdict(c.sample)
            for name, c in rows
        ],
    }
    (given.out / "validate.json").write_text(json.dumps(record) + "\n")
    pictures.times([c for _, c in rows], known.device.name, given.out / "validate.png")
    table = Table(title=f"Predicted / measured ms ({known.device.name}, {known.seconds:.0f} s)")
    for heading in ("shape", "clusters", "form", "density", "op", "error", "dense"):
        table.add_column(heading, justify="right")
    for name, c in rows:
        s = c.sample
        table.add_row(
            name, f"{s.q_clusters}/{s.k_clusters}", s.compensation, f"{s.density:g}",
            f"{c.op_ms:.1f} / {s.op_ms:.1f}", f"{c.op_error:+.1%}",
            f"{c.dense_ms:.1f} / {s.dense_ms:.1f}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    console.print({name: round(value, 4) for name, value in found.items()})


if __name__ == "__main__":
    main()
