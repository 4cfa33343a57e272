"""Measures a device: roofs, dense attention, and every stage of the sparse call, in a minute.

Each class of call (dtype, head dim) is timed over a few lengths, densities, cluster counts and both
forms; the coefficients of `latency` are fitted to most of them and tested on the rest. Stage times
are read off a profiler: of kernels on a GPU, of Python functions on a CPU.
"""

from __future__ import annotations

import cProfile
import importlib
import math
import pstats
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_ear_compile.cost_model.calibration import (
    VERSION,
    Calibration,
    Efficiency,
    Roofs,
    Sample,
    ideal_ms,
)
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.latency import dense_ms, sparse_ms
from svg_ear_compile.cost_model.stages import (
    STAGES,
    Amount,
    AttentionShape,
    dense_amount,
    sparse_amounts,
)
from svg_ear_compile.cost_model.synthetic import video_like
from svg_ear_compile.kernels.form import captured_form, sparse_form
from svg_ear_compile.kernels.op import dense_attention
from svg_ear_compile.kernels.plan import AttentionPlan

SECONDS = 55.0
"""Time that measuring may take; what is not measured by then is left to the nearest class. Most
kernels are compiled before."""

_PATIENCE_MS = 1500.0  # for the repeats of one call
# A rested GPU clocks up to a fifth higher than one that has been busy this long.
_BUSY_MS, _MOST_CALLS = 150.0, 150
# Short calls wait for the host, which hesitates now and then: they are repeated for this long.
_SAMPLED_MS, _MOST_SAMPLES = 50.0, 40
_LEAST_SAMPLES = 14  # two lengths: enough for the three coefficients of a stage

# Kernels and functions by stage; everything else sorts tokens by cluster, which is clustering.
_STAGE_OF_KERNEL = {
    "probe_kernel": "probe",
    "route_kernel": "route",
    "list_keys_kernel": "route",
    "attend_kernel": "attend",
    "attend_wgmma_kernel": "attend",
    "covariance_kernel": "second_order",
    "growth_kernel": "second_order",
    "move_kernel": "second_order",
}
_STAGE_OF_FUNCTION = {
    "_probe": "probe",
    "route": "route",
    "compensation_tables": "tables",
    "_attend": "attend",
    "second_order": "second_order",
}


@dataclass(frozen=True)
class _Workload:
    """What is measured on one kind of device: classes in order of importance, and lengths."""

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
    AttentionPlan(density=0.3, compensation="second_order"),
    AttentionPlan(density=0.2, compensation="centroid"),
)
# The lengths that test the fit are measured at densities and cluster sizes of their own.
_HELD_OUT_PLANS = (
    AttentionPlan(density=0.15),
    AttentionPlan(density=0.25, compensation="centroid"),
)
# Cluster sizes over the default ones.
_SIZES, _HELD_OUT_SIZES = (2.0, 0.4), (1.5, 0.6)


