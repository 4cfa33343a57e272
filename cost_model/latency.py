"""Milliseconds of dense and sparse attention, and the questions that they answer.

Model: the time of a stage is a sum of operations, bytes and launches over the device's roofs, each
times a measured efficiency (`calibration`); a sparse call takes the sum of its stages, or as long
as the host needs to issue it if that is longer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from svg_ear_compile.cost_model.calibration import Calibration, ideal_ms
from svg_ear_compile.cost_model.stages import (
    Amount,
    AttentionShape,
    dense_amount,
    sparse_amounts,
)
from svg_ear_compile.kernels.plan import AttentionPlan

# Longest sequence that break-even is looked for in: four times the longest video in public use.
LONGEST = 1 << 19

# Products of a model's own shapes, and what is left between them after fusion, take longer than one
# large square product. This is what a forward of the video DiT took (6,912 tokens, one CPU core,
# through Inductor: 5.79 s, of which attention is predicted to take 4.57 s), less its bytes once,
# over its FLOPs at the roof. On a GPU it is not measured yet; `tune` measures the forward instead.
REST_OVERHEAD = 1.45


Start = Literal["cold", "warm", "reused"]
"""How a call comes by its clusters: from the first sample of tokens, from those of the step before,
or it reuses those with the exact blocks."""

REUSED_FRACTION = 0.5
"""Fraction of a bound model's sparse calls that are expected to reuse their clusters and blocks.
How long a model's tokens stay in their clusters shows while it runs: the two video models of the
fidelity bench reuse more (benchmarks/fidelity/NOTES.md)."""


@dataclass(frozen=True)
class StageTimes:
    """Predicted milliseconds of one sparse call by stage, and of the host that issues it."""

    stages: dict[str, float]
    host_ms: float

    @property
    def total(self) -> float:
        """Milliseconds of the call."""
        return max(sum(self.stages.values()), self.host_ms)


def dense_ms(shape: AttentionShape, calibration: Calibration) -> float:
    """Milliseconds of the fastest dense attention of that shape."""
    return calibration.stage_ms("dense", dense_amount(shape), shape.dtype, shape.head_dim)


def sparse_ms(
    shape: AttentionShape,
    plan: AttentionPlan,
    calibration: Calibration,
    start: Start = "warm",
) -> StageTimes:
    """Milliseconds of one sparse call by stage."""
    rounds = {"cold": plan.first_iterations, "warm": plan.warm_iterations, "reused": 0}
    amounts = sparse_amounts(shape, plan, calibration.device, rounds[start])
    stages = {
        stage: calibration.stage_ms(stage, amount, shape.dtype, shape.head_dim)
        for stage, amount in amounts.items()
    }
    return StageTimes(stages, calibration.host_ms)


def call_ms(shape: AttentionShape, plan: AttentionPlan, calibration: Calibration) -> float:
    """Milliseconds of one call of a bound model under a plan, dense or sparse, in the mean."""
    if plan.is_dense:
        return dense_ms(shape, calibration)
    warm = sparse_ms(shape, plan, calibration).total
    if plan.max_drift == 0.0:
        return warm
    reused = sparse_ms(shape, plan, calibration, "reused").total
    return REUSED_FRACTION * reused + (1 - REUSED_FRACTION) * warm


def pays(shape: AttentionShape, plan: AttentionPlan, calibration: Calibration) -> bool:
    """True if the plan is predicted to be faster than dense attention.

    Clustering is counted as without a warm start: unbound models have none.
    """
    return sparse_ms(shape, plan, calibration, "cold").total < dense_ms(shape, calibration)


def break_even_tokens(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration
) -> int | None:
    """Fewest video tokens at which such a plan pays; None if it does not up to `LONGEST`.

    The gain grows with the square of the tokens and the cost hardly faster than they do, so there
    is one crossing and bisection finds it.
    """
    if plan.is_dense or not pays(shape.with_tokens(LONGEST), plan, calibration):
        return None
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        if pays(shape.with_tokens(middle), plan, calibration):
            high = middle
        else:
            low = middle
    return high


def rest_ms(flops: float, moved: float, dtype: str, calibration: Calibration) -> float:
    """Milliseconds of everything in a model that is not attention.

    Args:
        flops, moved: FLOPs of its products, and bytes that its nodes put out, each counted once:
            fusion spares many of them, and what is left is read as well.
        dtype: of the products.
    """
    compute, memory, _ = ideal_ms(Amount(flops, moved), calibration.roofs, dtype)
    return REST_OVERHEAD * compute + memory


def attention_allowance(dense_attention: float, rest: float, target_speedup: float) -> float:
    """Milliseconds that a whole-model speed-up leaves for attention; negative if it cannot be had.

    The model takes `dense_attention` + `rest` milliseconds now and shall take that over
    `target_speedup`, of which `rest` cannot be saved.
    """
    return (dense_attention + rest) / target_speedup - rest


def ms_per_exact_share(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration
) -> float:
    """Milliseconds that a call takes longer per unit of density, at the plan's density."""
    step = 1e-3
    more = dataclasses.replace(plan, density=min(plan.density, 1.0 - 2 * step) + step)
    less = dataclasses.replace(plan, density=min(plan.density, 1.0 - 2 * step))
    longer = sum(sparse_ms(shape, more, calibration).stages.values())
    return (longer - sum(sparse_ms(shape, less, calibration).stages.values())) / step
