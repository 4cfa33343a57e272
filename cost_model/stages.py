"""Work of one attention call by stage: operations, bytes, launches.

Nothing here is a time: `latency` divides the amounts by measured roofs. The amounts follow the
stages of `kernels/reference.py` as the GPU kernels carry them out. Restoring the token order is not
a stage, because the attend stage scatters the output to its tokens. On a CPU, where times matter
less, the whole sparse call is one stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.kernels.gpu.launch import BLOCKS_PER_COPY, launch_config
from svg_ear_compile.kernels.kept_clusters import BATCHES
from svg_ear_compile.kernels.plan import AttentionPlan

STAGES = {
    "cuda": ("cluster", "score", "route", "attend", "correction"),
    "cpu": ("sparse",),
}
"""Stages of a sparse call by kind of device. ``score`` is block scoring; ``correction`` is the work
of the Gaussian form before and after the attend stage."""

WAVE = 1024
"""Approximate number of programs that a GPU runs at once. A wave of so many programs takes at least
the time of a launch, however little work the programs have."""

CACHED = 0.25
"""Approximate cost of a byte from a GPU's cache over that of a byte from its memory."""

ELEMENT_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class AttentionShape:
    """Shape and dtype of one attention call.

    Attributes:
        batch, heads, kv_heads, q_tokens, k_tokens, head_dim: q is (batch, heads, q_tokens,
            head_dim), k and v are (batch, kv_heads, k_tokens, head_dim). Tokens include the text.
        dtype: name without ``torch.``, one of `ELEMENT_SIZES`.
        text: number of exact keys. They are exact for every query.
        exact_queries: number of exact queries, which are dense; None for as many as keys.
    """

    batch: int
    heads: int
    kv_heads: int
    q_tokens: int
    k_tokens: int
    head_dim: int
    dtype: str
    text: int = 0
    exact_queries: int | None = None

    @property
    def query_text(self) -> int:
        """Number of exact queries."""
        return self.text if self.exact_queries is None else self.exact_queries

    @property
    def clustered(self) -> tuple[int, int]:
        """Numbers of clustered queries and keys, at least 1."""
        return max(self.q_tokens - self.query_text, 1), max(self.k_tokens - self.text, 1)

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return ELEMENT_SIZES[self.dtype]

    def with_tokens(self, tokens: int) -> AttentionShape:
        """The same call over `tokens` clustered queries, keys in proportion, and the same text."""
        queries, keys = self.clustered
        return replace(
            self,
            q_tokens=tokens + self.query_text,
            k_tokens=round(tokens * keys / queries) + self.text,
        )


