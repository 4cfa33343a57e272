"""Q, K, V to time attention on: clusters of uneven sizes, as a video transformer's tokens make.

Gaussian noise has no clusters and its even cluster sizes would flatter the kernels. Tokens here are
a smooth field over frames, rows and columns plus token noise, projected for every head and
normalised. Good for times; errors are measured on recorded tensors only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WAVES, _NOISE, _SHARPNESS = 24, 0.35, 1.7


def video_like(
    heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded q, k, v (1, H, N, D) as views of (1, N, H, D) memory, as projections leave them."""
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
        shared = normal(_WAVES, dim)
        for out in (q, k):
            x = field @ (shared + 0.5 * normal(_WAVES, dim))
            out[0, :, head] = x * x.square().mean(-1, keepdim=True).rsqrt() * _SHARPNESS
        v[0, :, head] = field @ normal(_WAVES, dim) / math.sqrt(_WAVES)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
