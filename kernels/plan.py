"""What one attention call is asked to do: clusters, routing, compensation.

A plan is plain data. It crosses the compiled graph as one string (`AttentionPlan.encode`),
so that it is readable in a printed graph and part of every compile-cache key.
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
"""Head dims that the kernels are built and tested for."""

# Where the defaults come from. Errors are the relative L2 of the output on recorded Q, K, V of the
# video DiT in benchmarks/ with first-order compensation and Euclidean clusters (figures in
# benchmarks/NOTES.md); the defaults of both lower all of them.
# density 0.2: the published range of the method is 0.2 to 0.26; first-order compensation at 0.1 is
#   about as exact as the centroid form at 0.2, so 0.2 leaves room for models that were never tried.
# first_iterations 5: the error falls 0.199, 0.167, 0.157, 0.147, 0.142, 0.137 at 1, 2, 3, 5, 8, 16.
# warm_iterations 1: from the last step's centroids, step after step, a second round takes 1.8 % off
#   the error; its time buys more as density.
# Clusters are means, in tokens. Every form gains with every halving of the query clusters until
#   one is about a tile of queries; below that the tiles run half empty. The probe costs in
#   proportion to the clusters, and 128 queries leave more of a tile empty than 256: on long videos
#   both lie on one frontier of picture and time. 64 keys are one key tile.
QUERIES_PER_CLUSTER = 128
LONG_QUERIES_PER_CLUSTER = 256
FINE_QUERY_CLUSTERS = 256
KEYS_PER_CLUSTER = 64


@dataclass(frozen=True)
class AttentionPlan:
    """How one attention call spends its exact blocks.

    Attributes:
        density: share of the video query-key area computed exactly, in [0, 1]. Used by
            ``routing="density"``; at 1 every routing gives dense attention.
        routing: ``"density"`` (per row of blocks, best score first until the area is spent),
            ``"top_p"`` (the area of the centroid softmax's top-p set, with a floor) or
            ``"threshold"`` (every block whose scale-free error ``rho`` reaches ``threshold``).
        top_p: mass of the centroid softmax whose area is the budget of ``routing="top_p"``.
        min_block_ratio: share of a row's blocks guaranteed by ``routing="top_p"``.
        threshold: smallest ``rho`` computed exactly by ``routing="threshold"``.
        compensation: form of the skipped blocks, ``"gaussian"`` or the paper's ``"centroid"``; see
            `compensation.corrections`.
        cluster_metric: distance of the k-means, ``"logits"`` (what a difference between tokens does
            to the logits, see `clustering.logit_metrics`) or ``"euclidean"``.
        q_clusters: number of query clusters; None takes one per 128 queries up to 256 clusters, and
            more than those only where they would be of more than 256 queries.
        k_clusters: number of key clusters; None takes one per 64 keys.
        first_iterations: k-means iterations where nothing is remembered.
        warm_iterations: k-means iterations from remembered centroids.
        max_drift: a bound layer takes clusters and exact blocks over from its last steps while it
            expects fewer than this share of the tokens to be in another cluster than would be
            theirs; 0 makes them at every step. See `state.Memory`.
        shared_branches: guidance branches of a bound layer take clusters and exact blocks over from
            the first of them, at every step: their errors are alike then and cancel where one
            branch is taken from the other.
        seed: seed of the stratified sample that starts the first k-means.
        min_tokens: a call with fewer video tokens is dense. For graphs that serve several lengths
            and so cannot decide while they are compiled.

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

    def __post_init__(self) -> None:
        check_fields(self)

    def encode(self) -> str:
        """JSON of the fields that differ from the defaults, keys in field order."""
        default = asdict(_DEFAULT)
        return json.dumps({k: v for k, v in asdict(self).items() if v != default[k]})

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> AttentionPlan:
        """The plan that `encode` wrote.

        Raises:
            ValueError, TypeError: `text` is not a JSON object of plan fields.
        """
        known = {f.name for f in fields(AttentionPlan)}
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidValueError(f"plan must be JSON, got {shown(text)}") from error
        if not isinstance(given, dict) or not given.keys() <= known:
            raise InvalidValueError(
                f"plan must be a JSON object with keys among {sorted(known)}, got {shown(text)}"
            )
        return AttentionPlan(**given)

    @property
    def is_dense(self) -> bool:
        """True where the plan asks for every block."""
        return self.density >= 1.0

    def clusters(self, q_tokens: int, k_tokens: int) -> tuple[int, int]:
        """(Qc, Kc) for that many clustered tokens: never more clusters than tokens, at least 1."""
        fine = math.ceil(q_tokens / QUERIES_PER_CLUSTER)
        long = math.ceil(q_tokens / LONG_QUERIES_PER_CLUSTER)
        q_clusters = self.q_clusters or min(fine, max(FINE_QUERY_CLUSTERS, long))
        k_clusters = self.k_clusters or math.ceil(k_tokens / KEYS_PER_CLUSTER)
        return max(1, min(q_clusters, q_tokens)), max(1, min(k_clusters, k_tokens))


_DEFAULT = AttentionPlan()
