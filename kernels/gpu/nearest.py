"""The nearest of many centroids, found in one pass over tiles of centroids."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing_yet(BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Initial `best` and `origin` of `keep_nearer`."""
    best = tl.full([BLOCK_N, BLOCK_C // 2], float("inf"), tl.float32)
    return best, tl.zeros([BLOCK_N, BLOCK_C // 2], tl.int32)


@triton.jit
def keep_nearer(distance, first, best, origin):
    """Update `best` and `origin` with the distances [BN, BC] of the centroids from `first` on.

    `best` [BN, BC / 2] is the least distance in each pair of columns over all tiles so far.
    `origin` [BN, BC / 2] is the index `first` of the tile of that distance, plus 1 where the
    distance was in the second column of the pair. Different pairs are compared only after the last
    tile, in `nearest_of`: one reduction instead of one for every tile. Pairs take half the
    registers that single columns would.
    """
    pairs: tl.constexpr = [distance.shape[0], distance.shape[1] // 2, 2]
    even, odd = tl.split(tl.reshape(distance, pairs))  # [BN, BC / 2]
    nearer = tl.minimum(even, odd)
    origin = tl.where(nearer < best, tl.where(nearer == even, first, first + 1), origin)
    return tl.minimum(best, nearer), origin


@triton.jit
def nearest_of(best, origin, none):
    """Least distance [BN] and index of its centroid [BN], the lowest of equal ones.

    `none` is a number above all indices.
    """
    nearest = tl.min(best, 1)
    candidate = origin + 2 * tl.arange(0, best.shape[1])[None, :]
    return nearest, tl.min(tl.where(best == nearest[:, None], candidate, none), 1)
