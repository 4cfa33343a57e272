"""SVG-EAR attention in plain PyTorch: the definition that every other form is tested against.

Works in any float dtype and on any device; float64 is the oracle of the tests. The five stages are
those of "SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation via Error-aware
Routing" (arXiv 2603.08982); the ``"gaussian"``, ``"first_order"`` and ``"second_order"`` forms of
the compensation and the metric of the logits are ours.

Notation: query cluster ``i`` of ``m_i`` queries with mean ``q_i``; key cluster ``j`` of ``n_j``
keys with means ``k_j`` and ``v_j``; scale ``s``. A token's label is its cluster, or ``C`` for a
token that is always exact (text, or a non-finite query or key), or ``C + 1`` for a padding key,
which carries no mass; ``C`` is the number of clusters.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.plan import AttentionPlan


class Clusters(NamedTuple):
    """Labelled tokens of G heads.

    Attributes:
        labels: (B, H, N) int64 in [0, C + 1], see the module's notation.
        centroids: (B, H, C, D) mean of each cluster's tokens; an empty cluster keeps the centroid
            that it was started from.
        sizes: (B, H, C) int64 tokens in each cluster.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor


class Blocks(NamedTuple):
    """Clusters of the tokens and which of their blocks are exact, for a later step to take over.

    Attributes:
        q_labels: (B, H, N_q) integer, k_labels: (B, H_kv, N_k) integer, see `Clusters`.
        exact: (B, H, Qc, Kc) bool.
    """

    q_labels: Tensor
    k_labels: Tensor
    exact: Tensor


LARGEST_GROWTH = 1.0
"""Growth in log-mass up to which second order is believed. Farther from its centroid a query sees
the few keys that it is near to, and no Gaussian: without a limit some heads lose more than they
gain."""


class Probe(NamedTuple):
    """What every block looks like from its query centroid, all (B, H, Qc, Kc[, D]).

    Attributes:
        log_error: ``log E_ij``, the paper's error of compensating the block (natural log).
        log_mass: ``log Z_ij``, ``Z_ij = sum_t exp(a_it)`` over the block's keys.
        mean_key: ``sum_t exp(a_it) k_t / Z_ij``.
        mean_value: ``sum_t exp(a_it) v_t / Z_ij``.
        centroid_logit: ``c_ij = s q_i . k_j``.
    """

    log_error: Tensor
    log_mass: Tensor
    mean_key: Tensor
    mean_value: Tensor
    centroid_logit: Tensor


class SecondOrder(NamedTuple):
    """What a query's distance from its centroid does to its stand-ins, see `second_order`.

    From the origin instead of the centroid in the ``"gaussian"`` form.

    Attributes:
        growth: (B, H, N_q) added to the logit of every stand-in.
        move: (B, H, N_q, D) added to the value of every stand-in.
    """

    growth: Tensor
    move: Tensor


@dataclass(frozen=True)
class Result:
    """One attention call with everything that led to it.

    Attributes:
        out: (B, H, N_q, D) in the dtype of q.
        lse: (B, H, N_q) natural log-sum-exp of the logits, float32 or wider.
        queries, keys: the clusters (`Clusters`).
        exact: (B, H, Qc, Kc) bool, the blocks computed exactly.
        row_area: (B, H, Qc) integer, clustered keys computed exactly for each query cluster.
    """

    out: Tensor
    lse: Tensor
    queries: Clusters
    keys: Clusters
    exact: Tensor
    row_area: Tensor

    @property
    def blocks(self) -> Blocks:
        """What a later step may take over."""
        return Blocks(self.queries.labels, self.keys.labels, self.exact)

    @property
    def exact_pairs(self) -> Tensor:
        """() float64, query-key pairs of clustered tokens computed exactly."""
        return (self.row_area * self.queries.sizes).sum(dtype=torch.float64)


