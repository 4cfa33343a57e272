"""Clips as a page shows them: small lossy pictures of many frames each, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from svg_ear_compile.compare.frames import WHITE, Frames, as_bytes

# A lossy block is 16 pixels wide: a frame that starts on one does not bleed into its neighbour.
_BLOCK = 16
# Phones refuse much larger pictures.
_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Layout:
    """How the frames of every clip of a page lie in its sheets, in pixels.

    Attributes:
        width, height: of one shown frame.
        pitch_x, pitch_y: from one frame to the next in a sheet.
        columns, rows: frames of a full sheet.
    """

    width: int
    height: int
    pitch_x: int
    pitch_y: int
    columns: int
    rows: int

    @classmethod
    def of(cls, clip: Frames, width: int) -> Layout:
        """For clips of this shape, shown `width` pixels wide or as wide as they are."""
        _, full_height, full_width, _ = clip.shape
        width = min(width, full_width)
        height = max(1, round(full_height * width / full_width))
        pitch_x, pitch_y = (_BLOCK * -(-side // _BLOCK) for side in (width, height))
        columns, rows = (max(1, _LARGEST_SIDE // pitch) for pitch in (pitch_x, pitch_y))
        return cls(width, height, pitch_x, pitch_y, columns, rows)

    def to_json(self) -> dict[str, int]:
        """Plain JSON values for the page's script."""
        return dict(self.__dict__)


def sheets_of(clip: Frames, layout: Layout) -> list[str]:
    """The clip's frames, from left to right and then down, as few pictures."""
    return _encoded((as_bytes(frame) for frame in clip), len(clip), layout, quality=85)


def difference_sheets_of(clip: Frames, dense: Frames, layout: Layout, gain: int) -> list[str]:
    """The same of `gain` times the greatest difference of a pixel's three colours, from raw frames.

    Black is equal, white is a difference of ``1 / gain`` and above.
    """

    def differences() -> Iterator[np.ndarray]:
        for frame, wanted in zip(clip, dense, strict=True):
            found = np.minimum(gain * _difference(frame, wanted), WHITE) // 257
            yield np.repeat(found.astype(np.uint8)[..., None], 3, axis=-1)

    return _encoded(differences(), len(clip), layout, quality=70)


def gain_of(pairs: Iterable[tuple[Frames, Frames]]) -> int:
    """The power of two up to 16 that makes the differences of (clip, dense) pairs easy to see.

    One for a whole page, so that its clips compare: a hundredth of the pixels is white at most.
    """
    strong = 0.0
    for clip, dense in pairs:
        for index in sorted({0, len(clip) // 2, len(clip) - 1}):
            strong = max(strong, float(np.quantile(_difference(clip[index], dense[index]), 0.99)))
    gain = 16
    while gain > 1 and gain * strong > WHITE:
        gain //= 2
    return gain


def _difference(frame: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``(H, W)`` int64."""
    difference: np.ndarray = np.abs(frame.astype(np.int64) - wanted.astype(np.int64)).max(axis=-1)
    return difference


def _encoded(frames: Iterable[np.ndarray], count: int, layout: Layout, quality: int) -> list[str]:
    """WebP pictures of 8-bit frames as data URIs."""
    found: list[str] = []
    each = layout.columns * layout.rows
    sheet: Image.Image | None = None
    for index, frame in enumerate(frames):
        place = index % each
        if place == 0:
            left = min(each, count - index)
            columns, rows = min(left, layout.columns), -(-left // layout.columns)
            sheet = Image.new("RGB", (columns * layout.pitch_x, rows * layout.pitch_y))
        assert sheet is not None, "place 0 comes first"
        row, column = divmod(place, layout.columns)
        sheet.paste(_tile(frame, layout), (column * layout.pitch_x, row * layout.pitch_y))
        if place == each - 1 or index == count - 1:
            found.append(_data_uri(sheet, quality))
    return found


def _tile(frame: np.ndarray, layout: Layout) -> Image.Image:
    """A frame at the size of its place, its edge repeated in what the place has too much."""
    picture = Image.fromarray(frame)
    if picture.size != (layout.width, layout.height):
        picture = picture.resize((layout.width, layout.height), Image.Resampling.LANCZOS)
    beyond = ((0, layout.pitch_y - layout.height), (0, layout.pitch_x - layout.width), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), beyond, mode="edge"))


def _data_uri(picture: Image.Image, quality: int) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
