"""What one attention call asks of a device, stage by stage: operations, bytes, launches.

Plain arithmetic, no time: `latency` divides these by measured roofs. The counts follow the stages
of `kernels/reference.py` as the GPU kernels carry them out; restoring the token order has no stage
of its own, because the attend stage scatters the output to its tokens. On a CPU, where nobody
waits for a video, a sparse call is one stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.kernels.gpu.launch import LISTED_CLUSTERS, launch_config
from svg_ear_compile.kernels.plan import AttentionPlan

STAGES = {
    "cuda": ("cluster", "probe", "route", "attend", "correction"),
    "cpu": ("sparse",),
}
"""Stages of a sparse call by kind of device; ``correction`` is what the Gaussian form takes before
and after the attend stage."""

WAVE = 1024
"""Programs that a GPU runs at once, about; however little they do, it takes them a launch."""

CACHED = 0.25
"""What a byte from a GPU's cache costs, about, of one from its memory."""

ELEMENT_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class AttentionShape:
    """Plain facts of one attention call.

    Attributes:
        batch, heads, kv_heads, q_tokens, k_tokens, head_dim: q is (batch, heads, q_tokens,
            head_dim), k and v (batch, kv_heads, k_tokens, head_dim); tokens include the text.
        dtype: name without ``torch.``, one of `ELEMENT_SIZES`.
        text: text tokens of both sequences: exact keys of every query, dense queries.
    """

    batch: int
    heads: int
    kv_heads: int
    q_tokens: int
    k_tokens: int
    head_dim: int
    dtype: str
    text: int = 0

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return ELEMENT_SIZES[self.dtype]

    def with_tokens(self, tokens: int) -> AttentionShape:
        """The same call over `tokens` video tokens and the same text."""
        return replace(self, q_tokens=tokens + self.text, k_tokens=tokens + self.text)


