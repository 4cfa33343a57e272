"""The error of a model that was never calibrated: a curve measured on another model, and said so.

The law is fitted to the attention of one small video DiT (2,304 tokens, 64 channels a head; script
`benchmarks/tuning/local_error.py`, record `benchmarks/results/cpu/local_error.json`). What an error
in one layer does to the output of a whole model is that model's median layer
(`benchmarks/results/cpu/sensitivity.json`). Layers of the same model stray from it by factors of
two to fifteen, other models may stray more: good for ranking plans, no promise of quality.
`svg-ear tune` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

BASIS = "default curve of another model, not measured on this one"

SPREAD = math.exp(0.36)
"""Factor by which single calls stray from the law: their levels and its own residual together."""

MODEL_SHARE = 0.095
"""Relative error of the model's output over that of one layer's attention output."""


@dataclass(frozen=True)
class _Law:
    """error = (1 - density) * exp(intercept) * density^a * queries^b * keys^c per cluster."""

    intercept: float
    density: float
    queries: float
    keys: float


_LAWS: dict[Compensation, _Law] = {
    "gaussian": _Law(-6.54, -0.633, 0.413, 0.347),
    "centroid": _Law(-5.83, -0.600, 0.376, 0.299),
}
_LEAST_DENSITY = 0.02  # the law was fitted from 0.05 up; it must not run off to infinity at 0


def attention_error(
    density: float, queries_per_cluster: float, keys_per_cluster: float, form: Compensation
) -> float:
    """Relative L2 error of one attention output, at most 1.

    Args:
        density: share computed exactly, in [0, 1].
        queries_per_cluster, keys_per_cluster: mean cluster sizes in tokens.
        form: how the rest is compensated.
    """
    if density >= 1.0:
        return 0.0
    law = _LAWS[form]
    log_error = (
        law.intercept
        + law.density * math.log(max(density, _LEAST_DENSITY))
        + law.queries * math.log(queries_per_cluster)
        + law.keys * math.log(keys_per_cluster)
    )
    return min(1.0, (1.0 - density) * math.exp(log_error))


def model_error(density: float, plan: AttentionPlan, q_tokens: int, k_tokens: int) -> float:
    """Relative RMS error of a model's output with one layer sparse at `density`.

    Args:
        density: share computed exactly; that of the plan may be decided at run time.
        plan: clusters and form.
        q_tokens, k_tokens: clustered tokens.
    """
    q_clusters, k_clusters = plan.clusters(q_tokens, k_tokens)
    sizes = q_tokens / q_clusters, k_tokens / k_clusters
    return MODEL_SHARE * attention_error(density, *sizes, plan.compensation)
