"""Generating a clip: Euler steps along the flow, with classifier-free guidance."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

SHIFT = 3.0
"""Wan's timestep shift at small sizes."""


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
    shift: float = SHIFT,
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
    path = torch.tensor([list(camera)], dtype=torch.float32, device=device)
    labels = (torch.tensor([n], device=device) for n in (label, model.config.null_label))
    conditions, without_conditions = (model.conditions(n, path) for n in labels)

    def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        found = model(x, timestep, *conditions)
        if guidance != 1:
            without = model(x, timestep, *without_conditions)
            found = without + guidance * (found - without)
        return found

    clips = denoise(velocity, noise_of([seed], shape, device), steps, shift, on_step)
    return clips[0].float().cpu()


def noise_of(
    seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device
) -> torch.Tensor:
    """The noise ``(len(seeds), 3, T, H, W)`` float32 of each seed."""
    # Drawn on the CPU, so that a seed means the same clip on every device.
    drawn = [
        torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.cat(drawn).to(device)


@torch.no_grad()
def denoise(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    steps: int,
    shift: float = SHIFT,
    on_step: Callable[[int, float], None] | None = None,
) -> torch.Tensor:
    """Follow ``velocity(x, timestep)`` from noise ``(B, 3, T, H, W)`` to frames.

    Returns ``(B, T, H, W, 3)`` in [0, 1] on the device and in the dtype of ``noise``. The other
    arguments are those of :func:`generate`.
    """
    x = noise
    for step, (sigma, next_sigma) in enumerate(pairwise(shifted_sigmas(steps, shift))):
        started = time.perf_counter()
        timestep = torch.full((len(x),), 1000 * sigma, device=x.device)
        x = x + (next_sigma - sigma) * velocity(x, timestep)
        if on_step is not None:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            on_step(step, time.perf_counter() - started)
    return ((x.permute(0, 2, 3, 4, 1) + 1) / 2).clamp(0, 1)


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 to 0, ``steps + 1`` of them, with Wan's timestep shift."""
    even = [1 - step / steps for step in range(steps + 1)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
