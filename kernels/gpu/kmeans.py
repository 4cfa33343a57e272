"""Stage 1 on a GPU: batched k-means with a fixed number of iterations and no host synchronisation.

Heads are flattened to G = B * H. An iteration assigns every token to its nearest centroid, sorts
the tokens by label, and averages the tokens of each cluster in sorted order in float32. The result
does not depend on the order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.clusters import QueryTile
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, ceil_div, token_strides
from svg_ear_compile.kernels.gpu.nearest import keep_nearer, nearest_of, nothing_yet
from svg_ear_compile.kernels.gpu.sort import LabelCounts, sort_by_label, uncounted
from svg_ear_compile.kernels.gpu.tile_align import align_to_tile
from svg_ear_compile.kernels.kinds import EXACT, PADDING

# Half norms are padded to a multiple of this, so that no tile of centroids has to mask them.
_PITCH = 64


class SortedClusters(NamedTuple):
    """Tokens of G heads sorted by label.

    Attributes:
        labels, order, starts, sizes: see `sort.Sorted`.
        centroids: (G, C, D) float32.
        rounded: (G, C, D) centroids in the dtype of the tokens.
    """

    labels: Tensor
    order: Tensor
    starts: Tensor
    sizes: Tensor
    centroids: Tensor
    rounded: Tensor


class Spread(NamedTuple):
    """Distance of the token at each place of the order from the mean of its cluster.

    ``delta`` is the token minus the mean. Places of tokens in no cluster are not written.

    Attributes:
        along: (G, N) float32, ``mean . delta``.
        square: (G, N) float32, ``|delta|^2``.
    """

    along: Tensor
    square: Tensor


@triton.jit(do_not_specialize=["heads", "tokens", "clusters", "parts", "chunk"])
def kmeans_assign_kernel(
    x_ptr,  # (B, H, N, D)
    aim_ptr,  # (G, C, D) in the dtype of x, see `aim_kernel`
    half_norm_ptr,  # (G, P) float32, see `aim_kernel`
    kind_ptr,  # (B|1, H|1, N) uint8, see `kernels.kinds`
    label_ptr,  # (G, N) int32, out
    count_ptr,  # (G, parts, C + 2) int32, see `LabelCounts`, 0 before
    stride_xb,
    stride_xh,
    stride_xn,
    stride_kb,
    stride_kh,
    stride_kn,
    pitch,  # P, a multiple of BLOCK_C
    heads,
    tokens,
    clusters,
    parts,
    chunk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    IS_PADDING: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """Label of each token: the nearest centroid, the lowest of equal ones, or C or C + 1."""
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    d = tl.arange(0, BLOCK_D)  # [BD]
    x_base = x_ptr + b * stride_xb + h * stride_xh
    x_row = x_base + token.to(tl.int64)[:, None] * stride_xn + d[None, :]
    x = tl.load(x_row, mask=(token[:, None] < tokens) & (d[None, :] < D), other=0.0)  # [BN, BD]
    best, origin = nothing_yet(BLOCK_N, BLOCK_C)
    for first in range(0, clusters, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BC]
        row = aim_ptr + (g * clusters + c)[None, :] * D + d[:, None]
        aim = tl.load(row, mask=(c[None, :] < clusters) & (d[:, None] < D), other=0.0)
        half_norm = tl.load(half_norm_ptr + g * pitch + c)
        distance = half_norm[None, :] - tl.dot(x, aim, input_precision="ieee")  # [BN, BC]
        best, origin = keep_nearer(distance, first, best, origin)
    _, label = nearest_of(best, origin, clusters)
    # x * 0 is NaN exactly where x is NaN or infinite.
    not_finite = tl.sum(x.to(tl.float32) * 0.0, 1) != 0.0
    label = tl.where(not_finite, clusters, label)
    if HAS_KINDS:
        kind_row = kind_ptr + b * stride_kb + h * stride_kh + token.to(tl.int64) * stride_kn
        kind = tl.load(kind_row, mask=token < tokens, other=0)
        label = tl.where(kind == IS_EXACT, clusters, label)
        label = tl.where(kind == IS_PADDING, clusters + 1, label)
    tl.store(label_ptr + g * tokens + token, label, mask=token < tokens)
    count = count_ptr + (g * parts + token // chunk) * (clusters + 2) + label
    tl.atomic_add(count, 1, mask=token < tokens, sem="relaxed")


@triton.jit(do_not_specialize=["clusters", "pitch", "shared_by", "parts"])
def aim_kernel(
    centroid_ptr,  # (G, C, D), any float dtype
    metric_ptr,  # (G / shared_by, D, D) float32, symmetric
    aim_ptr,  # (G, C, D) in the dtype of the tokens
    half_norm_ptr,  # (G, P) float32
    count_ptr,  # (G, parts, C + 2) int32, see `LabelCounts`, set to 0
    pitch,  # P, a multiple of BLOCK_N
    clusters,
    shared_by,  # heads that have one metric
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_METRIC: tl.constexpr,
):
    """For BLOCK_N centroids c: ``a = M c``, rounded, and ``h = c . a - c' M c / 2``.

    Centroid and metric are rounded to the dtype of the tokens before the product. The nearest
    centroid of x is the one of least ``h - x . a``. h contains the rounded a, so that the rounding
    of a cancels for a token at its centroid, however far both are from 0. Past C, h is infinite.
    The last program clears the counts of the labels that are found next.
    """
    g = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) * BLOCK_N >= pitch:  # one program more than tiles
        cells = parts * (clusters + 2)
        for first in range(0, cells, 1024):
            cell = first + tl.arange(0, 1024)
            to = count_ptr + g * cells + cell
            tl.store(to, tl.zeros([1024], tl.int32), mask=cell < cells)
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    d = tl.arange(0, BLOCK_D)  # [BD]
    dtype = aim_ptr.dtype.element_ty
    row = (g * clusters + n)[:, None] * D
    there = (n < clusters)[:, None]
    centroid = tl.load(centroid_ptr + row + d[None, :], mask=there & (d < D)[None, :], other=0.0)
    centroid = centroid.to(tl.float32).to(dtype)
    half_norm = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BC]
        inside = there & (c < D)[None, :]
        mine = tl.load(centroid_ptr + row + c[None, :], mask=inside, other=0.0)
        mine = mine.to(tl.float32).to(dtype).to(tl.float32)
        moved = mine  # [BN, BC]
        if HAS_METRIC:
            column = tl.load(
                metric_ptr + (g // shared_by * D + d[:, None]) * D + c[None, :],
                mask=(d < D)[:, None] & (c < D)[None, :],
                other=0.0,
            )  # [BD, BC]
            moved = tl.dot(centroid, column.to(dtype), input_precision="ieee")
        aim = moved.to(dtype)
        tl.store(aim_ptr + row + c[None, :], aim, mask=inside)
        half_norm += tl.sum(mine * (aim.to(tl.float32) - 0.5 * moved), 1)
    half_norm = tl.where(n < clusters, half_norm, float("inf"))
    tl.store(half_norm_ptr + g * pitch + n, half_norm)


@triton.jit(do_not_specialize=["heads", "tokens", "clusters"])
def cluster_mean_kernel(
    x_ptr,  # (B, H, N, D)
    order_ptr,  # (G, N) int32
    start_ptr,  # (G, C + 3) int32
    kept_ptr,  # (G, C, D) any float dtype, means of empty clusters where HAS_KEPT
    mean_ptr,  # (G, C, D) float32, out
    rounded_ptr,  # (G, C, D) in the dtype of x
    along_ptr,  # (G, N) float32, out where WRITE_SPREAD, see `Spread`
    square_ptr,  # (G, N) float32, out where WRITE_SPREAD, see `Spread`
    stride_xb,
    stride_xh,
    stride_xn,
    heads,
    tokens,
    clusters,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    WRITE_SPREAD: tl.constexpr,
):
    """Mean of the tokens of one cluster; an empty cluster keeps its mean, or has mean 0."""
    c = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    d = tl.arange(0, BLOCK_D)  # [BD]
    first = tl.load(start_ptr + g * (clusters + 3) + c)
    last = tl.load(start_ptr + g * (clusters + 3) + c + 1)
    x_base = x_ptr + b * stride_xb + h * stride_xh
    total = tl.zeros([BLOCK_D], tl.float32)
    for place in range(first, last, BLOCK_N):
        at = place + tl.arange(0, BLOCK_N)  # [BN]
        token = tl.load(order_ptr + g * tokens + at, mask=at < last, other=0).to(tl.int64)
        row = x_base + token[:, None] * stride_xn + d[None, :]
        x = tl.load(row, mask=(at[:, None] < last) & (d[None, :] < D), other=0.0)  # [BN, BD]
        total += tl.sum(x.to(tl.float32), 0)
    to = (g * clusters + c) * D + d
    mean = total / tl.maximum(last - first, 1).to(tl.float32)
    if HAS_KEPT and first == last:
        mean = tl.load(kept_ptr + to, mask=d < D, other=0.0).to(tl.float32)
    tl.store(mean_ptr + to, mean, mask=d < D)
    tl.store(rounded_ptr + to, mean.to(rounded_ptr.dtype.element_ty), mask=d < D)
    if WRITE_SPREAD:
        for place in range(first, last, BLOCK_N):
            at = place + tl.arange(0, BLOCK_N)  # [BN]
            inside = at < last
            token = tl.load(order_ptr + g * tokens + at, mask=inside, other=0).to(tl.int64)
            row = x_base + token[:, None] * stride_xn + d[None, :]
            x = tl.load(row, mask=inside[:, None] & (d[None, :] < D), other=0.0)  # [BN, BD]
            away = tl.where((d < D)[None, :], x.to(tl.float32) - mean[None, :], 0.0)
            along = tl.sum(away * mean[None, :], 1)
            tl.store(along_ptr + g * tokens + at, along, mask=inside)
            tl.store(square_ptr + g * tokens + at, tl.sum(away * away, 1), mask=inside)


def cluster_means(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    kept: Tensor | None,
    config: LaunchConfig,
    spread: Spread | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster means of x (B, H, N, D).

    Args:
        x: (B, H, N, D).
        order, starts: (G, N) and (G, C + 3), see `sort.Sorted`.
        kept: (G, C, D) contiguous, any float dtype, means of empty clusters; None gives 0.
        config: see `launch_config`.
        spread: written too, unless it is None.

    Returns:
        Means (G, C, D) in float32 and in the dtype of x.
    """
    _, heads, tokens, dim = x.shape
    groups, clusters = order.shape[0], starts.shape[1] - 3
    means = torch.empty(groups, clusters, dim, dtype=torch.float32, device=x.device)
    rounded = torch.empty_like(means, dtype=x.dtype)
    cluster_mean_kernel[(clusters, groups)](
        x, order, starts, means if kept is None else kept, means, rounded,
        *(spread or (means, means)),
        x.stride(0), x.stride(1), x.stride(2), heads, tokens, clusters,
        D=dim, BLOCK_D=config.block_dim, BLOCK_N=32, num_warps=2,
        HAS_KEPT=kept is not None, WRITE_SPREAD=spread is not None,
    )  # fmt: skip
    return means, rounded


