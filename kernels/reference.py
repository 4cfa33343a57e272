"""SVG-EAR attention in plain PyTorch: the definition that every implementation is tested against.

The definition takes any float dtype and any device; the tests use it in float64. The five stages
are those of "SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation via
Error-aware Routing" (arXiv 2603.08982). The ``"gaussian"`` form of the compensation and the
``"logits"`` metric of the clusters are ours. Clustering, routing and compensation have files of
their own, which the CPU implementation uses too. Block scoring and attention are defined here; the
CPU implementation has its own code for them. The definition is not a registered implementation:
nothing falls back on it. The notation is that of `kernels.clusters`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svg_ear_compile.kernels.clustering import (
    as_metric,
    cluster,
    cluster_means,
    is_kind,
    kmeans,
    logit_metrics,
)
from svg_ear_compile.kernels.clusters import (
    Blocks,
    Clusters,
    QueryTile,
    Result,
    Routed,
    initial_centroids,
)
from svg_ear_compile.kernels.compensation import (
    LARGEST_LOGIT_CORRECTION,
    Corrections,
    ProxyTokens,
    corrections,
    proxy_tokens,
)
from svg_ear_compile.kernels.kept_clusters import Placed
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, TokenKinds
from svg_ear_compile.kernels.own_tokens import has_own_tokens, with_own_tokens
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.routing import BlockScores, route, row_area, take_until

# The whole definition under one name, for tests and benchmarks.
__all__ = [
    "LARGEST_LOGIT_CORRECTION", "BlockScores", "Blocks", "Clusters", "Corrections", "ProxyTokens",
    "QueryTile", "Result", "as_metric", "attend", "cluster", "cluster_and_route", "cluster_means",
    "corrections", "initial_centroids", "is_kind", "kmeans", "logit_metrics",
    "proxy_tokens", "route", "row_area", "score_blocks", "softmax_over", "sparse_attention",
    "take_until", "with_own_tokens",
]  # fmt: skip


def score_blocks(
    queries: Clusters, keys: Clusters, k: Tensor, v: Tensor, scale: float
) -> BlockScores:
    """Stage 2. Scores of every block, computed with its query centroid.

    ``E_ij = sum_t || exp(a_it) v_t - exp(c_ij) v_j ||^2`` with ``a_it = s q_i . k_t`` and
    ``c_ij = s q_i . k_j``. Before the exponential, the largest logit of the block is subtracted.

    Args:
        queries, keys: clusters, both of H heads.
        k, v: (B, H, N_k, D).
        scale: s.

    Returns:
        `BlockScores`; log_error and log_mass of an empty key cluster are -inf.
    """
    clusters = keys.centroids.shape[2]
    member = torch.nn.functional.one_hot(keys.labels, clusters + 2)[..., :clusters].bool()
    logits = scale * queries.centroids @ k.transpose(2, 3)  # [B, H, Qc, N]
    value_means, _ = cluster_means(v, keys.labels, clusters)
    log_error, log_mass = [], []
    centroid_logit = scale * queries.centroids @ keys.centroids.transpose(2, 3)
    for j in range(clusters):
        inside = member[..., j].unsqueeze(2)  # [B, H, 1, N]
        block = logits.masked_fill(~inside, -math.inf)
        c = centroid_logit[..., j : j + 1]  # [B, H, Qc, 1]
        shift = block.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weight = (block - shift).exp()  # [B, H, Qc, N]
        mass = weight.sum(-1)
        central = inside * (c - shift).exp()  # exp(c) at the block's keys
        mean = value_means[:, :, j]  # [B, H, D]
        norm = v.square().sum(-1).unsqueeze(2)
        dot = (v @ mean.unsqueeze(-1)).transpose(2, 3)  # [B, H, 1, N]
        square = mean.square().sum(-1)[..., None, None]
        error = (
            weight.square() * norm - 2 * weight * central * dot + central.square() * square
        ).sum(-1)
        log_error.append(error.clamp(min=0).log() + 2 * shift.squeeze(-1))
        log_mass.append(mass.log() + shift.squeeze(-1))
    return BlockScores(torch.stack(log_error, -1), torch.stack(log_mass, -1), centroid_logit)


def cluster_and_route(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    kinds: TokenKinds = ALL_CLUSTERED,
    scale: float,
    centroids: tuple[Tensor, Tensor] | None = None,
    blocks: Blocks | None = None,
    query_tile: QueryTile | None = None,
    update: Placed | None = None,
) -> Routed:
    """Stages 1 to 3: clusters of queries and keys, and the block mask.

    Args:
        q: (B, H, N_q, D) of any float dtype. k, v: (B, H_kv, N_k, D), H_kv dividing H.
        plan: see `AttentionPlan`.
        kinds: which tokens are clustered, always exact or padding.
        scale: logit scale.
        centroids: remembered centroids (B, H, Qc, D) and (B, H_kv, Kc, D); None starts cold.
        blocks: labels and block mask of an earlier call under this plan, to be reused together with
            the `centroids` of that call; None recomputes them.
        query_tile: tile that newly computed query clusters are aligned to, see
            `clustering.tile_aligned`; None leaves the clusters as k-means ends.
        update: kept clusters of cached keys; None clusters all keys.
    """
    groups = q.shape[1] // k.shape[1]
    queries, keys, excess = cluster(q, k, plan, kinds, centroids, blocks, query_tile, update)
    head_keys = keys.per_query_head(groups)
    if blocks is None:
        all_k, all_v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = score_blocks(queries, head_keys, all_k, all_v, scale)
        block_mask = route(scores, queries, head_keys, plan)
    else:
        block_mask = blocks.block_mask
    return Routed(queries, keys, block_mask, row_area(block_mask, head_keys), excess=excess)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Routed,
    compensation: Compensation,
    *,
    scale: float,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Stages 4 and 5: proxy tokens of the skipped blocks, `softmax_over`, then the own tokens.

    Args:
        q: (B, H, N_q, D). k, v: (B, H_kv, N_k, D).
        routed: result of `cluster_and_route` for these q, k and v.
        compensation: form of the skipped blocks.
        scale: logit scale.
        return_lse: whether to return the log-sum-exp; otherwise it is empty.

    Returns:
        out (B, H, N_q, D) and lse (B, H, N_q).
    """
    groups = q.shape[1] // k.shape[1]
    head_keys = routed.keys.per_query_head(groups)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    value_means, _ = cluster_means(v, head_keys.labels, routed.block_mask.shape[3])
    proxies = proxy_tokens(head_keys, value_means)
    corrected = None
    if compensation == "gaussian":
        corrected = corrections(q, k, v, routed.queries, head_keys, value_means, scale)
    out, lse = softmax_over(
        q, k, v, routed.queries.labels, head_keys.labels, routed.block_mask, proxies, scale,
        corrected,
    )  # fmt: skip
    if corrected is not None and has_own_tokens(compensation, q, k):
        out, lse = with_own_tokens(
            out, lse, q, k, v, routed.queries, head_keys, routed.block_mask, proxies, scale,
            corrected,
        )  # fmt: skip
    return out, lse if return_lse else lse.new_empty(0)


