"""Kernels of Sol-Attn, from the wheel `comfy-kitchen` where it is installed and the GPU has some.

INT8 products, head dim 128; `sol.py` is the same choice of blocks in full precision. Smaller heads
are padded with zeros, which changes no logit. The wheel has no cubes: tokens stay in raster order.
"""

from __future__ import annotations

import importlib
import importlib.util
import math

import torch
from torch import Tensor

from benchmarks.fidelity.sol import BLOCK, Grid
from svg_ear_compile.kernels.plan import AttentionPlan

_HEAD_DIM = 128


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in words; None where they can."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "the wheel comfy-kitchen is not installed"
    if not importlib.import_module("comfy_kitchen").sol_attn_is_available(device):
        return f"comfy-kitchen has no kernels for {device}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, text: int, grid: Grid, augmented: int = 0
) -> tuple[Tensor, None]:
    """Attention as `sol.SolAttn` in raster order; arguments as there, head dim up to 128.

    Blocks that hold text are exact for all, and their queries attend to everything. The kernels do
    not tell which blocks they computed, so the exact pairs are unknown.
    """
    sol_attn = importlib.import_module("comfy_kitchen").sol_attn
    dim, tokens = q.shape[-1], q.shape[2]
    padded = (
        torch.nn.functional.pad(x, (0, _HEAD_DIM - dim)).transpose(1, 2).contiguous()
        for x in (q, k, v)
    )
    ends = [(tokens - text) // BLOCK, math.ceil(tokens / BLOCK)] if text else None
    by_tau = plan.routing == "threshold"
    out = sol_attn(
        *padded,
        tau=plan.threshold,
        topk_ratio=0.0 if by_tau else plan.density,
        scale=dim**-0.5,
        sink_blocks=ends,
        sink_q=ends,
        token_aug=augmented,
    )
    return out.transpose(1, 2)[..., :dim], None
