"""`python -m benchmarks.tuning.sensitivity --out FILE`: what a layer's error does to the model.

For each layer of the video DiT: relative error of its attention output, and of the model's output
with that layer alone sparse; their ratio is the sensitivity that `cost_model/default_error.py`
takes the median of. Also the non-attention cost in milliseconds, predicted and
measured, from which `cost_model/latency.py` has the overhead of its products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tuning.video_dit import device, forward_error, long, short
from svg_ear_compile import bind, explain
from svg_ear_compile.backend import svg_ear
from svg_ear_compile.capture import CapturedCall, capture_attention
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import device_profile
from svg_ear_compile.cost_model.budget import Budget, Choice, Schedule
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.latency import dense_ms, non_attention_ms
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.kernels.plan import AttentionPlan


def sensitivities(model: Any, calls: list[Any], density: float) -> list[dict[str, Any]]:
    """Attention error, model error and their ratio, by call and layer."""
    compiled = torch.compile(model, backend=svg_ear, options={"density": 0.5, "min_tokens": 1})
    rows = []
    for index, call in enumerate(calls):
        local: dict[str, float] = {}

        def see(seen: CapturedCall, local: dict[str, float] = local) -> None:
            local[seen.layer] = seen.error(seen.sparse(AttentionPlan(density=density)))

        dense = capture_attention(model, call.args, call.kwargs, see)
        every = dict.fromkeys(local, (Choice(1.0),))
        base = Budget(
            budgets.VERSION, fingerprint_of(model), 1, describe(device()), "", "", Schedule(), every
        )
        for layer, error in local.items():
            alone = replace(base, layers={**every, layer: (Choice(density),)})
            with torch.no_grad(), bind(compiled, budget=alone):
                change = forward_error(compiled(*call.args, **call.kwargs), dense)
            rows.append(
                {"call": index, "layer": layer, "attention": error, "model": change,
                 "sensitivity": change / error}
            )  # fmt: skip
    return rows


def non_attention(model: Any, call: Any, repeats: int) -> dict[str, float]:
    """The non-attention cost: FLOPs and bytes, milliseconds measured and predicted."""
    calibration = device_profile.load(describe(device()))
    if calibration.origin == "prior":
        raise SystemExit("run svg-ear calibrate first: a prior predicts no measured time")
    found = explain(model, *call.args, **call.kwargs)
    attention = 0.0
    for site in found.sites:
        b, h, n_q, n_k, d = (size or 0 for size in site.shape)
        shape = AttentionShape(b, h, site.kv_heads or h, n_q, n_k, d, site.dtype)
        attention += dense_ms(shape, calibration)
    plain = torch.compile(model, backend="inductor")
    samples = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            if device() == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            plain(*call.args, **call.kwargs)
            if device() == "cuda":
                torch.cuda.synchronize()
            samples.append(1e3 * (time.perf_counter() - began))
    measured = (min if device() == "cpu" else statistics.median)(samples[1:])
    flops = sum(graph.non_attention.flops for graph in found.graphs)
    moved = sum(graph.non_attention.bytes for graph in found.graphs)
    dtype = found.sites[0].dtype
    compute = flops / calibration.roofs.flops[dtype] / 1e9
    memory = moved / calibration.roofs.bandwidth / 1e6
    return {
        "flops": flops, "bytes": moved, "forward_ms": measured, "attention_ms": attention,
        "measured_ms": measured - attention,
        "predicted_ms": non_attention_ms(flops, moved, dtype, calibration),
        "overhead": (measured - attention - memory) / compute,
    }  # fmt: skip


def main() -> None:
    """Measure both, write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=("short", "long"), default="short")
    parser.add_argument("--density", type=float, default=0.1)
    given = parser.parse_args()
    model, calls = short() if given.shape == "short" else long()
    rows = sensitivities(model, calls, given.density)
    record: dict[str, Any] = {
        "device": asdict(describe(device())),
        "shape": given.shape,
        "density": given.density,
        "median_sensitivity": statistics.median(row["sensitivity"] for row in rows),
        "non_attention": non_attention(model, calls[0], 7),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    by_layer: dict[str, list[float]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(row["sensitivity"])
    for layer, found in by_layer.items():
        print(f"{layer}: {statistics.fmean(found):.3f}")
    print(f"median {record['median_sensitivity']:.3f}")
    print(f"non-attention cost {json.dumps(record['non_attention'])}")


if __name__ == "__main__":
    main()
