"""Stage 1 in plain PyTorch: k-means over the tokens of every head, in any float dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import (
    Blocks,
    Clusters,
    QueryTile,
    initial_centroids,
    key_mask_of,
)
from svg_ear_compile.kernels.plan import AttentionPlan


def cluster(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    attn_mask: Tensor | None,
    text: tuple[int, int],
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None = None,
    query_tile: QueryTile | None = None,
) -> tuple[Clusters, Clusters]:
    """Stage 1 for queries and keys: reused, warm from `centroids`, or cold.

    Arguments as `reference.sparse_attention`.
    """
    mask = key_mask_of(attn_mask, k)
    if blocks is not None:
        assert centroids is not None, "blocks come with the centroids of their clusters"
        return (
            regrouped(q, None, centroids[0].to(q.dtype), blocks.q_labels),
            regrouped(k, mask, centroids[1].to(k.dtype), blocks.k_labels),
        )
    q_clusters, k_clusters = plan.clusters(q.shape[2] - sum(text), k.shape[2] - sum(text))
    if centroids is not None:
        q_start, k_start = centroids[0].to(q.dtype), centroids[1].to(k.dtype)
        iterations = plan.warm_iterations
    else:
        q_start = initial_centroids(q, None, q_clusters, text, plan.seed)
        k_start = initial_centroids(k, mask, k_clusters, text, plan.seed)
        iterations = plan.first_iterations
    of_queries, of_keys = None, None
    if plan.cluster_metric == "logits":
        of_queries, of_keys = logit_metrics(q, k, mask, text)
    return (
        kmeans(q, None, q_start, text, iterations, of_queries, query_tile),
        kmeans(k, mask, k_start, text, iterations, of_keys),
    )


def is_video(x: Tensor, key_mask: Tensor | None, text: tuple[int, int]) -> Tensor:
    """(B, H, N) bool: video tokens that take part; arguments as `kmeans`."""
    position = torch.arange(x.shape[2], device=x.device)
    found = ((position >= text[0]) & (position < x.shape[2] - text[1])).expand(x.shape[:3])
    return found if key_mask is None else found & key_mask


def logit_metrics(
    q: Tensor, k: Tensor, key_mask: Tensor | None, text: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What a difference between two queries, or two keys, does to the logits.

    Two queries that differ by ``d`` weigh the keys of their head alike where ``d . k`` is the same
    for all keys; how much it is not is ``d' Cov(k) d``. The logits of two keys that differ by ``d``
    differ by ``d' E[q q'] d`` in the mean square over the queries. Clusters of equal tokens by
    these are what centroids stand for best.

    Args:
        q: (B, H, N_q, D). k: (B, H_kv, N_k, D).
        key_mask: (B, H_kv, N_k) bool or None.
        text: text tokens before and after the video tokens.

    Returns:
        Metrics (see `as_metric`) of the queries (B, H, D, D) and of the keys (B, H_kv, D, D): of
        the video tokens, the queries of all heads of a key head together.
    """

    def moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        inside = is_video(x, mask, text).unsqueeze(-1)
        count = inside.sum(2).clamp(min=1)  # [B, H, 1]
        x = torch.where(inside, x, 0.0)
        mean = x.sum(2) / count
        away = torch.where(inside, x - mean.unsqueeze(2), 0.0)
        squares, spreads = (t.transpose(2, 3) @ t / count.unsqueeze(-1) for t in (x, away))
        return squares, spreads

    kv_heads = k.shape[1]
    of_queries = moments(q, None)[0].unflatten(1, (kv_heads, -1)).mean(2)
    of_keys = moments(k, key_mask)[1].repeat_interleave(q.shape[1] // kv_heads, 1)
    return as_metric(of_keys), as_metric(of_queries)


def as_metric(moment: Tensor) -> Tensor:
    """(..., D, D) of Frobenius norm 1, or 0: then any clusters are as good.

    k-means asks which distance is the least, so the size of a metric is free; at this one a token
    becomes no longer, which keeps half precision within its range. Moments of tokens that are not
    finite, or whose squares are not, say nothing: the metric is Euclidean then.
    """
    size = moment.flatten(-2).norm(dim=-1)[..., None, None]
    euclidean = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    metric = moment / size.clamp(min=torch.finfo(moment.dtype).tiny)
    return torch.where(size.isfinite(), metric, euclidean)


def cluster_means(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean of x over each cluster, and the cluster sizes; empty clusters have mean 0.

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
    key_mask: Tensor | None,
    centroids: Tensor,
    text: tuple[int, int],
    iterations: int,
    metric: Tensor | None = None,
    query_tile: QueryTile | None = None,
) -> Clusters:
    """Stage 1. k-means from given centroids; ties go to the lowest cluster.

    Args:
        x: (B, H, N, D).
        key_mask: (B, H, N) bool or None.
        centroids: (B, H, C, D), finite.
        text: text tokens before and after the video tokens.
        iterations: number of assign-and-update rounds, at least 1.
        metric: (B, H, D, D) M of the squared distance ``d' M d``, symmetric; None is Euclidean.
        query_tile: what clusters are `tile_aligned` to in the last round, or None.

    Returns:
        `Clusters`, whose centroids are the means of the returned labels.
    """
    clusters = centroids.shape[2]
    always_exact = ~(is_video(x, None, text) & x.isfinite().all(-1))
    finite = torch.where(always_exact.unsqueeze(-1), torch.zeros_like(x), x)
    labels = sizes = None
    for turn in range(iterations):
        aims = centroids if metric is None else centroids @ metric
        norm = (centroids * aims).sum(-1)
        distance = norm.unsqueeze(2) - 2 * finite @ aims.transpose(2, 3)
        labels = torch.where(always_exact, clusters, distance.argmin(-1))
        if key_mask is not None:
            labels = torch.where(key_mask, labels, clusters + 1)
        if query_tile is not None and turn == iterations - 1:
            labels = tile_aligned(labels, distance, query_tile)
        means, sizes = cluster_means(finite, labels, clusters)
        centroids = torch.where(sizes.unsqueeze(-1) > 0, means, centroids)
    assert labels is not None
    assert sizes is not None
    return Clusters(labels, centroids, sizes)


def tile_aligned(labels: Tensor, distance: Tensor, query_tile: QueryTile) -> Tensor:
    """Labels of clusters that leave fewer subtiles and tiles part empty.

    Queries of a cluster are attended to in tiles, and a tile consists of subtiles; a subtile of few
    queries costs nearly as much as a full one. A cluster of more than one subtile whose last tile
    holds a sixth of a tile at most, or whose last subtile a quarter, gives that many queries away:
    of its first `QueryTile.candidates` those that lose least, each to the nearest cluster that
    gives none and whose last subtile is filled by more than a quarter and at most three quarters.
    Several clusters may overfill one, which costs a subtile and is rare.

    Args:
        labels: (B, H, N) int64 in [0, C + 1].
        distance: (B, H, N, C) of every token from every centroid.
        query_tile: what they are aligned to.
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

    def place_by(key: Tensor) -> Tensor:
        """(B, H, N) place of each token in its cluster, by `key` (B, H, N), then in token order."""
        by_key = key.argsort(dim=-1, stable=True)
        order = by_key.gather(2, labels.gather(2, by_key).argsort(dim=-1, stable=True))
        place = torch.arange(labels.shape[2], device=labels.device).expand_as(order)
        start = (sizes.cumsum(-1) - sizes).gather(2, labels)
        return torch.empty_like(order).scatter_(2, order, place) - start

    sampled = place_by(torch.zeros_like(own)) < query_tile.candidates
    lost = torch.where(sampled, other - own, math.inf)
    moves = (place_by(lost) < surplus.gather(2, labels)) & lost.isfinite()
    return torch.where(moves, to, labels)


def regrouped(x: Tensor, key_mask: Tensor | None, centroids: Tensor, labels: Tensor) -> Clusters:
    """Stage 1 where an earlier step's labels are reused: the means of x under them.

    A token that was finite then and is not now spoils its cluster.

    Args:
        x: (B, H, N, D).
        key_mask: (B, H, N) bool or None; a token that was padding then and is none now is exact.
        centroids: (B, H, C, D), what an empty cluster keeps.
        labels: (B, H, N) integer, of the earlier step.
    """
    clusters = centroids.shape[2]
    labels = labels.long()
    if key_mask is not None:
        labels = torch.where(key_mask, labels.clamp(max=clusters), clusters + 1)
    means, sizes = cluster_means(x, labels, clusters)
    return Clusters(labels, torch.where(sizes.unsqueeze(-1) > 0, means, centroids), sizes)
