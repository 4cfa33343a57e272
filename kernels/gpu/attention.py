"""The two stages on a GPU, a few heads at a time, so that scores and lists take little memory."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from svg_ear_compile.kernels.clusters import (
    Blocks,
    Clusters,
    Rounds,
    Routed,
    cold_start,
)
from svg_ear_compile.kernels.gpu.attend import attend_kernel
from svg_ear_compile.kernels.gpu.correction import curvature_and_slope, logit_corrections
from svg_ear_compile.kernels.gpu.finish import finish
from svg_ear_compile.kernels.gpu.kmeans import (
    SortedClusters,
    Spread,
    cluster_means,
    kmeans,
    regrouped,
)
from svg_ear_compile.kernels.gpu.launch import (
    BLOCKS_PER_COPY,
    HOPPER,
    LaunchConfig,
    architecture,
    ceil_div,
    launch_config,
    power_of_2_from,
    token_strides,
)
from svg_ear_compile.kernels.gpu.metric import logit_metrics
from svg_ear_compile.kernels.gpu.query_tiles import query_tiles
from svg_ear_compile.kernels.gpu.route import kv_indices_kernel, kv_offset_kernel, route_kernel
from svg_ear_compile.kernels.gpu.score import score_kernel
from svg_ear_compile.kernels.kept_clusters import Placed, excess_spread, updated_labels
from svg_ear_compile.kernels.kinds import TokenKinds
from svg_ear_compile.kernels.own_tokens import has_own_tokens
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import Implementation, register

# Memory for the scores or lists of the heads of one launch: a fraction of the bytes of Q, K, V and
# the output. With the floor small problems need only one launch.
WORKSPACE_FRACTION = 0.35
WORKSPACE_FLOOR = 256 << 20


@dataclass(frozen=True)
class SortedRouting(Routed):
    """`Routed` with what the attend stage needs in addition.

    Attributes:
        q_sorted, k_sorted: tokens sorted by cluster.
        value_means: (G_kv, Kc, D) in the dtype of v.
        pitch: number of key tokens that the list of a row has room for.
    """

    q_sorted: SortedClusters
    k_sorted: SortedClusters
    value_means: Tensor
    pitch: int


def cluster_and_route(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    kinds: TokenKinds,
    scale: float,
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None,
    on_hopper: bool,
    update: Placed | None = None,
) -> SortedRouting:
    """`reference.cluster_and_route` with `LaunchConfig.query_tile`; does not wait for the device.

    Labels and sizes are int32.
    """
    q, k, v, scale = _as_rows(q, k, v, scale)
    config = _config(q, on_hopper)
    batch, heads, _, dim = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    queries, keys, excess = _clustered(q, k, kinds, plan, centroids, blocks, update, config)
    q_clusters, k_clusters = queries.centroids.shape[1], keys.centroids.shape[1]
    spread = None
    if blocks is None:
        spread = Spread(*(torch.empty_like(keys.order, dtype=torch.float32) for _ in range(2)))
    value_means, rounded_value_means = cluster_means(
        v, keys.order, keys.starts, None, config, spread
    )

    flat_heads = batch * heads
    row_area = torch.empty(flat_heads, q_clusters, dtype=torch.int32, device=q.device)
    if blocks is None:
        mask_shape = (flat_heads, q_clusters, k_clusters)
        block_mask = torch.empty(mask_shape, dtype=torch.bool, device=q.device)
        tables = 1 if plan.routing == "density" else 2
        step = _heads_at_once(q, k, q_clusters * k_clusters * 4 * tables)
    else:
        block_mask, step = blocks.block_mask.flatten(0, 1).contiguous(), flat_heads
    scores = (block_mask, block_mask)  # placeholders, which are not read where blocks are reused
    if spread is not None:
        score = torch.empty(tables, step, q_clusters, k_clusters, device=q.device)
        scores = (score[0], score[-1])
    density_bits = int.from_bytes(struct.pack("<d", plan.density), "little")
    log_threshold = math.log(plan.threshold) if plan.threshold > 0 else -math.inf
    block_k = power_of_2_from(k_clusters)
    for first_head in range(0, flat_heads, step):
        launched = min(step, flat_heads - first_head)
        if spread is not None:
            score_kernel[(k_clusters, ceil_div(q_clusters, config.score.rows), launched)](
                queries.rounded, k, keys.order, keys.starts, keys.centroids, value_means,
                *spread, *scores, *token_strides(k), first_head, heads, kv_heads,
                k_tokens, q_clusters, k_clusters, scale,
                D=dim, BLOCK_D=config.block_dim, BLOCK_Q=config.score.rows,
                BLOCK_C=min(64, config.block_dim), BLOCK_N=config.score.columns,
                ROUTING=plan.routing,
                num_warps=config.score.warps, num_stages=config.score.stages,
            )  # fmt: skip
        route_kernel[(q_clusters, launched)](
            *scores, queries.starts, keys.starts, block_mask, row_area,
            first_head, heads, kv_heads, q_clusters, k_clusters, density_bits,
            plan.top_p, plan.min_block_ratio, log_threshold,
            BLOCK_K=block_k, ROUTING=plan.routing if blocks is None else "reused",
            num_warps=_row_warps(block_k),
        )  # fmt: skip
    return SortedRouting(
        _clusters(queries, batch, heads),
        _clusters(keys, batch, kv_heads),
        block_mask.unflatten(0, (batch, heads)),
        row_area.unflatten(0, (batch, heads)),
        queries,
        keys,
        rounded_value_means,
        math.ceil(plan.density * k_tokens) if plan.routing == "density" else k_tokens,
        excess=excess,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Routed,
    compensation: Compensation,
    *,
    scale: float,
    return_lse: bool,
    on_hopper: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.attend` of the result of `cluster_and_route`; does not wait for the device."""
    assert isinstance(routed, SortedRouting), "routed by another implementation"
    result = torch.empty_like(q)
    # The kernels write dense rows. A result of another layout gets a copy at the end.
    out = result if result.stride(-1) == 1 else q.new_empty(q.shape)
    q, k, v, scale = _as_rows(q, k, v, scale)
    config = _config(q, on_hopper)
    tile = config.wgmma or config.attend
    queries, keys, pitch = routed.q_sorted, routed.k_sorted, routed.pitch
    batch, heads, q_tokens, dim = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    q_clusters, k_clusters = queries.centroids.shape[1], keys.centroids.shape[1]
    flat_heads = batch * heads
    corrected = compensation == "gaussian"
    owns = has_own_tokens(compensation, q, k)
    needs_lse = return_lse or owns
    lse = q.new_empty(q.shape[:3] if needs_lse else (0,), dtype=torch.float32)
    tile_cluster, tile_place = query_tiles(queries.starts, q_tokens, tile.rows)
    tiles = tile_cluster.shape[1]
    step = _heads_at_once(q, k, q_clusters * (k_clusters * 4 * 3 + pitch * 4))

    def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(step, q_clusters, *shape, dtype=dtype, device=q.device)

    bias, offset = table(k_clusters, dtype=torch.float32), table(k_clusters)
    first, rows, kv_indices = table(k_clusters), table(3), table(pitch)
    correction = proxy_weight = bias  # placeholders, neither read nor written
    if corrected:
        curvature, slope = curvature_and_slope(k, v, keys, routed.value_means, scale, config)
        correction, clip = logit_corrections(q, queries, curvature, kv_heads, config)
        proxy_weight = torch.empty_like(correction)
    block_mask = routed.block_mask.flatten(0, 1)
    block_k = power_of_2_from(k_clusters)
    for first_head in range(0, flat_heads, step):
        launched = min(step, flat_heads - first_head)
        head_counts = (first_head, heads, kv_heads)
        kv_offset_kernel[(q_clusters, launched)](
            block_mask, keys.starts, bias, offset, first, rows,
            *head_counts, q_clusters, k_clusters,
            BLOCK_K=block_k, num_warps=_row_warps(block_k),
        )  # fmt: skip
        kv_indices_kernel[(q_clusters, ceil_div(k_clusters, BLOCKS_PER_COPY), launched)](
            offset, first, rows, keys.order, kv_indices, *head_counts,
            k_tokens, q_clusters, k_clusters, pitch,
            BLOCK_J=BLOCKS_PER_COPY, BLOCK_N=32,
        )  # fmt: skip
        arguments = (
            q, k, v, out, lse, tile_cluster, tile_place, queries.order, queries.starts,
            keys.order, keys.starts, kv_indices, rows, keys.rounded, routed.value_means, bias,
            correction, proxy_weight,
            *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(out),
            *head_counts, q_tokens, k_tokens, q_clusters, k_clusters, tiles, pitch, scale,
        )  # fmt: skip
        constants = {
            "D": dim, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns,
            "CORRECTED": corrected, "WRITE_LSE": needs_lse, "num_warps": tile.warps,
        }  # fmt: skip
        if config.wgmma:
            # Gluon is experimental in Triton, so only calls of this kernel import it.
            from svg_ear_compile.kernels.gpu.attend_wgmma import attend_wgmma_kernel

            attend_wgmma_kernel[(tiles, launched)](*arguments, **constants, STAGES=tile.stages)
        else:
            attend_kernel[(tiles, launched)](
                *arguments, **constants, BLOCK_D=config.block_dim, INT64_OFFSETS=_needs_int64(k, v),
                num_stages=tile.stages,
            )  # fmt: skip
    if corrected:
        finish(
            out, lse, proxy_weight, q, k, v, queries, keys, routed.value_means, block_mask,
            slope, correction, clip, scale, owns, config,
        )  # fmt: skip
    if out is not result:
        result.copy_(out)
    return result, lse if return_lse else lse.new_empty(0)


