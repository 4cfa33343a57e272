"""Scores of clips against the dense clips of the same seeds, and their confidence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from benchmarks.video_dit.compare import score_frames

CONFIDENCE = 0.95
EQUAL_DB = 100.0
"""PSNR of equal clips: finite, so that means and intervals over seeds exist."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval, None where there is a single value."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        half = "" if self.high is None else f" ± {self.high - self.mean:.2f}"
        return f"{self.mean:.2f}{half}"


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean at `CONFIDENCE`, of one value per seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def flicker(frames: Tensor, reference: Tensor) -> float:
    """RMS of ``(x_{t+1} - x_t) - (y_{t+1} - y_t)``: changes between frames that are not meant.

    Args:
        frames, reference: raw frames x and y, (T, H, W, 3) in [0, 1].

    Returns:
        in units of the frames; 0 for one frame.
    """
    if len(frames) < 2:
        return 0.0
    error = (frames - reference).double()
    return float(error.diff(dim=0).square().mean().sqrt())


def score_clips(clips: Tensor, references: Tensor) -> dict[str, list[float]]:
    """PSNR in dB and SSIM (means over the frames) and flicker of each clip (S, T, H, W, 3).

    A PSNR is at most `EQUAL_DB`.
    """

    def one(pair: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
        found = score_frames(*pair).summary()
        return min(found["psnr_mean"], EQUAL_DB), found["ssim_mean"], flicker(*pair)

    with ThreadPoolExecutor(min(8, len(clips))) as pool:
        found = list(pool.map(one, zip(clips, references, strict=True)))
    psnr, ssim, flickers = (list(part) for part in zip(*found, strict=True))
    return {"psnr": psnr, "ssim": ssim, "flicker": flickers}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|`` in float64."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()))
