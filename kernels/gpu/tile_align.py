"""Alignment of query clusters to subtiles and tiles on a GPU, see `clustering.tile_aligned`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.clusters import QueryTile
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, token_strides
from svg_ear_compile.kernels.gpu.nearest import keep_nearer, nearest_of, nothing_yet
from svg_ear_compile.kernels.gpu.sort import LabelCounts, Sorted


@triton.jit
def surplus_of(size, SUBTILE: tl.constexpr, TILE: tl.constexpr):
    """Numbers of queries that clusters of these sizes give away."""
    in_subtile, in_tile = size % SUBTILE, size % TILE
    surplus = tl.where(in_subtile <= SUBTILE // 4, in_subtile, 0)
    surplus = tl.where(in_tile <= TILE // 6, in_tile, surplus)
    return tl.where(size > SUBTILE, surplus, 0)


@triton.jit(do_not_specialize=["heads", "tokens", "clusters", "parts", "chunk"])
def tile_align_kernel(
    x_ptr,  # (B, H, N, D)
    aim_ptr,  # (G, C, D) in the dtype of x, see `aim_kernel`
    half_norm_ptr,  # (G, P) float32, see `aim_kernel`
    order_ptr,  # (G, N) int32
    start_ptr,  # (G, C + 3) int32
    label_ptr,  # (G, N) int32, in and out
    count_ptr,  # (G, parts, C + 2) int32, see `LabelCounts`, in and out
    stride_xb,
    stride_xh,
    stride_xn,
    pitch,  # P, a multiple of BLOCK_C
    heads,
    tokens,
    clusters,
    parts,
    chunk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUBTILE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # `QueryTile.candidates`
    BLOCK_C: tl.constexpr,
):
    """Move the surplus queries of one cluster to other clusters."""
    i = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    start_row = start_ptr + g * (clusters + 3)
    first = tl.load(start_row + i)
    size = tl.load(start_row + i + 1) - first
    surplus = surplus_of(size, SUBTILE, TILE)
    if surplus == 0:
        return
    b, h = g // heads, g % heads
    n = tl.arange(0, BLOCK_N)  # [BN]
    d = tl.arange(0, BLOCK_D)  # [BD]
    inside = n < size
    token = tl.load(order_ptr + g * tokens + first + n, mask=inside, other=0)
    x_row = x_ptr + b * stride_xb + h * stride_xh + token.to(tl.int64)[:, None] * stride_xn
    x_mask = inside[:, None] & (d < D)[None, :]
    x = tl.load(x_row + d[None, :], mask=x_mask, other=0.0)  # [BN, BD]
    best, origin = nothing_yet(BLOCK_N, BLOCK_C)
    for block in range(0, clusters, BLOCK_C):
        c = block + tl.arange(0, BLOCK_C)  # [BC]
        row = aim_ptr + (g * clusters + c)[None, :] * D + d[:, None]
        aim = tl.load(row, mask=(c[None, :] < clusters) & (d[:, None] < D), other=0.0)
        half_norm = tl.load(half_norm_ptr + g * pitch + c)
        there = c < clusters
        c_start = tl.load(start_row + c, mask=there, other=0)
        c_size = tl.load(start_row + c + 1, mask=there, other=0) - c_start
        c_last = c_size % SUBTILE
        takes = (c_last > SUBTILE // 4) & (c_last <= SUBTILE - SUBTILE // 4)
        takes = takes & (surplus_of(c_size, SUBTILE, TILE) == 0)
        distance = half_norm[None, :] - tl.dot(x, aim, input_precision="ieee")  # [BN, BC]
        distance = tl.where(takes[None, :], distance, float("inf"))
        best, origin = keep_nearer(distance, block, best, origin)
    nearest, to = nearest_of(best, origin, clusters)
    own_aim = tl.load(aim_ptr + (g * clusters + i) * D + d, mask=d < D, other=0.0)
    along = tl.sum(x.to(tl.float32) * own_aim.to(tl.float32)[None, :], 1)
    lost = nearest - (tl.load(half_norm_ptr + g * pitch + i) - along)  # [BN]
    lost = tl.where(inside, lost, float("inf"))
    # The queries whose distance grows least move; of equal ones the first.
    sooner = (lost[None, :] < lost[:, None]) | (
        (lost[None, :] == lost[:, None]) & (n[None, :] < n[:, None])
    )
    moves = (tl.sum(sooner.to(tl.int32), 1) < surplus) & (lost < float("inf"))
    tl.store(label_ptr + g * tokens + token, to, mask=moves)
    count = count_ptr + (g * parts + token // chunk) * (clusters + 2)
    tl.atomic_add(count + i, -1, mask=moves, sem="relaxed")
    tl.atomic_add(count + to, 1, mask=moves, sem="relaxed")


def align_to_tile(
    x: Tensor,
    aims: Tensor,
    half_norm: Tensor,
    found: Sorted,
    counts: LabelCounts,
    query_tile: QueryTile,
    config: LaunchConfig,
) -> None:
    """`clustering.tile_aligned` on a GPU; changes labels and their counts in place.

    Args:
        x: (B, H, N, D), last stride 1.
        aims, half_norm: (G, C, D) and (G, P) that gave the labels, see `aims_of`.
        found: the tokens sorted by label; afterwards the order is that of the labels before.
        counts: of the labels.
        query_tile: sizes of subtile and tile.
        config: see `launch_config`.
    """
    _, heads, tokens, dim = x.shape
    groups, clusters, _ = aims.shape
    tile_align_kernel[(clusters, groups)](
        x, aims, half_norm, found.order, found.starts, found.labels, counts.table,
        *token_strides(x), half_norm.shape[1], heads, tokens, clusters,
        counts.table.shape[1], counts.chunk,
        D=dim, BLOCK_D=config.block_dim, SUBTILE=query_tile.subtile, TILE=query_tile.tile,
        BLOCK_N=query_tile.candidates, BLOCK_C=config.assign.columns, num_warps=8, num_stages=1,
    )  # fmt: skip
