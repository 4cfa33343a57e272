"""The gate before any speed: sampled rows of a sparse result against the float64 definition."""

from __future__ import annotations

from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.clusters import Clusters, Result
from svg_ear_compile.kernels.own_tokens import has_own_tokens
from svg_ear_compile.kernels.plan import AttentionPlan

GATE = 1e-2
"""Relative error from which no time is printed: arithmetic in bf16 is below it."""


def passes(gate: float, error: float, plan: AttentionPlan) -> bool:
    """Whether a result is right: near its definition, and nearer than dense attention is.

    Args:
        gate: relative error of sampled rows against the definition.
        error: of the whole output against dense attention. Where it is as small as `gate`, the
            inputs are so easy that other blocks would have passed as well.
        plan: at density 1 the definition is dense attention itself.
    """
    return gate < (GATE if plan.is_dense else min(GATE, error / 3))


def definition_rows(
    q: Tensor, k: Tensor, v: Tensor, result: Result, plan: AttentionPlan, head: tuple[int, int],
    rows: Tensor,
) -> Tensor:  # fmt: skip
    """`reference.attend` of a few queries, from the labels and blocks of `result`.

    Proxy tokens are rounded to the inputs' dtype as the kernels hold them, so that what is left is
    the arithmetic.
    """
    b, h = head
    owns = has_own_tokens(plan.compensation, q, k)
    kv = h // (q.shape[1] // k.shape[1])
    scale = q.shape[-1] ** -0.5
    queries, keys = (
        Clusters(*(x[b : b + 1, at : at + 1] for x in found))
        for found, at in ((result.queries, h), (result.keys, kv))
    )
    queries = Clusters(queries.labels[..., rows].long(), queries.centroids, queries.sizes)
    keys = Clusters(keys.labels.long(), keys.centroids.double(), keys.sizes)
    q = q[b : b + 1, h : h + 1, rows].double()
    wide_k, wide_v = (x[b : b + 1, kv : kv + 1].double() for x in (k, v))
    means, _ = reference.cluster_means(wide_v, keys.labels, keys.sizes.shape[-1])
    proxies = reference.proxy_tokens(keys, means)
    corrected = None
    if plan.compensation == "gaussian":
        corrected = reference.corrections(q, wide_k, wide_v, queries, keys, means, scale)
    stored = proxies._replace(
        keys=proxies.keys.to(k.dtype).double(), values=proxies.values.to(k.dtype).double()
    )
    exact = result.block_mask[b : b + 1, h : h + 1]
    out, lse = reference.softmax_over(
        q, wide_k, wide_v, queries.labels, keys.labels, exact, stored, scale, corrected
    )
    if corrected is not None and owns:
        own = keys._replace(labels=keys.labels[..., rows])
        out, _ = reference.with_own_tokens(
            out, lse, q, wide_k[:, :, rows], wide_v[:, :, rows], queries, own, exact, stored, scale,
            corrected,
        )  # fmt: skip
    return out[0, 0]


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; NaN if either has a NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())
