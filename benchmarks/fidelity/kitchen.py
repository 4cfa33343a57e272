"""Kernels of Sol-Attn, from the wheel `comfy-kitchen` where it is installed and the GPU has some.

INT8 products, head dim 128; `sol.py` is the same choice of blocks in full precision. Smaller heads
are padded with zeros, which changes no logit. The wheel takes tokens in the order in which they
lie, so cubes are laid out before it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.fidelity.sol import BLOCK, Grid, Order, places
from svg_ear_compile.kernels.plan import AttentionPlan

_HEAD_DIM = 128


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in words; None where they can."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "the wheel comfy-kitchen is not installed"
    if not importlib.import_module("comfy_kitchen").sol_attn_is_available(device):
        return f"comfy-kitchen has no kernels for {device}"
    return None


@dataclass(frozen=True)
class Kitchen:
    """One way to use the kernels; attributes as of `sol.SolAttn`."""

    order: Order = "raster"
    augmented: int = 0

    def prepared(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, text: int, order: Tensor
    ) -> Callable[[], Tensor]:
        """The kernels' call alone, (B, N, H, 128), its inputs laid out as they want them.

        Args:
            q, k, v, plan, text: as of `sol.SolAttn`, head dim up to 128.
            order: (N,) int64, the places of the tokens.
        """
        dim, tokens = q.shape[-1], q.shape[2]
        laid_out = [
            torch.nn.functional.pad(x[:, :, order], (0, _HEAD_DIM - dim))
            .transpose(1, 2)
            .contiguous()
            for x in (q, k, v)
        ]
        ends = [(tokens - text) // BLOCK, math.ceil(tokens / BLOCK)] if text else None
        by_tau = plan.routing == "threshold"
        return partial(
            importlib.import_module("comfy_kitchen").sol_attn,
            *laid_out,
            tau=plan.threshold,
            topk_ratio=0.0 if by_tau else plan.density,
            scale=dim**-0.5,
            sink_blocks=ends,
            sink_q=ends,
            token_aug=self.augmented,
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, text: int, grid: Grid
    ) -> tuple[Tensor, None]:
        """Attention as `sol.SolAttn`; arguments as there, head dim up to 128.

        Blocks that hold text are exact for all, and their queries attend to everything. The kernels
        do not tell which blocks they computed, so the exact pairs are unknown.
        """
        order = places(self.order, q, text, grid)
        found = self.prepared(q, k, v, plan, text, order)()
        out = torch.empty_like(q)
        out[:, :, order] = found.transpose(1, 2)[..., : q.shape[-1]]
        return out, None
