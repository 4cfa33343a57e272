"""What the video transformers of this folder share: pixel patches in, flow-matching velocity out.

The network estimates the clean clip and the velocity follows from it: clean pixels lie near a
low-dimensional manifold that a narrow network can hit, noise does not ("Back to basics: let
denoising generative models denoise", arXiv 2511.13720).
"""

import json
from abc import abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from benchmarks.video_dit.stored_weights import read_weights, write_weights

_ROPE_BASE = 100.0  # token grids are at most some dozens wide
_POSITION_OCTAVES = 6
_TIMESTEP_FREQUENCIES = 64
_MIN_SIGMA = 0.05


class PixelDiT(nn.Module):
    """Patches a noisy clip, leaves the tokens to a subclass, and turns them into a velocity.

    A subclass sets ``config_type``, a dataclass of JSON values and tuples of them, has its
    ``blocks`` in order, builds its layers after ``super().__init__`` and then calls ``initialise``.
    """

    config_type: ClassVar[Any]
    blocks: Any  # a ModuleList, or a list over several
    text_tokens: int = 0  # at the end of the sequence that attends

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        width, cond_width = config.width, config.cond_width
        patch_values = 3 * config.patch**2
        self.patch_in = nn.Linear(patch_values, width)
        # Rotary positions are relative; a photograph also wants to know where the frame ends.
        self.position_in = nn.Linear(3 * 2 * _POSITION_OCTAVES, width)
        self.timestep_in = two_layers(2 * _TIMESTEP_FREQUENCIES, cond_width)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(cond_width, 2 * width)
        self.patch_out = nn.Linear(width, patch_values)

    @abstractmethod
    def conditions(self, label: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What ``forward`` takes after the clip and the timestep.

        ``label`` is ``(B,)`` int64, ``config.null_label`` for none; ``camera`` ``(B, C)`` float32.
        """

    def initialise(self, *zero: nn.Linear) -> None:
        """Xavier for every linear layer, zero for its bias, for ``zero`` and for the estimate."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (*zero, self.modulation_out, self.patch_out):
            nn.init.zeros_(layer.weight)

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of a clip of shape ``(..., T, H, W)``."""
        frames, height, width = shape[-3:]
        return frames, height // self.config.patch, width // self.config.patch

    def embed(
        self, x: torch.Tensor, head_dim: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Tokens ``(B, N, width)`` of a clip ``(B, 3, T, H, W)``, and their rotary tables."""
        patch = self.config.patch
        frames, rows, columns = self.grid(x.shape)
        dtype = self.patch_in.weight.dtype
        tokens = x.view(*x.shape[:3], rows, patch, columns, patch)
        tokens = tokens.permute(0, 2, 3, 5, 4, 6, 1).reshape(len(x), frames * rows * columns, -1)
        positions = _token_positions(frames, rows, columns, x.device)  # (N, 3)
        tokens = self.patch_in(tokens.to(dtype))
        tokens = tokens + self.position_in(_position_features(positions, columns).to(dtype))
        return tokens, _rotary_tables(positions, head_dim)

    def timestep_code(self, timestep: torch.Tensor) -> torch.Tensor:
        """``(B, cond_width)`` of ``(B,)`` timesteps."""
        return self.timestep_in(_timestep_features(timestep).to(self.patch_in.weight.dtype))

    def velocity(
        self, x: torch.Tensor, tokens: torch.Tensor, code: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at ``x`` from the last tokens ``(B, N, width)`` under ``code``."""
        patch = self.config.patch
        shift, scale = self.modulation_out(code).unsqueeze(1).chunk(2, dim=-1)
        pixels = self.patch_out(self.norm_out(tokens) * (1 + scale) + shift)
        pixels = pixels.view(len(x), *self.grid(x.shape), patch, patch, x.shape[1])
        clean = pixels.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)
        sigma = (timestep.to(x.dtype) / 1000).clamp(min=_MIN_SIGMA)
        return (x - clean.to(x.dtype)) / sigma.view(-1, 1, 1, 1, 1)

    def save(self, folder: Path | str) -> None:
        """Write the weights (`stored_weights`) and ``config.json`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, self.state_dict())
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load what :meth:`save` wrote, in evaluation mode and without gradients."""
        folder = Path(folder)
        fields = json.loads((folder / "config.json").read_text())
        listed = {name: tuple(v) for name, v in fields.items() if isinstance(v, list)}
        model = cls(cls.config_type(**(fields | listed)))
        model.load_state_dict(read_weights(folder))
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def velocity_target(
    noisy: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """What ``forward`` of a model here should return for ``noisy`` when the clip is ``clean``.

    This is ``noise - clean`` except at the lowest noise levels, where the division is clamped in
    the same way as in the model. Shapes as in ``forward``.
    """
    sigma = (timestep / 1000).clamp(min=_MIN_SIGMA)
    return (noisy - clean) / sigma.view(-1, 1, 1, 1, 1)


def two_layers(width_in: int, width_out: int) -> nn.Sequential:
    """Linear, SiLU, linear."""
    return nn.Sequential(nn.Linear(width_in, width_out), nn.SiLU(), nn.Linear(width_out, width_out))


def _token_positions(frames: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Frame, row and column of every token, ``(N, 3)`` float32, each counted from the middle."""
    axes = [
        torch.arange(count, device=device, dtype=torch.float32) - (count - 1) / 2
        for count in (frames, rows, columns)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _position_features(positions: torch.Tensor, columns: int) -> torch.Tensor:
    """Sines and cosines of absolute positions, ``(N, 36)`` float32."""
    # In octaves of half the frame's width; frames are counted in units of 16, so that a short
    # clip reads like the middle of a long one.
    frame, row, column = positions.unbind(-1)
    scaled = torch.stack([frame / 16, row * (2 / columns), column * (2 / columns)], dim=-1)
    octaves = 2.0 ** torch.arange(_POSITION_OCTAVES, device=positions.device)
    angles = scaled[..., None] * octaves * (torch.pi / 2)  # (N, 3, octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _rotary_tables(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(N, 1, head_dim / 2)``: a quarter for frames, the rest for y and x."""
    pairs = head_dim // 2
    frame_pairs = pairs // 4
    row_pairs = (pairs - frame_pairs) // 2
    counts = (frame_pairs, row_pairs, pairs - frame_pairs - row_pairs)
    angles = torch.cat(
        [
            positions[:, axis, None]
            * _ROPE_BASE ** (-torch.arange(count, device=positions.device) / count)
            for axis, count in enumerate(counts)
        ],
        dim=-1,
    )
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs ``(x[d], x[d + D / 2])`` of ``(B, N, H, D)`` by their tokens' angles."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _timestep_features(timestep: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of ``(B,)`` timesteps, ``(B, 128)`` float32."""
    steps = torch.arange(_TIMESTEP_FREQUENCIES, device=timestep.device)
    frequencies = 10000.0 ** (-steps / _TIMESTEP_FREQUENCIES)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
