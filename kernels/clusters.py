"""Types of one attention call that all implementations use, and the cold start of k-means.

Notation: query cluster ``i`` has ``m_i`` queries with mean ``q_i``. Key cluster ``j`` has ``n_j``
keys with means ``k_j`` and ``v_j``. The logit scale is ``s``, the number of clusters ``C``. The
label of a token is its cluster, or ``C`` where the token is always exact (of that kind, see
`kernels.kinds`, or not finite), or ``C + 1`` where it is a padding key, which gets no weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.kinds import CLUSTERED
from svg_ear_compile.kernels.plan import AttentionPlan


class Clusters(NamedTuple):
    """Clusters of the tokens of all heads.

    Attributes:
        labels: (B, H, N) int64 in [0, C + 1], see the module's notation.
        centroids: (B, H, C, D) mean of the tokens of each cluster; an empty cluster keeps its
            initial centroid.
        sizes: (B, H, C) int64 number of tokens in each cluster.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor

    def per_query_head(self, groups: int) -> Clusters:
        """Key clusters of H_kv heads repeated for the `groups` query heads of each key head."""
        return Clusters(*(t.repeat_interleave(groups, 1) for t in self))


class Blocks(NamedTuple):
    """Labels of the tokens and the block mask of a call, for a later step to reuse.

    Attributes:
        q_labels: (B, H, N_q) integer, k_labels: (B, H_kv, N_k) integer, see `Clusters`.
        block_mask: (B, H, Qc, Kc) bool, True for blocks computed exactly.
    """

    q_labels: Tensor
    k_labels: Tensor
    block_mask: Tensor


class QueryTile(NamedTuple):
    """Numbers of queries that an attend stage works on at once; query clusters are aligned to them.

    Attributes:
        subtile: queries of one group of warps; a subtile without queries costs nothing.
        tile: queries that attend to the same gathered keys, a multiple of `subtile`.
    """

    subtile: int
    tile: int

    @property
    def candidates(self) -> int:
        """Number of queries from which a cluster chooses the ones that it gives away."""
        return min(2 * self.subtile, 128)


@dataclass(frozen=True)
class Routed:
    """Result of clustering and routing. An implementation adds what its own attend stage needs.

    Attributes:
        queries: query clusters of the H heads. keys: key clusters of the H_kv heads.
        block_mask: (B, H, Qc, Kc) bool, True for blocks computed exactly.
        row_area: (B, H, Qc) integer, clustered keys computed exactly for each query cluster.
        excess: () float32, see `kept_clusters.excess_spread`; None if no key kept its cluster.
    """

    queries: Clusters
    keys: Clusters
    block_mask: Tensor
    row_area: Tensor
    excess: Tensor | None = field(default=None, kw_only=True)

    def block_lists(self) -> tuple[Tensor, Tensor]:
        """The block mask as lists of key clusters; waits for the device.

        Returns:
            kv_indptr (B * H * Qc + 1,) int32 and kv_indices (blocks,) int32. Rows of blocks are
            counted over batch, head and query cluster in this order. Row r computes the key
            clusters ``kv_indices[kv_indptr[r]:kv_indptr[r + 1]]`` exactly.
        """
        rows = self.block_mask.flatten(0, 2)
        kv_indptr = torch.nn.functional.pad(rows.sum(-1, dtype=torch.int32).cumsum(0), (1, 0))
        return kv_indptr.to(torch.int32), rows.nonzero()[:, 1].to(torch.int32)


@dataclass(frozen=True)
class Result:
    """Output of one attention call, with the clusters and the block mask that it was made with.

    Attributes:
        out: (B, H, N_q, D) in the dtype of q.
        lse: (B, H, N_q) natural log-sum-exp of the logits, float32 or wider.
        queries, keys: see `Clusters`.
        block_mask: (B, H, Qc, Kc) bool, True for blocks computed exactly.
        row_area: (B, H, Qc) integer, clustered keys computed exactly for each query cluster.
        identities: (B, N_k) int64 of cached keys, see `kept_clusters.identities_of`; else None.
        excess: see `Routed`.
    """

    out: Tensor
    lse: Tensor
    queries: Clusters
    keys: Clusters
    block_mask: Tensor
    row_area: Tensor
    identities: Tensor | None = None
    excess: Tensor | None = None

    @property
    def blocks(self) -> Blocks:
        """Labels and block mask for a later step to reuse."""
        return Blocks(self.queries.labels, self.keys.labels, self.block_mask)

    @property
    def exact_pairs(self) -> Tensor:
        """() float64, number of query-key pairs of clustered tokens computed exactly."""
        return (self.row_area * self.queries.sizes).sum(dtype=torch.float64)


