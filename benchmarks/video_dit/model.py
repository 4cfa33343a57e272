"""The video diffusion transformer: pixel patches in, flow-matching velocity out.

An ordinary DiT (patch embedding, adaLN-zero blocks, 3-D rotary positions, RMS-normalised queries
and keys) in pixel space, all tokens of a clip in one self-attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.video_dit.pixel_dit import PixelDiT, rotate, two_layers


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a :class:`VideoDiT`, and the names of its classes in label order.

    ``patch`` is the side of a square patch in pixels; every frame is patched by itself.
    ``cond_width`` is the width of the code of timestep, label and camera together.
    """

    class_names: tuple[str, ...]
    camera_fields: tuple[str, ...]
    width: int = 256
    heads: int = 4
    layers: int = 8
    mlp_width: int = 832
    cond_width: int = 96
    patch: int = 6

    @property
    def null_label(self) -> int:
        """The label that means "no class and no camera", for classifier-free guidance."""
        return len(self.class_names)


class Attention(nn.Module):
    """Self-attention over all tokens of the clip, with normalised and rotated queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend within ``x`` ``(B, N, width)``; ``cos`` and ``sin`` are ``(N, 1, D / 2)``."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # (B, N, H, D)
        k = self.to_k(x).unflatten(-1, (self.heads, -1))
        v = self.to_v(x).unflatten(-1, (self.heads, -1))
        q = rotate(self.norm_q(q), cos, sin).to(v.dtype)
        k = rotate(self.norm_k(k), cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning code (adaLN-zero)."""

    def __init__(self, config: VideoDiTConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_width, width),
        )
        self.modulation = nn.Linear(config.cond_width, 6 * width)

    def forward(
        self, x: torch.Tensor, code: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Transform ``x`` ``(B, N, width)`` under ``code`` ``(B, cond_width)``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(code).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class VideoDiT(PixelDiT):
    """A class- and camera-conditioned video diffusion transformer in pixel space."""

    config_type = VideoDiTConfig

    def __init__(self, config: VideoDiTConfig):
        super().__init__(config)
        self.camera_in = two_layers(len(config.camera_fields), config.cond_width)
        self.label_in = nn.Embedding(len(config.class_names) + 1, config.cond_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        # adaLN-zero: every block starts as the identity, the estimate as grey.
        self.initialise(*(block.modulation for block in self.blocks))
        nn.init.normal_(self.label_in.weight, std=0.5)

    def conditions(self, label: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The label and the camera as they are."""
        return label, camera

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor, camera: torch.Tensor
    ) -> torch.Tensor:
        """The flow-matching velocity ``noise - clip`` at a noisy clip.

        ``x`` is ``(B, 3, T, H, W)``, best in float32 whatever the weights' dtype: the velocity is
        formed in its precision. ``timestep`` is ``(B,)`` float in [0, 1000], 1000 being pure noise;
        ``label`` ``(B,)`` int64, ``config.null_label`` for none; ``camera`` ``(B, C)`` float.
        Returns the shape and dtype of ``x``.
        """
        dtype = self.patch_in.weight.dtype
        tokens, (cos, sin) = self.embed(x, self.config.width // self.config.heads)
        has_condition = (label != self.config.null_label).to(dtype)[:, None]
        code = self.timestep_code(timestep) + self.label_in(label)
        code = F.silu(code + has_condition * self.camera_in(camera.to(dtype)))
        for block in self.blocks:
            tokens = block(tokens, code, cos, sin)
        return self.velocity(x, tokens, code, timestep)
