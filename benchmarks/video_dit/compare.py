"""How far clips are from a reference clip: scores per frame, and pictures that show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

_MARGIN = 8
_PAPER, _INK, _GREY = (255, 255, 255), (24, 24, 24), (110, 110, 110)


@dataclass(frozen=True)
class FrameScores:
    """PSNR in dB and SSIM of every frame against the reference's; PSNR of equal frames is inf."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Mean and worst frame of both."""
        return {
            "psnr_mean": sum(self.psnr) / len(self.psnr),
            "psnr_min": min(self.psnr),
            "ssim_mean": sum(self.ssim) / len(self.ssim),
            "ssim_min": min(self.ssim),
        }


@dataclass(frozen=True)
class ShownClip:
    """A clip ``(T, H, W, 3)`` in [0, 1], what it is called, and its scores unless it is the first.

    ``title`` and ``caption`` are one short line each.
    """

    title: str
    caption: str
    frames: torch.Tensor
    scores: FrameScores | None = None


def score_frames(frames: torch.Tensor, reference: torch.Tensor) -> FrameScores:
    """Compare raw frames ``(T, H, W, 3)`` float in [0, 1] one by one.

    Raises:
        ValueError: the clips differ in shape.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"clips of {tuple(frames.shape)} and {tuple(reference.shape)} differ")
    psnr, ssim = [], []
    for frame, wanted in zip(_float_frames(frames), _float_frames(reference), strict=True):
        # scikit-image divides by the error: equal frames would warn on the way to infinity.
        equal = np.array_equal(frame, wanted)
        psnr.append(
            math.inf if equal else float(peak_signal_noise_ratio(wanted, frame, data_range=1))
        )
        ssim.append(float(structural_similarity(wanted, frame, data_range=1, channel_axis=-1)))
    return FrameScores(tuple(psnr), tuple(ssim))


def write_contact_sheet(
    path: Path,
    reference: ShownClip,
    others: Sequence[ShownClip],
    *,
    columns: int = 5,
    tile: int = 156,
    gain: float = 4.0,
) -> None:
    """Write a picture with a row per clip and a row per amplified |difference| to the reference.

    ``columns`` frames evenly spread over the clip, each ``tile`` pixels wide; ``gain`` multiplies
    the differences.
    """
    count, height, width = reference.frames.shape[:3]
    chosen = torch.linspace(0, count - 1, min(columns, count)).round().long().tolist()
    size = (tile, round(tile * height / width))
    side, header = round(1.3 * tile), 26
    rows = [(clip.title, clip.caption, clip.frames, clip.scores) for clip in (reference, *others)]
    for clip in others:
        difference = (gain * (clip.frames - reference.frames).abs()).clamp(0, 1)
        rows.append((f"|difference| × {gain:g}", clip.title, difference, None))

    sheet = Image.new(
        "RGB",
        (
            _MARGIN + side + len(chosen) * (size[0] + _MARGIN),
            header + len(rows) * (size[1] + _MARGIN),
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(chosen):
        middle = _MARGIN + side + column * (size[0] + _MARGIN) + size[0] // 2
        draw.text((middle, header // 2), f"frame {frame}", _GREY, _font(13), anchor="mm")
    for row, (title, caption, frames, scores) in enumerate(rows):
        top = header + row * (size[1] + _MARGIN)
        draw.text((_MARGIN, top + size[1] // 2 - 13), title, _INK, _font(16, bold=True), "lm")
        draw.text((_MARGIN, top + size[1] // 2 + 10), caption, _GREY, _font(13), anchor="lm")
        for column, frame in enumerate(chosen):
            left = _MARGIN + side + column * (size[0] + _MARGIN)
            sheet.paste(_picture(frames[frame], size), (left, top))
            if scores is not None:
                _write_tag(draw, (left, top + size[1]), f"{scores.psnr[frame]:.1f} dB")
    sheet.save(path, optimize=True, quality=93, subsampling=0)


def write_animation(
    path: Path, clips: Sequence[ShownClip], *, tile: int = 288, frames_per_second: float = 9.0
) -> None:
    """Write clips of equal shape side by side as a GIF that runs to the last frame and back.

    Each clip is ``tile`` pixels wide under its title and caption.
    """
    count, height, width = clips[0].frames.shape[:3]
    size = (tile, round(tile * height / width))
    header = 52
    images = []
    for frame in range(count):
        image = Image.new(
            "RGB",
            (_MARGIN + len(clips) * (size[0] + _MARGIN), header + size[1] + _MARGIN),
            _PAPER,
        )
        draw = ImageDraw.Draw(image)
        for position, clip in enumerate(clips):
            left = _MARGIN + position * (size[0] + _MARGIN)
            draw.text((left, 16), clip.title, _INK, _font(17, bold=True), anchor="lm")
            draw.text((left, 38), clip.caption, _GREY, _font(13), anchor="lm")
            image.paste(_picture(clip.frames[frame], size), (left, header))
        images.append(image)
    # One palette for all frames: with one each, still areas would flicker.
    film = Image.new("RGB", (images[0].width, count * images[0].height))
    for frame, image in enumerate(images):
        film.paste(image, (0, frame * image.height))
    palette = film.quantize(256, method=Image.Quantize.MEDIANCUT)
    # There and back: a short clip that jumps to its start cannot be watched.
    order = [*range(count), *range(count - 2, 0, -1)]
    indexed = [images[i].quantize(palette=palette) for i in order]
    indexed[0].save(
        path,
        save_all=True,
        append_images=indexed[1:],
        duration=round(1000 / frames_per_second),
        loop=0,
    )


def _float_frames(frames: torch.Tensor) -> np.ndarray:
    return frames.detach().double().cpu().numpy()


def _picture(frame: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A frame ``(H, W, 3)`` in [0, 1] at ``size`` (width, height)."""
    pixels = (frame * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _write_tag(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """White text on a dark plate whose lower left corner is at ``corner``."""
    left, bottom = corner
    font = _font(12)
    plate = (left, bottom - 18, left + round(font.getlength(text)) + 9, bottom - 1)
    draw.rectangle(plate, fill=_INK)
    draw.text((left + 5, bottom - 9), text, _PAPER, font, anchor="lm")


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib ships: the same on every machine, with all the signs used here."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
