"""Tiles of queries for the attend stage on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.gpu.launch import ceil_div, power_of_2_from


@triton.jit(do_not_specialize=["clusters", "tiles"])
def query_tile_kernel(
    start_ptr,  # (G, Qc + 3) int32
    cluster_ptr,  # (G, T) int32, out
    place_ptr,  # (G, T) int32, out
    clusters,  # Qc
    tiles,  # T
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least Qc + 1
):
    """Tiles of one head."""
    g = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK_C)  # [BC]
    label = tl.where(rank == 0, clusters, rank - 1)
    start_at = start_ptr + g * (clusters + 3) + label
    start = tl.load(start_at, mask=rank <= clusters, other=0)
    size = tl.load(start_at + 1, mask=rank <= clusters, other=0) - start
    count = (size + ROWS - 1) // ROWS
    row = g * tiles
    first = row + tl.cumsum(count, 0) - count
    for tile in range(0, tl.max(count, 0)):
        there = tile < count
        tl.store(cluster_ptr + first + tile, label, mask=there)
        tl.store(place_ptr + first + tile, start + tile * ROWS, mask=there)
    none = tl.zeros([BLOCK_C], tl.int32)
    for tile in range(tl.sum(count, 0), tiles, BLOCK_C):
        at = tile + rank
        tl.store(cluster_ptr + row + at, none + clusters + 1, mask=at < tiles)
        tl.store(place_ptr + row + at, none, mask=at < tiles)


def query_tiles(starts: Tensor, q_tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Tiles of `rows` queries of one cluster, those of the always exact queries first.

    Always exact queries attend to every key and take many times as long as
    the others. If their tiles were started last, they would still run when all others are done.

    Args:
        starts: (G, Qc + 3) int32, see `sort.Sorted`.
        q_tokens: number of queries of a head.
        rows: queries of a tile.

    Returns:
        (G, T) int32 cluster of each tile, more than Qc where there is no tile, and (G, T) int32
        place of its first query. T is an upper bound of the number of tiles for any cluster sizes.
    """
    groups, clusters = starts.shape[0], starts.shape[1] - 3
    tiles = ceil_div(q_tokens, rows) + clusters + 1
    cluster, place = torch.empty(
        2, groups, tiles, dtype=torch.int32, device=starts.device
    ).unbind()  # fmt: skip
    query_tile_kernel[(groups,)](
        starts, cluster, place, clusters, tiles,
        ROWS=rows, BLOCK_C=power_of_2_from(clusters + 1), num_warps=4, num_stages=1,
    )  # fmt: skip
    return cluster, place