def _as_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Tensors of the same logits whose rows are dense in memory, with a scale >= 0."""
    if scale < 0:  # the kernels take the largest logit before they multiply by the scale
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v, scale


def _config(q: Tensor, on_hopper: bool) -> LaunchConfig:
    return _config_for(q.shape[-1], q.element_size(), architecture(q.device), on_hopper)


@functools.lru_cache(maxsize=256)
def _config_for(dim: int, element_size: int, architecture: str, on_hopper: bool) -> LaunchConfig:
    config = launch_config(dim, element_size, architecture)
    return config if on_hopper else replace(config, wgmma=None)


def _heads_at_once(q: Tensor, k: Tensor, bytes_per_head: int) -> int:
    """Number of heads whose scores or lists fit into the workspace."""
    tensors = (2 * q.numel() + 2 * k.numel()) * q.element_size()
    room = max(WORKSPACE_FLOOR, int(WORKSPACE_FRACTION * tensors))
    return min(q.shape[0] * q.shape[1], max(1, room // bytes_per_head))


def _row_warps(block_k: int) -> int:
    return min(16, max(4, block_k // 512))


def _clustered(
    q: Tensor,
    k: Tensor,
    kinds: TokenKinds,
    plan: AttentionPlan,
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None,
    update: Placed | None,
    config: LaunchConfig,
) -> tuple[SortedClusters, SortedClusters, Tensor | None]:
    """`clustering.cluster` with tile-aligned query clusters."""
    if blocks is not None:
        assert centroids is not None, "blocks come with the centroids of their clusters"
        return (
            regrouped(q, kinds.queries, centroids[0], blocks.q_labels, config),
            regrouped(k, kinds.keys, centroids[1], blocks.k_labels, config),
            None,
        )
    q_clusters, k_clusters = plan.clusters(*kinds.counts(q.shape[2], k.shape[2]))
    of_queries, of_keys = None, None
    if plan.cluster_metric == "logits":
        of_queries, of_keys = logit_metrics(q, k, kinds, config)

    def rounds_of(metric: Tensor | None) -> Rounds:
        return lambda x, of_x, start, rounds: kmeans(
            x, of_x, start, rounds, config, metric
        ).centroids.unflatten(0, x.shape[:2])

    iterations = 1
    if centroids is not None:
        iterations, q_start = plan.warm_iterations, centroids[0]
    else:
        q_start = cold_start(q, kinds.queries, q_clusters, plan, rounds_of(of_queries))
    queries = kmeans(q, kinds.queries, q_start, iterations, config, of_queries, config.query_tile)
    if update is None:
        if centroids is not None:
            k_start = centroids[1]
        else:
            k_start = cold_start(k, kinds.keys, k_clusters, plan, rounds_of(of_keys))
        return queries, kmeans(k, kinds.keys, k_start, iterations, config, of_keys), None
    batch, heads = k.shape[:2]
    labels, start = updated_labels(
        k, kinds.keys, k_clusters, update, plan,
        lambda x, of_x, start, rounds: _clusters(
            kmeans(x, of_x, start, rounds, config, of_keys), batch, heads
        ),
        lambda start, labels: _clusters(
            regrouped(k, kinds.keys, start, labels, config), batch, heads
        ),
    )  # fmt: skip
    keys = regrouped(k, kinds.keys, start, labels, config)
    metric = None if of_keys is None else of_keys.unflatten(0, (batch, heads))
    return queries, keys, excess_spread(k, _clusters(keys, batch, heads), metric)


def _needs_int64(k: Tensor, v: Tensor) -> bool:
    """Whether offsets inside one head reach 2^31 elements."""
    return bool(k.shape[2] * max(k.stride(2), v.stride(2)) >= 2**31)


def _clusters(found: SortedClusters, batch: int, heads: int) -> Clusters:
    tensors = (found.labels, found.centroids, found.sizes)
    return Clusters(*(t.unflatten(0, (batch, heads)) for t in tensors))


def _no_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"needs a GPU, not {q.device.type}"
    return None


def _no_hopper(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if architecture(q.device) != HOPPER or triton.knobs.runtime.interpret:
        return f"needs {HOPPER} (Gluon has no interpreter)"
    if launch_config(q.shape[-1], q.element_size(), HOPPER).wgmma is None:
        return f"has no tile for head dim {q.shape[-1]} in {q.dtype}"
    q, k, v, _ = _as_rows(q, k, v, 1.0)
    if _needs_int64(k, v):
        return "does not take heads of 2^31 elements or more"
    # Triton has to know that every row starts at a multiple of 16 bytes.
    aligned = all(
        t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in token_strides(t))
        for t in (q, k, v)
    )
    return None if aligned else "needs rows that start at multiples of 16 bytes"


TRITON = register(
    Implementation(
        "triton",
        _no_triton,
        functools.partial(cluster_and_route, on_hopper=False),
        functools.partial(attend, on_hopper=False),
    )
)
"""Plain Triton, for every GPU, and for Triton's interpreter on a CPU."""

HOPPER_GLUON = register(
    Implementation(
        "hopper",
        _no_hopper,
        functools.partial(cluster_and_route, on_hopper=True),
        functools.partial(attend, on_hopper=True),
    )
)
"""As `TRITON`, with the attend stage in Gluon."""
