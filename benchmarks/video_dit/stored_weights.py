"""How weights lie in a file: matrices of the blocks in 8 bits, all else in 16, and gzip over it.

Each row of a matrix has a scale of its own. Clips of eight-bit weights are about 45 dB from those
of 16-bit ones; with the layers outside of the blocks in 8 bits too it would be less than 40 dB.
The 256 values are not used alike, so that gzip takes 7 % off.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

FILE = "weights.safetensors.gz"
"""Name of the file in a model's folder."""

_SCALE = ".row_scale"
_LARGEST = 127


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write `FILE` into a folder, whole or not at all; the same weights make the same bytes."""
    # Written aside and renamed: a run that is cut leaves the previous checkpoint whole.
    part = folder / f"{FILE}.part"
    part.write_bytes(gzip.compress(save(packed(weights)), mtime=0))
    part.rename(folder / FILE)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in float32 of the `FILE` in a folder."""
    return unpacked(load(gzip.decompress((folder / FILE).read_bytes())))


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
    """The weights in float32 for what `packed` made."""
    return {
        name: tensor.float() * stored[name + _SCALE][:, None]
        if name + _SCALE in stored
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(_SCALE)
    }
