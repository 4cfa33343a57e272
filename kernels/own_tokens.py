"""The own token of every query is exact, in the Gaussian form.

A call with as many queries as keys is self-attention: query t and key t are the same token. Heads
that look at single tokens give most of their mass to it, and no cluster tells one token from its
neighbours. So where the block of a query and its own key is skipped, this one key of it is computed
exactly, and the proxy token stands for the other keys of its cluster, whose means it has. It is one
more pair for each query, and a pair is exact whatever its tokens are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Clusters
from svg_ear_compile.kernels.compensation import Corrections, ProxyTokens
from svg_ear_compile.kernels.plan import Compensation


def has_own_tokens(compensation: Compensation, q: Tensor, k: Tensor) -> bool:
    """True if attention of q (B, H, N_q, D) to k (B, H_kv, N_k, D) has exact own tokens."""
    return compensation == "gaussian" and q.shape[2] == k.shape[2]


def with_own_tokens(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Clusters,
    keys: Clusters,
    block_mask: Tensor,
    proxies: ProxyTokens,
    scale: float,
    corrected: Corrections,
) -> tuple[Tensor, Tensor]:
    """Attention with exact own tokens, from attention without.

    With the weights of all keys and proxy tokens as they were, the weight of one proxy token of n_j
    keys is replaced by that of the own key and that of a proxy token of n_j - 1 keys. Its means are
    ``(n_j k_j - k_t) / (n_j - 1)`` and likewise for the values, its corrections the query's.

    Args:
        out, lse: (B, H, N, D) and (B, H, N), see `reference.softmax_over`.
        q, k, v: (B, H, N, D), every query beside its own key and value.
        queries, keys: clusters of H heads; labels of the same N tokens.
        block_mask: (B, H, Qc, Kc) bool, True for blocks computed exactly.
        proxies, scale, corrected: see `reference.softmax_over`.

    Returns:
        out and lse; unchanged where the own key is exact already, always exact or padding.
    """
    q_clusters, k_clusters = block_mask.shape[2:]
    i, j = queries.labels.clamp(max=q_clusters - 1), keys.labels.clamp(max=k_clusters - 1)
    exact = block_mask.flatten(2).gather(2, i * k_clusters + j)
    skipped = (queries.labels < q_clusters) & (keys.labels < k_clusters) & ~exact
    row = j.unsqueeze(-1).expand_as(q)
    proxy_key, proxy_value = (x.gather(2, row) for x in (proxies.keys, proxies.values))
    count = keys.sizes.gather(2, j).to(q.dtype)
    others = (count - 1).clamp(min=1)  # a cluster of one key leaves no proxy token
    own = scale * (q * k).sum(-1)
    centroid = scale * (q * proxy_key).sum(-1)
    left = (count * centroid - own) / others
    largest = torch.maximum(lse, torch.maximum(own, left + others.log() + corrected.logit))
    shift = torch.where(skipped, largest, 0.0)

    def weight(logit: Tensor) -> Tensor:
        return torch.where(skipped, logit - shift, 0.0).exp()

    kept, of_own = weight(lse), weight(own)
    before = count * weight(centroid + corrected.logit)
    after = torch.where(count > 1, others * weight(left + corrected.logit), 0.0)
    total = kept - before + after + of_own
    change = (after - before).unsqueeze(-1) * corrected.value
    value_left = (count.unsqueeze(-1) * proxy_value - v) / others.unsqueeze(-1)
    mixed = (
        kept.unsqueeze(-1) * out
        - before.unsqueeze(-1) * proxy_value
        + after.unsqueeze(-1) * value_left
        + of_own.unsqueeze(-1) * v
        + change
    ) / total.unsqueeze(-1)
    return torch.where(skipped.unsqueeze(-1), mixed, out), torch.where(
        skipped, shift + total.log(), lse
    )
