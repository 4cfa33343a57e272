"""`python -m benchmarks.attention.likeness --out DIR`: are the synthetic inputs like real ones?

The error of sparse attention over its density, on the synthetic generator's tensors and on those
captured from a video model, at the same size: speed bought on easy inputs would show here. With it
what makes attention easy: in how many directions keys differ, how many keys a query looks at, and
how far keys move from one denoising step to the next. Writes all as JSON, and a plot of the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.attention.data import video_like
from benchmarks.attention.gate import relative_error
from benchmarks.provenance import provenance, where
from benchmarks.tuning.captured import capture
from benchmarks.video_dit.zoo import MODELS
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import sparse_attention

DENSITIES = (0.05, 0.1, 0.2, 0.4)
FORMS: tuple[Compensation, ...] = get_args(Compensation)
_STEPS, _WANTED, _LAYERS = 24, (8, 16), (0.15, 0.57, 1.0)
_SHOWN = (0.1, 0.2)
_SAMPLED = 256  # queries whose attention is looked at


def curve(q: Tensor, k: Tensor, v: Tensor, form: Compensation, text: int = 0) -> list[float]:
    """Relative L2 error of attention at each of `DENSITIES`; q, k, v (1, H, N, D), text last."""
    dense = F.scaled_dot_product_attention(q, k, v)
    kinds = exact_at_ends(q, k, 0, text)
    return [
        relative_error(sparse_attention(q, k, v, plan, kinds=kinds).out, dense)
        for plan in (AttentionPlan(density=d, compensation=form) for d in DENSITIES)
    ]


def participation_ratio(x: Tensor) -> float:
    """Directions that tokens (..., N, D) differ in: ``(tr C)^2 / tr C^2``, at most D."""
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    covariance = x.mT @ x
    total = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return float((total.square() / covariance.square().sum((-2, -1))).mean())


def perplexity(q: Tensor, k: Tensor) -> float:
    """Keys that a query looks at: e to the mean entropy of its attention, at most N."""
    places = torch.linspace(0, q.shape[-2] - 1, min(_SAMPLED, q.shape[-2])).round().long()
    logits = q[..., places.to(q.device), :].float() @ k.float().mT * q.shape[-1] ** -0.5
    log = logits.log_softmax(-1)
    return float((-(log.exp() * log).sum(-1)).mean().exp())


def rows_of(
    name: str,
    shape: tuple[int, int, int],
    device: str,
    dtype: torch.dtype,
    forms: Sequence[Compensation] = FORMS,
) -> list[dict[str, Any]]:
    """Curves and traits of some layers and steps of a model, and of as many synthetic heads."""
    steps = [s + later for s in _WANTED for later in (0, 1)]
    calls = list(capture(shape, _STEPS, steps, 0, device, name))
    layers = 1 + max(call.layer for call in calls)
    wanted = {round(x * (layers - 1)) for x in _LAYERS}
    after = {(call.layer, call.step - 1): call.k for call in calls}
    captured = [c for c in calls if c.layer in wanted and c.step in _WANTED]
    _, heads, tokens, dim = captured[0].q.shape
    text = getattr(MODELS[name].config, "text_tokens", 0)
    inputs = [
        ("captured", f"layer {c.layer}, step {c.step}", (c.q, c.k, c.v),
         relative_error(after[c.layer, c.step], c.k))
        for c in captured
    ]  # fmt: skip
    inputs += [
        ("synthetic", f"seed {seed}", tensors, None)
        for seed in range(len(captured))
        for tensors in [video_like(1, heads, tokens, dim, seed=seed, device=device, dtype=dtype)]
    ]
    rows = []
    for kind, which, tensors, drift in inputs:
        q, k, v = (t.to(dtype) for t in tensors)
        traits = {
            "participation_ratio": participation_ratio(k),
            "perplexity": perplexity(q, k),
            "drift": drift,
        }
        for form in forms:
            errors = curve(q, k, v, form, text if kind == "captured" else 0)
            row = {"inputs": kind, "name": which, "form": form, "size": list(q.shape)}
            rows.append({**row, **traits, "errors": errors})
    return rows


def table(folder: Path) -> str:
    """Traits and errors of every record in a folder as Markdown, means over steps or seeds."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    at = [DENSITIES.index(density) for density in _SHOWN]
    lines = [
        "| inputs | directions of keys, of D | keys that a query looks at, of N | drift of keys "
        f"in a step | {' | '.join(f'error at {density:g}' for density in _SHOWN)} |",
        f"|---|---|---|---|{'---|' * len(at)}",
    ]
    for record in sorted(records, key=lambda r: r["rows"][0]["size"][2]):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in record["rows"]:
            if row["form"] == FORMS[0]:
                layer = row["name"].partition(",")[0]
                captured = row["inputs"] == "captured"
                title = f"{record['model']}, {layer}" if captured else "synthetic, the same size"
                groups.setdefault(title, []).append(row)
        for title, group in groups.items():
            tokens, dim = group[0]["size"][2:]
            drifts = [row["drift"] for row in group if row["drift"] is not None]
            cells = [
                f"{fmean(row['participation_ratio'] for row in group):.1f} of {dim}",
                f"{fmean(row['perplexity'] for row in group):,.0f} of {tokens:,}",
                f"{fmean(drifts):.3f}" if drifts else "",
                *(f"{fmean(row['errors'][i] for row in group):.3f}" for i in at),
            ]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([f"{where(records)}.", "", *lines])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each form, one line for each call."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure = Figure(figsize=(6 * len(forms), 4), layout="constrained")
    axes = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
    for axis, form in zip(axes, forms, strict=True):
        for inputs, colour in (("captured", "#d9622b"), ("synthetic", "#1f77b4")):
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
    """Measure, write the model's record and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="self")
    parser.add_argument("--clip", choices=("short", "long"), default="long")
    parser.add_argument("--forms", default=",".join(FORMS), help="only these")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = getattr(MODELS[given.model], given.clip)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = rows_of(given.model, shape, device, dtype, given.forms.split(","))
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {"model": given.model, "clip": given.clip, "densities": DENSITIES}
    found = {**provenance(), **settings, "rows": rows}
    (given.out / f"{given.model}.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(rows, given.out / f"{given.model}.png")
    for row in rows:
        drift = "-" if row["drift"] is None else f"{row['drift']:.3f}"
        print(f"{row['inputs']:9s} {row['name']:16s} {row['form']:11s}",
              " ".join(f"{e:.3f}" for e in row["errors"]),
              f"directions {row['participation_ratio']:.1f}, keys {row['perplexity']:.0f},",
              f"drift {drift}")  # fmt: skip


if __name__ == "__main__":
    main()
