"""Stage 1 in plain PyTorch: k-means of the tokens of every head, in any float dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import (
    Blocks,
    Clusters,
    QueryTile,
    Rounds,
    cold_start,
)
from svg_ear_compile.kernels.kept_clusters import Placed, excess_spread, updated_labels
from svg_ear_compile.kernels.kinds import CLUSTERED, EXACT, PADDING, TokenKinds
from svg_ear_compile.kernels.plan import AttentionPlan


def cluster(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    kinds: TokenKinds,
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None = None,
    query_tile: QueryTile | None = None,
    update: Placed | None = None,
) -> tuple[Clusters, Clusters, Tensor | None]:
    """Query and key clusters: reused from `blocks`, warm from `centroids`, or cold.

    For the arguments see `reference.cluster_and_route`.

    Returns:
        The clusters, and the excess spread of key clusters that were kept.
    """
    if blocks is not None:
        assert centroids is not None, "blocks come with the centroids of their clusters"
        return (
            regrouped(q, kinds.queries, centroids[0].to(q.dtype), blocks.q_labels),
            regrouped(k, kinds.keys, centroids[1].to(k.dtype), blocks.k_labels),
            None,
        )
    q_clusters, k_clusters = plan.clusters(*kinds.counts(q.shape[2], k.shape[2]))
    of_queries, of_keys = None, None
    if plan.cluster_metric == "logits":
        of_queries, of_keys = logit_metrics(q, k, kinds)

    def rounds_of(metric: Tensor | None) -> Rounds:
        return lambda x, of_x, start, rounds: kmeans(x, of_x, start, rounds, metric).centroids

    iterations = 1
    if centroids is not None:
        iterations, q_start = plan.warm_iterations, centroids[0].to(q.dtype)
    else:
        q_start = cold_start(q, kinds.queries, q_clusters, plan, rounds_of(of_queries))
    queries = kmeans(q, kinds.queries, q_start, iterations, of_queries, query_tile)
    if update is None:
        if centroids is not None:
            k_start = centroids[1].to(k.dtype)
        else:
            k_start = cold_start(k, kinds.keys, k_clusters, plan, rounds_of(of_keys))
        return queries, kmeans(k, kinds.keys, k_start, iterations, of_keys), None
    labels, start = updated_labels(
        k, kinds.keys, k_clusters, update, plan,
        lambda x, of_x, start, rounds: kmeans(x, of_x, start.to(k.dtype), rounds, of_keys),
        lambda start, labels: regrouped(k, kinds.keys, start.to(k.dtype), labels),
    )  # fmt: skip
    keys = regrouped(k, kinds.keys, start.to(k.dtype), labels)
    return queries, keys, excess_spread(k, keys, of_keys)


def is_kind(x: Tensor, kinds: Tensor | None, kind: int) -> Tensor:
    """(B, H, N) bool: tokens of a kind; for the arguments see `kmeans`."""
    if kinds is None:
        return torch.full(x.shape[:3], kind == CLUSTERED, device=x.device)
    return (kinds == kind).expand(x.shape[:3])


def logit_metrics(q: Tensor, k: Tensor, kinds: TokenKinds) -> tuple[Tensor, Tensor]:
    """Metrics that measure the difference of two queries, or of two keys, by their logits.

    Two queries that differ by ``d`` give the keys of their head the same weights where ``d . k`` is
    the same for all keys; the variance of ``d . k`` over the keys is ``d' Cov(k) d``. The logits of
    two keys that differ by ``d`` differ by ``d' E[q q'] d`` in the mean square over the queries.
    Tokens that are close by these metrics can be replaced by their centroid at a small error.

    Args:
        q: (B, H, N_q, D). k: (B, H_kv, N_k, D).
        kinds: kinds of the queries and keys.

    Returns:
        Metric of the queries (B, H, D, D) and metric of the keys (B, H_kv, D, D), see `as_metric`.
        Both are moments of the clustered tokens. The metric of a key head is a mean over the query
        heads of its group.
    """

    def moments(x: Tensor, kinds: Tensor | None) -> tuple[Tensor, Tensor]:
        inside = is_kind(x, kinds, CLUSTERED).unsqueeze(-1)
        count = inside.sum(2).clamp(min=1)  # [B, H, 1]
        x = torch.where(inside, x, 0.0)
        mean = x.sum(2) / count
        away = torch.where(inside, x - mean.unsqueeze(2), 0.0)
        squares, spreads = (t.transpose(2, 3) @ t / count.unsqueeze(-1) for t in (x, away))
        return squares, spreads

    kv_heads = k.shape[1]
    of_queries = moments(q, kinds.queries)[0].unflatten(1, (kv_heads, -1)).mean(2)
    of_keys = moments(k, kinds.keys)[1].repeat_interleave(q.shape[1] // kv_heads, 1)
    return as_metric(of_keys), as_metric(of_queries)


def as_metric(moment: Tensor) -> Tensor:
    """The moments (..., D, D) scaled to Frobenius norm 1; moments of 0 stay 0.

    k-means compares distances, so a factor on the metric changes no cluster. With norm 1 the metric
    makes no token longer, which keeps half precision within its range. Where a norm is not finite,
    because tokens or their squares are not, the metric is Euclidean.
    """
    size = moment.flatten(-2).norm(dim=-1)[..., None, None]
    euclidean = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    metric = moment / size.clamp(min=torch.finfo(moment.dtype).tiny)
    return torch.where(size.isfinite(), metric, euclidean)


def cluster_means(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of each cluster, and the cluster sizes; an empty cluster has mean 0.

    Args:
        x: (B, H, N, D).
        labels: (B, H, N) int64 in [0, C + 1].
        clusters: C.

    Returns:
        (B, H, C, D) means and (B, H, C) int64 sizes.
    """
    batch, heads, _, dim = x.shape
    sums = x.new_zeros(batch, heads, clusters + 2, dim)
    sums.scatter_add_(2, labels.unsqueeze(-1).expand_as(x), x)
    sizes = torch.zeros(batch, heads, clusters + 2, dtype=torch.int64, device=x.device)
    sizes.scatter_add_(2, labels, torch.ones_like(labels))
    sums, sizes = sums[:, :, :clusters], sizes[:, :, :clusters]
    return sums / sizes.clamp(min=1).unsqueeze(-1), sizes


