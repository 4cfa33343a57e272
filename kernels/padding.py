"""`torch.ops.svg_ear.key_padding`: whether a mask is only padding, proven on its values.

The sparse operator takes masks that leave out whole keys. A mask with one row per query, or one
that is added to the logits, may hold anything (causality, windows, biases) and its shape does not
tell. One pass over its values does, once for all layers that share the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = -9000.0
"""A bias from here on leaves a key out: models write -10000 (-9984 in bfloat16), and e^-9000 is 0
in every dtype next to any other key."""

_ROWS_AT_A_TIME = 4096


@torch.library.custom_op(
    "svg_ear::key_padding", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def key_padding(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a mask apart into keys and queries that take part, if that is all it says.

    ``mask[b, h, i, t] == rows[b, h, i] and keys[b, h, t]`` is what padding of keys and of queries
    makes. Waits for the device.

    Nothing is remembered from call to call. A tensor tells of no write through `.data`, NumPy or a
    replayed CUDA graph, so a remembered proof could be that of other values, and to compare values
    with remembered ones waits as long as to prove them. The layers of one graph share a call;
    blocks that are compiled one by one prove once each, which is a wait and three reads of the mask
    beside attention that takes milliseconds.

    Args:
        mask: (B|1, H|1, N_q|1, N_k) bool, True takes part, or float, added to the logits: 0 takes
            part, a value of `NEGLIGIBLE` or less does not, any other is no padding. A row without
            keys refutes a float mask: softmax knows no difference from a row with all keys.

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
