"""The nearest of many centroids, found a tile of them at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing_yet(BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """`best` and `origin` before the first tile, see `keep_nearer`."""
    best = tl.full([BLOCK_N, BLOCK_C // 2], float("inf"), tl.float32)
    return best, tl.zeros([BLOCK_N, BLOCK_C // 2], tl.int32)


@triton.jit
def keep_nearer(distance, first, best, origin):
    """Fold in the distances [BN, BC] of centroids from number `first` on.

    `best` [BN, BC / 2] is the least of a pair of columns in all tiles so far, `origin` the number
    of its first column's centroid in that tile, or one more. Columns are compared only after the
    last tile: one reduction instead of one in every step; in pairs they take half the registers.
    """
    pairs: tl.constexpr = [distance.shape[0], distance.shape[1] // 2, 2]
    even, odd = tl.split(tl.reshape(distance, pairs))  # [BN, BC / 2]
    nearer = tl.minimum(even, odd)
    origin = tl.where(nearer < best, tl.where(nearer == even, first, first + 1), origin)
    return tl.minimum(best, nearer), origin


@triton.jit
def nearest_of(best, origin, none):
    """Least distance [BN] and its centroid, the lowest of equal ones; `none` is above them all."""
    nearest = tl.min(best, 1)
    candidate = origin + 2 * tl.arange(0, best.shape[1])[None, :]
    return nearest, tl.min(tl.where(best == nearest[:, None], candidate, none), 1)