def kmeans(
    x: Tensor,
    kinds: Tensor | None,
    centroids: Tensor,
    iterations: int,
    metric: Tensor | None = None,
    query_tile: QueryTile | None = None,
) -> Clusters:
    """k-means from given centroids. Ties go to the lowest cluster.

    Args:
        x: (B, H, N, D).
        kinds: (B|1, H|1, N) uint8, see `kernels.kinds`; None where all tokens are clustered.
        centroids: (B, H, C, D), finite.
        iterations: number of assign-and-update rounds, at least 1.
        metric: (B, H, D, D) symmetric M of the squared distance ``d' M d``; None is Euclidean.
        query_tile: tile of `tile_aligned`, which is applied in the last round, or None.

    Returns:
        `Clusters`; the centroids are the means of the clusters that are returned.
    """
    clusters = centroids.shape[2]
    always_exact = is_kind(x, kinds, EXACT) | ~x.isfinite().all(-1)
    padding = is_kind(x, kinds, PADDING)
    finite = torch.where(always_exact.unsqueeze(-1), torch.zeros_like(x), x)
    labels = sizes = None
    for iteration in range(iterations):
        aims = centroids if metric is None else centroids @ metric
        norm = (centroids * aims).sum(-1)
        distance = norm.unsqueeze(2) - 2 * finite @ aims.transpose(2, 3)
        labels = torch.where(always_exact, clusters, distance.argmin(-1))
        labels = torch.where(padding, clusters + 1, labels)
        if query_tile is not None and iteration == iterations - 1:
            labels = tile_aligned(labels, distance, query_tile)
        means, sizes = cluster_means(finite, labels, clusters)
        centroids = torch.where(sizes.unsqueeze(-1) > 0, means, centroids)
    assert labels is not None
    assert sizes is not None
    return Clusters(labels, centroids, sizes)


