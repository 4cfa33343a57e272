"""Launch configurations: every tile shape that the kernels can be launched with.

The set of configurations is small and known, so that tests can compile each one for every supported
GPU without owning that GPU, and check registers, spills and shared memory. Numbers of heads, tokens
and clusters are never specialised, so that a new resolution compiles nothing. Strides are
specialised, because loads are wide only where the compiler knows what divides the strides.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import QueryTile
from svg_ear_compile.kernels.plan import HEAD_DIMS

WGMMA_SUBTILE = 64
"""Queries of one group of warps; a group without queries does nothing."""

BLOCKS_PER_COPY = 64
"""Exact blocks of a row whose tokens one program of `kv_indices_kernel` copies."""


@dataclass(frozen=True)
class Tiles:
    """Tile of one kernel: rows, columns, warps, software-pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles of all kernels for one head dim and element size.

    Attributes:
        block_dim: head dim rounded up to a power of two, the width of every tile.
        assign: queries or keys × centroids.
        score: query centroids × keys of one cluster.
        attend: queries of one cluster × keys.
        moments: tokens × columns of a head's moments.
        covariance: tokens × columns of a head's covariances.
        correction: queries × columns of a head's covariances.
        finish: queries × columns of the output.
        wgmma: as `attend`, for `attend_wgmma_kernel`; None where that kernel cannot be used.
    """

    block_dim: int
    assign: Tiles
    score: Tiles
    attend: Tiles
    moments: Tiles
    covariance: Tiles
    correction: Tiles
    finish: Tiles
    wgmma: Tiles | None = None

    @property
    def query_tile(self) -> QueryTile:
        """Sizes that query clusters are aligned to."""
        if self.wgmma:
            return QueryTile(WGMMA_SUBTILE, self.wgmma.rows)
        return QueryTile(self.attend.rows, self.attend.rows)


HOPPER = "sm_90"
"""Architecture on which tiles were chosen by measurements."""


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"`` and so on; "" for a device that is not a GPU."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=256)
def launch_config(head_dim: int, element_size: int, architecture: str) -> LaunchConfig:
    """The configuration for a head dim in elements and an element size in bytes (2 or 4).

    The tiles of `HOPPER` were measured at head dim 128; Triton's interpreter uses them too. Other
    architectures have less shared memory (gfx942: 64 KiB), or accumulators that take more
    registers, and get tiles that fit all of them. With 16-bit elements none of these tiles spills
    registers up to head dim 128.
    """
    hopper = architecture in (HOPPER, "")
    block_dim = max(16, power_of_2_from(head_dim))
    padded = head_dim < block_dim  # the masks of padded columns take registers
    if element_size == 4:
        # tf32 is not exact enough for float32, so float32 products run on the CUDA cores.
        if block_dim <= 64:
            tiles = Tiles(32, 32, 4, 2)
        else:
            tiles = Tiles(16, 32, 4, 1) if block_dim > 128 else Tiles(32, 32, 4, 1)
        sums = Tiles(32, 32, 8, 1)
        return LaunchConfig(block_dim, tiles, tiles, tiles, sums, sums, tiles, sums)
    moments, covariance = Tiles(32, 32, 8 if padded else 4, 1), Tiles(32, 32, 4, 1)
    correction = finish = covariance
    if hopper:
        columns = block_dim if block_dim <= 128 else 32
        narrow = block_dim > 128 or padded
        moments = Tiles(64, columns, 8, 1) if narrow else Tiles(128, columns, 4, 3)
        covariance = Tiles(64, columns, 8, 1 if padded or block_dim > 128 else 2)
        correction = Tiles(64, min(64, block_dim), 8 if padded else 4, 1)
        finish = Tiles(64, 32, 8 if narrow else 4, 1)
    # 72 is not a multiple of 16: loads are narrow, and their addresses take many registers.
    rows = 64 if head_dim == 72 else 128
    if block_dim > 128:
        assign, score, attend = Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 2)
    elif not hopper:
        attend = Tiles(rows, 32, 8 if padded or block_dim == 128 else 4, 2)
        assign, score = Tiles(64, 64, 8 if padded else 4, 2), Tiles(32, 32, 8, 1)
    else:
        # With two stages the results changed from call to call at head dims 80 and 96.
        score = Tiles(32 if head_dim == 72 else 64, 32, 4, 1)
        assign = Tiles(64 if padded else 128, 64, 4, 2)
        attend = Tiles(rows, 64, 8 if padded or block_dim == 128 else 4, 3)
    wgmma = Tiles(192, 64, 4, 4) if hopper and head_dim in (64, 128) else None
    return LaunchConfig(
        block_dim, assign, score, attend, moments, covariance, correction, finish, wgmma
    )


def token_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens; 0 for a dimension of size 1, whatever its stride."""
    batch, heads, tokens = x.shape[:3]
    of_batch, of_heads, of_tokens = x.stride()[:3]
    return (
        of_batch if batch != 1 else 0,
        of_heads if heads != 1 else 0,
        of_tokens if tokens != 1 else 0,
    )


# Triton's own functions of these two can be called in kernels, which makes each call on the host
# take microseconds.
def ceil_div(number: int, by: int) -> int:
    """number / by, rounded up."""
    return -(-number // by)


def power_of_2_from(least: int) -> int:
    """The least power of two that is not below `least`."""
    return 1 << (least - 1).bit_length()


def parts_of(tokens: int, programs: int, step: int) -> tuple[int, int]:
    """Number of parts of `tokens`, and tokens of a part, a multiple of `step`.

    Each part is computed by `programs` programs. There are enough parts for 512 programs, which
    keep a large device busy, but none of fewer than 1024 tokens, which are not worth a program.
    """
    parts = min(ceil_div(512, programs), ceil_div(tokens, 1024))
    chunk = ceil_div(tokens, parts * step) * step
    return ceil_div(tokens, chunk), chunk


def all_launch_configs() -> list[tuple[int, int, str, LaunchConfig]]:
    """(head_dim, element_size, architecture, configuration) of everything `launch_config` returns.

    All architectures other than `HOPPER` have the tiles of the other one in the list.
    """
    return [
        (dim, size, arch, launch_config(dim, size, arch))
        for dim in HEAD_DIMS
        for size in (2, 4)
        for arch in (HOPPER, "sm_80")
    ]
