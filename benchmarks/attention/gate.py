"""The gate before any speed: sampled rows of a sparse result against the float64 definition."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.clusters import Clusters, Result
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
    q: Tensor, k: Tensor, v: Tensor, result: Result, plan: AttentionPlan, text: tuple[int, int],
    head: tuple[int, int], rows: Tensor,
) -> Tensor:  # fmt: skip
    """`reference.softmax_over` of a few queries, from the labels and blocks of `result`.

    Proxy tokens are rounded to the inputs' dtype as the kernels hold them, so that what is left is
    the arithmetic.
    """
    b, h = head
    kv = h // (q.shape[1] // k.shape[1])
    scale = q.shape[-1] ** -0.5
    keys, values = k[b, kv].double(), v[b, kv].double()
    k_labels, clusters = result.keys.labels[b, kv].long(), result.keys.sizes.shape[-1]
    q_clusters = result.queries.sizes.shape[-1]
    of_rows = Clusters(
        result.queries.labels[b, h, rows].long()[None, None],
        result.queries.centroids[b, h].double()[None, None],
        result.queries.sizes[b : b + 1, h : h + 1],
    )
    of_keys = Clusters(
        k_labels[None, None],
        result.keys.centroids[b, kv].double()[None, None],
        result.keys.sizes[b : b + 1, kv : kv + 1],
    )
    means, _ = reference.cluster_means(values[None, None], of_keys.labels, clusters)
    proxies = reference.proxy_tokens(of_keys, means)
    proxy_key, proxy_value = (x[0, 0].to(q.dtype).double() for x in (proxies.keys, proxies.values))
    corrected = None
    if plan.compensation == "gaussian":
        tokens = (x[None, None] for x in (q[b, h, rows].double(), keys, values))
        corrected = reference.corrections(*tokens, of_rows, of_keys, means, scale)
    out = []
    for place, row in enumerate(rows.tolist()):
        i = int(result.queries.labels[b, h, row])
        query = q[b, h, row].double()
        if i == q_clusters:
            out.append(torch.softmax(scale * keys @ query, 0) @ values)
            continue
        exact = torch.cat([result.exact[b, h, i], result.exact.new_ones(1)])
        taken = exact[k_labels]
        bias = proxies.bias[0, 0].masked_fill(exact[:clusters], -torch.inf)
        value = proxy_value
        if corrected is not None:
            bias = bias + corrected.logit[0, 0, place]
            value = value + corrected.value[0, 0, place]
        logits = torch.cat([scale * keys[taken] @ query, scale * proxy_key @ query + bias])
        out.append(torch.softmax(logits, 0) @ torch.cat([values[taken], value]))
    return torch.stack(out)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; NaN if either has a NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())
