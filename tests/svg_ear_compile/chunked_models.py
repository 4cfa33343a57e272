"""A model that makes a video chunk by chunk, with a cache that is written in every style."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention.data import LATENT, latent_video

HEADS, CHUNK, WINDOW = 2, 192, 4  # chunks that a cache of constant length holds
STYLES = ("cat", "slice", "roll", "index_copy")
TIMESTEPS = (900.0, 500.0, 0.0)


class Chunked(nn.Module):
    """One attention from the tokens of a chunk to the cached ones and themselves.

    Styles "cat" and "slice" have a cache that grows, "roll" and "index_copy" one of `WINDOW` chunks
    from the start, "static" one for the whole video, whose end is masked.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.to_q, self.to_k, self.to_v = (nn.Linear(LATENT, LATENT) for _ in range(3))
        self.requires_grad_(False)

    def written(self, cache: Tensor, new: Tensor, start: int) -> Tensor:
        """(B, N, H, D) of the tokens that are attended to."""
        count = new.shape[1]
        if self.style == "cat":
            return torch.cat([cache, new], 1)
        if self.style == "roll":
            rolled = cache.roll(-count, 1)
            rolled[:, -count:] = new
            return rolled
        if self.style in ("slice", "static"):
            cache[:, start : start + count] = new
            return cache if self.style == "static" else cache[:, : start + count]
        at = (start + torch.arange(count)) % cache.shape[1]
        cache.index_copy_(1, at, new)
        return cache[:, : cache.shape[1]]

    def forward(
        self, hidden_states: Tensor, timestep: Any, k_cache: Tensor, v_cache: Tensor, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attended tokens, and the keys and values that were attended to."""
        q, k, v = (
            layer(hidden_states).unflatten(-1, (HEADS, -1))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q = 6.0 * q  # as sharp as trained models are
        k, v = self.written(k_cache, k, start), self.written(v_cache, v, start)
        mask = None
        if self.style == "static":
            mask = (torch.arange(k.shape[1]) < start + q.shape[1])[None, None, None]
        q, keys, values = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(2), k, v


def video(chunks: int, seed: int = 0) -> Tensor:
    """(1, N, LATENT) tokens of a video."""
    return latent_video(chunks * CHUNK, torch.Generator().manual_seed(seed))[0].unsqueeze(0)


def empty_cache(style: str, chunks: int) -> tuple[Tensor, Tensor]:
    """Caches of keys and values for so many chunks; those of a window are full."""
    held = {"cat": 0, "slice": chunks, "static": chunks}.get(style, WINDOW) * CHUNK
    generator = torch.Generator().manual_seed(5)
    shape = (1, held, HEADS, LATENT // HEADS)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return (k.zero_(), v.zero_()) if style == "static" else (k, v)


def generate(
    model: Callable[..., tuple[Tensor, Tensor, Tensor]],
    style: str,
    chunks: int,
    timesteps: tuple[float, ...] = TIMESTEPS,
    seed: int = 0,
) -> Iterator[Tensor]:
    """The outputs of all forwards: all timesteps of a chunk, then those of the next."""
    tokens = video(chunks, seed)
    generator = torch.Generator().manual_seed(seed)
    k_cache, v_cache = empty_cache(style, chunks)
    for chunk in range(chunks):
        clean = tokens[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        for timestep in timesteps:
            x = clean + timestep / 1000 * torch.randn(clean.shape, generator=generator)
            out, k, v = model(x, torch.tensor([timestep]), k_cache, v_cache, chunk * CHUNK)
            yield out
        if style in ("cat", "roll"):
            k_cache, v_cache = k.clone(), v.clone()
