"""What one attention call asks of a device, stage by stage: operations, bytes, launches.

Plain arithmetic, no time: `latency` divides these by measured roofs. The counts follow the stages
of `kernels/reference.py` as the GPU and the CPU form carry them out. Restoring the token order has
no stage of its own: both forms scatter the output to its tokens while they attend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from svg_ear_compile.kernels.gpu.launch import LISTED_CLUSTERS, launch_config
from svg_ear_compile.kernels.plan import AttentionPlan

STAGES = ("cluster", "probe", "tables", "route", "attend", "second_order")
"""Stages of a sparse call; ``tables`` is what stand-ins of every query cluster's own add to the
probe, ``second_order`` what covariances take before and after the attend stage."""

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
    shape: AttentionShape, plan: AttentionPlan, kind: str, iterations: int | None = None
) -> dict[str, Amount]:
    """Work of each of `STAGES` for a plan that is not dense.

    Args:
        shape: see `AttentionShape`.
        plan: clusters, density, form.
        kind: ``"cuda"`` or ``"cpu"``.
        iterations: k-means rounds, by default those of a warm start; 0 where clusters and exact
            blocks are taken over.
    """
    rounds = plan.warm_iterations if iterations is None else iterations
    dim = shape.head_dim
    heads, kv_heads = shape.batch * shape.heads, shape.batch * shape.kv_heads
    queries, keys = max(shape.q_tokens - shape.text, 1), max(shape.k_tokens - shape.text, 1)
    q_clusters, k_clusters = plan.clusters(queries, keys)
    blocks = float(heads * q_clusters * k_clusters)
    density = expected_density(plan)
    own_tables = plan.has_own_tables
    on_gpu = kind == "cuda"
    size = shape.element_size if on_gpu else 4  # the CPU form computes in float32
    kv_bytes = 2.0 * kv_heads * keys * dim * size
    config = launch_config(dim, size)
    # A ragged cluster leaves half of its last tile empty on average; trimmed, a quarter of a share
    # and, as few end in a tile of little, a third of a tile. None has less than one.
    rows, probed_keys, probed_rows = float(queries), float(keys), float(q_clusters)
    if on_gpu:
        share, tile = config.shares
        rows = q_clusters * max(share, queries / q_clusters + share / 4)
        probed_keys += k_clusters * (config.probe.columns - 1) / 2
        probed_rows = math.ceil(q_clusters / config.probe.rows) * config.probe.rows
    # The block that crosses the budget is taken whole: half of one on average.
    exact = min(float(keys), density * keys + keys / (2 * k_clusters))
    # The GPU walks all stand-ins and takes the exact ones out by their bias.
    stand_ins = k_clusters if on_gpu else k_clusters * (1 - density)
    distances = heads * queries * q_clusters + kv_heads * keys * k_clusters
    tokens = heads * queries + kv_heads * keys
    # The metric's moments are one more pass over all tokens.
    moments = 1 if rounds and plan.cluster_metric == "logits" else 0
    passes = max(rounds, 1) + moments  # what is taken over is sorted and averaged all the same
    posterior = 4.0 * dim * heads * probed_rows * probed_keys  # mean keys and values of every block
    seen = exact + shape.text + stand_ins  # by one query
    attended = rows * seen + shape.text * shape.k_tokens
    # Keys and values pass from the cache to every tile of queries; a CPU reads them once.
    read, probed, passed = kv_bytes, kv_bytes, 0.0
    probe_waves = attend_waves = route_waves = 0.0
    if on_gpu:
        tiles = q_clusters * max(1.0, queries / q_clusters / tile + 1 / 3)
        attended_keys = tiles * seen + shape.text / tile * shape.k_tokens
        read += CACHED * 2.0 * heads * dim * size * attended_keys
        # Keys alone, a tile of query centroids after another; posterior means take the values too.
        passed = CACHED * heads * keys * dim * size * probed_rows / config.probe.rows
        probed = kv_bytes / 2 + passed
        if own_tables:  # and come from memory: every query cluster has tables of its own
            read += 2.0 * heads * dim * size * tiles * k_clusters
        probe_waves = heads * k_clusters * probed_rows / config.probe.rows / WAVE
        attend_waves = heads * tiles / WAVE
        route_waves = heads * q_clusters * (1 + k_clusters / LISTED_CLUSTERS) / WAVE
    elif own_tables:
        read += 2.0 * heads * rows * k_clusters * dim * size
    return {
        "cluster": Amount(
            flops=2.0 * rounds * dim * distances + 2.0 * moments * dim**2 * tokens,
            bytes=2.0 * passes * dim * size * tokens,
            launches=16.0 * passes,
        ),
        "probe": Amount(
            flops=2.0 * dim * heads * probed_rows * probed_keys + (0.0 if on_gpu else posterior),
            bytes=probed + 16.0 * blocks,
            launches=1.0 + probe_waves if on_gpu else 24.0 * heads * k_clusters,
        )
        if rounds or own_tables
        else Amount(),
        "tables": Amount(
            flops=posterior if on_gpu else 2.0 * dim * blocks,
            bytes=2.0 * dim * size * blocks + passed + kv_bytes / 2,
            launches=1.0 + probe_waves,
        )
        if own_tables
        else Amount(),
        "route": Amount(
            bytes=24.0 * blocks + 8.0 * heads * q_clusters * density * keys,
            launches=2.0 + route_waves if on_gpu else 16.0,
        ),
        "attend": Amount(
            flops=4.0 * dim * heads * attended,
            bytes=2.0 * heads * queries * dim * size + read,
            launches=1.0 + attend_waves if on_gpu else 16.0 * heads * (q_clusters + 1),
        ),
        # Two covariances of the keys, two products of the queries; the centroids are gathered.
        "second_order": Amount(
            flops=4.0 * dim**2 * (kv_heads * keys + heads * queries),
            bytes=(1 + CACHED * 4 / size) * kv_bytes
            + (4 + CACHED * 2) * heads * queries * dim * size,
            launches=3.0,
        )
        if plan.has_covariances
        else Amount(),
    }
