"""Raw frames of a clip: one form for whatever a pipeline returns, ``(T, H, W, 3)`` uint16.

Sixteen bits keep what eight do exactly (``257 * value``) and float frames to 1e-5, so figures of a
clip that was just generated and of one that was read back from disk are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Frames = np.ndarray
"""``(T, H, W, 3)`` uint16, 0 for black and 65535 for white."""

WHITE = 65535

LEAST_SIDE = 7
"""Pixels of SSIM's window, so of the smallest frame."""

_SHAPES = "one clip of frames (T, H, W, 3), or a batch of one"


def frames_of(result: Any) -> Frames:
    """The first clip in what a pipeline returned.

    Takes ``result.frames`` or `result` itself: an array, a tensor (``(T, 3, H, W)`` too) or a list
    of pictures, of floats in [0, 1] or of 8-bit values, alone or in a batch.

    Raises:
        TypeError: it is no clip.
        ValueError: a value is not finite or is outside of [0, 1].
    """
    found = getattr(result, "frames", result)
    if isinstance(found, (list, tuple)):
        found = _stacked(found)
    if isinstance(found, torch.Tensor):
        found = found.detach()
        if found.dtype == torch.bfloat16:
            found = found.float()
        found = found.cpu().numpy()
    if not isinstance(found, np.ndarray):
        raise TypeError(f"the pipeline must return {_SHAPES}, got {type(result).__name__}")
    if found.ndim == 5:
        found = found[0]
    if found.ndim == 4 and found.shape[-1] != 3 and found.shape[1] == 3:
        found = np.moveaxis(found, 1, -1)
    if found.ndim != 4 or found.shape[-1] != 3 or min(found.shape) < 1:
        raise TypeError(f"the pipeline must return {_SHAPES}, got shape {found.shape}")
    if min(found.shape[1:3]) < LEAST_SIDE:
        raise TypeError(f"frames of {found.shape[1]} x {found.shape[2]} pixels are too small")
    return _sixteen_bits(found)


def as_floats(frame: Frames) -> np.ndarray:
    """Values in [0, 1], float64."""
    return frame.astype(np.float64) / WHITE


def as_bytes(frame: Frames) -> np.ndarray:
    """The nearest 8-bit values, as a screen shows them."""
    return ((frame.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _stacked(given: list[Any] | tuple[Any, ...]) -> Any:
    """An array or a tensor from a list of pictures, or the first entry of a batch."""
    if not given:
        raise TypeError(f"the pipeline must return {_SHAPES}, got an empty list")
    first = given[0]
    if hasattr(first, "convert"):  # a picture of Pillow's
        return np.stack([np.asarray(picture.convert("RGB")) for picture in given])
    if isinstance(first, (list, tuple)):
        return _stacked(first)
    if isinstance(first, torch.Tensor):
        return torch.stack(list(given)) if first.dim() == 3 else first
    if isinstance(first, np.ndarray):
        return np.stack(given) if first.ndim == 3 else first
    return given


def _sixteen_bits(values: np.ndarray) -> Frames:
    if values.dtype == np.uint8:
        return values.astype(np.uint16) * np.uint16(257)
    if values.dtype == np.uint16:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"frames must be floats in [0, 1] or 8-bit values, got {values.dtype}")
    found = np.empty(values.shape, np.uint16)
    for index, frame in enumerate(values):  # one by one: a clip may be gigabytes of floats
        if not np.isfinite(frame).all():
            raise ValueError(f"frame {index} has values that are not finite")
        if frame.min() < -1e-3 or frame.max() > 1 + 1e-3:
            raise ValueError(
                f"frames must be floats in [0, 1], but frame {index} has values from "
                f"{frame.min():.3g} to {frame.max():.3g}"
            )
        found[index] = np.rint(np.clip(frame.astype(np.float64), 0, 1) * WHITE)
    return found
