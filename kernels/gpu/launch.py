"""Launch configurations: every tile shape that the kernels can be started with.

The set is small and listed so that each configuration can be compiled for each supported GPU
without owning one (registers, spills, shared memory).
"""

from __future__ import annotations

from dataclasses import dataclass

from svg_ear_compile.kernels.plan import HEAD_DIMS


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
    """

    block_dim: int
    assign: Tiles
    probe: Tiles
    attend: Tiles


def launch_config(head_dim: int, element_size: int) -> LaunchConfig:
    """The configuration for a head dim in elements and an element size in bytes (2 or 4)."""
    block_dim = max(16, 1 << (head_dim - 1).bit_length())
    if element_size == 4:
        # tf32 would break the float32 tolerance, so float32 products run on the CUDA cores.
        if block_dim <= 64:
            tiles = Tiles(32, 32, 4, 2)
        else:
            tiles = Tiles(16, 32, 4, 1) if block_dim > 128 else Tiles(32, 32, 4, 1)
        return LaunchConfig(block_dim, tiles, tiles, tiles)
    if block_dim <= 64:
        return LaunchConfig(
            block_dim, Tiles(128, 64, 4, 2), Tiles(64, 32, 4, 1), Tiles(128, 64, 4, 3)
        )
    if block_dim <= 128:
        return LaunchConfig(
            block_dim, Tiles(128, 64, 4, 2), Tiles(64, 32, 4, 1), Tiles(128, 32, 4, 4)
        )
    return LaunchConfig(block_dim, Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 2))


def all_launch_configs() -> list[tuple[int, int, LaunchConfig]]:
    """(head_dim, element_size, configuration) for everything that `launch_config` can return."""
    return [(dim, size, launch_config(dim, size)) for dim in HEAD_DIMS for size in (2, 4)]