@dataclass(frozen=True)
class Amount:
    """Work of one stage: multiply-adds times two, bytes moved, launches.

    On a GPU bytes from the cache count as `CACHED` says, and beside launches the waves of programs
    of the probe, the route and the attend stage count, see `WAVE`; on a CPU every operator does.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0


def expected_density(plan: AttentionPlan) -> float:
    """Density asked for, or the default where the routing decides it at run time."""
    return plan.density if plan.routing == "density" or plan.is_dense else AttentionPlan.density


def dense_amount(shape: AttentionShape) -> Amount:
    """Dense attention: two products of (N_q, D) by (N_k, D), inputs read and output written."""
    heads = shape.batch * shape.heads
    tokens = 2 * heads * shape.q_tokens + 2 * shape.batch * shape.kv_heads * shape.k_tokens
    return Amount(
        flops=4.0 * heads * shape.q_tokens * shape.k_tokens * shape.head_dim,
        bytes=float(tokens * shape.head_dim * shape.element_size),
        launches=1.0,
    )


def sparse_amounts(
    shape: AttentionShape, plan: AttentionPlan, device: Device, iterations: int | None = None
) -> dict[str, Amount]:
    """Work of each of the device's `STAGES` for a plan that is not dense.

    Args:
        shape: see `AttentionShape`.
        plan: clusters, density, form.
        device: its kind, and the architecture that decides the tiles.
        iterations: k-means rounds, by default those of a warm start; 0 where clusters and exact
            blocks are reused.
    """
    rounds = plan.warm_iterations if iterations is None else iterations
    if device.kind == "cpu":
        return {"sparse": _on_cpu(shape, plan, rounds)}
    dim, size = shape.head_dim, shape.element_size
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    queries, keys, q_clusters, k_clusters, exact = _clustered(shape, plan)
    kv_bytes = 2.0 * kv_heads * keys * dim * size
    config = launch_config(dim, size, device.architecture)
    # A ragged cluster leaves half of its last tile empty on average; aligned, a quarter of a
    # subtile and, as few end in a tile of little, a third of a tile. None has less than one.
    subtile, tile = config.query_tile
    rows = q_clusters * max(subtile, queries / q_clusters + subtile / 4)
    tiles = q_clusters * max(1.0, queries / q_clusters / tile + 1 / 3)
    probed_keys = keys + k_clusters * (config.probe.columns - 1) / 2
    probed_tiles = math.ceil(q_clusters / config.probe.rows)
    # All proxy tokens are walked; those of exact blocks are taken out by their bias.
    seen = exact + shape.text + k_clusters  # by one query
    attended_keys = tiles * seen + shape.text / tile * shape.k_tokens
    passes, _ = _passes(plan, rounds)
    tokens = heads * queries + kv_heads * keys
    blocks = float(heads * q_clusters * k_clusters)
    return {
        "cluster": Amount(
            flops=_clustering_flops(shape, plan, rounds),
            bytes=2.0 * passes * dim * size * tokens,
            launches=16.0 * passes,
        ),
        # Keys alone, from the cache to one tile of query centroids after another.
        "probe": Amount(
            flops=2.0 * dim * heads * probed_tiles * config.probe.rows * probed_keys,
            bytes=kv_bytes / 2 + CACHED * heads * keys * dim * size * probed_tiles + 16.0 * blocks,
            launches=1.0 + heads * k_clusters * probed_tiles / WAVE,
        )
        if rounds
        else Amount(),
        "route": Amount(
            bytes=24.0 * blocks + 8.0 * heads * q_clusters * expected_density(plan) * keys,
            launches=2.0 + heads * q_clusters * (1 + k_clusters / LISTED_CLUSTERS) / WAVE,
        ),
        # Keys and values pass from the cache to every tile of queries.
        "attend": Amount(
            flops=4.0 * dim * heads * (rows * seen + shape.text * shape.k_tokens),
            bytes=2.0 * heads * queries * dim * size
            + kv_bytes
            + CACHED * 2.0 * heads * dim * size * attended_keys,
            launches=1.0 + heads * tiles / WAVE,
        ),
        # Two covariances of the keys, two products of the queries.
        "correction": Amount(
            flops=4.0 * dim**2 * (kv_heads * keys + heads * queries),
            bytes=(1 + CACHED * 4 / size) * kv_bytes
            + (4 + CACHED * 2) * heads * queries * dim * size,
            launches=3.0,
        )
        if plan.compensation == "gaussian"
        else Amount(),
    }


def _on_cpu(shape: AttentionShape, plan: AttentionPlan, rounds: int) -> Amount:
    """All stages together: in float32, skipped blocks never touched, a cluster at a time."""
    dim, heads = shape.head_dim, shape.batch * shape.heads
    queries, keys, q_clusters, k_clusters, exact = _clustered(shape, plan)
    skipped = k_clusters * (1 - expected_density(plan))
    attended = queries * (exact + shape.text + skipped) + shape.text * shape.k_tokens
    probed = q_clusters * keys if rounds else 0
    covered = queries + keys if plan.compensation == "gaussian" else 0
    passes, _ = _passes(plan, rounds)
    return Amount(
        flops=_clustering_flops(shape, plan, rounds)
        + heads * dim * (2.0 * probed + 4.0 * attended + 4.0 * dim * covered),
        bytes=heads * (8.0 * passes * dim * (queries + keys) + 40.0 * q_clusters * k_clusters),
        launches=16.0 * (passes + 1)
        + heads * (24.0 * k_clusters * min(rounds, 1) + 16.0 * q_clusters),
    )


def _clustered(shape: AttentionShape, plan: AttentionPlan) -> tuple[int, int, int, int, float]:
    """Clustered queries and keys, clusters of both, and the exact keys of one query."""
    queries, keys = max(shape.q_tokens - shape.text, 1), max(shape.k_tokens - shape.text, 1)
    q_clusters, k_clusters = plan.clusters(queries, keys)
    # The block that crosses the budget is taken whole: half of one on average.
    exact = min(float(keys), expected_density(plan) * keys + keys / (2 * k_clusters))
    return queries, keys, q_clusters, k_clusters, exact


def _passes(plan: AttentionPlan, rounds: int) -> tuple[int, int]:
    """Passes over all tokens, and how many of them take the moments of the metric.

    What is reused is sorted and averaged all the same.
    """
    moments = 1 if rounds and plan.cluster_metric == "logits" else 0
    return max(rounds, 1) + moments, moments


def _clustering_flops(shape: AttentionShape, plan: AttentionPlan, rounds: int) -> float:
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    queries, keys, q_clusters, k_clusters, _ = _clustered(shape, plan)
    distances = heads * queries * q_clusters + kv_heads * keys * k_clusters
    _, moments = _passes(plan, rounds)
    products = rounds * distances + moments * shape.head_dim * (heads * queries + kv_heads * keys)
    return 2.0 * shape.head_dim * products