@dataclass(frozen=True)
class Amount:
    """Work of one stage.

    Attributes:
        flops: multiply-adds times two.
        bytes: bytes moved; on a GPU a byte from the cache counts `CACHED`.
        launches: on a GPU launches, and waves of programs (`WAVE`) of the score, the route and the
            attend stage; on a CPU operators.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0


def expected_density(plan: AttentionPlan) -> float:
    """Density of the plan, or the default density where routing decides it at run time."""
    return plan.density if plan.routing == "density" or plan.is_dense else AttentionPlan.density


def dense_amount(shape: AttentionShape) -> Amount:
    """Two products of (N_q, D) by (N_k, D); inputs are read, the output is written."""
    heads = shape.batch * shape.heads
    tokens = 2 * heads * shape.q_tokens + 2 * shape.batch * shape.kv_heads * shape.k_tokens
    return Amount(
        flops=4.0 * heads * shape.q_tokens * shape.k_tokens * shape.head_dim,
        bytes=float(tokens * shape.head_dim * shape.element_size),
        launches=1.0,
    )


def sparse_amounts(
    shape: AttentionShape,
    plan: AttentionPlan,
    device: Device,
    iterations: float | None = None,
    *,
    kept: bool = False,
) -> dict[str, Amount]:
    """Work of each of the device's `STAGES` for a plan that is not dense.

    Args:
        shape: shape of the call.
        plan: plan of the call.
        device: its kind gives the stages, its architecture the tiles.
        iterations: k-means iterations over all tokens, by default those of a warm start; 0 where
            clusters and block mask are reused.
        kept: whether keys keep their clusters, see `kernels.kept_clusters`.
    """
    if iterations is None:
        iterations = plan.warm_iterations
    if device.kind == "cpu":
        return {"sparse": _on_cpu(shape, plan, iterations, kept)}
    dim, size = shape.head_dim, shape.element_size
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    queries, keys, q_clusters, k_clusters, exact = _clustered(shape, plan)
    kv_bytes = 2.0 * kv_heads * keys * dim * size
    config = launch_config(dim, size, device.architecture)
    # On average half of the last tile of a cluster is empty; of an aligned cluster a quarter of a
    # subtile, and since few aligned clusters have a nearly empty tile, a third of a tile. Every
    # cluster has at least one subtile and one tile.
    subtile, tile = config.query_tile
    rows = q_clusters * max(subtile, queries / q_clusters + subtile / 4)
    tiles = q_clusters * max(1.0, queries / q_clusters / tile + 1 / 3)
    scored_keys = keys + k_clusters * (config.score.columns - 1) / 2
    score_tiles = math.ceil(q_clusters / config.score.rows)
    # A query attends to all proxy tokens; the bias removes those of exact blocks.
    seen = exact + shape.text + k_clusters  # by one query
    attended_keys = tiles * seen + shape.query_text / tile * shape.k_tokens
    passes, _ = _passes(plan, iterations)
    tokens = heads * queries + kv_heads * keys
    blocks = float(heads * q_clusters * k_clusters)
    return {
        "cluster": Amount(
            flops=_clustering_flops(shape, plan, iterations, kept),
            bytes=2.0 * passes * dim * size * tokens,
            launches=16.0 * passes,
        ),
        # Only keys are read, from the cache for every tile of query centroids.
        "score": Amount(
            flops=2.0 * dim * heads * score_tiles * config.score.rows * scored_keys,
            bytes=kv_bytes / 2 + CACHED * heads * keys * dim * size * score_tiles + 16.0 * blocks,
            launches=1.0 + heads * k_clusters * score_tiles / WAVE,
        )
        if iterations
        else Amount(),
        "route": Amount(
            bytes=24.0 * blocks + 8.0 * heads * q_clusters * expected_density(plan) * keys,
            launches=2.0 + heads * q_clusters * (1 + k_clusters / BLOCKS_PER_COPY) / WAVE,
        ),
        # Keys and values are read from the cache for every tile of queries.
        "attend": Amount(
            flops=4.0 * dim * heads * (rows * seen + shape.query_text * shape.k_tokens),
            bytes=2.0 * heads * queries * dim * size
            + kv_bytes
            + CACHED * 2.0 * heads * dim * size * attended_keys,
            launches=1.0 + heads * tiles / WAVE,
        ),
        # Two covariances over the keys, two products with the queries.
        "correction": Amount(
            flops=4.0 * dim**2 * (kv_heads * keys + heads * queries),
            bytes=(1 + CACHED * 4 / size) * kv_bytes
            + (4 + CACHED * 2) * heads * queries * dim * size,
            launches=3.0,
        )
        if plan.compensation == "gaussian"
        else Amount(),
    }


def _on_cpu(shape: AttentionShape, plan: AttentionPlan, iterations: float, kept: bool) -> Amount:
    """All stages together, see `kernels/cpu.py`: float32, one cluster at a time."""
    dim, heads = shape.head_dim, shape.batch * shape.heads
    queries, keys, q_clusters, k_clusters, exact = _clustered(shape, plan)
    skipped = k_clusters * (1 - expected_density(plan))
    attended = queries * (exact + shape.text + skipped) + shape.query_text * shape.k_tokens
    scored = q_clusters * keys if iterations else 0
    corrected = queries + keys if plan.compensation == "gaussian" else 0
    passes, _ = _passes(plan, iterations)
    return Amount(
        flops=_clustering_flops(shape, plan, iterations, kept)
        + heads * dim * (2.0 * scored + 4.0 * attended + 4.0 * dim * corrected),
        bytes=heads * (8.0 * passes * dim * (queries + keys) + 40.0 * q_clusters * k_clusters),
        launches=16.0 * (passes + 1)
        + heads * (24.0 * k_clusters * min(iterations, 1) + 16.0 * q_clusters),
    )


def _clustered(shape: AttentionShape, plan: AttentionPlan) -> tuple[int, int, int, int, float]:
    """Numbers of clustered queries and keys, of clusters of both, and of exact keys of a query."""
    queries, keys = shape.clustered
    q_clusters, k_clusters = plan.clusters(queries, keys)
    # The last block of a row is taken whole, so it exceeds the budget by half a block on average.
    exact = min(float(keys), expected_density(plan) * keys + keys / (2 * k_clusters))
    return queries, keys, q_clusters, k_clusters, exact


def _passes(plan: AttentionPlan, iterations: float) -> tuple[float, int]:
    """Number of passes over all tokens, and of those that compute the moments of the metric.

    Tokens whose labels are reused are still sorted and averaged, in one pass.
    """
    moments = 1 if iterations and plan.cluster_metric == "logits" else 0
    return max(iterations, 1) + moments, moments


def _clustering_flops(
    shape: AttentionShape, plan: AttentionPlan, iterations: float, kept: bool
) -> float:
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    queries, keys, q_clusters, k_clusters, _ = _clustered(shape, plan)
    labelled = min(keys, BATCHES * queries) if kept else keys
    distances = heads * queries * q_clusters + kv_heads * labelled * k_clusters
    _, moments = _passes(plan, iterations)
    tokens = heads * queries + kv_heads * keys
    products = iterations * distances + moments * shape.head_dim * tokens
    return 2.0 * shape.head_dim * products
