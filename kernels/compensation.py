"""How skipped blocks act, in plain PyTorch: proxy tokens, and what the Gaussian form adds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Clusters

LARGEST_LOGIT_CORRECTION = 1.0
"""Correction in log-mass up to which the Gaussian is believed. A query farther from 0 sees the few
keys that it is near to, and no Gaussian: without a limit some heads lose more than they gain."""


class ProxyTokens(NamedTuple):
    """One token for every key cluster, which stands for its skipped blocks.

    Attributes:
        keys, values: (B, H, Kc, D).
        bias: (B, H, Kc) added to the logits, -inf for an empty cluster.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


class Corrections(NamedTuple):
    """What the Gaussian form adds to every proxy token of a query, see `corrections`.

    Attributes:
        logit: (B, H, N_q) added to the logit.
        value: (B, H, N_q, D) added to the value.
    """

    logit: Tensor
    value: Tensor


def proxy_tokens(keys: Clusters, value_means: Tensor) -> ProxyTokens:
    """Centroids with the mass of their clusters, ``log n_j``: the paper's centroid form.

    Args:
        keys: clusters.
        value_means: (B, H, Kc, D).
    """
    return ProxyTokens(keys.centroids, value_means, keys.sizes.to(value_means.dtype).log())


def pooled_covariances(
    k: Tensor, v: Tensor, keys: Clusters, value_means: Tensor
) -> tuple[Tensor, Tensor]:
    """Covariance of keys, and of values with keys, within the clusters of a head, pooled.

    Args:
        k, v: (B, H, N_k, D).
        keys, value_means: clusters, and (B, H, Kc, D); text and padding have no part.

    Returns:
        ``Cov(k, k)`` and ``Cov(v, k)``, both (B, H, D, D): means over the clustered keys of
        ``(k_t - k_j)(k_t - k_j)'`` and ``(v_t - v_j)(k_t - k_j)'``.
    """

    def away(x: Tensor, means: Tensor) -> Tensor:
        clusters = means.shape[2]
        label = keys.labels.clamp(max=clusters - 1).unsqueeze(-1).expand_as(x)
        inside = (keys.labels < clusters).unsqueeze(-1)
        return torch.where(inside, x - means.gather(2, label), 0.0)

    from_mean = away(k, keys.centroids)
    count = keys.sizes.sum(-1).clamp(min=1)[..., None, None]
    pairs = (from_mean, away(v, value_means))
    of_keys, of_values = (x.transpose(2, 3) @ from_mean / count for x in pairs)
    return of_keys, of_values


def corrections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Clusters,
    keys: Clusters,
    value_means: Tensor,
    scale: float,
) -> Corrections:
    """What the Gaussian form adds to the centroid form: one covariance for all clusters of a head.

    Under weights ``exp(s q . k)`` a cluster of jointly Gaussian keys and values has the log-mass
    ``log n_j + s q . k_j + s^2/2 q' Cov(k, k) q`` and the mean value ``v_j + s Cov(v, k) q``,
    exactly. The covariances of single clusters serve hardly better than the pooled one, with which
    both corrections are the query's own, the same for all its proxy tokens. A query whose logit
    correction is more than `LARGEST_LOGIT_CORRECTION` is shortened to where it is that, by the clip
    factor, for both corrections.

    Args:
        q: (B, H, N_q, D). k, v: (B, H, N_k, D).
        queries, keys, value_means: clusters, and (B, H, Kc, D).
        scale: s.

    Returns:
        `Corrections`, 0 for queries that are in no cluster.
    """
    of_keys, of_values = pooled_covariances(k, v, keys, value_means)
    clustered = (queries.labels < queries.centroids.shape[2]).unsqueeze(-1)
    clustered_q = torch.where(clustered, q, 0.0)
    logit = scale**2 / 2 * (clustered_q @ of_keys * clustered_q).sum(-1)
    # Rounding may leave less than nothing of a correction of 0.
    clip = (LARGEST_LOGIT_CORRECTION / logit.clamp(min=LARGEST_LOGIT_CORRECTION)).sqrt()
    clipped = clustered_q * clip.unsqueeze(-1)
    value = scale * clipped @ of_values.transpose(2, 3)
    return Corrections(logit.clamp(max=LARGEST_LOGIT_CORRECTION), value)