def _places_in_strata(count: int, seed: int) -> Tensor:
    """(count,) float32 on the CPU, in [0, 1]: one place drawn from each of `count` equal strata."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


# A call has no time for the small operations that make these two: both are kept. They are made on
# the CPU, so that every device draws the same tokens and no recorded graph makes a kept tensor; and
# outside of inference mode, for a later call may need gradients.
@functools.lru_cache(maxsize=64)
def strata(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) float32 in [0, 1]: one place drawn from each of `count` equal strata."""
    with torch.inference_mode(False):
        return _places_in_strata(count, seed).to(device)


@functools.lru_cache(maxsize=64)
def stratified_places(count: int, tokens: int, seed: int, device: torch.device) -> Tensor:
    """(count,) int64: one token of each of `count` equal strata of all tokens."""
    with torch.inference_mode(False):
        places = (_places_in_strata(count, seed) * tokens).long()
        return places.clamp(0, max(tokens - 1, 0)).to(device)


def stratified_sample(x: Tensor, kinds: Tensor | None, count: int, seed: int) -> Tensor:
    """One token from each of `count` equal strata of the clustered tokens.

    Neighbouring tokens of a video are alike, so strata of the token order cover space and time at
    the cost of one gather. Without the jitter the samples could lie in one column of the image.

    Args:
        x: (B, H, N, D) queries or keys.
        kinds: (B|1, H|1, N) uint8, see `kernels.kinds`; None where all tokens are clustered.
        count: S.
        seed: seed of the jitter.

    Returns:
        (B, H, S, D) in the dtype of x.
    """
    tokens = x.shape[2]
    if kinds is None:
        return x[:, :, stratified_places(count, tokens, seed, x.device)]
    rank = (kinds == CLUSTERED).long().cumsum(-1)  # [B|1, H|1, N] clustered up to and with each
    last = rank[..., -1:]
    wanted = (strata(count, seed, x.device) * last).long() + 1  # [B|1, H|1, S]
    wanted = torch.minimum(wanted, last)  # in 1..n; the last place may be rounded to 1
    index = torch.searchsorted(rank.contiguous(), wanted).clamp(max=tokens - 1)
    return x.gather(2, index.unsqueeze(-1).expand(*x.shape[:2], count, x.shape[3]))


def initial_centroids(x: Tensor, kinds: Tensor | None, clusters: int, seed: int) -> Tensor:
    """`stratified_sample` of as many tokens as clusters, finite."""
    return torch.nan_to_num(stratified_sample(x, kinds, clusters, seed), 0.0, 0.0, 0.0)


SAMPLED_PART = 3
"""The rounds of a cold start but the last look at one of so many tokens."""


def sampled_tokens(tokens: int, clusters: int) -> int:
    """Number of tokens that all rounds of a cold start but the last look at.

    Sixteen for each cluster at least; all, where that is more than half of them.
    """
    sampled = max(tokens // SAMPLED_PART, 16 * clusters)
    return sampled if 2 * sampled <= tokens else tokens


def samples_of_a_cold_start(
    tokens: int, clusters: int, first_iterations: int
) -> list[tuple[int, int]]:
    """How many tokens `cold_start` draws from how many, in this order."""
    early = tokens if first_iterations == 1 else sampled_tokens(tokens, clusters)
    return [(clusters, tokens)] if early == tokens else [(early, tokens), (clusters, early)]


Rounds = Callable[[Tensor, Tensor | None, Tensor, int], Tensor]
"""Centroids (B, H, C, D) after so many rounds of k-means, from tokens, kinds and centroids."""


def cold_start(
    x: Tensor,
    kinds: Tensor | None,
    clusters: int,
    plan: AttentionPlan,
    kmeans: Rounds,
) -> Tensor:
    """Centroids (B, H, C, D) after all rounds of k-means from scratch but the last.

    A part of the tokens shows where the centroids belong; only the last round has to label all.

    Args:
        x: (B, H, N, D) queries or keys.
        kinds: (B|1, H|1, N) uint8, see `kernels.kinds`; None where all tokens are clustered.
        clusters: C.
        plan: plan with the number of rounds and the seed.
        kmeans: see `Rounds`.
    """
    samples = samples_of_a_cold_start(x.shape[2], clusters, plan.first_iterations)
    if len(samples) == 2:
        x, kinds = stratified_sample(x, kinds, samples[0][0], plan.seed), None
    start = initial_centroids(x, kinds, clusters, plan.seed)
    rounds = plan.first_iterations - 1
    return kmeans(x, kinds, start, rounds) if rounds else start
