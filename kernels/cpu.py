"""SVG-EAR attention on a CPU: the result of the definition, without computing skipped blocks.

Clustering, routing and compensation are the code of the definition, which consists of a few large
matrix products. Block scoring and attention take one head at a time, with the keys sorted by
cluster, so that a block is a slice. Half-precision inputs are computed in float32.
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
from svg_ear_compile.kernels.kept_clusters import Placed
from svg_ear_compile.kernels.kinds import TokenKinds
from svg_ear_compile.kernels.own_tokens import has_own_tokens, with_own_tokens
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import Implementation, register
from svg_ear_compile.kernels.routing import BlockScores, route, row_area


@dataclass(frozen=True)
class SortedRouting(Routed):
    """`Routed` with the order of the keys for the attend stage.

    Attributes:
        order: (B, H, N_k) key tokens sorted by cluster, then the always exact keys, then padding.
        bounds: for each head, where every cluster, the always exact keys and the padding start in
            that order.
    """

    order: Tensor
    bounds: dict[tuple[int, int], list[int]]


def cluster_and_route(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    kinds: TokenKinds,
    scale: float,
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None,
    update: Placed | None = None,
) -> SortedRouting:
    """See `reference.cluster_and_route`; query clusters are not aligned to a tile."""
    groups = q.shape[1] // k.shape[1]
    float_q, float_k = q.float(), k.float()
    queries, keys, excess = cluster(float_q, float_k, plan, kinds, centroids, blocks, update=update)
    head_keys = keys.per_query_head(groups)
    order = head_keys.labels.argsort(dim=-1, stable=True)  # [B, H, N_k]
    bounds = _bounds(head_keys)
    if blocks is None:
        by_head = [
            _score_blocks(queries.centroids[p], float_k[at], v[at].float(), bounds[p], scale)
            for p, at in _sorted_keys(order, groups)
        ]
        scores = BlockScores(
            *(torch.stack(part).unflatten(0, q.shape[:2]) for part in zip(*by_head, strict=True))
        )
        block_mask = route(scores, queries, head_keys, plan)
    else:
        block_mask = blocks.block_mask
    area = row_area(block_mask, head_keys)
    return SortedRouting(queries, keys, block_mask, area, order, bounds, excess=excess)


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
    assert isinstance(routed, SortedRouting), "routed by another implementation"
    queries, block_mask = routed.queries, routed.block_mask
    groups = q.shape[1] // k.shape[1]
    head_keys = routed.keys.per_query_head(groups)
    float_q, float_k, float_v = q.float(), k.float(), v.float()
    all_v = float_v.repeat_interleave(groups, 1)
    value_means, _ = cluster_means(all_v, head_keys.labels, block_mask.shape[3])
    proxies = proxy_tokens(head_keys, value_means)
    corrected = None
    if compensation == "gaussian":
        all_k = float_k.repeat_interleave(groups, 1)
        corrected = corrections(float_q, all_k, all_v, queries, head_keys, value_means, scale)
    out, lse = torch.empty_like(float_q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for p, at in _sorted_keys(routed.order, groups):
        _attend(
            float_q[p], float_k[at], float_v[at], queries.labels[p], routed.bounds[p],
            block_mask[p],
            ProxyTokens(*(x[p] for x in proxies)), scale,
            None if corrected is None else Corrections(*(x[p] for x in corrected)),
            out[p], lse[p],
        )  # fmt: skip
    if corrected is not None and has_own_tokens(compensation, q, k):
        out, lse = with_own_tokens(
            out, lse, float_q, all_k, all_v, queries, head_keys, block_mask, proxies, scale,
            corrected,
        )  # fmt: skip
    result = torch.empty_like(q)
    return result.copy_(out), lse if return_lse else lse.new_empty(0)


def _sorted_keys(
    order: Tensor, groups: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int, Tensor]]]:
    """Of every query head: its index, and the index of its keys in sorted order."""
    for b in range(order.shape[0]):
        for h in range(order.shape[1]):
            yield (b, h), (b, h // groups, order[b, h])


def _bounds(keys: Clusters) -> dict[tuple[int, int], list[int]]:
    """See `SortedRouting.bounds`."""
    batch, heads, clusters = keys.sizes.shape
    exact = (keys.labels == clusters).sum(-1, keepdim=True)
    starts = torch.cat([keys.sizes, exact], -1).cumsum(-1).tolist()
    return {(b, h): [0, *starts[b][h]] for b in range(batch) for h in range(heads)}


def _score_blocks(
    centroids: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float
) -> BlockScores:
    """`reference.score_blocks` of one head: centroids (Qc, D), k and v (N, D) sorted by cluster."""
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
        spread = values - center  # [n, D]; its sum is 0, so the terms below do not cancel
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
    return BlockScores(log_error, log_mass, centroid_logit)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_labels: Tensor,
    bounds: list[int],
    block_mask: Tensor,
    proxies: ProxyTokens,
    scale: float,
    corrected: Corrections | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`reference.softmax_over` of one head, k and v sorted; writes out (N, D) and lse (N,)."""
    q_clusters, clusters = block_mask.shape
    bias = proxies.bias.masked_fill(block_mask, -math.inf)  # [Qc, Kc]
    block_of = torch.repeat_interleave(torch.arange(clusters + 1), torch.tensor(bounds).diff())
    taken = torch.nn.functional.pad(block_mask, (0, 1, 0, 1), value=True)  # [Qc + 1, Kc + 1]
    for i in range(q_clusters + 1):
        rows = (q_labels == i).nonzero().squeeze(1)
        if not rows.numel():
            continue
        columns = taken[i][block_of].nonzero().squeeze(1)
        mine, values = q[rows] * scale, v[columns]
        logits = mine @ k[columns].T
        if i < q_clusters:
            skipped = bias[i].isfinite().nonzero().squeeze(1)
            of_skipped = mine @ proxies.keys[skipped].T + bias[i, skipped]
            if corrected is not None:
                of_skipped += corrected.logit[rows, None]
            logits = torch.cat([logits, of_skipped], 1)
            values = torch.cat([values, proxies.values[skipped]])
        total = logits.logsumexp(1)
        lse[rows] = total
        # Without any key a row has no columns, or only logits of -inf: weights of 0, not NaN.
        weights = (logits - total.masked_fill(total == -math.inf, 0.0)[:, None]).exp()
        result = weights @ values
        if i < q_clusters and corrected is not None:
            result += weights[:, len(columns) :].sum(1, keepdim=True) * corrected.value[rows]
        out[rows] = result.to(out.dtype)


def _no_cpu(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None if q.device.type == "cpu" else f"runs on a CPU, not on {q.device.type}"


CPU = register(Implementation("cpu", _no_cpu, cluster_and_route, attend))
