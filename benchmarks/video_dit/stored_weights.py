"""How weights lie in a file: matrices of the blocks in 8 bits, all else in 16.

Each row of a matrix has a scale of its own. Clips of eight-bit weights are about 45 dB from those
of 16-bit ones; with the layers outside of the blocks in 8 bits too it would be less than 40 dB.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SCALE = ".row_scale"
_LARGEST = 127


def packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors to store, on the CPU, for the weights of a model."""
    found = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu()
        if "blocks." in name and name.endswith(".weight") and weight.ndim == 2:
            scale = weight.float().abs().amax(dim=1).clamp(min=1e-20) / _LARGEST  # (rows,)
            found[name] = (weight.float() / scale[:, None]).round().to(torch.int8)
            found[name + _SCALE] = scale
        else:
            found[name] = weight.to(torch.bfloat16).contiguous()
    return found


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32 for what `packed` made, or for a file without 8-bit matrices."""
    return {
        name: tensor.float() * stored[name + _SCALE][:, None]
        if name + _SCALE in stored
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(_SCALE)
    }
