"""`python -m benchmarks.tuning.local_error --out FILE`: error of the attention output alone.

Runs every recorded call of the video DiT over densities, cluster sizes and both forms. Fits the
default curve of `cost_model/default_error.py` and says how well the run-time estimate of
`residual.py` goes along with the real error. Writes every row as JSON and a plot.
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
from scipy.stats import spearmanr

from benchmarks.tuning.recorded import Recording, record
from benchmarks.tuning.residual import residual
from benchmarks.video_dit.demo import SHAPES
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.kernels.clusters import Clusters, Result
from svg_ear_compile.kernels.form import sparse_form
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

DENSITIES = (0.05, 0.1, 0.2, 0.4)
CLUSTER_SIZES = ((256, 64), (128, 64), (128, 128), (64, 32))
FORMS: tuple[Compensation, ...] = get_args(Compensation)


@dataclass(frozen=True)
class Row:
    """One call under one plan: mean queries and keys per cluster, relative L2 error, estimate."""

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
    estimate: float


def sparse(found: Recording, plan: AttentionPlan) -> Result:
    """The call under a plan, cold."""
    return sparse_form(found.q.is_cuda)(found.q, found.k, found.v, plan)


def measure(found: Recording, seed: int) -> list[Row]:
    """Rows of one recorded call."""
    tokens, dim = found.q.shape[2:]
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
                queries, keys = (
                    Clusters(c.labels.long(), c.centroids, c.sizes.long())
                    for c in (result.queries, result.keys)
                )
                estimate = residual(
                    found.q, found.k, found.v, queries, keys, result.exact, dim**-0.5
                )
                error = (result.out - dense).float().norm() / dense.float().norm()
                reached = float(result.exact_pairs) / (found.q.shape[1] * tokens**2)
                rows.append(
                    Row(
                        tokens, found.layer, found.step, seed, density, form, q_size, k_size,
                        reached, float(error), float(estimate.square().mean().sqrt()),
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


def correlation(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Of log estimate and log error: over everything, and over calls at one and the same plan."""
    found = {}
    for form in FORMS:
        mine = [r for r in rows if r.form == form]
        same = [
            spearmanr([r.estimate for r in group], [r.error for r in group]).statistic
            for density in DENSITIES
            for q_size, k_size in CLUSTER_SIZES
            if len(group := [
                r for r in mine if (r.density, r.q_size, r.k_size) == (density, q_size, k_size)
            ]) > 2
        ]  # fmt: skip
        logs = np.log([[r.estimate, r.error] for r in mine]).T
        found[form] = {
            "pearson_of_logs": float(np.corrcoef(logs)[0, 1]),
            "spearman": float(spearmanr(logs[0], logs[1]).statistic),
            "spearman_over_calls_at_one_plan": float(np.mean(same)),
            "median_error_over_estimate": float(np.median(np.exp(logs[1] - logs[0]))),
        }
    return found


def plot(rows: list[Row], found: dict[str, dict[str, float]], path: Path) -> None:
    """Estimate against error, a colour for each density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FORMS), figsize=(13, 4.2), sharex=True, sharey=True)
    colours = dict(zip(DENSITIES, plt.get_cmap("viridis")(np.linspace(0, 0.85, 4)), strict=True))
    for axis, form in zip(axes, FORMS, strict=True):
        for density, colour in colours.items():
            mine = [r for r in rows if r.form == form and r.density == density]
            axis.scatter(
                [r.estimate for r in mine],
                [r.error for r in mine],
                s=9,
                color=colour,
                label=f"density {density:g}",
            )
        axis.set(xscale="log", yscale="log", xlabel="estimate at run time")
        rho = found[form]["spearman"]
        axis.set_title(f"{form.replace('_', ' ')} (rank correlation {rho:.2f})", fontsize=11)
        axis.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("relative error of the attention output")
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Record, measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .json; the plot goes beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="short")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--at", default="3,6,9", help="denoising steps that are recorded")
    parser.add_argument("--seeds", default="0,1")
    given = parser.parse_args()
    rows: list[Row] = []
    for seed in map(int, given.seeds.split(",")):
        wanted = [int(step) for step in given.at.split(",")]
        for found in record(SHAPES[given.shape], given.steps, wanted, seed, given.device):
            rows += measure(found, seed)
        print(f"seed {seed}: {len(rows)} rows", flush=True)
    correlations = correlation(rows)
    record_of: dict[str, Any] = {
        "device": asdict(describe(given.device)),
        "law": {form: fit_power_law(rows, form) for form in FORMS},
        "correlation": correlations,
        "rows": [asdict(row) for row in rows],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record_of) + "\n")
    plot(rows, correlations, given.out.with_suffix(".png"))
    print(json.dumps({key: record_of[key] for key in ("law", "correlation")}, indent=1))


if __name__ == "__main__":
    main()
