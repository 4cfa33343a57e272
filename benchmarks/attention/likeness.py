"""`python -m benchmarks.attention.likeness --out DIR`: are the synthetic inputs like real ones?

The error of sparse attention over its density, on the synthetic generator's tensors and on those
recorded from the video DiT, at the same size: speed bought on easy inputs would show here. Writes
the curves as JSON, and a plot.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.attention.data import video_like
from benchmarks.attention.gate import relative_error
from benchmarks.provenance import provenance
from benchmarks.tuning.recorded import record
from benchmarks.video_dit.data import TRAIN_SHAPE
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import sparse_attention

DENSITIES = (0.05, 0.1, 0.2, 0.4)
FORMS: tuple[Compensation, ...] = get_args(Compensation)
_STEPS, _WANTED, _LAYERS = 24, (8, 16), (1, 4, 7)


def curve(q: Tensor, k: Tensor, v: Tensor, form: Compensation) -> list[float]:
    """Relative L2 error of attention at each of `DENSITIES`; q, k, v (1, H, N, D)."""
    dense = F.scaled_dot_product_attention(q, k, v)
    return [
        relative_error(sparse_attention(q, k, v, plan).out, dense)
        for plan in (AttentionPlan(density=d, compensation=form) for d in DENSITIES)
    ]


def rows_of(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Curves of some recorded layers and steps, and of as many synthetic heads."""
    rows = []
    recorded = [r for r in record(shape, _STEPS, _WANTED, 0, device) if r.layer in _LAYERS]
    for call in recorded:
        for form in FORMS:
            name = f"layer {call.layer}, step {call.step}"
            errors = curve(call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), form)
            rows.append({"inputs": "recorded", "name": name, "form": form, "errors": errors})
    _, heads, tokens, dim = recorded[0].q.shape
    for seed in range(len(recorded)):
        tensors = video_like(1, heads, tokens, dim, seed=seed, device=device, dtype=dtype)
        for form in FORMS:
            errors = curve(*tensors, form)
            rows.append(
                {"inputs": "synthetic", "name": f"seed {seed}", "form": form, "errors": errors}
            )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each form, one line for each call."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axis, form in zip(figure.subplots(1, len(FORMS), sharey=True), FORMS, strict=True):
        for inputs, colour in (("recorded", "#d9622b"), ("synthetic", "#1f77b4")):
            chosen = [r for r in rows if (r["inputs"], r["form"]) == (inputs, form)]
            for i, row in enumerate(chosen):
                label = inputs if i == 0 else None
                axis.loglog(DENSITIES, row["errors"], "o-", ms=3, lw=1, color=colour, label=label)
        axis.set(title=form, xlabel="density", ylabel="relative L2 error")
        axis.set_xticks(DENSITIES, [f"{d:g}" for d in DENSITIES])
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write `likeness.json` and `likeness.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = rows_of(TRAIN_SHAPE, device, torch.bfloat16 if device == "cuda" else torch.float32)
    given.out.mkdir(parents=True, exist_ok=True)
    found = {**provenance(), "densities": DENSITIES, "rows": rows}
    (given.out / "likeness.json").write_text(json.dumps(found, indent=1))
    plot(rows, given.out / "likeness.png")
    for row in rows:
        print(f"{row['inputs']:9s} {row['name']:16s} {row['form']:11s}",
              " ".join(f"{e:.3f}" for e in row["errors"]))  # fmt: skip


if __name__ == "__main__":
    main()