class _Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def ms(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Milliseconds of a call after one to warm up; fewer repeats where a CPU takes seconds.

        The median of calls back to back on a busy GPU, as in a generation. The least on a CPU:
        whatever else runs there only ever adds, and adds much.
        """
        if self.on_gpu:
            with torch.cuda.device(self.device):
                return statistics.median(busy_ms(call, repeats))
        call()
        samples: list[float] = []
        while len(samples) < repeats and (len(samples) < 2 or sum(samples) < _PATIENCE_MS):
            began = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - began))
        return min(samples)

    def stages(self, call: Callable[[], object], plan: AttentionPlan) -> dict[str, float]:
        """Milliseconds of a sparse call by `STAGES`; a GPU makes its tables inside the probe."""
        known = _STAGE_OF_KERNEL if self.on_gpu else _STAGE_OF_FUNCTION
        # What a call is known not to run must not be missed in its profile.
        known = {
            name: s for name, s in known.items() if s != "second_order" or plan.has_covariances
        }
        profiled = self._profiled_kernels if self.on_gpu else self._profiled_functions
        runs = profiled(call, known)
        return {stage: min(run[stage] for run in runs) for stage in STAGES}

    def _profiled_kernels(
        self, call: Callable[[], object], stage_of: dict[str, str]
    ) -> list[dict[str, float]]:
        with torch.cuda.device(self.device):
            spent = busy_kernels_ms(call, 5)
        return [_by_stage(spent, stage_of, sum(spent.values()))]

    def _profiled_functions(
        self, call: Callable[[], object], stage_of: dict[str, str]
    ) -> list[dict[str, float]]:
        runs: list[dict[str, float]] = []
        spent_ms = 0.0
        while len(runs) < 4 and spent_ms < _PATIENCE_MS:
            profile = cProfile.Profile()
            began = time.perf_counter()
            profile.runcall(call)
            total = 1e3 * (time.perf_counter() - began)
            spent: dict[str, float] = {}
            for (_, _, name), entry in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
                spent[name] = spent.get(name, 0.0) + 1e3 * entry[3]
            runs.append(_by_stage(spent, stage_of, total))
            spent_ms += total
        return runs


def busy_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of at least `repeats` calls back to back on the current GPU.

    The device is busy before; short calls are repeated up to 40 times.
    """
    seconds = _keep_busy(call)
    repeats = max(repeats, min(_MOST_SAMPLES, math.ceil(_SAMPLED_MS / 1e3 / seconds)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def busy_kernels_ms(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Device milliseconds by kernel in one of `repeats` calls, on average, timed as `busy_ms`."""
    _keep_busy(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1e3 / repeats for e in profile.key_averages()}


def _keep_busy(call: Callable[[], object]) -> float:
    """Seconds of a call, after one to compile, one to record, and as many as bring the GPU's clock
    to that of a long run."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    for _ in range(min(_MOST_CALLS, math.ceil(_BUSY_MS / 1e3 / seconds))):
        call()
    return seconds


def _by_stage(spent: dict[str, float], stage_of: dict[str, str], total: float) -> dict[str, float]:
    """Sum what was spent under each name by stage; what is left of the total is clustering."""
    missing = set(stage_of.values()) - {stage_of[name] for name in spent if name in stage_of}
    if missing:
        raise RuntimeError(
            f"the profiler saw nothing of {', '.join(sorted(missing))}: "
            "what runs has other names than this file knows"
        )
    found = dict.fromkeys(STAGES, 0.0)
    for name, stage in stage_of.items():
        found[stage] += spent.get(name, 0.0)
    found["cluster"] = total - sum(found.values())
    return found


def fastest_dense_ms(q: Tensor, k: Tensor, v: Tensor, repeats: int = 5) -> float:
    """Milliseconds of the fastest dense attention that takes these inputs: what has to be beaten.

    Args:
        q: (B, H, N_q, D). k, v: (B, H_kv, N_k, D).
        repeats: timed calls of each backend.
    """
    clock = _Clock(q.device)
    scale = q.shape[3] ** -0.5

    def default() -> object:
        return dense_attention(q, k, v, None, scale, False)

    times = [clock.ms(default, repeats)]
    if clock.on_gpu:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                if backend_takes(q, k, v):
                    times.append(clock.ms(default, repeats))
    return min(times)


def backend_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the backend that `sdpa_kernel` leaves has a kernel for such inputs."""
    try:
        F.scaled_dot_product_attention(q[:, :, :16], k[:, :, :16], v[:, :, :16])
    except RuntimeError:  # "No available kernel": PyTorch has no other way to ask
        return False
    return True


def measure_roofs(device: torch.device, dtypes: Iterable[str], side: int, copied: int) -> Roofs:
    """Matrix products of `side`, a copy of `copied` bytes, and a run of small operators."""
    clock = _Clock(device)
    rates = {}
    for name in dtypes:
        a = torch.randn(side, side, device=device).to(getattr(torch, name))
        rates[name] = 2e-9 * side**3 / clock.ms(lambda a=a: a @ a)  # type: ignore[misc]
    source = torch.zeros(copied // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2e-6 * copied / clock.ms(lambda: target.copy_(source))
    small = torch.zeros(16, device=device)

    def many() -> None:
        for _ in range(200):
            small.add_(1.0)

    return Roofs(rates, bandwidth, clock.ms(many) / 200)


def measure(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dense: float, *, text: int = 0,
    fitted: bool = False,
) -> Sample:  # fmt: skip
    """Time one call: the whole sparse call with warm centroids, and its stages.

    Args:
        q, k, v: (B, H, N, D), all of one shape.
        plan: not dense.
        dense: milliseconds of dense attention on them, see `fastest_dense_ms`.
        text: text tokens at the end.
        fitted: what the sample will say of itself.
    """
    clock = _Clock(q.device)
    batch, heads, tokens, head_dim = q.shape
    sparse_attention = captured_form(q.device)
    cold = sparse_attention(q, k, v, plan, text=(0, text))
    warm = (cold.queries.centroids, cold.keys.centroids)

    def call() -> object:
        return sparse_attention(q, k, v, plan, text=(0, text), centroids=warm)

    stages = clock.stages(call, plan)
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
        op_ms=clock.ms(call),
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
        seconds: no further call is measured once this has passed and there is enough to fit to;
            compiling most of the kernels before does not count.
        on_sample: hears what was measured, and the share of `seconds` that has passed.

    Raises:
        ValueError: there are no kernels for such a device.
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    importlib.import_module("scipy.optimize")  # `fit` needs it, after a minute of measuring
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
        share = (time.perf_counter() - measuring) / seconds
        if on_sample is not None:
            on_sample(what, min(share, 1.0))
        return share

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
        "measured",
        facts,
        roofs,
        host_ms,
        fit(samples, roofs, facts.kind),
        time.perf_counter() - began,
        tuple(samples),
    )


def _cases(workload: _Workload) -> Iterator[tuple[str, int, int, bool]]:
    """dtype, head dim, tokens, whether to fit to it; what matters most first."""
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
        found += [other, replace(other, compensation="second_order")]
    return found


def _compile(device: torch.device, dtype: str, head_dim: int) -> None:
    """Call every form once, so small that compiling is all it takes; the route kernel is compiled
    again for larger numbers of clusters."""
    tensors = _small(device, dtype, head_dim)
    for plan in _PLANS:
        sparse_form(True)(*tensors, plan)


def _small(device: torch.device, dtype: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return video_like(1, 256, head_dim, device, getattr(torch, dtype))


def _host_ms(device: torch.device, workload: _Workload) -> float:
    """Milliseconds of a warm call so small that only what the host does is left."""
    tensors = _small(device, *workload.classes[0])
    call, plan = captured_form(device), AttentionPlan(density=0.5)
    cold = call(*tensors, plan)
    warm = (cold.queries.centroids, cold.keys.centroids)
    return _Clock(device).ms(lambda: call(*tensors, plan, centroids=warm), 7)


def fit(samples: Sequence[Sample], roofs: Roofs, kind: str) -> dict[str, dict[str, Efficiency]]:
    """Coefficients of every stage and of dense attention, by class of call.

    Non-negative least squares on relative errors; a stage's error counts against the time of its
    whole call too, so that a stage of no weight is not fitted at the cost of nothing.

    Args:
        samples: those that are not `fitted` are left out; a class without any is left out too.
        roofs: of the same device.
        kind: ``"cuda"`` or ``"cpu"``.
    """
    classes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.fitted:
            classes.setdefault(f"{sample.dtype}/{sample.head_dim}", []).append(sample)
    return {
        name: {stage: _fit_stage(stage, found, roofs, kind) for stage in (*STAGES, "dense")}
        for name, found in classes.items()
    }


def _fit_stage(stage: str, samples: Sequence[Sample], roofs: Roofs, kind: str) -> Efficiency:
    import numpy as np
    from scipy.optimize import nnls

    rows, wanted = [], []
    for sample in samples:
        shape, plan = shape_of(sample), plan_of(sample)
        if stage == "dense":
            amount, measured = dense_amount(shape), sample.dense_ms
            against = measured
        else:
            amount, measured = sparse_amounts(shape, plan, kind)[stage], sample.stages_ms[stage]
            # On a GPU the tables are made inside the probe: what it takes longer is theirs.
            if kind == "cuda" and stage in ("probe", "tables"):
                amount, measured = _share_of_probe(stage, sample, samples, amount)
            against = measured + 0.02 * sample.op_ms
        if amount == Amount() or measured == 0.0:
            continue
        rows.append([x / against for x in ideal_ms(amount, roofs, sample.dtype)])
        wanted.append(measured / against)
    if not rows:
        return Efficiency(0.0, 0.0, 0.0)
    found, _ = nnls(np.array(rows), np.array(wanted))
    return Efficiency(*map(float, found))


def _share_of_probe(
    stage: str, sample: Sample, samples: Sequence[Sample], amount: Amount
) -> tuple[Amount, float]:
    own_tables = plan_of(sample).has_own_tables
    if stage == "probe":
        return (Amount(), 0.0) if own_tables else (amount, sample.stages_ms["probe"])
    twins = [
        other.stages_ms["probe"]
        for other in samples
        if not plan_of(other).has_own_tables
        and (other.tokens, other.q_clusters, other.k_clusters)
        == (sample.tokens, sample.q_clusters, sample.k_clusters)
    ]
    if not own_tables or not twins:
        return Amount(), 0.0
    return amount, max(sample.stages_ms["probe"] - statistics.mean(twins), 0.0)


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
    """Predictions for samples of the calibration's own device."""
    return [
        Comparison(
            sample,
            sparse_ms(shape_of(sample), plan_of(sample), calibration).total,
            dense_ms(shape_of(sample), calibration),
        )
        for sample in samples
    ]