def kmeans(
    x: Tensor,
    kinds: Tensor | None,
    centroids: Tensor,
    iterations: int,
    config: LaunchConfig,
    metric: Tensor | None = None,
    query_tile: QueryTile | None = None,
) -> SortedClusters:
    """`clustering.kmeans` on a GPU.

    Args:
        x: (B, H, N, D), last stride 1.
        kinds: (B|1, H|1, N) uint8 or None.
        centroids: (B, H, C, D) finite, any float dtype; not modified.
        iterations: number of assign-and-update rounds, at least 1.
        config: see `launch_config`.
        metric: see `aims_of`.
        query_tile: tile of `align_to_tile`, which is applied in the last iteration, or None.
    """
    batch, heads, tokens, dim = x.shape
    groups, clusters = batch * heads, centroids.shape[2]
    means = centroids.flatten(0, 1).contiguous()
    labels = torch.empty(groups, tokens, dtype=torch.int32, device=x.device)
    kind_strides = (0, 0, 0) if kinds is None else token_strides(kinds)
    counts = uncounted(groups, tokens, clusters, x.device)  # `aim_kernel` clears it
    tiles = config.assign
    for iteration in range(iterations):
        aims, half_norm = aims_of(means, x.dtype, metric, counts, config)
        kmeans_assign_kernel[(ceil_div(tokens, tiles.rows), groups)](
            x, aims, half_norm, x if kinds is None else kinds, labels, counts.table,
            *token_strides(x), *kind_strides, half_norm.shape[1], heads, tokens, clusters,
            counts.table.shape[1], counts.chunk,
            D=dim, BLOCK_D=config.block_dim, BLOCK_N=tiles.rows, BLOCK_C=tiles.columns,
            HAS_KINDS=kinds is not None, IS_PADDING=PADDING, IS_EXACT=EXACT,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        found = sort_by_label(labels, clusters, heads, counts=counts)
        if query_tile is not None and iteration == iterations - 1:
            align_to_tile(x, aims, half_norm, found, counts, query_tile, config)
            found = sort_by_label(labels, clusters, heads, counts=counts)
        means, rounded = cluster_means(x, found.order, found.starts, means, config)
    return SortedClusters(*found, means, rounded)


def regrouped(
    x: Tensor, kinds: Tensor | None, centroids: Tensor, labels: Tensor, config: LaunchConfig
) -> SortedClusters:
    """`clustering.regrouped` on a GPU.

    Args:
        x: (B, H, N, D), last stride 1.
        kinds: (B|1, H|1, N) uint8 or None.
        centroids: (B, H, C, D) any float dtype; not modified.
        labels: (B, H, N) integer.
        config: see `launch_config`.
    """
    clusters = centroids.shape[2]
    flat = labels.flatten(0, 1).contiguous()
    found = sort_by_label(flat, clusters, x.shape[1], kinds)
    kept = centroids.flatten(0, 1).contiguous()
    return SortedClusters(*found, *cluster_means(x, found.order, found.starts, kept, config))


def aims_of(
    centroids: Tensor,
    dtype: torch.dtype,
    metric: Tensor | None,
    counts: LabelCounts,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor]:
    """Aims and half norms of `aim_kernel`, and counts of 0.

    A product by cuBLAS would give every captured graph a workspace, so a kernel of ours does it.

    Args:
        centroids: (G, C, D) contiguous, any float dtype.
        dtype: of the tokens.
        metric: (G', D, D) float32, symmetric, one for every G / G' heads; None for the identity.
        counts: set to 0 for the assignment that follows.
        config: see `launch_config`.

    Returns:
        aims (G, C, D) in the dtype of the tokens and half norms (G, P) float32.
    """
    groups, clusters, dim = centroids.shape
    aims = torch.empty_like(centroids, dtype=dtype)
    pitch = ceil_div(clusters, _PITCH) * _PITCH
    half_norm = torch.empty(groups, pitch, dtype=torch.float32, device=centroids.device)
    tiles = config.correction
    aim_kernel[(pitch // tiles.rows + 1, groups)](
        centroids, aims if metric is None else metric, aims, half_norm, counts.table,
        pitch, clusters, 1 if metric is None else groups // metric.shape[0], counts.table.shape[1],
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        HAS_METRIC=metric is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return aims, half_norm