def key_mask_of(attn_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """Key-padding mask (B, H_kv, N_k) bool of a (B|1, H|1, 1, N_k) bool mask; True takes part."""
    if attn_mask is None:
        return None
    return attn_mask[:, :, 0, :].expand(k.shape[0], k.shape[1], k.shape[2])


@functools.lru_cache(maxsize=256)
def stratified_jitter(clusters: int, seed: int, device: torch.device) -> Tensor:
    """(clusters,) float32 in [0, 1): where in its stratum each starting centroid is drawn."""
    generator = torch.Generator().manual_seed(seed)
    # Float64 would let CPU and GPU disagree in the last bit after the cast; this is the cast.
    return torch.rand(clusters, generator=generator, dtype=torch.float32).to(device)


def initial_centroids(
    x: Tensor, key_mask: Tensor | None, clusters: int, text: tuple[int, int], seed: int
) -> Tensor:
    """Starting centroids: one token from each of `clusters` equal strata of the video tokens.

    Neighbouring tokens of a video are alike, so strata of the token order cover space and time at
    the cost of one gather; the jitter keeps the samples off a common image column.

    Args:
        x: (B, H, N, D) queries or keys.
        key_mask: (B, H, N) bool or None; masked tokens are not drawn.
        clusters: C.
        text: text tokens before and after the video tokens.
        seed: seed of the jitter.

    Returns:
        (B, H, C, D) in the dtype of x, finite.
    """
    tokens = x.shape[2]
    before, after = text
    jitter = stratified_jitter(clusters, seed, x.device)
    strata = (torch.arange(clusters, device=x.device) + jitter) / clusters  # [C] in [0, 1)
    if key_mask is None:
        video = tokens - before - after
        index = before + (strata * video).long().clamp(0, max(video - 1, 0))
        drawn = x[:, :, index.clamp(max=tokens - 1)]
    else:
        valid = key_mask.clone()
        valid[..., :before] = False
        valid[..., tokens - after :] = False
        rank = valid.long().cumsum(-1)  # [B, H, N] valid tokens up to and including each
        wanted = (strata * rank[..., -1:]).long() + 1  # [B, H, C] in 1..n
        index = torch.searchsorted(rank.contiguous(), wanted).clamp(max=tokens - 1)
        drawn = x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
    return torch.nan_to_num(drawn, 0.0, 0.0, 0.0)


def cluster(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    attn_mask: Tensor | None,
    text: tuple[int, int],
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None = None,
) -> tuple[Clusters, Clusters]:
    """Stage 1 for queries and keys: taken over, warm from `centroids`, or cold.

    See `sparse_attention`.
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
        kmeans(q, None, q_start, text, iterations, of_queries),
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
    trim_to: tuple[int, int] | None = None,
) -> Clusters:
    """Stage 1. k-means from given centroids; ties go to the lowest cluster.

    Args:
        x: (B, H, N, D).
        key_mask: (B, H, N) bool or None.
        centroids: (B, H, C, D), finite.
        text: text tokens before and after the video tokens.
        iterations: number of assign-and-update rounds, at least 1.
        metric: (B, H, D, D) M of the squared distance ``d' M d``, symmetric; None is Euclidean.
        trim_to: share and tile that clusters are `trimmed` to in the last round.

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
        if trim_to is not None and turn == iterations - 1:
            labels = trimmed(labels, distance, *trim_to)
        means, sizes = cluster_means(finite, labels, clusters)
        centroids = torch.where(sizes.unsqueeze(-1) > 0, means, centroids)
    assert labels is not None
    assert sizes is not None
    return Clusters(labels, centroids, sizes)


def trimmed(labels: Tensor, distance: Tensor, share: int, tile: int) -> Tensor:
    """Labels of clusters that end with fewer shares and tiles part empty.

    Queries of a cluster are attended to in tiles, and those consist of shares; one that holds few
    queries costs nearly as much as a full one. A cluster of more than one share whose last tile
    holds a sixth of a tile at most, or whose last share a quarter, gives that many queries away: of
    its first `trim_sample` those that lose least, each to the nearest cluster that gives none and
    whose last share is filled by more than a quarter and at most three quarters. Several clusters
    may overfill one, which costs a share and is rare.

    Args:
        labels: (B, H, N) int64 in [0, C + 1].
        distance: (B, H, N, C) of every token from every centroid.
        share: queries of a share.
        tile: queries of a tile, a multiple of `share`.
    """
    clusters = distance.shape[3]
    sizes = torch.zeros(*labels.shape[:2], clusters + 2, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(2, labels, torch.ones_like(labels))
    of_share, of_tile = sizes % share, sizes % tile
    surplus = torch.where(of_share <= share // 4, of_share, 0)
    surplus = torch.where(of_tile <= tile // 6, of_tile, surplus)
    surplus = torch.where(sizes > share, surplus, 0)
    surplus[..., clusters:] = 0
    takes = (surplus == 0) & (of_share > share // 4) & (of_share <= share - share // 4)
    other, to = distance.masked_fill(~takes[..., None, :clusters], math.inf).min(-1)
    own = distance.gather(3, labels.clamp(max=clusters - 1).unsqueeze(-1)).squeeze(-1)

    def place_by(key: Tensor) -> Tensor:
        """(B, H, N) place of each token in its cluster, by `key` (B, H, N), then in token order."""
        by_key = key.argsort(dim=-1, stable=True)
        order = by_key.gather(2, labels.gather(2, by_key).argsort(dim=-1, stable=True))
        place = torch.arange(labels.shape[2], device=labels.device).expand_as(order)
        start = (sizes.cumsum(-1) - sizes).gather(2, labels)
        return torch.empty_like(order).scatter_(2, order, place) - start

    sampled = place_by(torch.zeros_like(own)) < trim_sample(share)
    lost = torch.where(sampled, other - own, math.inf)
    moves = (place_by(lost) < surplus.gather(2, labels)) & lost.isfinite()
    return torch.where(moves, to, labels)


def trim_sample(share: int) -> int:
    """How many tokens of a cluster `trimmed` chooses from: enough that a few lose little."""
    return min(2 * share, 128)


def regrouped(x: Tensor, key_mask: Tensor | None, centroids: Tensor, labels: Tensor) -> Clusters:
    """Stage 1 where an earlier step's labels are taken over: the means of x under them.

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


def probe(queries: Clusters, keys: Clusters, k: Tensor, v: Tensor, scale: float) -> Probe:
    """Stage 2. Every block as its query centroid sees it (METHOD of the paper, eq. for E_ij).

    ``E_ij = sum_t || exp(a_it) v_t - exp(c_ij) v_j ||^2`` with ``a_it = s q_i . k_t`` and
    ``c_ij = s q_i . k_j``, evaluated under a shift of the logits by the block's largest.

    Args:
        queries, keys: clusters; `queries` of H heads, `keys` of the same H.
        k, v: (B, H, N_k, D).
        scale: s.

    Returns:
        `Probe`; an empty key cluster has log_error and log_mass -inf and zero means.
    """
    clusters = keys.centroids.shape[2]
    member = torch.nn.functional.one_hot(keys.labels, clusters + 2)[..., :clusters].bool()
    logits = scale * queries.centroids @ k.transpose(2, 3)  # [B, H, Qc, N]
    value_means, _ = cluster_means(v, keys.labels, clusters)
    log_error, log_mass, mean_key, mean_value = [], [], [], []
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
        divisor = mass.unsqueeze(-1).clamp(min=torch.finfo(mass.dtype).tiny)
        mean_key.append(weight @ k / divisor)
        mean_value.append(weight @ v / divisor)
    return Probe(
        torch.stack(log_error, -1),
        torch.stack(log_mass, -1),
        torch.stack(mean_key, -2),
        torch.stack(mean_value, -2),
        centroid_logit,
    )


def take_until(score: Tensor, weight: Tensor, budget: Tensor) -> Tensor:
    """The best-scoring entries of each row, while the weight before them is below the budget.

    The entry that crosses the budget is taken; ties go to the lowest index; NaN counts as the
    highest score.

    Args:
        score, weight: (..., K); weights are not negative.
        budget: (...).

    Returns:
        (..., K) bool.
    """
    ranked = score.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    sorted_weight = weight.gather(-1, order)
    before = sorted_weight.cumsum(-1) - sorted_weight
    return torch.zeros_like(order, dtype=torch.bool).scatter(
        -1, order, before < budget.unsqueeze(-1)
    )


def block_score(found: Probe, queries: Clusters, keys: Clusters, cost_exponent: float) -> Tensor:
    """``log E_ij - gamma log(m_i n_j)``, (B, H, Qc, Kc); -inf for an empty block."""
    area = queries.sizes.unsqueeze(-1) * keys.sizes.unsqueeze(-2)
    score = found.log_error - cost_exponent * area.clamp(min=1).to(found.log_error.dtype).log()
    return score.masked_fill(area == 0, -math.inf)


def area_budget(keys: Clusters, plan: AttentionPlan) -> Tensor:
    """(B, H) float64 whole number: a row takes blocks while the area before them is below it.

    Rounded up from ``density * sum_j n_j`` in float64 so that every dtype draws the same line.
    """
    return torch.ceil(plan.density * keys.sizes.sum(-1).double())


def route(found: Probe, queries: Clusters, keys: Clusters, plan: AttentionPlan) -> Tensor:
    """Stage 3. The blocks computed exactly, (B, H, Qc, Kc) bool.

    * ``"density"``: in every row the best-scoring blocks while the area before them is below
      ``density * sum_j n_j``.
    * ``"top_p"``: the same with the paper's budget, the area of the smallest set of blocks that
      holds ``top_p`` of ``softmax_j(c_ij + log n_j)``; the best ``min_block_ratio`` of the row's
      blocks by that softmax are guaranteed and their area counts.
    * ``"threshold"``: every block with ``rho_ij = E_ij / (Z_i^2 n_j) >= threshold``, where
      ``Z_i = sum_t exp(a_it)`` over the clustered keys. Shifting all keys by one vector leaves
      ``rho`` as it was, so rows, heads and layers share one unit.
    """
    sizes = keys.sizes.unsqueeze(-2).to(found.log_error.dtype).expand_as(found.log_error)
    occupied = sizes > 0
    if plan.is_dense:
        return occupied
    score = block_score(found, queries, keys, plan.cost_exponent)
    total = sizes.sum(-1)
    if plan.routing == "density":
        return take_until(score, sizes, area_budget(keys, plan).unsqueeze(-1)) & occupied
    if plan.routing == "threshold":
        log_row_mass = torch.logsumexp(found.log_mass, -1, keepdim=True)
        log_rho = found.log_error - 2 * log_row_mass - sizes.clamp(min=1).log()
        log_threshold = math.log(plan.threshold) if plan.threshold > 0 else -math.inf
        return (log_rho.nan_to_num(nan=math.inf, posinf=math.inf) >= log_threshold) & occupied
    mass_logit = (found.centroid_logit + sizes.log()).masked_fill(~occupied, -math.inf)
    mass = torch.softmax(mass_logit, -1).nan_to_num(0.0)
    top_p = take_until(mass_logit, mass, torch.full_like(total, plan.top_p)) & occupied
    budget = (top_p * sizes).sum(-1)
    floor_count = torch.ceil(plan.min_block_ratio * occupied.sum(-1).to(total.dtype))
    guaranteed = take_until(mass_logit, torch.ones_like(sizes), floor_count) & occupied
    left = budget - (guaranteed * sizes).sum(-1)
    best = take_until(
        score.masked_fill(guaranteed, -math.inf), sizes.masked_fill(guaranteed, 0.0), left
    )
    return guaranteed | (best & occupied)


def row_area(exact: Tensor, keys: Clusters) -> Tensor:
    """(B, H, Qc) int64, keys computed exactly in each row of blocks."""
    return (exact * keys.sizes.unsqueeze(2)).sum(-1)


def compensation_tables(
    found: Probe | None,
    queries: Clusters,
    keys: Clusters,
    value_means: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One stand-in key, value and logit bias for every block.

    A skipped block acts on a query q of cluster i as one key ``K`` with value ``V`` and logit
    ``s q . K + bias``. The paper's centroid form takes ``K = k_j, V = v_j, bias = log n_j``, and so
    does the Gaussian form, which adds `second_order` from the origin: a query sees each cluster as
    a Gaussian about its means. The first-order form takes the block's posterior means at the query
    centroid and ``bias = log Z_ij - s q_i . K_ij``: mass and its gradient are exact at ``q = q_i``.
    The second-order form has the same tables and adds `second_order` from there.

    Args:
        found: see `probe`; forms without tables of a query cluster's own do not read it.
        queries, keys: clusters.
        value_means: (B, H, Kc, D).
        plan: names the form.
        scale: s.

    Returns:
        keys and values (B, H, Qc, Kc, D), bias (B, H, Qc, Kc).
    """
    if plan.has_own_tables:
        assert found is not None, "tables of a query cluster's own are made by the probe"
        bias = found.log_mass - scale * torch.einsum(
            "bhid,bhijd->bhij", queries.centroids, found.mean_key
        )
        return found.mean_key, found.mean_value, bias
    shape = (*queries.centroids.shape[:3], *keys.centroids.shape[2:])
    bias = keys.sizes.to(value_means.dtype).log().unsqueeze(2).expand(shape[:4])
    return keys.centroids.unsqueeze(2).expand(shape), value_means.unsqueeze(2).expand(shape), bias


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


def second_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Clusters,
    keys: Clusters,
    value_means: Tensor,
    scale: float,
) -> SecondOrder:
    """What first-order stand-ins leave out, under one covariance for all key clusters of a head.

    Under weights ``exp(s q . k)`` a cluster of jointly Gaussian keys and values keeps its
    covariance whatever the query; with ``dq = q - q_i`` its mean value moves by ``s Cov(v, k) dq``
    and its log-mass grows by the slope and ``s^2/2 dq' Cov(k, k) dq``, exactly. The covariances of
    single clusters serve hardly better than the pooled one, with which the growth and the move are
    the query's own, the same for all its stand-ins. A `dq` whose growth is more than
    `LARGEST_GROWTH` is shortened to where it is that, for growth and move.

    Args:
        q: (B, H, N_q, D). k, v: (B, H, N_k, D).
        queries, keys, value_means: clusters, and (B, H, Kc, D).
        scale: s.

    Returns:
        `SecondOrder`, 0 for queries that are in no cluster.
    """
    of_keys, of_values = pooled_covariances(k, v, keys, value_means)
    clusters = queries.centroids.shape[2]
    label = queries.labels.clamp(max=clusters - 1).unsqueeze(-1).expand_as(q)
    inside = (queries.labels < clusters).unsqueeze(-1)
    away = torch.where(inside, q - queries.centroids.gather(2, label), 0.0)
    growth = scale**2 / 2 * (away @ of_keys * away).sum(-1)
    # Rounding may leave less than nothing of a growth of 0.
    length = (LARGEST_GROWTH / growth.clamp(min=LARGEST_GROWTH)).sqrt()
    shortened = away * length.unsqueeze(-1)
    move = scale * shortened @ of_values.transpose(2, 3)
    return SecondOrder(growth.clamp(max=LARGEST_GROWTH), move)


def covariance_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Clusters,
    keys: Clusters,
    value_means: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> SecondOrder:
    """`second_order` about the point at which the stand-ins of a plan with covariances are exact.

    Tables of a query cluster's own are exact at its centroid, those of the Gaussian form at 0.
    """
    if not plan.has_own_tables:
        queries = queries._replace(centroids=torch.zeros_like(queries.centroids))
    return second_order(q, k, v, queries, keys, value_means, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_labels: Tensor,
    k_labels: Tensor,
    exact: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    scale: float,
    second: SecondOrder | None = None,
) -> tuple[Tensor, Tensor]:
    """Stages 4 and 5. One softmax over exact keys and the stand-ins of skipped blocks.

    Queries labelled ``Qc`` (text, non-finite) attend to every key; keys labelled ``Kc`` are exact
    for every query; keys labelled ``Kc + 1`` are padding. A row with no key gives output 0 and
    log-sum-exp -inf, as PyTorch's boolean masks do.

    Args:
        q: (B, H, N_q, D). k, v: (B, H, N_k, D).
        q_labels: (B, H, N_q). k_labels: (B, H, N_k).
        exact: (B, H, Qc, Kc) bool.
        tables: see `compensation_tables`.
        scale: s.
        second: see `second_order`.

    Returns:
        out (B, H, N_q, D) and lse (B, H, N_q).
    """
    batch, heads, q_clusters, k_clusters = exact.shape
    stand_in_key, stand_in_value, bias = tables
    # Row Qc takes everything; column Kc is always taken; column Kc + 1 never.
    allowed = exact.new_ones(batch, heads, q_clusters + 1, k_clusters + 2)
    allowed[:, :, :q_clusters, :k_clusters] = exact
    allowed[..., k_clusters + 1] = False
    bias = bias.masked_fill(exact, -math.inf)
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
                rest = scale * q[b, h][mine] @ stand_in_key[b, h, i].T + bias[b, h, i]
                if second is not None:
                    rest = rest + second.growth[b, h][mine][:, None]
                both = torch.cat(
                    [logits[mine], rest.masked_fill(bias[b, h, i] == -math.inf, -math.inf)], -1
                )
                merged_lse[mine] = torch.logsumexp(both, -1)
                p = torch.softmax(both, -1).masked_fill(
                    (merged_lse[mine] == -math.inf)[:, None], 0.0
                )
                result[mine] = (
                    p[:, : k.shape[2]] @ v[b, h] + p[:, k.shape[2] :] @ stand_in_value[b, h, i]
                )
                if second is not None:
                    moved = p[:, k.shape[2] :].sum(-1, keepdim=True)
                    result[mine] += moved * second.move[b, h][mine]
            out[b, h], lse[b, h] = result, merged_lse
    return out, lse


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    text: tuple[int, int] = (0, 0),
    centroids: tuple[Tensor, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> Result:
    """All five stages.

    Args:
        q: (B, H, N_q, D) of any float dtype. k, v: (B, H_kv, N_k, D), H_kv dividing H.
        plan: see `AttentionPlan`.
        attn_mask: (B|1, H_kv|1, 1, N_k) bool key-padding mask, True takes part.
        scale: logit scale, 1/sqrt(D) by default.
        text: text tokens at the start and at the end of both sequences.
        centroids: remembered centroids (B, H, Qc, D) and (B, H_kv, Kc, D).
        blocks: clusters and exact blocks of an earlier call under this plan, whose `centroids` come
            with them. They are taken over as they are; what stands in for the rest is made anew.

    Returns:
        `Result`; its key clusters are those of the H_kv heads.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    queries, keys = cluster(q, k, plan, attn_mask, text, centroids, blocks)
    shared = Clusters(*(t.repeat_interleave(groups, 1) for t in keys))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = probe(queries, shared, k, v, scale)
    exact = route(found, queries, shared, plan) if blocks is None else blocks.exact
    value_means, _ = cluster_means(v, shared.labels, exact.shape[3])
    tables = compensation_tables(found, queries, shared, value_means, plan, scale)
    second = None
    if plan.has_covariances:
        second = covariance_terms(q, k, v, queries, shared, value_means, plan, scale)
    out, lse = attend(q, k, v, queries.labels, shared.labels, exact, tables, scale, second)
    return Result(out, lse, queries, keys, exact, row_area(exact, shared))
