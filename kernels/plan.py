"""The plan of one attention call: clusters, routing, compensation.

A plan is plain data. A compiled graph holds a plan as one string (`AttentionPlan.encode`), which is
readable in a printed graph and part of every compile-cache key.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Literal, get_args

Routing = Literal["density", "top_p", "threshold"]
Compensation = Literal["gaussian", "centroid"]
ClusterMetric = Literal["logits", "euclidean"]

_TUNE_AGAIN = "a budget that names it has to be tuned again"
REMOVED = {
    "first_order": f'compensation "first_order" was replaced by "gaussian": {_TUNE_AGAIN}',
    "second_order": f'compensation "second_order" was replaced by "gaussian": {_TUNE_AGAIN}',
    "cost_exponent": f"cost_exponent was removed, its value is always 1 now: {_TUNE_AGAIN}",
    "max_error": "max_error needs a tuned budget: "
    "let `svg-ear tune --max-error` make one and give it as the option budget",
}
"""Options, and values of options, of earlier versions, each with the answer to who names it."""

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
        first_iterations: k-means iterations of a cold start.
        warm_iterations: k-means iterations from remembered centroids.
        max_drift: a bound layer reuses the clusters and the block mask of an earlier step while it
            expects that fewer than this fraction of the tokens would change their cluster. 0
            recomputes both at every step.
        shared_branches: the guidance branches of a bound layer reuse the clusters and the block
            mask of the reference branch at every step. Their errors are alike then, and cancel
            where guidance subtracts one branch from the other.
        seed: seed of the stratified sample of initial centroids.
        min_tokens: a call with fewer video tokens is dense. Needed by graphs that serve several
            lengths, for which nothing can be decided at compile time.

    Raises:
        ValueError: a field is out of its range; the message names the field.
    """

    density: float = 0.2
    routing: Routing = "density"
    top_p: float = 0.9
    min_block_ratio: float = 0.1
    threshold: float = 1e-3
    compensation: Compensation = "gaussian"
    cluster_metric: ClusterMetric = "logits"
    q_clusters: int | None = None
    k_clusters: int | None = None
    first_iterations: int = 5
    warm_iterations: int = 1
    max_drift: float = 0.15
    shared_branches: bool = True
    seed: int = 0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("density", "top_p", "min_block_ratio", "max_drift"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if not (self.threshold >= 0.0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold must be finite and not negative, got {self.threshold!r}")
        if self.routing not in get_args(Routing):
            raise ValueError(f"routing must be one of {get_args(Routing)}, got {self.routing!r}")
        if self.compensation in REMOVED:
            raise ValueError(REMOVED[self.compensation])
        if self.compensation not in get_args(Compensation):
            raise ValueError(
                f"compensation must be one of {get_args(Compensation)}, got {self.compensation!r}"
            )
        if self.cluster_metric not in get_args(ClusterMetric):
            raise ValueError(
                f"cluster_metric must be one of {get_args(ClusterMetric)}, "
                f"got {self.cluster_metric!r}"
            )
        for name in ("q_clusters", "k_clusters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens!r}")
        for name in ("first_iterations", "warm_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    def encode(self) -> str:
        """JSON of the fields that differ from the defaults, keys in field order."""
        default = asdict(_DEFAULT)
        return json.dumps({k: v for k, v in asdict(self).items() if v != default[k]})

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> AttentionPlan:
        """The plan that `encode` wrote.

        Raises:
            ValueError: `text` is not a JSON object of plan fields.
        """
        given = json.loads(text)
        known = {f.name for f in fields(AttentionPlan)}
        if not isinstance(given, dict) or not given.keys() <= known:
            raise ValueError(f"plan must be a JSON object with keys among {sorted(known)}: {text}")
        return AttentionPlan(**given)

    @property
    def is_dense(self) -> bool:
        """Whether every block is computed exactly."""
        return self.density >= 1.0

    def clusters(self, q_tokens: int, k_tokens: int) -> tuple[int, int]:
        """(Qc, Kc) for so many clustered tokens: at least 1 and at most one for each token."""
        fine = math.ceil(q_tokens / QUERIES_PER_CLUSTER)
        long = math.ceil(q_tokens / LONG_QUERIES_PER_CLUSTER)
        q_clusters = self.q_clusters or min(fine, max(FINE_QUERY_CLUSTERS, long))
        k_clusters = self.k_clusters or math.ceil(k_tokens / KEYS_PER_CLUSTER)
        return max(1, min(q_clusters, q_tokens)), max(1, min(k_clusters, k_tokens))


_DEFAULT = AttentionPlan()
