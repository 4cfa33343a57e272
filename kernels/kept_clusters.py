"""Clusters of cached keys from one call to the next: labels are kept, few keys are labelled anew.

A model with a cache of keys attends from a few new tokens to all tokens so far. k-means of all keys
in every call would take longer than the attention itself. Means, sizes and moments of the clusters
are computed from the present keys in every call, so any labels give a valid result: outdated labels
make it less exact, never wrong. A call therefore labels a limited number of keys: first those that
are new or were written again, then those whose cluster was given to new keys, then others in turn.
With the means that follow this is k-means over small batches.

A key is known again by the value that stands beside it in the cache: values have no rotary
positions, so they keep their bits when the keys are rotated anew. Where a key moved in the cache is
no matter, so caches may grow, roll, or be written anywhere. `excess_spread` tells whether labels
still fit: keys may change without their values, and the metric follows the queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Clusters, cold_start
from svg_ear_compile.kernels.kinds import CLUSTERED, EXACT
from svg_ear_compile.kernels.plan import AttentionPlan

BATCHES = 2
"""Keys that a call labels anew, as a multiple of its new keys. With 1, old keys never learn of new
clusters, and the error grows with every chunk; with 2, it stays that of k-means of all keys."""

_SAMPLED = 256  # keys of each head


class KeptClusters(NamedTuple):
    """Clusters of the keys of an earlier call.

    Attributes:
        identities: (B, N) int64, see `identities_of`.
        labels: (B, H_kv, N) integer, see `Clusters`.
        centroids: (B, H_kv, C, D) in the dtype of the keys.
    """

    identities: Tensor
    labels: Tensor
    centroids: Tensor


@dataclass(frozen=True, eq=False)
class CachedKeys:
    """How a call clusters keys that are cached.

    Attributes:
        kept: clusters of an earlier call; None clusters the keys as if they were not cached.
        new: number of keys that may differ from those of the earlier call.
        grows: whether these keys were added since, and get clusters of their own. Otherwise the
            earlier call had them too, with other contents.
        turn: number of earlier calls, by which all keys have their turn.
        labels_all: whether all keys are labelled anew, from the kept centroids.
    """

    kept: KeptClusters | None
    new: int
    grows: bool
    turn: int
    labels_all: bool = False


class Placed(NamedTuple):
    """Kept clusters, and the labels of the present keys as far as they are known.

    Attributes:
        cache: see `CachedKeys`.
        centroids: (B, H_kv, C, D), see `KeptClusters`.
        labels: (B, H_kv, N) int64, in [0, C + 1] of the earlier call.
        changed: (B, N) bool, keys that the earlier call did not have; their labels mean nothing.
    """

    cache: CachedKeys
    centroids: Tensor
    labels: Tensor
    changed: Tensor


@functools.lru_cache(maxsize=16)
def _factors(words: int, device: torch.device) -> Tensor:
    """(words,) odd int64."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (words,), generator=generator) * 2 + 1).to(device)


def identities_of(v: Tensor) -> Tensor:
    """(B, N) int64 that tells tokens apart: a hash of the values of the first head.

    Args:
        v: (B, H_kv, N, D), with D times the size of an element a multiple of 8 bytes.
    """
    # A copy in any case: one token counts as contiguous wherever it lies, also between two words.
    words = v[:, 0].clone(memory_format=torch.contiguous_format).view(torch.int64)  # [B, N, W]
    words = words ^ (words >> 29)  # a change of high bits alone must reach the low ones
    return (words * _factors(words.shape[2], v.device)).sum(-1)


class Continuation(NamedTuple):
    """How the tokens of two calls differ, by the sample of the batch that differs most.

    Attributes:
        known: number of tokens that both have. new: that the later one alone has.
        gone: that the earlier one alone has.
    """

    known: int
    new: int
    gone: int


