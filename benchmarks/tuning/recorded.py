"""Q, K, V of every attention of the video DiT at some denoising steps of a dense generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.video_dit.data import LABELS
from benchmarks.video_dit.demo import WEIGHTS
from benchmarks.video_dit.model import VideoDiT
from benchmarks.video_dit.sample import generate

CAMERA = (0.7, -0.3, 0.6, 0.35, 0.0)


@dataclass(frozen=True)
class Recording:
    """Inputs of one attention call: q, k, v (1, H, N, D), its layer and denoising step."""

    layer: int
    step: int
    q: Tensor
    k: Tensor
    v: Tensor


def record(
    shape: tuple[int, int, int], steps: int, wanted: Iterable[int], seed: int, device: str
) -> Iterator[Recording]:
    """Generate one clip dense and yield the calls of the steps in `wanted` (no guidance)."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = VideoDiT.from_pretrained(WEIGHTS, device=device, dtype=dtype)
    kept: list[Recording] = []
    chosen, step = set(wanted), 0

    def finished(done: int, seconds: float) -> None:
        nonlocal step
        step = done + 1

    def see(q: Tensor, k: Tensor, v: Tensor) -> None:
        if step in chosen:
            kept.append(Recording(len(kept) % model.config.layers, step, q, k, v))

    with watched_attention(see):
        generate(
            model,
            label=seed % len(LABELS),
            camera=CAMERA,
            seed=seed,
            steps=steps,
            guidance=1.0,
            shape=shape,
            device=device,
            dtype=dtype,
            on_step=finished,
        )
    yield from kept


@contextmanager
def watched_attention(see: Any) -> Iterator[None]:
    """Let `see(q, k, v)` look at every attention call of eager models in the with block."""
    dense = F.scaled_dot_product_attention

    def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        see(q, k, v)
        return dense(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = call
    try:
        yield
    finally:
        F.scaled_dot_product_attention = dense
