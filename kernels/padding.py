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
    once each, which costs a wait and two reads of the mask beside milliseconds of attention.

    Args:
        mask: (B|1, H|1, N_q|1, N_k). Bool: True takes part. Float, added to the logits: 0 takes
            part, `NEGLIGIBLE` and below does not, any other value is no padding. A float mask with
            a row without keys is no padding: softmax treats such a row like one with all keys.

    Returns:
        keys (B|1, H|1, 1, N_k) bool, rows (B|1, H|1, N_q|1, 1) bool, and proven, () bool on the
        CPU; keys and rows mean nothing where it is False.
    """
    additive = mask.dtype != torch.bool
    batch, heads, count, tokens = mask.shape
    keys = torch.zeros(batch, heads, 1, tokens, dtype=torch.bool, device=mask.device)
    rows = torch.zeros(batch, heads, count, 1, dtype=torch.bool, device=mask.device)
    found = rows.new_zeros(batch, heads, 1, 1)  # heads that had a row with keys
    proven = torch.ones((), dtype=torch.bool, device=mask.device)
    for first in range(0, count, _ROWS_AT_A_TIME):
        # A wait for each part after the first: most masks that are no padding end there.
        if first and not proven:
            break
        part = mask[:, :, first : first + _ROWS_AT_A_TIME]
        taken = part == 0 if additive else part
        if additive:
            proven &= (taken | (part <= NEGLIGIBLE)).all()
        words = words_of(taken)
        some = (words != 0).any(-1, keepdim=True)  # [B, H, R, 1]
        rows[:, :, first : first + _ROWS_AT_A_TIME] = some
        # All rows with keys have to have the keys of the first one.
        at = some.int().argmax(-2, keepdim=True).expand(-1, -1, 1, tokens)
        keys = torch.where(found, keys, taken.gather(2, at))
        found = found | some.any(-2, keepdim=True)
        proven &= ((words == keys.view(words.dtype)) | ~some).all()
    if additive:
        proven &= rows.all()
    return keys, rows, proven.cpu()


def words_of(taken: Tensor) -> Tensor:
    """Bools (..., N) as (..., N / bytes of a word), in the longest words that they fill.

    A comparison of words reads as much as one of bools, and makes an eighth of the numbers.
    """
    address = (taken.storage_offset(), taken.data_ptr())  # an imported tensor may begin anywhere
    for dtype in (torch.int64, torch.int32, torch.int16):
        places = (taken.shape[-1], *address, *taken.stride()[:-1])
        if taken.stride(-1) == 1 and all(place % dtype.itemsize == 0 for place in places):
            return taken.view(dtype)
    return taken.view(torch.uint8)


@key_padding.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, count, tokens = mask.shape
    return (
        mask.new_empty(batch, heads, 1, tokens, dtype=torch.bool),
        mask.new_empty(batch, heads, count, 1, dtype=torch.bool),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )
