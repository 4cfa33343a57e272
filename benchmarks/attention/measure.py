"""Times one shape: dense baselines, FlexAttention and every sparse plan, correctness first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.flex import flex_row
from benchmarks.attention.gate import definition_rows, passes, relative_error
from benchmarks.attention.inputs import Inputs, exact_pairs, plan_of
from svg_ear_compile.cost_model import stages
from svg_ear_compile.cost_model.measure import STAGE_OF_KERNEL
from svg_ear_compile.cost_model.timing import backend_takes, busy_kernels_ms, busy_ms
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import captured_attention

FUSED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Kernels by stage, those of clustering one by one; whatever else runs sorts tokens by cluster.
STAGES = STAGE_OF_KERNEL | {
    "kmeans_assign_kernel": "assign",
    "cluster_mean_kernel": "means",
    "moment_kernel": "means",
    "metric_kernel": "means",
    "unit_norm_kernel": "means",
    "aim_kernel": "means",
}
# Clustering in its parts, then the other stages of the cost model.
STAGE_NAMES = ("assign", "means", "sort", *stages.STAGES["cuda"][1:])
_SAMPLED_ROWS = 48


def time_ms(call: Callable[[], object], repeats: int, on_gpu: bool) -> list[float]:
    """Milliseconds of each of `repeats` calls, by device events on a busy GPU."""
    if on_gpu:
        return busy_ms(call, repeats)
    call()
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - started))
    return samples


def stage_ms(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Device milliseconds of one sparse call by `STAGES`, "sort" for everything else.

    A mean over calls back to back: a single call finds a rested device, whose clocks are higher
    than those that the baselines are timed at.
    """
    found = dict.fromkeys(STAGE_NAMES, 0.0)
    for kernel, ms in busy_kernels_ms(call, repeats).items():
        found[STAGES.get(kernel, "sort")] += ms
    return found


def dense_baselines(inputs: Inputs, repeats: int) -> dict[str, list[float]]:
    """Raw milliseconds of every dense backend that takes these inputs."""
    q, k, v = inputs.q, inputs.k, inputs.v

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    samples = {"default": time_ms(call, repeats, q.is_cuda)}
    if q.is_cuda:
        for name, backend in FUSED.items():
            with sdpa_kernel(backend):
                if backend_takes(q, k, v):
                    samples[name] = time_ms(call, repeats, True)
    return samples


def measure_shape(
    inputs: Inputs,
    densities: Sequence[float],
    forms: Sequence[str],
    clusters: Sequence[str],
    repeats: int,
    flex: bool,
    say: Callable[[str], None],
    details: bool = True,
) -> list[dict[str, Any]]:
    """Rows of one shape: dense baselines once, then every plan, gate first.

    Args:
        inputs: what is attended to.
        densities, forms, clusters: see `plan_of`.
        repeats: timed calls.
        flex: also time FlexAttention on the tiles that cover the chosen blocks.
        say: hears a line of progress for each row.
        details: also time cold calls, and every stage.
    """
    dense = dense_baselines(inputs, repeats)
    best = min(dense, key=lambda n: statistics.median(dense[n]))
    dense_ms = statistics.median(dense[best])
    rate = inputs.flop / dense_ms / 1e9
    say(f"{inputs.name}: dense {best} {dense_ms:.2f} ms = {rate:.0f} TFLOP/s")
    common = {
        "shape": inputs.name, "size": [*inputs.q.shape], "text": inputs.text,
        "dense_backend": best, "dense_samples_ms": dense, "dense_tflops": rate,
    }  # fmt: skip
    dense_out = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
    on_gpu = inputs.q.is_cuda
    rows: list[dict[str, Any]] = []
    for count in clusters:
        for form in forms:
            for density in densities:
                plan = plan_of(count, form, density)
                row = {**common, "clusters": count, "form": form, "density": density}
                row |= _measure_plan(inputs, plan, dense_out, dense_ms, repeats, details)
                rows.append(row)
                say(_line(row))
                if flex and form == forms[0]:
                    covering = flex_row(
                        inputs, plan, dense_out, lambda call: time_ms(call, repeats, on_gpu)
                    )
                    if "samples_ms" in covering:
                        median = statistics.median(covering["samples_ms"])
                        covering["speedup"] = dense_ms / median
                    rows.append({**common, "clusters": count, "density": density, **covering})
                    say(_line(rows[-1]))
    return rows


