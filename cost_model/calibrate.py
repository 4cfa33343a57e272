"""Measurement of a device in a minute: roofs, dense attention, and every stage of a sparse call.

Each class of calls (dtype, head dim) is timed over a few lengths, densities, cluster counts and
both compensation forms. The coefficients of `latency` are fitted to most of the samples and tested
on the others. On a GPU, a profiler of its kernels gives the times of the stages; on a CPU the whole
sparse call is one stage.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svg_ear_compile.cost_model.calibration import (
    VERSION,
    Calibration,
    Efficiency,
    Roofs,
    Sample,
    ideal_ms,
)
from svg_ear_compile.cost_model.device import Device, describe
from svg_ear_compile.cost_model.latency import dense_ms, sparse_ms
from svg_ear_compile.cost_model.stages import (
    STAGES,
    Amount,
    AttentionShape,
    dense_amount,
    sparse_amounts,
)
from svg_ear_compile.cost_model.synthetic import video_like
from svg_ear_compile.cost_model.timing import (
    Clock,
    busy_kernels_ms,
    fastest_dense_ms,
    measure_roofs,
)
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import captured_attention, sparse_attention

SECONDS = 55.0
"""Time that measuring may take. Most kernels are compiled before, which does not count. A class
that is not measured in this time uses the coefficients of the nearest class."""

_LEAST_SAMPLES = 14  # two lengths: enough for the three coefficients of a stage

# Stage of each kernel; all other kernels belong to clustering.
STAGE_OF_KERNEL = {
    "score_kernel": "score",
    "route_kernel": "route",
    "kv_offset_kernel": "route",
    "kv_indices_kernel": "route",
    "attend_kernel": "attend",
    "attend_wgmma_kernel": "attend",
    "covariance_kernel": "correction",
    "logit_correction_kernel": "correction",
    "value_correction_kernel": "correction",
    "own_token_kernel": "correction",
}


@dataclass(frozen=True)
class _Workload:
    """Classes to measure on one kind of device, in order of importance, and the lengths."""

    classes: tuple[tuple[str, int], ...]
    tokens: tuple[int, ...]
    held_out: tuple[int, ...]
    heads: int
    roof_side: int
    copied: int


_WORKLOADS = {
    "cuda": _Workload(
        classes=(("bfloat16", 128), ("bfloat16", 64)),
        tokens=(4096, 16384, 40960),
        held_out=(28672,),
        heads=8,
        roof_side=8192,
        copied=1 << 30,
    ),
    "cpu": _Workload(
        classes=(("float32", 64), ("float32", 128)),
        tokens=(1024, 2560, 5120),
        held_out=(3600,),
        heads=2,
        roof_side=2048,
        copied=1 << 27,
    ),
}
_PLANS = (
    AttentionPlan(density=0.1),
    AttentionPlan(density=0.3),
    AttentionPlan(density=0.2, compensation="centroid"),
)
# Samples that test the fit have other densities and cluster sizes.
_HELD_OUT_PLANS = (
    AttentionPlan(density=0.15),
    AttentionPlan(density=0.25, compensation="centroid"),
)
# Cluster sizes as multiples of the default sizes.
_SIZES, _HELD_OUT_SIZES = (2.0, 0.4), (1.5, 0.6)


def stages_ms(clock: Clock, call: Callable[[], object], plan: AttentionPlan) -> dict[str, float]:
    """Milliseconds of a sparse call on a GPU by `STAGES`."""
    # Kernels that this call does not run are not expected in its profile.
    known = {
        kernel: stage
        for kernel, stage in STAGE_OF_KERNEL.items()
        if stage != "correction" or plan.compensation == "gaussian"
    }
    with torch.cuda.device(clock.device):
        return by_stage(busy_kernels_ms(call, 5), known)


def by_stage(spent: dict[str, float], stage_of: dict[str, str]) -> dict[str, float]:
    """Milliseconds by stage, summed over kernels; kernels without a stage count as clustering.

    Args:
        spent: milliseconds by kernel.
        stage_of: stage by kernel.

    Raises:
        RuntimeError: no kernel of a stage was seen, because kernels were renamed.
    """
    missing = set(stage_of.values()) - {stage_of[name] for name in spent if name in stage_of}
    if missing:
        raise RuntimeError(
            f"the profiler saw no kernel of the stages {', '.join(sorted(missing))}: "
            "STAGE_OF_KERNEL does not have the names of the kernels that run"
        )
    found = dict.fromkeys(STAGES["cuda"], 0.0)
    for name, ms in spent.items():
        found[stage_of.get(name, "cluster")] += ms
    return found


def measure(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dense: float, *, text: int = 0,
    fitted: bool = False,
) -> Sample:  # fmt: skip
    """Time one sparse call with warm centroids, as a whole and by stage.

    Args:
        q, k, v: (B, H, N, D), all of one shape.
        plan: plan that is not dense.
        dense: milliseconds of dense attention on q, k and v, see `fastest_dense_ms`.
        text: number of text tokens at the end.
        fitted: whether coefficients will be fitted to the sample.
    """
    clock = Clock(q.device)
    batch, heads, tokens, head_dim = q.shape
    sparse_attention = captured_attention(q.device)
    kinds = exact_at_ends(q, k, 0, text)
    cold = sparse_attention(q, k, v, plan, kinds=kinds)
    warm = (cold.queries.centroids, cold.keys.centroids)

    def call() -> object:
        return sparse_attention(q, k, v, plan, kinds=kinds, centroids=warm)

    op_ms = clock.ms(call)
    stages = stages_ms(clock, call, plan) if clock.on_gpu else {"sparse": op_ms}
    q_clusters, k_clusters = plan.clusters(tokens - text, tokens - text)
    return Sample(
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=str(q.dtype).removeprefix("torch."),
        density=plan.density,
        compensation=plan.compensation,
        q_clusters=q_clusters,
        k_clusters=k_clusters,
        dense_ms=dense,
        op_ms=op_ms,
        stages_ms=stages,
        fitted=fitted,
        batch=batch,
        text=text,
    )


def calibrate(
    device: torch.device | str,
    *,
    seconds: float = SECONDS,
    on_sample: Callable[[str, float], None] | None = None,
) -> Calibration:
    """Measure a device.

    Args:
        device: CUDA or CPU.
        seconds: measuring ends after this time, once there are enough samples to fit to. Compiling
            most of the kernels before does not count.
        on_sample: gets the description of each measurement, and the fraction of `seconds` that has
            passed.

    Raises:
        ValueError: there are no kernels for this kind of device.
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    importlib.import_module("scipy.optimize")  # `fit` needs scipy: fail before a minute is spent
    began = time.perf_counter()
    device = torch.device(device)
    facts, workload = describe(device), _WORKLOADS[device.type]
    dtypes = ("bfloat16", "float16", "float32") if device.type == "cuda" else ("float32",)

    if device.type == "cuda":
        if on_sample is not None:
            on_sample("kernels are compiled", 0.0)
        for dtype, head_dim in workload.classes:
            _compile(device, dtype, head_dim)
    measuring = time.perf_counter()

    def passed(what: str) -> float:
        fraction = (time.perf_counter() - measuring) / seconds
        if on_sample is not None:
            on_sample(what, min(fraction, 1.0))
        return fraction

    roofs = measure_roofs(device, dtypes, workload.roof_side, workload.copied)
    passed("roofs")
    samples: list[Sample] = []
    for dtype, head_dim, tokens, fitted in _cases(workload):
        what = f"{dtype}, head dim {head_dim}, {tokens} tokens"
        if passed(what) > 1 and len(samples) >= _LEAST_SAMPLES:
            break
        tensors = video_like(workload.heads, tokens, head_dim, device, getattr(torch, dtype))
        dense = fastest_dense_ms(*tensors)
        for plan in _plans(tokens, fitted):
            if passed(what) > 1 and len(samples) >= _LEAST_SAMPLES:
                break
            samples.append(measure(*tensors, plan, dense, fitted=fitted))
    host_ms = _host_ms(device, workload) if device.type == "cuda" else 0.0
    return Calibration(
        VERSION,
        "calibrated",
        facts,
        roofs,
        host_ms,
        fit(samples, roofs, facts),
        time.perf_counter() - began,
        tuple(samples),
    )