def tile_aligned(labels: Tensor, distance: Tensor, query_tile: QueryTile) -> Tensor:
    """Labels (B, H, N) after some queries changed their cluster so that tiles are better filled.

    The attend stage works on tiles of queries of one cluster, and a tile consists of subtiles. A
    subtile of few queries costs nearly as much as a full one. So a cluster of more than one subtile
    gives away the queries of its last tile where these are at most a sixth of a tile, and else the
    queries of its last subtile where these are at most a quarter of a subtile. A cluster receives
    queries if it gives none away and its last subtile is filled by more than a quarter and at most
    three quarters. Of the first `QueryTile.candidates` queries of the giving cluster, those move
    whose distance grows least, each to the nearest receiving cluster. Several clusters can give to
    the same one and overfill its subtile, which costs a subtile and is rare.

    Args:
        labels: (B, H, N) int64 in [0, C + 1].
        distance: (B, H, N, C) of every token from every centroid.
        query_tile: sizes of subtile and tile.
    """
    subtile, tile = query_tile
    clusters = distance.shape[3]
    sizes = torch.zeros(*labels.shape[:2], clusters + 2, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(2, labels, torch.ones_like(labels))
    in_subtile, in_tile = sizes % subtile, sizes % tile
    surplus = torch.where(in_subtile <= subtile // 4, in_subtile, 0)
    surplus = torch.where(in_tile <= tile // 6, in_tile, surplus)
    surplus = torch.where(sizes > subtile, surplus, 0)
    surplus[..., clusters:] = 0
    takes = (surplus == 0) & (in_subtile > subtile // 4) & (in_subtile <= subtile - subtile // 4)
    other, to = distance.masked_fill(~takes[..., None, :clusters], math.inf).min(-1)
    own = distance.gather(3, labels.clamp(max=clusters - 1).unsqueeze(-1)).squeeze(-1)

    def rank_by(key: Tensor) -> Tensor:
        """(B, H, N) rank of each token in its cluster, by `key` (B, H, N), then in token order."""
        by_key = key.argsort(dim=-1, stable=True)
        order = by_key.gather(2, labels.gather(2, by_key).argsort(dim=-1, stable=True))
        place = torch.arange(labels.shape[2], device=labels.device).expand_as(order)
        start = (sizes.cumsum(-1) - sizes).gather(2, labels)
        return torch.empty_like(order).scatter_(2, order, place) - start

    sampled = rank_by(torch.zeros_like(own)) < query_tile.candidates
    lost = torch.where(sampled, other - own, math.inf)
    moves = (rank_by(lost) < surplus.gather(2, labels)) & lost.isfinite()
    return torch.where(moves, to, labels)


def regrouped(x: Tensor, kinds: Tensor | None, centroids: Tensor, labels: Tensor) -> Clusters:
    """Clusters with the labels of an earlier step, and the means of x under these labels.

    A token that was finite in the earlier step and is not now makes its whole cluster not finite.

    Args:
        x: (B, H, N, D).
        kinds: see `kmeans`; without kinds all tokens take part. A token that was padding in the
            earlier step and takes part now becomes always exact, and so does one that is of that
            kind only now.
        centroids: (B, H, C, D) of the earlier step, which empty clusters keep.
        labels: (B, H, N) integer, of the earlier step.
    """
    clusters = centroids.shape[2]
    labels = labels.long().clamp(max=clusters)
    if kinds is not None:
        labels = torch.where(kinds == EXACT, clusters, labels)
        labels = torch.where(kinds == PADDING, clusters + 1, labels)
    means, sizes = cluster_means(x, labels, clusters)
    return Clusters(labels, torch.where(sizes.unsqueeze(-1) > 0, means, centroids), sizes)
