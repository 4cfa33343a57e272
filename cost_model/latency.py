"""Predicted milliseconds of dense and sparse attention, and decisions that follow from them.

The time of a stage is the sum of its operations, bytes and launches, each divided by a roof of the
device and multiplied by a measured efficiency (`calibration`). A sparse call takes the sum of its
stages, or the time in which the host issues its launches if that is longer.
"""

from __future__ import annotations

import bisect
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
from svg_ear_compile.kernels.clusters import sampled_tokens
from svg_ear_compile.kernels.plan import AttentionPlan

# Break-even is searched up to this number of tokens: four times the longest video in public use.
LONGEST = 1 << 19

# Time of the products outside attention over their FLOPs at the roof. The products of a model have
# other shapes than the large square product that measures the roof, and fusion leaves operators
# between them. The factor was measured on the video DiT: a forward of 6,912 tokens took 5.79 s on
# one CPU core through Inductor, of which attention is predicted to take 4.57 s; the time of the
# bytes was subtracted. It was not measured on a GPU; `tune` measures the whole forward instead.
NON_ATTENTION_OVERHEAD = 1.45


Start = Literal["cold", "warm", "kept", "reused"]
"""Origin of the clusters of a call: k-means from a sample of the tokens (cold), k-means from the
centroids of the step before (warm), likewise with labels that cached keys keep (kept), or clusters
and block mask of an earlier step (reused)."""

REUSED_FRACTION = 0.5
"""Expected fraction of the sparse calls of a bound model that reuse clusters and block mask. The
real fraction is known only when the model runs, because it depends on how many tokens change their
cluster. It is larger for the two video models of benchmarks/fidelity (see NOTES.md there)."""


@dataclass(frozen=True)
class StageTimes:
    """Predicted milliseconds of one sparse call: by stage, and on the host that issues the call."""

    stages: dict[str, float]
    host_ms: float

    @property
    def total(self) -> float:
        """Milliseconds of the call."""
        return max(sum(self.stages.values()), self.host_ms)


EARLY_ROUND = 0.5
"""Time of an early round of a cold start over that of a round over all tokens: on an H200 0.4 to
0.6. Where clusters are many, early rounds look at all tokens, too."""


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
    rounds = _rounds(shape, plan, start)
    amounts = sparse_amounts(shape, plan, calibration.device, rounds, kept=start == "kept")
    stages = {
        stage: calibration.stage_ms(stage, amount, shape.dtype, shape.head_dim)
        for stage, amount in amounts.items()
    }
    return StageTimes(stages, calibration.host_ms)


def _rounds(shape: AttentionShape, plan: AttentionPlan, start: Start) -> float:
    """Rounds of k-means over all tokens that take as long as those of such a start."""
    if start == "reused":
        return 0.0
    if start != "cold":
        return float(plan.warm_iterations)
    tokens = shape.clustered
    samples = zip(tokens, plan.clusters(*tokens), strict=True)
    is_part = all(sampled_tokens(count, clusters) < count for count, clusters in samples)
    return 1 + (plan.first_iterations - 1) * (EARLY_ROUND if is_part else 1.0)


def call_ms(shape: AttentionShape, plan: AttentionPlan, calibration: Calibration) -> float:
    """Mean milliseconds of a call of a bound model under a plan that is dense or sparse."""
    if plan.is_dense:
        return dense_ms(shape, calibration)
    warm = sparse_ms(shape, plan, calibration).total
    if plan.max_drift == 0.0:
        return warm
    reused = sparse_ms(shape, plan, calibration, "reused").total
    return REUSED_FRACTION * reused + (1 - REUSED_FRACTION) * warm


def pays(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration, start: Start = "cold"
) -> bool:
    """Whether the plan is predicted to be faster than dense attention.

    Uncertainty counts against it.

    Args:
        shape, plan: the call.
        calibration: of its device.
        start: where its clusters come from. Unbound models have no warm start, so that what pays
            without a session has to pay cold.
    """
    if calibration.uncertainty is None:
        return False
    longest = sparse_ms(shape, plan, calibration, start).total * (1.0 + calibration.uncertainty)
    return longest < dense_ms(shape, calibration)


def break_even_tokens(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration
) -> int | None:
    """Smallest number of video tokens at which the plan pays; None if it is above `LONGEST`.

    The saved time grows with the square of the number of tokens, the added time about linearly. So
    there is one break-even, and bisection finds it.
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


def fewest_cached_keys(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration
) -> int | None:
    """Smallest number of clustered keys at which the plan pays if keys keep their clusters.

    The number of queries stays that of the shape: the chunks of a video are of one length. None if
    the plan does not pay with `LONGEST` keys.
    """

    def is_enough(keys: int) -> bool:
        tried = dataclasses.replace(shape, k_tokens=keys + shape.text)
        return pays(tried, plan, calibration, "kept")

    if plan.is_dense or not is_enough(LONGEST):
        return None
    return bisect.bisect_left(range(1, LONGEST), True, key=is_enough) + 1


def most_keys_per_query(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration
) -> float:
    """Largest number of clustered keys for each clustered query at which the plan pays.

    The time to cluster keys grows with the square of their number, the saved time with their number
    times that of the queries, so the bound is about the same for all numbers of queries. It is
    taken at `LONGEST` keys; 0 if the plan never pays there.
    """
    low, high = 1, 1 << 12
    for _ in range(12):
        middle = (low + high) // 2
        queries = max(LONGEST // middle, 1)
        tried = dataclasses.replace(shape, q_tokens=queries + shape.query_text, k_tokens=LONGEST)
        low, high = (middle, high) if pays(tried, plan, calibration) else (low, middle)
    return float(low)


def non_attention_ms(flops: float, moved: float, dtype: str, calibration: Calibration) -> float:
    """Milliseconds of everything in a model but its attention.

    Args:
        flops: FLOPs of the products outside attention.
        moved: bytes of the outputs of all nodes outside attention, each counted once. Fusion avoids
            many of these writes, and the others are also read; the two are taken to balance.
        dtype: dtype of the products, without ``torch.``.
        calibration: of the device.
    """
    compute, memory, _ = ideal_ms(Amount(flops, moved), calibration.roofs, dtype)
    return NON_ATTENTION_OVERHEAD * compute + memory


def attention_allowance(
    dense_attention: float, non_attention: float, target_speedup: float
) -> float:
    """Milliseconds that attention may take for a speed-up of the whole model.

    Args:
        dense_attention: milliseconds of dense attention.
        non_attention: milliseconds of everything else, which sparse attention cannot shorten.
        target_speedup: of the sum of the two.

    Returns:
        Milliseconds of attention; negative if the speed-up cannot be reached.
    """
    return (dense_attention + non_attention) / target_speedup - non_attention


def ms_per_unit_density(
    shape: AttentionShape, plan: AttentionPlan, calibration: Calibration
) -> float:
    """Derivative of a call's milliseconds by the density, at the density of the plan."""
    step = 1e-3
    more = dataclasses.replace(plan, density=min(plan.density, 1.0 - 2 * step) + step)
    less = dataclasses.replace(plan, density=min(plan.density, 1.0 - 2 * step))
    longer = sum(sparse_ms(shape, more, calibration).stages.values())
    return (longer - sum(sparse_ms(shape, less, calibration).stages.values())) / step
