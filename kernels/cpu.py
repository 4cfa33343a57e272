"""SVG-EAR attention on a CPU: the definition with the skipped blocks never touched.

Clustering, routing and compensation are the definition's own, already a few large matrix products.
Probe and attend walk one head at a time over keys sorted by cluster, so that a block is a slice.
Half-precision inputs are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svg_ear_compile.kernels.clustering import cluster, cluster_means
from svg_ear_compile.kernels.clusters import Blocks, Clusters, Routed
from svg_ear_compile.kernels.compensation import (
    Corrections,
    ProxyTokens,
    corrections,
    proxy_tokens,
)
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import Implementation, register
from svg_ear_compile.kernels.routing import Probe, route, row_area


@dataclass(frozen=True)
class SortedRouting(Routed):
    """What the attend stage needs besides.

    Attributes:
        order: (B, H, N_k) key tokens sorted by cluster.
        bounds: per head, where each cluster starts in that order; then exact keys, then padding.
    """

    order: Tensor
    bounds: dict[tuple[int, int], list[int]]


def cluster_and_route(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    attn_mask: Tensor | None,
    scale: float,
    text: tuple[int, int],
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None,
) -> SortedRouting:
    """See `reference.cluster_and_route`; query clusters stay as k-means ends."""
    groups = q.shape[1] // k.shape[1]
    wide_q, wide_k = q.float(), k.float()
    queries, keys = cluster(wide_q, wide_k, plan, attn_mask, text, centroids, blocks)
    shared = keys.per_query_head(groups)
    order = shared.labels.argsort(dim=-1, stable=True)  # [B, H, N_k]
    bounds = _bounds(shared)
    if blocks is None:
        probes = [
            _probe(queries.centroids[p], wide_k[at], v[at].float(), bounds[p], scale)
            for p, at in _sorted_keys(order, groups)
        ]
        found = Probe(
            *(torch.stack(part).unflatten(0, q.shape[:2]) for part in zip(*probes, strict=True))
        )
        exact = route(found, queries, shared, plan)
    else:
        exact = blocks.exact
    return SortedRouting(queries, keys, exact, row_area(exact, shared), order, bounds)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Routed,
    compensation: Compensation,
    *,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.attend`; the output has the dtype and layout of q."""
    assert isinstance(routed, SortedRouting), "attend takes what the same implementation routed"
    queries, exact = routed.queries, routed.exact
    groups = q.shape[1] // k.shape[1]
    shared = routed.keys.per_query_head(groups)
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    all_v = wide_v.repeat_interleave(groups, 1)
    value_means, _ = cluster_means(all_v, shared.labels, exact.shape[3])
    proxies = proxy_tokens(shared, value_means)
    corrected = None
    if compensation == "gaussian":
        all_k = wide_k.repeat_interleave(groups, 1)
        corrected = corrections(wide_q, all_k, all_v, queries, shared, value_means, scale)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for p, at in _sorted_keys(routed.order, groups):
        _attend(
            wide_q[p], wide_k[at], wide_v[at], queries.labels[p], routed.bounds[p], exact[p],
            ProxyTokens(*(x[p] for x in proxies)), scale,
            None if corrected is None else Corrections(*(x[p] for x in corrected)),
            out[p], lse[p],
        )  # fmt: skip
    return out, lse if return_lse else lse.new_empty(0)


def _sorted_keys(
    order: Tensor, groups: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int, Tensor]]]:
    """Of every query head its index, and the index of its keys in sorted order."""
    for b in range(order.shape[0]):
        for h in range(order.shape[1]):
            yield (b, h), (b, h // groups, order[b, h])


def _bounds(keys: Clusters) -> dict[tuple[int, int], list[int]]:
    """Per head, where each cluster starts in the sorted keys; then exact keys, then padding."""
    batch, heads, clusters = keys.sizes.shape
    exact = (keys.labels == clusters).sum(-1, keepdim=True)
    starts = torch.cat([keys.sizes, exact], -1).cumsum(-1).tolist()
    return {(b, h): [0, *starts[b][h]] for b in range(batch) for h in range(heads)}


def _probe(centroids: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Probe:
    """`reference.probe` of one head: centroids (Qc, D), k and v (N, D) sorted by cluster."""
    clusters = len(bounds) - 2
    q_clusters = centroids.shape[0]
    log_error = centroids.new_full((q_clusters, clusters), -math.inf)
    log_mass, centroid_logit = log_error.clone(), torch.zeros_like(log_error)
    logits = scale * centroids @ k.T  # [Qc, N]
    for j in range(clusters):
        inside = slice(bounds[j], bounds[j + 1])
        if inside.start == inside.stop:
            continue
        block, values = logits[:, inside], v[inside]
        center = values.mean(0)
        spread = values - center  # [n, D], sums to zero: the expansion below cannot cancel
        c = block.mean(1, keepdim=True)  # the centroid logit is the mean of the block's logits
        shift = block.amax(1, keepdim=True)
        weight, central = (block - shift).exp(), (c - shift).exp()
        lag = weight - central
        error = (
            lag.square().sum(1) * center.square().sum()
            + 2 * (weight * lag) @ (spread @ center)
            + weight.square() @ spread.square().sum(1)
        )
        mass = weight.sum(1, keepdim=True)
        log_error[:, j] = error.clamp(min=0).log() + 2 * shift[:, 0]
        log_mass[:, j] = (mass.log() + shift)[:, 0]
        centroid_logit[:, j] = c[:, 0]
    return Probe(log_error, log_mass, centroid_logit)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_labels: Tensor,
    bounds: list[int],
    exact: Tensor,
    proxies: ProxyTokens,
    scale: float,
    corrected: Corrections | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`reference.softmax_over` of one head, k and v sorted; writes out (N, D) and lse (N,)."""
    q_clusters, clusters = exact.shape
    bias = proxies.bias.masked_fill(exact, -math.inf)  # [Qc, Kc]
    block_of = torch.repeat_interleave(torch.arange(clusters + 1), torch.tensor(bounds).diff())
    taken = torch.nn.functional.pad(exact, (0, 1, 0, 1), value=True)  # [Qc + 1, Kc + 1]
    for i in range(q_clusters + 1):
        rows = (q_labels == i).nonzero().squeeze(1)
        if not rows.numel():
            continue
        columns = taken[i][block_of].nonzero().squeeze(1)
        mine, values = q[rows] * scale, v[columns]
        logits = mine @ k[columns].T
        if i < q_clusters:
            skipped = bias[i].isfinite().nonzero().squeeze(1)
            rest = mine @ proxies.keys[skipped].T + bias[i, skipped]
            if corrected is not None:
                rest += corrected.logit[rows, None]
            logits = torch.cat([logits, rest], 1)
            values = torch.cat([values, proxies.values[skipped]])
        total = logits.logsumexp(1)
        lse[rows] = total
        # A row without keys has no columns or only -inf: its weights must be 0, not NaN.
        weights = (logits - total.masked_fill(total == -math.inf, 0.0)[:, None]).exp()
        result = weights @ values
        if i < q_clusters and corrected is not None:
            result += weights[:, len(columns) :].sum(1, keepdim=True) * corrected.value[rows]
        out[rows] = result.to(out.dtype)


def _no_cpu(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None if q.device.type == "cpu" else f"runs on a CPU, not on {q.device.type}"


CPU = register(Implementation("cpu", _no_cpu, cluster_and_route, attend))
