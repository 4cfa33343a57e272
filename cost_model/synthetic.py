"""Synthetic Q, K, V for timing: clusters of uneven sizes, like those of a video transformer.

Gaussian noise has no clusters, and its clusters of even sizes would make the kernels look faster.
The tokens here are a smooth field over frames, rows and columns with noise on each token, projected
for every head and normalised. Only times are measured on them, never errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WAVES, _NOISE, _SHARPNESS = 24, 0.35, 1.7


def video_like(
    heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded q, k, v (1, H, N, D) as views of (1, N, H, D) memory, the layout of projections."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    side = math.ceil(tokens ** (1 / 3))
    place = torch.arange(tokens, device=device)
    unit = torch.stack([place // side**2, place // side % side, place % side], 1) / side  # [N, 3]
    field = torch.sin(2 * math.pi * (unit @ normal(3, _WAVES) * 1.5) + 6.28 * normal(_WAVES))
    noise = torch.randn(
        tokens, _WAVES, device=device, generator=torch.Generator(device).manual_seed(0)
    )
    field = field + _NOISE * noise
    q, k, v = (torch.empty(1, tokens, heads, dim, device=device, dtype=dtype) for _ in range(3))
    for head in range(heads):
        common = normal(_WAVES, dim)
        for out in (q, k):
            x = field @ (common + 0.5 * normal(_WAVES, dim))
            out[0, :, head] = x * x.square().mean(-1, keepdim=True).rsqrt() * _SHARPNESS
        v[0, :, head] = field @ normal(_WAVES, dim) / math.sqrt(_WAVES)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
