"""Q, K, V of every attention of a video model at some denoising steps of a dense generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.video_dit.attention import attention_answered_by
from benchmarks.video_dit.sample import generate
from benchmarks.video_dit.zoo import MODELS

CAMERA = (0.7, -0.3, 0.6, 0.35, 0.0)


@dataclass(frozen=True)
class CapturedCall:
    """Inputs of one attention call: q, k, v (1, H, N, D), its layer and denoising step."""

    layer: int
    step: int
    q: Tensor
    k: Tensor
    v: Tensor


class _NothingWanted(Exception):
    """No later denoising step is wanted."""


def capture(
    shape: tuple[int, int, int],
    steps: int,
    wanted: Iterable[int],
    seed: int,
    device: str,
    name: str = "self",
) -> Iterator[CapturedCall]:
    """Generate one clip of a model of `MODELS` dense and yield the calls of the steps in `wanted`.

    There is no guidance; text tokens come last in every call.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    trained = MODELS[name]
    model = trained.load(device=device, dtype=dtype)
    label, camera = trained.prompt(seed)
    if len(camera) == len(CAMERA):
        camera = list(CAMERA)
    kept: list[CapturedCall] = []
    chosen, step = set(wanted), 0

    def finished(done: int, seconds: float) -> None:
        nonlocal step
        step = done + 1
        if step > max(chosen):
            raise _NothingWanted

    def see(dense: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if step in chosen:
            kept.append(CapturedCall(len(kept) % len(model.blocks), step, q, k, v))
        return dense(q, k, v)

    with suppress(_NothingWanted), attention_answered_by(see):
        generate(
            model,
            label=label,
            camera=camera,
            seed=seed,
            steps=steps,
            guidance=1.0,
            shape=shape,
            device=device,
            dtype=dtype,
            on_step=finished,
        )
    yield from kept
