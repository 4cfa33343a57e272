"""The models of this folder by name, with their weights and the shapes they were made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.video_dit.data import CAMERA_FIELDS, DEMO_SHAPE, LABELS, TRAIN_SHAPE
from benchmarks.video_dit.joint import JointDiT, JointDiTConfig
from benchmarks.video_dit.model import VideoDiT, VideoDiTConfig
from benchmarks.video_dit.pixel_dit import PixelDiT

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class TrainedModel:
    """One model: how it is built, where its weights are, and its two clip shapes.

    ``config`` is of ``kind.config_type``; ``short`` and ``long`` are (frames, height, width), each
    with the batch size that fills a GPU in training; ``tiny`` holds the fields of the configuration
    that make it small enough for a smoke run.
    """

    kind: type[PixelDiT]
    config: Any
    weights: Path
    short: Shape
    short_batch: int
    long: Shape
    long_batch: int
    tiny: dict[str, int]

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
}  # fmt: skip
"""By the role of their attention."""
