"""Error of a model that was never tuned, estimated from measurements on another model.

The error of an attention output follows a law fitted to the attention of one small video DiT (2,304
tokens, head dim 64; script `benchmarks/tuning/local_error.py`, record
`benchmarks/results/cpu/local_error.json`). The error of the model's output follows from it by the
ratio of that model's median layer (`benchmarks/results/cpu/sensitivity.json`). One call is off the
law by a factor of 1.4, typically. Layers of the same model differ from the median by factors of two
to fifteen, and other models may differ more. The estimate is good for ranking plans and promises no
quality; `svg-ear tune` measures the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

BASIS = "default curve of another model, not measured on this one"

MODEL_ERROR_RATIO = 0.095
"""Relative error of the model's output over the relative error of the attention output of the one
layer that is sparse."""


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
_LEAST_DENSITY = 0.02  # the law was fitted from 0.05 on, and would be infinite at 0


def attention_error(
    density: float, queries_per_cluster: float, keys_per_cluster: float, form: Compensation
) -> float:
    """Relative L2 error of one attention output, at most 1.

    Args:
        density: fraction of the area computed exactly, in [0, 1].
        queries_per_cluster, keys_per_cluster: mean cluster sizes in tokens.
        form: compensation of the skipped blocks.
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
        density: fraction of the area computed exactly. The density of the plan is not used, since
            routing may decide it at run time.
        plan: its clusters and its compensation are used.
        q_tokens, k_tokens: numbers of clustered tokens.
    """
    q_clusters, k_clusters = plan.clusters(q_tokens, k_tokens)
    sizes = q_tokens / q_clusters, k_tokens / k_clusters
    return MODEL_ERROR_RATIO * attention_error(density, *sizes, plan.compensation)