def _cases(workload: _Workload) -> Iterator[tuple[str, int, int, bool]]:
    """dtype, head dim, tokens, whether to fit to the samples; the most important cases first."""
    for dtype, head_dim in workload.classes:
        for tokens in (*workload.tokens, *workload.held_out):
            yield dtype, head_dim, tokens, tokens not in workload.held_out


def _plans(tokens: int, fitted: bool) -> list[AttentionPlan]:
    plans, sizes = (_PLANS, _SIZES) if fitted else (_HELD_OUT_PLANS, _HELD_OUT_SIZES)
    counts = plans[0].clusters(tokens, tokens)
    found = list(plans)
    for size in sizes:
        q_clusters, k_clusters = (max(1, round(count / size)) for count in counts)
        other = replace(plans[0], q_clusters=q_clusters, k_clusters=k_clusters)
        found += [other, replace(other, compensation="centroid")]
    return found


def _compile(device: torch.device, dtype: str, head_dim: int) -> None:
    """Compile the kernels of all plans by small calls.

    The route kernel is compiled again later, for larger numbers of clusters.
    """
    tensors = _small(device, dtype, head_dim)
    for plan in _PLANS:
        sparse_attention(*tensors, plan)


def _small(device: torch.device, dtype: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return video_like(1, 256, head_dim, device, getattr(torch, dtype))


def _host_ms(device: torch.device, workload: _Workload) -> float:
    """Milliseconds of a warm call so small that the host takes all of the time."""
    tensors = _small(device, *workload.classes[0])
    call, plan = captured_attention(device), AttentionPlan(density=0.5)
    cold = call(*tensors, plan)
    warm = (cold.queries.centroids, cold.keys.centroids)
    return Clock(device).ms(lambda: call(*tensors, plan, centroids=warm), 7)


def fit(
    samples: Sequence[Sample], roofs: Roofs, device: Device
) -> dict[str, dict[str, Efficiency]]:
    """Coefficients of every stage and of dense attention, by class of call.

    Non-negative least squares on relative errors. The error of a stage is taken relative to the
    time of the stage plus a small part of the time of the call, so that stages of very short times
    do not dominate the fit.

    Args:
        samples: samples with `Sample.fitted`; others are left out.
        roofs: roofs of the same device.
        device: the device.

    Returns:
        Class to stage to coefficients; classes without samples are missing.
    """
    classes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.fitted:
            classes.setdefault(f"{sample.dtype}/{sample.head_dim}", []).append(sample)
    return {
        name: {
            stage: _fit_stage(stage, found, roofs, device)
            for stage in (*STAGES[device.kind], "dense")
        }
        for name, found in classes.items()
    }


def _fit_stage(stage: str, samples: Sequence[Sample], roofs: Roofs, device: Device) -> Efficiency:
    import numpy as np
    from scipy.optimize import nnls

    rows, wanted = [], []
    for sample in samples:
        shape, plan = shape_of(sample), plan_of(sample)
        if stage == "dense":
            amount, measured = dense_amount(shape), sample.dense_ms
            against = measured
        else:
            amount, measured = sparse_amounts(shape, plan, device)[stage], sample.stages_ms[stage]
            against = measured + 0.02 * sample.op_ms
        if amount == Amount() or measured == 0.0:
            continue
        rows.append([x / against for x in ideal_ms(amount, roofs, sample.dtype)])
        wanted.append(measured / against)
    if not rows:
        return Efficiency(0.0, 0.0, 0.0)
    found, _ = nnls(np.array(rows), np.array(wanted))
    return Efficiency(*map(float, found))


def shape_of(sample: Sample) -> AttentionShape:
    """The shape that a sample was measured at."""
    return AttentionShape(
        sample.batch,
        sample.heads,
        sample.heads,
        sample.tokens,
        sample.tokens,
        sample.head_dim,
        sample.dtype,
        sample.text,
    )


def plan_of(sample: Sample) -> AttentionPlan:
    """The plan that a sample was measured with."""
    return AttentionPlan(
        density=sample.density,
        compensation=sample.compensation,  # type: ignore[arg-type]
        q_clusters=sample.q_clusters,
        k_clusters=sample.k_clusters,
    )


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured milliseconds of one sample: the sparse call and dense attention."""

    sample: Sample
    op_ms: float
    dense_ms: float

    @property
    def op_error(self) -> float:
        """Relative error of the sparse call's prediction."""
        return self.op_ms / self.sample.op_ms - 1


def compare(calibration: Calibration, samples: Iterable[Sample]) -> list[Comparison]:
    """Predictions for samples that were measured on the device of the calibration."""
    return [
        Comparison(
            sample,
            sparse_ms(shape_of(sample), plan_of(sample), calibration).total,
            dense_ms(shape_of(sample), calibration),
        )
        for sample in samples
    ]
