"""The plan of one attention call: clusters, routing, compensation.

A plan is plain data. A compiled graph holds a plan as one string (`AttentionPlan.encode`), which is
readable in a printed graph and part of every compile-cache key.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Annotated, Literal

from svg_ear_compile.kernels.checked import (
    Count,
    Fraction,
    InvalidValueError,
    NotNegative,
    Range,
    Size,
    check_fields,
    shown,
)

Routing = Literal["density", "top_p", "threshold"]
Compensation = Literal["gaussian", "centroid"]
ClusterMetric = Literal["logits", "euclidean"]
Iterations = Annotated[int, Range(1, 100)]
"""Rounds of k-means: its error has stopped falling long before the largest number."""
Seed = Annotated[int, Range(0, 2**63 - 1)]

HEAD_DIMS = (32, 40, 64, 72, 80, 96, 128, 160, 192, 256)
"""Head dims that the kernels are built for and tested with."""

# Where the defaults come from. An error here is the relative L2 error of the output on captured
# Q, K, V of the video DiT in benchmarks/ with first-order compensation (an earlier form) and
# Euclidean clusters (figures in benchmarks/NOTES.md). The default compensation and the default
# metric lower all of these errors.
# density 0.2: the published range of the method is 0.2 to 0.26. First-order compensation at 0.1 is
#   about as exact as the centroid form at 0.2, so 0.2 leaves room for models that were never tried.
# first_iterations 5: after 1, 2, 3, 5, 8, 16 iterations the error is 0.199, 0.167, 0.157, 0.147,
#   0.142, 0.137.
# warm_iterations 1: a second iteration from the centroids of the last step lowers the error by
#   1.8 %; the same time lowers the error more when it is spent on density.
# Cluster sizes are means, in tokens. The error of every form falls with every halving of the query
#   clusters. Below about one tile of queries per cluster the tiles run half empty. The time of
#   block scoring is in proportion to the number of clusters, and clusters of 128 queries leave more
#   of a tile empty than clusters of 256: on long videos neither size is better in both picture and
#   time. 64 keys are one key tile.
QUERIES_PER_CLUSTER = 128
LONG_QUERIES_PER_CLUSTER = 256
FINE_QUERY_CLUSTERS = 256
KEYS_PER_CLUSTER = 64


@dataclass(frozen=True)
class AttentionPlan:
    """How one attention call forms its clusters, chooses its exact blocks and compensates the rest.

    Attributes:
        density: fraction of the query-key area of the video tokens that is computed exactly, in
            [0, 1]. ``routing="density"`` uses it as the budget; at 1 every routing is dense.
        routing: rule that chooses the exact blocks, see `routing.route`. ``"density"`` takes the
            blocks of largest error per area until the density is reached. ``"top_p"`` does the same
            with the area of a top-p set as the budget. ``"threshold"`` takes every block whose
            scale-free error ``rho`` reaches `threshold`.
        top_p: mass of the softmax over centroids that the set of ``routing="top_p"`` holds.
        min_block_ratio: fraction of the blocks of a row that ``routing="top_p"`` always takes.
        threshold: smallest ``rho`` that ``routing="threshold"`` computes exactly.
        compensation: form of the skipped blocks, ``"gaussian"`` or the paper's ``"centroid"``; see
            `compensation.corrections`.
        cluster_metric: distance of the k-means. ``"logits"`` measures how much two tokens differ in
            their logits, see `clustering.logit_metrics`; ``"euclidean"`` how far they are apart.
        q_clusters: number of query clusters. None gives one cluster per 128 queries, but at most
            256 clusters or one per 256 queries, whichever is more.
        k_clusters: number of key clusters. None gives one cluster per 64 keys.
        first_iterations: k-means iterations of a cold start, all but the last on a third of the
            tokens, or on more where clusters are many.
        warm_iterations: k-means iterations from remembered centroids.
        max_drift: a bound layer reuses the clusters and the block mask of an earlier step while it
            expects that fewer than this fraction of the tokens would change their cluster. 0
            recomputes both at every step, and clusters all cached keys in every call.
        shared_branches: the guidance branches of a bound layer reuse the clusters and the block
            mask of the reference branch at every step. Their errors are alike then, and cancel
            where guidance subtracts one branch from the other.
        seed: seed of the stratified sample of initial centroids.
        min_tokens: a call with fewer clustered queries or keys is dense. Needed by graphs that
            serve several lengths, for which nothing can be decided at compile time.
        max_key_ratio: a call with more clustered keys for each clustered query is dense, because
            clustering the keys would take longer than attention; 0 sets no limit.
        min_cached_keys: a call that keeps the clusters of cached keys is sparse from so many
            clustered keys on, whatever its number of queries. 0 leaves it to `min_tokens`.
        min_chunk_tokens: of a call whose mask makes several chunks of its queries, a chunk with
            fewer clustered queries or keys is dense.
        is_tuned: a budget chose the density, and its error was measured at that density: early
            denoising steps get no more of it, and later ones no less.

    Raises:
        ValueError: a field is out of its range; the message names the field.
        TypeError: a field is of the wrong type; the message names the field.
    """

    density: Fraction = 0.2
    routing: Routing = "density"
    top_p: Fraction = 0.9
    min_block_ratio: Fraction = 0.1
    threshold: NotNegative = 1e-3
    compensation: Compensation = "gaussian"
    cluster_metric: ClusterMetric = "logits"
    q_clusters: Size | None = None
    k_clusters: Size | None = None
    first_iterations: Iterations = 5
    warm_iterations: Iterations = 1
    max_drift: Fraction = 0.15
    shared_branches: bool = True
    seed: Seed = 0
    min_tokens: Count = 0
    max_key_ratio: NotNegative = 0.0
    min_cached_keys: Count = 0
    min_chunk_tokens: Count = 0
    is_tuned: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def encode(self) -> str:
        """JSON of the fields that differ from the defaults, keys in field order, in single quotes.

        Inductor's C++ wrapper writes it between double quotes as it is.
        """
        default = asdict(_DEFAULT)
        found = json.dumps({k: v for k, v in asdict(self).items() if v != default[k]})
        return found.replace('"', "'")

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> AttentionPlan:
        """The plan that `encode` wrote.

        Raises:
            ValueError, TypeError: `text` is not a JSON object of plan fields.
        """
        known = {f.name for f in fields(AttentionPlan)}
        try:
            given = json.loads(text.replace("'", '"'))
        except (ValueError, RecursionError) as error:
            raise InvalidValueError(f"plan must be JSON, got {shown(text)}") from error
        if not isinstance(given, dict) or not given.keys() <= known:
            raise InvalidValueError(
                f"plan must be a JSON object with keys among {sorted(known)}, got {shown(text)}"
            )
        return AttentionPlan(**given)

    @property
    def is_dense(self) -> bool:
        """Whether every block is computed exactly."""
        return self.density >= 1.0

    def is_dense_for(
        self, clustered_queries: int, clustered_keys: int, keeps_clusters: bool = False
    ) -> bool:
        """Whether a call with so many clustered tokens is too short, or has too many keys.

        Args:
            clustered_queries, clustered_keys: numbers of clustered tokens.
            keeps_clusters: the call keeps the clusters of cached keys.
        """
        fewest = min(clustered_queries, clustered_keys)
        if keeps_clusters and self.min_cached_keys:
            return fewest < 1 or clustered_keys < self.min_cached_keys
        too_many = 0 < self.max_key_ratio * clustered_queries < clustered_keys
        return fewest < max(1, self.min_tokens) or (too_many and not keeps_clusters)

    def clusters(self, q_tokens: int, k_tokens: int) -> tuple[int, int]:
        """(Qc, Kc) for so many clustered tokens: at least 1 and at most one for each token."""
        fine = math.ceil(q_tokens / QUERIES_PER_CLUSTER)
        long = math.ceil(q_tokens / LONG_QUERIES_PER_CLUSTER)
        q_clusters = self.q_clusters or min(fine, max(FINE_QUERY_CLUSTERS, long))
        k_clusters = self.k_clusters or math.ceil(k_tokens / KEYS_PER_CLUSTER)
        return max(1, min(q_clusters, q_tokens)), max(1, min(k_clusters, k_tokens))


_DEFAULT = AttentionPlan()
