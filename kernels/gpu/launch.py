"""Launch configurations: every tile shape that the kernels can be started with.

The set is small and listed so that each configuration can be compiled for each supported GPU
without owning one (registers, spills, shared memory). So that a new resolution compiles nothing,
counts of heads, tokens and clusters are never specialised; strides are, because their divisibility
makes loads wide.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import QueryTile
from svg_ear_compile.kernels.plan import HEAD_DIMS

WGMMA_SUBTILE = 64
"""Queries that one group of warps attends to; a group without queries does nothing."""

LISTED_CLUSTERS = 64
"""Key clusters whose tokens one program lists."""


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
        probe: query centroids × keys of one cluster.
        attend: queries of one cluster × keys.
        moments: tokens × columns of a head's moments.
        covariance: tokens × columns of a head's covariances.
        correction: queries × columns of what those make of them.
        wgmma: as `attend`, for `attend_wgmma_kernel`; None where that kernel does not serve.
    """

    block_dim: int
    assign: Tiles
    probe: Tiles
    attend: Tiles
    moments: Tiles
    covariance: Tiles
    correction: Tiles
    wgmma: Tiles | None = None

    @property
    def query_tile(self) -> QueryTile:
        """What query clusters are aligned to."""
        if self.wgmma:
            return QueryTile(WGMMA_SUBTILE, self.wgmma.rows)
        return QueryTile(self.attend.rows, self.attend.rows)


HOPPER = "sm_90"
"""The architecture whose tiles are measured."""


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"`` and the like; "" for what is no GPU."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def launch_config(head_dim: int, element_size: int, architecture: str) -> LaunchConfig:
    """The configuration for a head dim in elements and an element size in bytes (2 or 4).

    Tiles of `HOPPER`, which the interpreter takes too, are measured at head dim 128. Elsewhere
    there is less shared memory (64 KiB on gfx942) or a tile's accumulators take more registers; the
    tiles chosen there fit every device. In 16 bits up to head dim 128 none of them spills.
    """
    hopper = architecture in (HOPPER, "")
    block_dim = max(16, 1 << (head_dim - 1).bit_length())
    padded = head_dim < block_dim  # its masks take registers
    if element_size == 4:
        # tf32 would break the float32 tolerance, so float32 products run on the CUDA cores.
        if block_dim <= 64:
            tiles = Tiles(32, 32, 4, 2)
        else:
            tiles = Tiles(16, 32, 4, 1) if block_dim > 128 else Tiles(32, 32, 4, 1)
        sums = Tiles(32, 32, 8, 1)
        return LaunchConfig(block_dim, tiles, tiles, tiles, sums, sums, tiles)
    moments, covariance = Tiles(32, 32, 8 if padded else 4, 1), Tiles(32, 32, 4, 1)
    correction = covariance
    if hopper:
        columns = block_dim if block_dim <= 128 else 32
        narrow = block_dim > 128 or padded
        moments = Tiles(64, columns, 8, 1) if narrow else Tiles(128, columns, 4, 3)
        covariance = Tiles(64, columns, 8, 1 if padded or block_dim > 128 else 2)
        correction = Tiles(64, min(64, block_dim), 8 if padded else 4, 1)
    # 72 is no multiple of 16: its loads are narrow and their addresses take the registers.
    rows = 64 if head_dim == 72 else 128
    if block_dim > 128:
        assign, probe, attend = Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 2)
    elif not hopper:
        attend = Tiles(rows, 32, 8 if padded or block_dim == 128 else 4, 2)
        assign, probe = Tiles(64, 64, 8 if padded else 4, 2), Tiles(32, 32, 8, 1)
    else:
        # Two stages here gave other values from one call to the next at head dims 80 and 96.
        probe = Tiles(32 if head_dim == 72 else 64, 32, 4, 1)
        assign = Tiles(64 if padded else 128, 64, 4, 2)
        attend = Tiles(rows, 64, 8 if padded or block_dim == 128 else 4, 3)
    wgmma = Tiles(192, 64, 4, 4) if hopper and head_dim in (64, 128) else None
    return LaunchConfig(block_dim, assign, probe, attend, moments, covariance, correction, wgmma)


def token_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, heads and tokens; 0 where there is one of them, whatever PyTorch says."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride(), strict=False)
    )


def parts_of(tokens: int, programs: int, step: int) -> tuple[int, int]:
    """How many parts to cut a sum over `tokens` into, and the tokens of one, a multiple of `step`.

    `programs` are there for each part; a large device is kept busy by 512, and fewer than 1024
    tokens are not worth a program.
    """
    parts = min(-(-512 // programs), -(-tokens // 1024))
    chunk = -(-tokens // (parts * step)) * step
    return -(-tokens // chunk), chunk


def all_launch_configs() -> list[tuple[int, int, str, LaunchConfig]]:
    """(head_dim, element_size, architecture, configuration) for all that `launch_config` returns.

    Every architecture but `HOPPER` has the tiles of the one named here.
    """
    return [
        (dim, size, arch, launch_config(dim, size, arch))
        for dim in HEAD_DIMS
        for size in (2, 4)
        for arch in (HOPPER, "sm_80")
    ]
