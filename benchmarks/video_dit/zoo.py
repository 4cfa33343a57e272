"""The models of this folder by name, with their weights and the shapes they were made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.video_dit import footage
from benchmarks.video_dit.data import (
    CAMERA_FIELDS,
    DEMO_SHAPE,
    LABELS,
    TRAIN_SHAPE,
    Clips,
    draw_clips,
    load_photo_bank,
    photo_prompt,
)
from benchmarks.video_dit.joint import JointDiT, JointDiTConfig
from benchmarks.video_dit.model import VideoDiT, VideoDiTConfig
from benchmarks.video_dit.pixel_dit import PixelDiT

Shape = tuple[int, int, int]

PHOTO_NOISE = (0.9, 1.1)
"""Mean and deviation of the logit of the noise level that clips of photographs are learnt at."""

Draw = Callable[[int, Shape, torch.Generator], Clips]
"""Draws a batch of clips of a shape, on the generator's device."""


def _photos(width: int, device: torch.device, _films: Path | None) -> Draw:
    return partial(draw_clips, load_photo_bank(width, device))


def _footage(width: int, device: torch.device, films: Path | None) -> Draw:
    if films is None:
        raise SystemExit("name the file of films with --films; prepare_footage makes it")
    return footage.load_footage(films, width, device).draw


@dataclass(frozen=True)
class TrainedModel:
    """One model: how it is built, where its weights are, and its two clip shapes.

    ``config`` is of ``kind.config_type``; ``short`` and ``long`` are (frames, height, width), each
    with the batch size that fills a GPU in training; ``tiny`` holds the fields of the configuration
    that make it small enough for a smoke run. ``clips(width, device, films)`` is what it learns
    from, ``films`` being the file of `prepare_footage`; ``prompt`` gives the label and the camera
    of a seed's clip. ``noise`` is mean and deviation of the logit of the noise level in training.
    """

    kind: type[PixelDiT]
    config: Any
    weights: Path
    short: Shape
    short_batch: int
    long: Shape
    long_batch: int
    tiny: dict[str, int]
    clips: Callable[[int, torch.device, Path | None], Draw] = _photos
    prompt: Callable[[int], tuple[int, list[float]]] = photo_prompt
    noise: tuple[float, float] = PHOTO_NOISE

    def build(self) -> PixelDiT:
        """The model before training."""
        return self.kind(self.config)

    def load(self, *, device: torch.device | str, dtype: torch.dtype) -> PixelDiT:
        """The trained model, for inference."""
        return self.kind.from_pretrained(self.weights, device=device, dtype=dtype)

    def shrunk(self) -> TrainedModel:
        """The same kind of model at a size that a CPU trains in seconds; it has no weights."""
        return replace(
            self,
            config=replace(self.config, **self.tiny),
            short=(3, 48, 48),
            short_batch=8,
            long=(6, 48, 48),
            long_batch=4,
        )


_FOLDER = Path(__file__).parent
_NAMES: dict[str, Any] = {"class_names": LABELS, "camera_fields": CAMERA_FIELDS}

MODELS = {
    # 6,912 video tokens, head dim 64.
    "self": TrainedModel(
        VideoDiT,
        VideoDiTConfig(**_NAMES),
        _FOLDER / "weights",
        DEMO_SHAPE,
        48,
        TRAIN_SHAPE,
        12,
        {"width": 64, "heads": 2, "layers": 2, "mlp_width": 128, "cond_width": 32},
    ),
    # 16,704 video and 16 text tokens, head dim 128.
    "joint": TrainedModel(
        JointDiT,
        JointDiTConfig(**_NAMES),
        _FOLDER / "joint_weights",
        (7, 144, 144),
        24,
        (29, 144, 144),
        4,
        {
            "width": 64, "heads": 2, "head_dim": 32, "dual_layers": 1, "single_layers": 1,
            "mlp_width": 96, "text_mlp_width": 48, "cond_width": 32,
        },
    ),
    # 33,792 tokens of real motion, head dim 128.
    "third": TrainedModel(
        VideoDiT,
        VideoDiTConfig(
            footage.LABELS, footage.MOMENT_FIELDS, width=384, heads=3, layers=6, mlp_width=1536
        ),
        _FOLDER / "third_weights",
        (9, footage.SIDE, footage.SIDE),
        8,
        (footage.FRAMES[0], footage.SIDE, footage.SIDE),
        3,
        {"width": 64, "heads": 2, "layers": 2, "mlp_width": 128, "cond_width": 32},
        _footage,
        footage.footage_prompt,
        # The more pixels, the more noise it takes until the label alone tells what is to be seen:
        # with the photographs' noise one clip in a hundred was learnt like that.
        (1.9, 1.3),
    ),
}  # fmt: skip
"""By the role of their attention."""
