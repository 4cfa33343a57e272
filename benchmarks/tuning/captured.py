"""Q, K, V of every attention of the video DiT at some denoising steps of a dense generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.video_dit.attention import attention_answered_by
from benchmarks.video_dit.data import LABELS
from benchmarks.video_dit.demo import WEIGHTS
from benchmarks.video_dit.model import VideoDiT
from benchmarks.video_dit.sample import generate

CAMERA = (0.7, -0.3, 0.6, 0.35, 0.0)


@dataclass(frozen=True)
class CapturedCall:
    """Inputs of one attention call: q, k, v (1, H, N, D), its layer and denoising step."""

    layer: int
    step: int
    q: Tensor
    k: Tensor
    v: Tensor


def capture(
    shape: tuple[int, int, int], steps: int, wanted: Iterable[int], seed: int, device: str
) -> Iterator[CapturedCall]:
    """Generate one clip dense and yield the calls of the steps in `wanted` (no guidance)."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = VideoDiT.from_pretrained(WEIGHTS, device=device, dtype=dtype)
    kept: list[CapturedCall] = []
    chosen, step = set(wanted), 0

    def finished(done: int, seconds: float) -> None:
        nonlocal step
        step = done + 1

    def see(dense: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if step in chosen:
            kept.append(CapturedCall(len(kept) % model.config.layers, step, q, k, v))
        return dense(q, k, v)

    with attention_answered_by(see):
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