def _measure_plan(
    inputs: Inputs, plan: AttentionPlan, dense_out: Tensor, dense_ms: float, repeats: int,
    details: bool,
) -> dict[str, Any]:  # fmt: skip
    q, k, v = inputs.q, inputs.k, inputs.v
    kinds = exact_at_ends(q, k, 0, inputs.text)
    batch, heads, tokens, dim = q.shape
    sparse_attention = captured_attention(q.device)
    cold = sparse_attention(q, k, v, plan, kinds=kinds)
    warm = (cold.queries.centroids, cold.keys.centroids)

    def call() -> Result:
        return sparse_attention(q, k, v, plan, kinds=kinds, centroids=warm)

    def reusing_call() -> Result:
        return sparse_attention(q, k, v, plan, kinds=kinds, centroids=warm, blocks=blocks)

    extra = _extra_bytes(call, q) if q.is_cuda else None
    result = call()
    blocks = result.blocks
    row: dict[str, Any] = {
        "gate": _gate(inputs, plan, result),
        "reused_gate": _gate(inputs, plan, reusing_call()),
        "error": relative_error(result.out, dense_out),
    }
    if not all(passes(row[g], row["error"], plan) for g in ("gate", "reused_gate")):
        return row  # no time for a wrong result
    video = tokens - inputs.text
    row |= {
        "samples_ms": time_ms(call, repeats, q.is_cuda),
        "reused_samples_ms": time_ms(reusing_call, repeats, q.is_cuda),
        "density_reached": float(result.exact_pairs) / (batch * heads * video**2),
        "extra_memory": None if extra is None else extra / inputs.held_bytes,
        "q_sizes": _mean_and_deviation(result.queries.sizes),
        "k_sizes": _mean_and_deviation(result.keys.sizes),
    }
    row["speedup"] = dense_ms / statistics.median(row["samples_ms"])
    if details:
        row["cold_samples_ms"] = time_ms(
            lambda: sparse_attention(q, k, v, plan, kinds=kinds), 2, q.is_cuda
        )
    if details and q.is_cuda:
        by_stage = stage_ms(call, repeats)
        row["reused_stages_ms"] = stage_ms(reusing_call, repeats)
        useful = 4.0 * exact_pairs(result, inputs) * dim / by_stage["attend"] / 1e9
        row |= {
            "stages_ms": by_stage,
            "useful_tflops": useful,
            "attend_over_dense_rate": useful * dense_ms / inputs.flop * 1e9,
            "other_stages_over_dense": (sum(by_stage.values()) - by_stage["attend"]) / dense_ms,
        }
    return row


def _gate(inputs: Inputs, plan: AttentionPlan, result: Result) -> float:
    """Relative error of sampled rows of one head against the definition."""
    _, heads, tokens, _ = inputs.q.shape
    rows = torch.randint(0, tokens, (_SAMPLED_ROWS,), generator=torch.Generator().manual_seed(1))
    head = (0, heads - 1)
    wanted = definition_rows(inputs.q, inputs.k, inputs.v, result, plan, head, rows)
    return relative_error(result.out[head][rows], wanted)


def _extra_bytes(call: Callable[[], Result], q: Tensor) -> int:
    """Peak bytes of calls beyond their output and what was held before; with captured graphs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        out_bytes = call().out.numel() * q.element_size()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return peak - out_bytes


def _mean_and_deviation(sizes: Tensor) -> list[float]:
    deviation, mean = torch.std_mean(sizes.float())
    return [float(mean), float(deviation)]


def _line(row: dict[str, Any]) -> str:
    name = f"  {row['clusters']:9s} {row['form']:11s} d={row['density']:.2f}"
    if "samples_ms" not in row:
        return f"{name} GATE FAILED, error {row['gate']:.2e}"
    found = f"{name} op {statistics.median(row['samples_ms']):8.2f} ms {row['speedup']:5.2f}x"
    if "reused_samples_ms" in row:
        found += f" (reused {statistics.median(row['reused_samples_ms']):.2f})"
    found += f" err {row['error']:.3f} gate {row['gate']:.1e}"
    if "useful_tflops" in row:
        found += f" useful {row['useful_tflops']:4.0f} TF/s"
    if "stages_ms" in row:
        found += f" ({row['attend_over_dense_rate']:.2f} of dense) "
        found += f"all other stages {row['other_stages_over_dense']:.1%} "
        found += " ".join(f"{stage} {ms:.2f}" for stage, ms in row["stages_ms"].items())
    return found
