"""What compensation leaves out, estimated while a call runs and no dense result is at hand.

A skipped block (i, j) acts on a query q with its mean value instead of the value that q would
weight. To leading order the difference is ``s Cov_ij(v, k) q`` in the centroid form, which is exact
at q = 0; ``Cov_ij`` is the covariance of values and keys in the block. The Gaussian form leaves the
part in which the covariance of the block differs from the pooled one; the same is estimated for it.
The size is estimated by the spreads alone, ``s * sigma_v(j) * sigma_k(j) * |q|`` over sqrt(D), as
for a covariance without a preferred direction, weighted by the block's part of the row's mass.

An estimate to compare calls with, not an error in any unit: `local_error` measures how it goes
along with the real error, less well for the Gaussian form than for the centroid form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg_ear_compile.kernels.clustering import cluster_means
from svg_ear_compile.kernels.clusters import Clusters


def spread(x: Tensor, found: Clusters) -> Tensor:
    """Root mean square distance of each cluster's tokens from their mean, (B, H, C) float32.

    Args:
        x: (B, H, N, D).
        found: clusters of x's tokens.
    """
    wide, labels = x.float(), found.labels.long()
    means, _ = cluster_means(wide, labels, found.sizes.shape[-1])
    # Tokens outside of the clusters (text, padding) are measured against 0 and never read.
    padded = torch.nn.functional.pad(means, (0, 0, 0, 2))
    center = padded.gather(2, labels.unsqueeze(-1).expand_as(wide))
    square = (wide - center).square().sum(-1, keepdim=True)
    return cluster_means(square, labels, found.sizes.shape[-1])[0].squeeze(-1).sqrt()


def residual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Clusters,
    keys: Clusters,
    exact: Tensor,
    scale: float,
) -> Tensor:
    """Estimated relative RMS error of one call's output, (B, H) float32.

    Args:
        q: (B, H, N_q, D). k, v: (B, H, N_k, D).
        queries, keys: clusters of H heads.
        exact: (B, H, Qc, Kc) bool, blocks computed exactly.
        scale: logit scale.
    """
    sizes = keys.sizes.float()
    logits = scale * queries.centroids.float() @ keys.centroids.float().transpose(2, 3)
    mass = torch.softmax(logits + sizes.log().unsqueeze(2), -1)  # [B, H, Qc, Kc], 0 where empty
    block = scale * spread(v, keys) * spread(k, keys) / math.sqrt(q.shape[-1])  # [B, H, Kc]
    skipped = (mass * block.unsqueeze(2)).square().masked_fill(exact, 0.0).sum(-1)  # [B, H, Qc]
    square = spread(q, queries).square() + queries.centroids.float().square().sum(-1)  # of |q|
    error = (skipped * square * queries.sizes).sum(-1)
    value_means, _ = cluster_means(v.float(), keys.labels.long(), keys.sizes.shape[-1])
    # |output|^2 by the centroids, so that a layer's unit drops out.
    out = ((mass @ value_means).square().sum(-1) * queries.sizes).sum(-1)
    return (error / out.clamp(min=torch.finfo(out.dtype).tiny)).sqrt()