def continuation(earlier: Tensor, identities: Tensor) -> Continuation:
    """Compare tokens of identities (B, N_earlier) and (B, N); waits for the device.

    Values of zero are no tokens: a cache is empty where nothing has been written.
    """
    _, new = _found(earlier.sort(dim=-1)[0], identities)
    _, gone = _found(identities.sort(dim=-1)[0], earlier)
    is_token = identities != 0
    found = (
        (is_token & ~new).sum(-1).amin(), (is_token & new).sum(-1).amax(),
        ((earlier != 0) & gone).sum(-1).amax(),
    )  # fmt: skip
    return Continuation(*torch.stack(found).tolist())


def _found(known: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) places of identities among sorted ones (B, N_known), and which are not among them."""
    at = torch.searchsorted(known, identities.contiguous()).clamp(max=known.shape[1] - 1)
    return at, known.gather(1, at) != identities


def placed(cache: CachedKeys, identities: Tensor) -> Placed | None:
    """The labels of keys of these identities (B, N), wherever they were in the earlier call.

    None if no clusters are kept.
    """
    kept = cache.kept
    if kept is None:
        return None
    known, order = kept.identities.sort(dim=-1, stable=True)
    at, changed = _found(known, identities)
    here = torch.arange(identities.shape[1], device=identities.device).clamp(max=known.shape[1] - 1)
    source = torch.where(changed, here, order.gather(1, at))  # [B, N]
    labels = kept.labels.gather(2, source.unsqueeze(1).expand(-1, kept.labels.shape[1], -1))
    return Placed(cache, kept.centroids, labels.long(), changed)


def updated_labels(
    k: Tensor,
    kinds: Tensor | None,
    clusters: int,
    update: Placed,
    plan: AttentionPlan,
    kmeans: Callable[[Tensor, Tensor | None, Tensor, int], Clusters],
    regrouped: Callable[[Tensor, Tensor], Clusters],
) -> tuple[Tensor, Tensor]:
    """Labels of all keys, and centroids for the clusters that stay empty.

    Args:
        k: (B, H_kv, N, D).
        kinds: (B|1, H_kv|1, N) uint8, see `kernels.kinds`; None where all keys are clustered.
        clusters: C, at least the number of kept clusters.
        update: see `Placed`.
        plan: for the seed and the iterations of new clusters.
        kmeans: clusters of tokens (B, H_kv, M, D) of given kinds (B|1, H_kv|1, M) or None, from
            centroids (B, H_kv, C', D) in some iterations.
        regrouped: clusters of all keys for given centroids and labels, see `clustering.regrouped`.

    Returns:
        labels (B, H_kv, N) int64 in [0, C + 1], which mean nothing for keys that are not clustered,
        and centroids (B, H_kv, C, D) float32.
    """
    cache, centroids, labels, changed = update
    centroids = centroids.float()
    earlier = centroids.shape[2]
    # Copies of a cluster tie with it, so they cost no key its nearest cluster.
    copies = centroids[:, :, :1].expand(-1, -1, clusters - earlier, -1)
    centroids = torch.cat([centroids, copies], 2)
    labels = torch.where(labels >= earlier, clusters, labels)
    clustered = None if kinds is None else kinds == CLUSTERED  # [B|1, H|1, N]
    fresh = changed.unsqueeze(1)  # [B, 1, N]
    if clustered is not None:
        fresh = fresh & clustered
    given_away = None
    if cache.grows:
        present = regrouped(centroids, labels.masked_fill(changed.unsqueeze(1), clusters))
        given_away, centroids = _seeded(k, fresh, labels, present, cache.new, plan, kmeans)
    # More keys changed than a call labels anew: until their turn they go to any cluster.
    labels = torch.where(fresh & (labels == clusters), 0, labels)

    tokens = k.shape[2]
    count = tokens if cache.labels_all else min(tokens, BATCHES * cache.new)
    if count == tokens:
        return kmeans(k, kinds, centroids, plan.warm_iterations).labels.long(), centroids
    order_of = torch.where(fresh, 0, 2).to(torch.uint8)  # [B, H|1, N] what is labelled first
    if given_away is not None:
        order_of = torch.where(given_away & (order_of > 0), 1, order_of)
    if clustered is not None:
        order_of = torch.where(clustered, order_of, 3)
    first = cache.turn * (count - cache.new) % tokens
    picked = order_of.roll(-first, 2).argsort(dim=-1, stable=True)[..., :count]
    picked = ((picked + first) % tokens).expand(-1, k.shape[1], -1)  # [B, H, M]
    found = kmeans(_taken(k, picked), None, centroids, 1)
    return labels.scatter(2, picked, found.labels.long()), centroids


def _seeded(
    k: Tensor,
    fresh: Tensor,
    labels: Tensor,
    present: Clusters,
    new: int,
    plan: AttentionPlan,
    kmeans: Callable[[Tensor, Tensor | None, Tensor, int], Clusters],
) -> tuple[Tensor, Tensor]:
    """Give clusters of few keys or none to the new keys.

    Args:
        k, plan, kmeans: see `updated_labels`.
        fresh: (B, H_kv|1, N) bool, new keys.
        labels: (B, H_kv, N) int64.
        present: clusters of the other keys.
        new: number of new keys that are looked at.

    Returns:
        (B, H_kv, N) bool, keys whose cluster was given away, and centroids (B, H_kv, C, D) float32.
    """
    clusters = present.centroids.shape[2]
    count = max(1, math.ceil(clusters * new / k.shape[2]))
    at = fresh.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :new]
    inside = fresh.gather(2, at)
    at = at.expand(-1, k.shape[1], -1)
    x = _taken(k, at)
    kinds = torch.where(inside, CLUSTERED, EXACT).to(torch.uint8)
    start = cold_start(x, kinds, count, plan, lambda *given: kmeans(*given).centroids)
    own = kmeans(x, kinds, start, 1)
    slots = present.sizes.argsort(dim=-1, stable=True)[..., :count]  # [B, H, Kn]
    rows = slots.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
    taken = own.sizes > 0
    centroids = present.centroids.float()
    seeds = torch.where(taken.unsqueeze(-1), own.centroids.float(), centroids.gather(2, rows))
    given = torch.zeros(*labels.shape[:2], clusters + 2, dtype=torch.bool, device=k.device)
    given.scatter_(2, slots, taken)
    return given.gather(2, labels), centroids.scatter(2, rows, seeds)


def _taken(k: Tensor, at: Tensor) -> Tensor:
    """(B, H, M, D) tokens of k at places (B, H, M)."""
    return k.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, k.shape[3]))


def excess_spread(k: Tensor, keys: Clusters, metric: Tensor | None) -> Tensor:
    """() float32: how much nearer than its own cluster the nearest one is, by a sample of the keys.

    The excess of the squared distances, relative to the distances from the nearest centroid. Just
    after k-means it is a few thousandths; with labels that mean nothing it is near 1.

    Args:
        k: (B, H_kv, N, D).
        keys: clusters of k.
        metric: (B, H_kv, D, D), see `clustering.kmeans`; None is Euclidean.
    """
    clusters, tokens = keys.centroids.shape[2], k.shape[2]
    at = torch.arange(min(_SAMPLED, tokens), device=k.device) * tokens // min(_SAMPLED, tokens)
    x, labels = k[:, :, at].float(), keys.labels[:, :, at].long()
    inside = (labels < clusters) & x.isfinite().all(-1)
    x = torch.where(inside.unsqueeze(-1), x, 0.0)
    centroids = keys.centroids.float()
    aims, own_aims = (centroids, x) if metric is None else (centroids @ metric, x @ metric)
    distance = (centroids * aims).sum(-1).unsqueeze(2) - 2 * x @ aims.transpose(2, 3)
    distance = distance.masked_fill((keys.sizes == 0).unsqueeze(2), math.inf)  # [B, H, S, C]
    own = distance.gather(3, labels.clamp(max=clusters - 1).unsqueeze(-1)).squeeze(-1)
    nearest = distance.amin(-1)
    total = torch.where(inside, nearest + (x * own_aims).sum(-1), 0.0).sum()
    excess = torch.where(inside, own - nearest, 0.0).sum()
    return excess / total.clamp(min=torch.finfo(total.dtype).tiny)
