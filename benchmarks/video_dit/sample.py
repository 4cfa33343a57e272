"""Generating a clip: Euler steps along the flow, with classifier-free guidance."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


@torch.no_grad()
def generate(
    model: nn.Module,
    *,
    label: int,
    camera: Sequence[float],
    seed: int,
    steps: int,
    guidance: float,
    shape: tuple[int, int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    shift: float = 3.0,
    on_step: Callable[[int, float], None] | None = None,
) -> torch.Tensor:
    """Generate one clip as raw frames, ``(T, H, W, 3)`` float32 in [0, 1] on the CPU.

    ``model`` is a ``PixelDiT`` or what ``torch.compile`` made of it; it is moved to ``device`` and
    ``dtype`` if it is elsewhere. ``shape`` is (frames, height, width), ``camera`` one value per
    ``data.CAMERA_FIELDS``. With ``guidance`` other than 1 each step calls the model twice, with and
    then without the conditions, at the same timestep. ``shift`` above 1 spends more of the steps at
    high noise. ``on_step(step, seconds)`` hears of every finished step, ``step`` counting from 0.
    """
    device = torch.device(device)
    model = model.to(device=device, dtype=dtype)
    # Drawn on the CPU, so that a seed means the same clip on every device.
    noise = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(seed))
    x = noise.to(device)
    path = torch.tensor([list(camera)], dtype=torch.float32, device=device)
    labels = (torch.tensor([n], device=device) for n in (label, model.config.null_label))
    conditions, without_conditions = (model.conditions(n, path) for n in labels)

    sigmas = shifted_sigmas(steps, shift)
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        started = time.perf_counter()
        timestep = torch.full((1,), 1000 * sigma, device=device)
        velocity = model(x, timestep, *conditions)
        if guidance != 1:
            without = model(x, timestep, *without_conditions)
            velocity = without + guidance * (velocity - without)
        x = x + (next_sigma - sigma) * velocity
        if on_step is not None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            on_step(step, time.perf_counter() - started)
    return ((x[0].permute(1, 2, 3, 0) + 1) / 2).clamp(0, 1).float().cpu()


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0, ``steps + 1`` of them, with Wan's timestep shift."""
    even = [1 - step / steps for step in range(steps + 1)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
