"""Q, K, V that look like a video transformer's: smooth in space and time, with objects, RoPE'd.

Gaussian noise has no clusters, so every sparse method looks bad and every clustering looks uniform
on it. Here every head projects one latent video: slow Fourier waves over the token grid, a few
moving regions of constant code (objects) and token noise; queries and keys are RMS-normalised and
rotated by 3-D RoPE as in Wan. A longer video shows more: waves per axis grow with its side and
regions with its tokens, so that a cluster of so many tokens is as varied at every length.
`likeness.py` compares the errors with those of captured tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WAVES, REGIONS, LATENT = 24, 48, 64
NOISE = 0.7
SHARPNESS = 1.0  # at 2.5 queries of 128 numbers find nothing but their own keys
USUAL_TOKENS = 6912  # of the captured clips: that many have `REGIONS` regions


def grid_of(tokens: int) -> tuple[int, int, int]:
    """(T, H, W) with T * H * W >= tokens, 16:9 frames, about 21 frames for 75,600 tokens."""
    frames = max(1, round(21 * (tokens / 75600) ** (1 / 3)))
    height = max(1, math.ceil(math.sqrt(tokens / frames * 9 / 16)))
    return frames, height, math.ceil(tokens / frames / height)


def latent_video(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latent code (N, LATENT) and token coordinates (N, 3) in float32 on the generator's device."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    frames, height, width = grid_of(tokens)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in (frames, height, width)]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)[:tokens]
    unit = at / torch.tensor([frames, height, width], device=device)
    length = tokens / USUAL_TOKENS
    frequency = 1.5 * length ** (1 / 3) * normal(3, WAVES)
    waves = torch.sin(2 * math.pi * (unit @ frequency + normal(WAVES)))
    regions = max(1, round(REGIONS * length))
    center, drift = normal(regions, 2).abs() % 1.0, 0.3 * normal(regions, 2)
    nearest = []
    for part in unit.split(1 << 14):
        moved = part[:, None, 1:] - drift * part[:, None, :1]  # objects drift with time
        nearest.append((moved - center).square().sum(-1).argmin(1))
    code = (
        waves @ normal(WAVES, LATENT) / math.sqrt(WAVES)
        + normal(regions, LATENT)[torch.cat(nearest)]
    )
    return code + NOISE * normal(tokens, LATENT), at


def rope(x: Tensor, at: Tensor) -> Tensor:
    """Rotate (N, D) by 3-D RoPE of the coordinates (N, 3), bands split as in Wan."""
    half = x.shape[-1] // 2
    pairs = [half - 2 * (half // 3), half // 3, half // 3]
    angles = torch.cat(
        [
            at[:, axis : axis + 1]
            / 10000.0 ** (torch.arange(bands, device=x.device) / max(bands, 1))
            for axis, bands in enumerate(pairs)
        ],
        1,
    )
    even, odd = x[:, 0::2], x[:, 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def video_like(
    batch: int, heads: int, tokens: int, dim: int, *, text: int = 0, seed: int = 0,
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, sharpness: float = SHARPNESS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Q, K, V (B, H, N + text, D) as views of (B, N + text, H, D) memory, text tokens last.

    `sharpness` is the root of the mean square of queries and of keys.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, tokens + text, heads, dim)
    q, k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(3))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    for b in range(batch):
        code, at = latent_video(tokens, generator)
        for h in range(heads):
            shared = normal(LATENT, dim)
            for out, mixed in ((q, 0.5), (k, 0.5)):
                x = code @ (shared + mixed * normal(LATENT, dim))
                x = x * x.square().mean(-1, keepdim=True).rsqrt() * sharpness
                out[b, :tokens, h] = rope(x, at).to(dtype)
                out[b, tokens:, h] = normal(text, dim).to(dtype)
            v[b, :tokens, h] = (code @ normal(LATENT, dim) / math.sqrt(LATENT)).to(dtype)
            v[b, tokens:, h] = normal(text, dim).to(dtype)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
