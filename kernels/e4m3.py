"""``precision="fp8"``: queries and keys of the exact logits in e4m3, the 8-bit float.

e4m3 keeps four significant bits. Within 14 powers of two below the largest number, which is far
more than queries and keys span, its relative error is at most 1/16. So one power of two for each
query and one for each head of keys is all the scaling that it needs. Keys are taken less their
mean, a shift of all logits of a query by the same number, because a part that all keys have in
common would be most of their rounding error.

Rounded are the logits of queries with the keys that are computed one by one. Proxy tokens are not,
since one stands for many keys, and its error would have all their weight; nor are own tokens,
values, weights, nor anything that clusters and block masks are made from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Clusters

LARGEST = 256.0
"""The largest number is scaled to at most this, a power of two; e4m3 ends at 448."""
SMALLEST = 1e-30
"""Rows of smaller numbers are scaled as if their largest number were this."""


class Rounded(NamedTuple):
    """Queries and keys whose products are the exact logits, divided by the logit scale.

    ``q . k_t`` becomes ``q_rounded . k_rounded_t + q . mean``.

    Attributes:
        q: (B, H, N_q, D) rounded queries. k: (B, H, N_k, D) rounded keys less their mean.
        mean: (B, H, D).
    """

    q: Tensor
    k: Tensor
    mean: Tensor

    def per_query_head(self, groups: int) -> Rounded:
        """The keys and the mean repeated for the `groups` query heads of each key head."""
        return Rounded(
            self.q, self.k.repeat_interleave(groups, 1), self.mean.repeat_interleave(groups, 1)
        )


def key_mean(centroids: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the clustered keys of every head, from the centroids (.., Kc, D) of their clusters.

    Args:
        centroids: float32 or wider.
        sizes: (.., Kc) numbers of keys.

    Returns:
        (.., D), 0 without clustered keys.
    """
    weights = sizes.to(centroids.dtype)
    total = (weights.unsqueeze(-1) * centroids).sum(-2)
    return total / weights.sum(-1, keepdim=True).clamp(min=1)


def in_e4m3(q: Tensor, k: Tensor, keys: Clusters) -> Rounded:
    """Queries rounded with a scale for each, keys less their mean with a scale for each head.

    Padding has no part in a scale, nor have numbers that are not finite; these become NaN.

    Args:
        q: (B, H, N_q, D). k: (B, H_kv, N_k, D), both float32 or wider.
        keys: key clusters.
    """
    mean = key_mean(keys.centroids, keys.sizes).to(k.dtype)
    centered = k - mean.unsqueeze(2)
    takes_part = keys.labels <= keys.centroids.shape[2]  # all but padding
    of_keys = _magnitude(centered).amax(-1).masked_fill(~takes_part, 0.0)
    largest = of_keys.amax(-1) if k.shape[2] else of_keys.new_zeros(of_keys.shape[:2])
    return Rounded(
        rounded(q, _magnitude(q).amax(-1, keepdim=True)),
        rounded(centered, largest[..., None, None]),
        mean,
    )


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """x with four significant bits, at the scale of numbers up to `largest`."""
    _, exponent = torch.frexp(largest.clamp(min=SMALLEST))
    # largest < 2^exponent, so that the scaled numbers stay below LARGEST.
    scale = torch.ldexp(torch.full_like(largest, 1 / LARGEST), exponent)
    finite = torch.where(x.isfinite(), x, torch.nan)
    return (finite / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _magnitude(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0).abs()
