"""Compensation of skipped blocks in plain PyTorch: proxy tokens and their Gaussian corrections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Clusters

LARGEST_LOGIT_CORRECTION = 1.0
"""Largest logit correction that is applied. A query with a larger one gives most of its weight to
few keys of a cluster, which are not distributed like a Gaussian: without the limit the error of
some heads is larger than in the centroid form."""


class ProxyTokens(NamedTuple):
    """One token for every key cluster, which replaces the keys of the cluster in skipped blocks.

    Attributes:
        keys, values: (B, H, Kc, D).
        bias: (B, H, Kc) added to the logits, -inf for an empty cluster.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


class Corrections(NamedTuple):
    """Corrections of the Gaussian form for the proxy tokens of each query, see `corrections`.

    Attributes:
        logit: (B, H, N_q) added to the logits of the proxy tokens.
        value: (B, H, N_q, D) added to the values of the proxy tokens.
    """

    logit: Tensor
    value: Tensor


def proxy_tokens(keys: Clusters, value_means: Tensor) -> ProxyTokens:
    """Key and value means, with ``log n_j`` as the bias: the paper's centroid form.

    Args:
        keys: key clusters.
        value_means: (B, H, Kc, D).
    """
    return ProxyTokens(keys.centroids, value_means, keys.sizes.to(value_means.dtype).log())


def pooled_covariances(
    k: Tensor, v: Tensor, keys: Clusters, value_means: Tensor
) -> tuple[Tensor, Tensor]:
    """Covariance of keys, and of values with keys, within clusters; pooled over those of a head.

    Args:
        k, v: (B, H, N_k, D).
        keys: key clusters; always exact keys and padding are left out.
        value_means: (B, H, Kc, D).

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
    """Corrections that the Gaussian form adds to the centroid form.

    Let keys and values of a cluster be jointly Gaussian. Under weights ``exp(s q . k)`` the cluster
    then has exactly the log-mass ``log n_j + s q . k_j + s^2/2 q' Cov(k, k) q`` and the mean value
    ``v_j + s Cov(v, k) q``. One covariance, pooled over the clusters of a head, is nearly as good
    as one for each cluster; with it both corrections depend on the query alone. Where the logit
    correction of a query would be more than `LARGEST_LOGIT_CORRECTION`, both corrections are those
    of the query multiplied by a clip factor, at which the logit correction is that limit.

    Args:
        q: (B, H, N_q, D). k, v: (B, H, N_k, D).
        queries, keys: query and key clusters, both of H heads.
        value_means: (B, H, Kc, D).
        scale: s.

    Returns:
        `Corrections`, 0 for queries that are in no cluster.
    """
    of_keys, of_values = pooled_covariances(k, v, keys, value_means)
    clustered = (queries.labels < queries.centroids.shape[2]).unsqueeze(-1)
    clustered_q = torch.where(clustered, q, 0.0)
    logit = scale**2 / 2 * (clustered_q @ of_keys * clustered_q).sum(-1)
    # A correction of 0 may be rounded to a number below 0.
    clip = (LARGEST_LOGIT_CORRECTION / logit.clamp(min=LARGEST_LOGIT_CORRECTION)).sqrt()
    clipped = clustered_q * clip.unsqueeze(-1)
    value = scale * clipped @ of_values.transpose(2, 3)
    return Corrections(logit.clamp(max=LARGEST_LOGIT_CORRECTION), value)
