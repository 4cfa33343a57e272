"""Forms of the attend stage over pages that are measured beside the present kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
DIM = 128


@dataclass(frozen=True)
class Variant:
    """One form of the attend stage.

    Attributes:
        k8, v8: whether Q and K, and weights and V, are in e4m3.
        page, pages: places of a page, pages of a tile (2, 4 or 8).
        stages: tiles of K, and of V, in shared memory.
        consumers: groups of warps with 64 queries each.
        parts: float32 registers add up the tiles, and not the tensor cores.
        trim: keys of few in their last page go to other clusters.
        copied: without copies the result is wrong, and the time is that of the rest.
    """

    k8: bool
    v8: bool
    page: int
    pages: int
    stages: int
    consumers: int
    parts: bool = False
    trim: bool = False
    copied: bool = True


# In the order in which a short run wants them.
VARIANTS = {
    "bf16-p16": Variant(False, False, 16, 4, 4, 3),
    "fp8-p32-3": Variant(True, True, 32, 2, 6, 3),
    "fp8-p32-2-parts": Variant(True, True, 32, 2, 8, 2, parts=True),
    "k8-p16": Variant(True, False, 16, 4, 4, 3),
    "bf16-p16-no-copies": Variant(False, False, 16, 4, 4, 3, copied=False),
    "fp8-p32-3-trim": Variant(True, True, 32, 2, 6, 3, trim=True),
    "fp8-p32-3-no-copies": Variant(True, True, 32, 2, 6, 3, copied=False),
    "bf16-p8": Variant(False, False, 8, 8, 4, 3),
    "k8-p8": Variant(True, False, 8, 8, 4, 3),
    "fp8-p32-2-parts-trim": Variant(True, True, 32, 2, 8, 2, parts=True, trim=True),
    "fp8-p32-2": Variant(True, True, 32, 4, 4, 2),
    "bf16-p16-trim": Variant(False, False, 16, 4, 4, 3, trim=True),
}
