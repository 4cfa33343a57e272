"""`torch.ops.svg_ear.key_padding`: proves on its values that a mask is padding only.

The sparse operator takes masks that leave out whole keys. A mask with one row per query, or one
that is added to the logits, may express anything (causality, windows, biases), and its shape does
not tell. This operator reads the values, once for all layers that share the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = -9000.0
"""A bias of at most this value leaves a key out. Models write -10000 (-9984 in bfloat16), and
e^-9000 is 0 in every dtype beside any other key."""

_ROWS_AT_A_TIME = 4096


@torch.library.custom_op(
    "svg_ear::key_padding", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def key_padding(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a mask into the keys and the queries that take part, if it is padding only.

    A mask is padding if ``mask[b, h, i, t] == rows[b, h, i] and keys[b, h, t]`` everywhere. Waits
    for the device.

    Proofs are not cached. Writes through `.data`, NumPy or a replayed CUDA graph do not change the
    version of a tensor, so a cached proof could belong to other values; comparing values takes as
    long as a proof. The layers of one graph share a call. Blocks that are compiled one by one prove
    once each, which costs a wait and three reads of the mask beside milliseconds of attention.

    Args:
        mask: (B|1, H|1, N_q|1, N_k). Bool: True takes part. Float, added to the logits: 0 takes
            part, `NEGLIGIBLE` and below does not, any other value is no padding. A float mask with
            a row without keys is no padding: softmax treats such a row like one with all keys.

    Returns:
        keys (B|1, H|1, 1, N_k) bool, rows (B|1, H|1, N_q|1, 1) bool, and proven, () bool on the
        CPU; keys and rows mean nothing where it is False.
    """
    additive = mask.dtype != torch.bool
    keys = torch.zeros_like(mask[..., :1, :], dtype=torch.bool)
    rows = torch.zeros_like(mask[..., :1], dtype=torch.bool)
    proven = torch.ones((), dtype=torch.bool, device=mask.device)
    parts = mask.split(_ROWS_AT_A_TIME, dim=-2)
    row_parts = rows.split(_ROWS_AT_A_TIME, dim=-2)
    for part, row_part in zip(parts, row_parts, strict=True):
        taken = part == 0 if additive else part
        if additive:
            proven &= (taken | (part <= NEGLIGIBLE)).all()
        row_part.copy_(taken.any(-1, keepdim=True))
        keys |= taken.any(-2, keepdim=True)
    for part, row_part in zip(parts, row_parts, strict=True):
        taken = part == 0 if additive else part
        proven &= (taken == (row_part & keys)).all()
    if additive:
        proven &= rows.all()
    return keys, rows, proven.cpu()


@key_padding.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(mask[..., :1, :], dtype=torch.bool),
        torch.empty_like(mask[..., :1], dtype=torch.bool),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )
