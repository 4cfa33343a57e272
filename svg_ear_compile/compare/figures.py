"""How far a clip is from the dense one, frame by frame: PSNR, SSIM and flicker of raw frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

from svg_ear_compile.compare.frames import WHITE, Frames, as_floats


@dataclass(frozen=True)
class Figures:
    """Figures of one clip against the dense clip of the same prompt and seed.

    Attributes:
        psnr: dB over the whole clip, infinite for equal clips.
        psnr_frames: dB of every frame.
        ssim_frames: of every frame, 1 for equal ones.
        flicker_frames: of every frame but the first and the last, see `flicker`.
        dense_flicker: mean flicker of the dense clip.
    """

    psnr: float
    psnr_frames: tuple[float, ...]
    ssim_frames: tuple[float, ...]
    flicker_frames: tuple[float, ...]
    dense_flicker: float

    @property
    def ssim(self) -> float:
        """Mean over the frames."""
        return sum(self.ssim_frames) / len(self.ssim_frames)

    @property
    def flicker_ratio(self) -> float | None:
        """Flicker of the clip over that of the dense one; None where nothing moves."""
        if not self.flicker_frames or self.dense_flicker == 0:
            return None
        return sum(self.flicker_frames) / len(self.flicker_frames) / self.dense_flicker

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite PSNR is null."""
        return {
            "psnr": finite(self.psnr),
            "psnr_frames": [finite(value) for value in self.psnr_frames],
            "ssim_frames": list(self.ssim_frames),
            "flicker_frames": list(self.flicker_frames),
            "dense_flicker": self.dense_flicker,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Figures:
        """What `to_json` wrote."""

        def infinite(value: float | None) -> float:
            return math.inf if value is None else float(value)

        return cls(
            infinite(data["psnr"]),
            tuple(infinite(value) for value in data["psnr_frames"]),
            tuple(float(value) for value in data["ssim_frames"]),
            tuple(float(value) for value in data["flicker_frames"]),
            float(data["dense_flicker"]),
        )


def figures_of(clip: Frames, dense: Frames) -> Figures:
    """Compare two clips of one shape, one frame in memory at a time.

    Raises:
        ValueError: the clips differ in shape.
    """
    if clip.shape != dense.shape:
        raise ValueError(f"clips of {clip.shape} and {dense.shape} cannot be compared")
    errors, ssim = [], []
    for frame, wanted in zip(clip, dense, strict=True):
        a, b = as_floats(frame), as_floats(wanted)
        errors.append(float(np.mean((a - b) ** 2)))
        ssim.append(float(structural_similarity(b, a, data_range=1.0, channel_axis=-1)))
    of_dense = flicker(dense)
    return Figures(
        _decibels(sum(errors) / len(errors)),
        tuple(_decibels(error) for error in errors),
        tuple(ssim),
        flicker(clip),
        sum(of_dense) / len(of_dense) if of_dense else 0.0,
    )


def psnr(clip: Frames, other: Frames) -> float:
    """PSNR of two clips of one shape in dB, infinite for equal ones."""
    errors = [
        float(np.mean((as_floats(a) - as_floats(b)) ** 2)) for a, b in zip(clip, other, strict=True)
    ]
    return _decibels(sum(errors) / len(errors))


def flicker(clip: Frames) -> tuple[float, ...]:
    """RMS of ``before - 2 * frame + after`` in units of 1/255, of every frame but the outer two.

    A steady movement has next to none; what comes and goes from frame to frame has much.
    """
    found = []
    for before, frame, after in zip(clip[:-2], clip[1:-1], clip[2:], strict=True):
        # Signed 64-bit whole numbers: equal frames give exactly 0.
        bend = before.astype(np.int64) - 2 * frame.astype(np.int64) + after.astype(np.int64)
        found.append(255 / WHITE * math.sqrt(float(np.mean(bend.astype(np.float64) ** 2))))
    return tuple(found)


def finite(value: float) -> float | None:
    """The value, None where it is infinite."""
    return value if math.isfinite(value) else None


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -10 * math.log10(error)
