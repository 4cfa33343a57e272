"""All five stages on a GPU, a few heads at a time so that the tables stay small."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from svg_ear_compile.kernels.clusters import Blocks, Clusters, Result, initial_centroids
from svg_ear_compile.kernels.gpu.attend import attend_kernel
from svg_ear_compile.kernels.gpu.correction import (
    correct_values,
    curvature_and_slope,
    logit_corrections,
)
from svg_ear_compile.kernels.gpu.kmeans import (
    SortedClusters,
    Spread,
    cluster_means,
    kmeans,
    regrouped,
)
from svg_ear_compile.kernels.gpu.launch import (
    LISTED_CLUSTERS,
    LaunchConfig,
    is_hopper,
    launch_config,
    token_strides,
)
from svg_ear_compile.kernels.gpu.metric import logit_metrics
from svg_ear_compile.kernels.gpu.probe import probe_kernel
from svg_ear_compile.kernels.gpu.route import list_keys_kernel, route_kernel
from svg_ear_compile.kernels.plan import AttentionPlan

# Scores and lists of the heads in flight, as a fraction of the bytes of Q, K, V and the output; the
# floor keeps small problems in one launch.
WORKSPACE_FRACTION = 0.35
WORKSPACE_FLOOR = 256 << 20


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
    return_lse: bool = False,
) -> Result:
    """All five stages; arguments and result as `reference.sparse_attention`.

    The query tile is `LaunchConfig.query_tile`. Nothing waits for the device. The output has the
    dtype and layout of q; `Result.lse` is empty unless `return_lse`; labels and sizes are int32.
    """
    if scale is not None and scale < 0:  # the kernels take the largest logit before they scale
        q, scale = -q, -scale
    promised = torch.empty_like(q)
    # The kernels write rows: a layout whose last dim is not dense is filled at the end.
    out = promised if promised.stride(-1) == 1 else q.new_empty(q.shape)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, q_tokens, dim = q.shape
    kv_heads, k_tokens = k.shape[1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    config = launch_config(dim, q.element_size(), is_hopper(q.device))
    mask = None if attn_mask is None else attn_mask[:, :, 0, :]
    wide = k_tokens * max(k.stride(2), v.stride(2)) >= 2**31
    # Gluon has no interpreter.
    if wide or triton.knobs.runtime.interpret or not _copied_in_16_bytes(q, k, v):
        config = replace(config, wgmma=None)
    attend = config.wgmma or config.attend
    queries, keys = _clustered(q, k, mask, plan, text, centroids, blocks, config)
    q_clusters, k_clusters = queries.centroids.shape[1], keys.centroids.shape[1]
    value_means = torch.zeros_like(keys.centroids)
    spread = None
    if blocks is None:
        spread = Spread(*(torch.empty_like(keys.order, dtype=torch.float32) for _ in range(2)))
    rounded_value_means = cluster_means(v, keys.order, keys.starts, value_means, config, spread)

    groups = batch * heads
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    if blocks is None:
        exact = torch.empty(groups, q_clusters, k_clusters, dtype=torch.bool, device=q.device)
    else:
        exact = blocks.exact.flatten(0, 1).contiguous()
    row_area = torch.empty(groups, q_clusters, dtype=torch.int32, device=q.device)
    clustered_keys = keys.starts[:, k_clusters]
    budget = torch.ceil(plan.density * clustered_keys.double()).float()
    listed = math.ceil(plan.density * k_tokens) if plan.routing == "density" else k_tokens
    tile_cluster, tile_place = query_tiles(queries, q_tokens, attend.rows)
    pairs = q_clusters * k_clusters
    per_head = pairs * 4 * 5 + q_clusters * listed * 4
    tensors = (2 * q.numel() + 2 * k.numel()) * q.element_size()
    room = max(WORKSPACE_FLOOR, int(WORKSPACE_FRACTION * tensors))
    step = min(groups, max(1, room // per_head))

    def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(step, q_clusters, *shape, dtype=dtype, device=q.device)

    bias = table(k_clusters)
    log_error, log_mass, logit = (table(k_clusters) if blocks is None else bias for _ in range(3))
    offset = table(k_clusters, dtype=torch.int32)
    rows = table(3, dtype=torch.int32)
    key_list = table(listed, dtype=torch.int32)
    corrected = plan.compensation == "gaussian"
    correction = proxy_weight = bias  # never read, never written
    if corrected:
        curvature, slope = curvature_and_slope(k, v, keys, rounded_value_means, scale, config)
        correction, clip = logit_corrections(q, queries, curvature, kv_heads, config)
        proxy_weight = torch.empty_like(correction)
    head_counts = (heads, kv_heads)
    tiles = tile_cluster.shape[1]
    routing = plan.routing if blocks is None else "kept"
    log_threshold = math.log(plan.threshold) if plan.threshold > 0 else -math.inf
    for first_head in range(0, groups, step):
        launched = min(step, groups - first_head)
        if spread is not None:
            probe_kernel[(k_clusters, triton.cdiv(q_clusters, config.probe.rows), launched)](
                queries.rounded, k, keys.order, keys.starts, keys.centroids, value_means,
                *spread, log_error, log_mass, logit, *token_strides(k), first_head, *head_counts,
                k_tokens, q_clusters, k_clusters, scale,
                D=dim, BLOCK_D=config.block_dim, BLOCK_Q=config.probe.rows,
                BLOCK_N=config.probe.columns,
                num_warps=config.probe.warps, num_stages=config.probe.stages,
            )  # fmt: skip
        block_k = triton.next_power_of_2(k_clusters)
        route_kernel[(q_clusters, launched)](
            log_error, log_mass, logit, bias, queries.starts, keys.starts, budget,
            exact, row_area, offset, rows, first_head, *head_counts, q_clusters, k_clusters,
            plan.top_p, plan.min_block_ratio, log_threshold,
            BLOCK_K=block_k, ROUTING=routing, num_warps=min(16, max(4, block_k // 512)),
        )  # fmt: skip
        list_keys_kernel[(q_clusters, triton.cdiv(k_clusters, LISTED_CLUSTERS), launched)](
            offset, keys.starts, keys.order, key_list, first_head, *head_counts,
            k_tokens, q_clusters, k_clusters, listed,
            BLOCK_J=LISTED_CLUSTERS, BLOCK_N=32,
        )  # fmt: skip
        arguments = (
            q, k, v, out, lse, tile_cluster, tile_place, queries.order, queries.starts,
            keys.order, keys.starts, key_list, rows, keys.rounded, rounded_value_means, bias,
            correction, proxy_weight,
            *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(out),
            first_head, *head_counts, q_tokens, k_tokens, q_clusters, k_clusters, tiles, listed,
            scale,
        )  # fmt: skip
        constants = {
            "D": dim, "BLOCK_M": attend.rows, "BLOCK_N": attend.columns,
            "CORRECTED": corrected, "WRITE_LSE": return_lse, "num_warps": attend.warps,
        }  # fmt: skip
        if config.wgmma:
            # Experimental in Triton: only what runs it depends on it.
            from svg_ear_compile.kernels.gpu.attend_wgmma import attend_wgmma_kernel

            attend_wgmma_kernel[(tiles, launched)](*arguments, **constants, STAGES=attend.stages)
        else:
            attend_kernel[(tiles, launched)](
                *arguments, **constants, BLOCK_D=config.block_dim, WIDE=wide,
                num_stages=attend.stages,
            )  # fmt: skip
    if corrected:
        correct_values(out, q, queries, slope, clip, proxy_weight, kv_heads, config)
    if out is not promised:
        promised.copy_(out)
    return Result(
        promised,
        lse,
        _clusters(queries, batch, heads),
        _clusters(keys, batch, kv_heads),
        exact.unflatten(0, (batch, heads)),
        row_area.unflatten(0, (batch, heads)),
    )


def _clustered(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    plan: AttentionPlan,
    text: tuple[int, int],
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None,
    config: LaunchConfig,
) -> tuple[SortedClusters, SortedClusters]:
    """`clustering.cluster`, query clusters tile-aligned; `mask` is (B|1, H_kv|1, N_k)."""
    if blocks is not None:
        assert centroids is not None, "blocks come with the centroids of their clusters"
        return (
            regrouped(q, None, centroids[0], blocks.q_labels, config),
            regrouped(k, mask, centroids[1], blocks.k_labels, config),
        )
    if centroids is None:
        q_clusters, k_clusters = plan.clusters(q.shape[2] - sum(text), k.shape[2] - sum(text))
        full_mask = None if mask is None else mask.expand(k.shape[:3])
        q_init = initial_centroids(q, None, q_clusters, text, plan.seed)
        k_init = initial_centroids(k, full_mask, k_clusters, text, plan.seed)
        iterations = plan.first_iterations
    else:
        (q_init, k_init), iterations = centroids, plan.warm_iterations
    of_queries, of_keys = None, None
    if plan.cluster_metric == "logits":
        of_queries, of_keys = logit_metrics(q, k, mask, text, config)
    return (
        kmeans(q, None, q_init, text, iterations, config, of_queries, config.query_tile),
        kmeans(k, mask, k_init, text, iterations, config, of_keys),
    )


def query_tiles(queries: SortedClusters, q_tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Cut every query cluster into tiles of `rows` queries, text and its like first.

    Those see every key and take many times as long as the others: started last, they would run on
    when everything else is done.

    Returns:
        (G, T) int32 cluster of each tile, more than Qc where there is none, and (G, T) int32 place
        of its first query; T bounds the number of tiles whatever the sizes.
    """
    clusters = queries.starts.shape[1] - 2  # the special cluster included
    sizes = queries.starts.diff()[:, :clusters].roll(1, -1)  # [G, C], the special cluster first
    starts = queries.starts[:, :clusters].roll(1, -1)
    ends = ((sizes + rows - 1) // rows).cumsum(-1, dtype=torch.int32)  # [G, C]
    tile = torch.arange(
        triton.cdiv(q_tokens, rows) + clusters, device=ends.device, dtype=torch.int32
    )
    tile = tile.expand(ends.shape[0], -1).contiguous()
    turn = torch.searchsorted(ends, tile, right=True, out_int32=True)  # [G, T]
    known = turn.clamp(max=clusters - 1).long()
    first_tile = torch.where(known > 0, ends.gather(1, (known - 1).clamp(min=0)), 0)
    place = starts.gather(1, known) + (tile - first_tile) * rows
    cluster = torch.where(turn == 0, clusters - 1, turn - 1)
    return torch.where(turn == clusters, clusters, cluster), place


def _copied_in_16_bytes(*tensors: Tensor) -> bool:
    """Whether Triton can see that every row starts at a multiple of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in token_strides(t))
        for t in tensors
    )


def _clusters(found: SortedClusters, batch: int, heads: int) -> Clusters:
    clusters = found.centroids.shape[1]
    sizes = found.starts.diff()[:, :clusters]
    return Clusters(
        *(t.unflatten(0, (batch, heads)) for t in (found.labels, found.centroids, sizes))
    )
