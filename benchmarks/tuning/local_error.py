"""`python -m benchmarks.tuning.local_error --out FILE`: error of the attention output alone.

Runs every captured call of the video DiT over densities, cluster sizes and both forms, and fits the
default curve of `cost_model/default_error.py`. Writes every row as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.tuning.captured import CapturedCall, capture
from benchmarks.video_dit.demo import SHAPES
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import sparse_attention

DENSITIES = (0.05, 0.1, 0.2, 0.4)
CLUSTER_SIZES = ((256, 64), (128, 64), (128, 128), (64, 32))
FORMS: tuple[Compensation, ...] = get_args(Compensation)


@dataclass(frozen=True)
class Row:
    """One call under one plan: mean queries and keys per cluster, relative L2 error."""

    tokens: int
    layer: int
    step: int
    seed: int
    density: float
    form: Compensation
    q_size: float
    k_size: float
    reached: float
    error: float


def sparse(found: CapturedCall, plan: AttentionPlan) -> Result:
    """The call under a plan, cold."""
    return sparse_attention(found.q, found.k, found.v, plan)


def measure(found: CapturedCall, seed: int) -> list[Row]:
    """Rows of one captured call."""
    tokens = found.q.shape[2]
    dense = torch.nn.functional.scaled_dot_product_attention(found.q, found.k, found.v)
    rows = []
    for q_size, k_size in CLUSTER_SIZES:
        for form in FORMS:
            for density in DENSITIES:
                plan = AttentionPlan(
                    density=density,
                    compensation=form,
                    q_clusters=math.ceil(tokens / q_size),
                    k_clusters=math.ceil(tokens / k_size),
                )
                result = sparse(found, plan)
                error = (result.out - dense).float().norm() / dense.float().norm()
                reached = float(result.exact_pairs) / (found.q.shape[1] * tokens**2)
                rows.append(
                    Row(
                        tokens, found.layer, found.step, seed, density, form, q_size, k_size,
                        reached, float(error),
                    )
                )  # fmt: skip
    return rows


def fit_power_law(rows: list[Row], form: Compensation) -> dict[str, float]:
    """log(error / (1 - density)) = intercept + a log density + b log queries per cluster
    + c log keys per cluster.

    One offset per call (layer, step, seed) takes the calls' own levels out; the intercept is their
    mean, the spread their standard deviation.
    """
    mine = [r for r in rows if r.form == form]
    calls = sorted({(r.tokens, r.layer, r.step, r.seed) for r in mine})
    design = np.zeros((len(mine), 3 + len(calls)))
    for at, r in enumerate(mine):
        design[at, :3] = np.log([r.density, r.q_size, r.k_size])
        design[at, 3 + calls.index((r.tokens, r.layer, r.step, r.seed))] = 1
    logs = np.log([r.error / (1 - r.density) for r in mine])
    solved, *_ = np.linalg.lstsq(design, logs, rcond=None)
    return {
        "intercept": float(solved[3:].mean()),
        "density": float(solved[0]),
        "queries_per_cluster": float(solved[1]),
        "keys_per_cluster": float(solved[2]),
        "spread_of_calls": float(solved[3:].std()),
        "rms_log_residual": float(np.sqrt(np.mean((design @ solved - logs) ** 2))),
    }


def main() -> None:
    """Capture, measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="short")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--at", default="3,6,9", help="denoising steps that are captured")
    parser.add_argument("--seeds", default="0,1")
    given = parser.parse_args()
    rows: list[Row] = []
    for seed in map(int, given.seeds.split(",")):
        wanted = [int(step) for step in given.at.split(",")]
        for found in capture(SHAPES[given.shape], given.steps, wanted, seed, given.device):
            rows += measure(found, seed)
        print(f"seed {seed}: {len(rows)} rows", flush=True)
    record: dict[str, Any] = {
        "device": asdict(describe(given.device)),
        "law": {form: fit_power_law(rows, form) for form in FORMS},
        "rows": [asdict(row) for row in rows],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(json.dumps(record["law"], indent=1))


if __name__ == "__main__":
    main()