def softmax_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_labels: Tensor,
    k_labels: Tensor,
    block_mask: Tensor,
    proxies: ProxyTokens,
    scale: float,
    corrected: Corrections | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over exact keys and the proxy tokens of skipped blocks.

    Queries labelled ``Qc`` (always exact, or not finite) attend to every key. Keys labelled ``Kc``
    are exact for every query, keys labelled ``Kc + 1`` are padding. A query without any key gets
    output 0 and log-sum-exp -inf, as with PyTorch's boolean masks.

    Args:
        q: (B, H, N_q, D). k, v: (B, H, N_k, D).
        q_labels: (B, H, N_q). k_labels: (B, H, N_k).
        block_mask: (B, H, Qc, Kc) bool, True for blocks computed exactly.
        proxies: see `compensation.proxy_tokens`.
        scale: s.
        corrected: corrections of the Gaussian form, see `compensation.corrections`; None for the
            centroid form.

    Returns:
        out (B, H, N_q, D) and lse (B, H, N_q).
    """
    batch, heads, q_clusters, k_clusters = block_mask.shape
    # Row Qc: all keys but padding. Column Kc: keys of every query. Column Kc + 1: padding.
    allowed = block_mask.new_ones(batch, heads, q_clusters + 1, k_clusters + 2)
    allowed[:, :, :q_clusters, :k_clusters] = block_mask
    allowed[..., k_clusters + 1] = False
    bias = proxies.bias.unsqueeze(2).masked_fill(block_mask, -math.inf)  # [B, H, Qc, Kc]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for b in range(batch):
        for h in range(heads):
            row = q_labels[b, h]
            logits = scale * q[b, h] @ k[b, h].T
            logits = logits.masked_fill(~allowed[b, h][row][:, k_labels[b, h]], -math.inf)
            merged_lse = torch.logsumexp(logits, -1)
            weights = torch.softmax(logits, -1).masked_fill((merged_lse == -math.inf)[:, None], 0.0)
            result = weights @ v[b, h]
            for i in range(q_clusters):
                mine = row == i
                if not mine.any():
                    continue
                of_skipped = scale * q[b, h][mine] @ proxies.keys[b, h].T + bias[b, h, i]
                if corrected is not None:
                    of_skipped = of_skipped + corrected.logit[b, h][mine][:, None]
                of_skipped = of_skipped.masked_fill(bias[b, h, i] == -math.inf, -math.inf)
                both = torch.cat([logits[mine], of_skipped], -1)
                merged_lse[mine] = torch.logsumexp(both, -1)
                p = torch.softmax(both, -1).masked_fill(
                    (merged_lse[mine] == -math.inf)[:, None], 0.0
                )
                of_keys, of_proxies = p[:, : k.shape[2]], p[:, k.shape[2] :]
                result[mine] = of_keys @ v[b, h] + of_proxies @ proxies.values[b, h]
                if corrected is not None:
                    weight = of_proxies.sum(-1, keepdim=True)
                    result[mine] += weight * corrected.value[b, h][mine]
            out[b, h], lse[b, h] = result, merged_lse
    return out, lse


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    query_tile: QueryTile | None = None,
    **more: Any,
) -> Result:
    """`cluster_and_route`, then `attend`.

    Args:
        q, k, v, plan, query_tile: see `cluster_and_route`.
        scale: logit scale, 1/sqrt(D) by default.
        more: further arguments of `cluster_and_route`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    routed = cluster_and_route(q, k, v, plan, scale=scale, query_tile=query_tile, **more)
    out, lse = attend(q, k, v, routed, plan.compensation, scale=scale)
    return Result(
        out, lse, routed.queries, routed.keys, routed.block_mask, routed.row_area,
        excess=routed.excess,
    )  # fmt: skip
