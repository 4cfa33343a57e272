"""Comparisons whose clips are drawn, not generated: a disc that moves over a gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from svg_ear_compile.compare.comparison import Clip, Comparison
from svg_ear_compile.compare.figures import figures_of
from svg_ear_compile.compare.frames import Frames, frames_of
from svg_ear_compile.compare.setting import DENSE, Setting

GIB = 2**30


def disc_clip(seed: int, frames: int = 9, height: int = 48, width: int = 64) -> Frames:
    """A disc that moves to the right; its height and the colours follow from the seed."""
    rng = np.random.default_rng(seed)
    colour, ground = rng.uniform(0.3, 1, 3), rng.uniform(0, 0.5, 3)
    y, x = np.mgrid[0:height, 0:width] / height
    top = rng.uniform(0.3, 0.7)
    shown = np.empty((frames, height, width, 3))
    for index in range(frames):
        left = (0.2 + 0.6 * index / max(1, frames - 1)) * width / height
        inside = 1 / (1 + np.exp(60 * (np.hypot(x - left, y - top) - 0.22)))[..., None]
        shown[index] = inside * colour + (1 - inside) * ground * (0.5 + 0.5 * y[..., None])
    return frames_of(shown)


def noisy(clip: Frames, strength: float, seed: int) -> Frames:
    """The clip with noise of this deviation, most of it where the picture has edges."""
    rng = np.random.default_rng(seed)
    values = clip / 65535
    edges = 0.3 + 12 * np.abs(np.diff(values, axis=2, append=values[:, :, -1:]))
    return frames_of(np.clip(values + strength * edges * rng.normal(size=values.shape), 0, 1))


def made_comparison(
    strengths: dict[str, float],
    *,
    prompts: tuple[str, ...] = ("a disc",),
    seeds: tuple[int, ...] = (0, 1, 2),
    seconds: dict[str, float] | None = None,
    size: tuple[int, int, int] = (9, 48, 64),
    page: Path = Path("index.html"),
) -> Comparison:
    """Settings by name with the strength of their noise, 0 for frames equal to dense.

    A setting takes `seconds`, dense 10; clip `i` takes ``1 + i / 100`` times as long.
    """
    keys = [(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]
    dense = {key: disc_clip(10 * key[0] + key[1], *size) for key in keys}
    times = {DENSE.name: 10.0, **(seconds or {})}
    clips = {
        DENSE.name: {
            key: Clip(dense[key], times[DENSE.name] * (1 + i / 100), peak_bytes=9 * GIB)
            for i, key in enumerate(keys)
        }
    }
    for name, strength in strengths.items():
        clips[name] = {}
        for i, key in enumerate(keys):
            clip = noisy(dense[key], strength, i) if strength else dense[key]
            took = times.get(name, 5.0) * (1 + i / 100)
            figures = figures_of(clip, dense[key])
            clips[name][key] = Clip(
                clip, took, peak_bytes=8 * GIB, density=0.2, figures=figures, repeat_psnr=np.inf
            )
    return Comparison(
        prompts,
        seeds,
        tuple(Setting(name, {"density": 0.2}) for name in strengths),
        clips,
        (("device", "a device"), ("torch", "2.13.0")),
        page=page,
    )
