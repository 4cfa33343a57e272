"""A second video transformer, built differently: text and video tokens in one attention.

As in HunyuanVideo: a prompt of words becomes text tokens; in the first blocks text and video keep
weights of their own and meet in the attention, in the others they share all weights, with attention
and MLP side by side. Positions turn video tokens alone; text comes last. A prompt is filled up to a
fixed length with a word that is attended to like any other, so that no mask is needed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.video_dit.pixel_dit import PixelDiT, rotate, two_layers

CAMERA_LEVELS = 8
"""Magnitudes that words tell apart: the word of a rate r ends in ceil(8 |r|)."""

_Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class JointDiTConfig:
    """Sizes of a :class:`JointDiT`, and the names of its classes in label order.

    ``patch`` is the side of a square patch in pixels; ``cond_width`` the width of the code that
    timestep and prompt share; ``text_tokens`` the length of every prompt.
    """

    class_names: tuple[str, ...]
    camera_fields: tuple[str, ...]
    width: int = 256
    heads: int = 2
    head_dim: int = 128
    dual_layers: int = 2
    single_layers: int = 8
    mlp_width: int = 576
    text_mlp_width: int = 256
    cond_width: int = 128
    patch: int = 6
    text_tokens: int = 16

    @property
    def null_label(self) -> int:
        """The label that means "no class and no camera": a prompt of fillers alone."""
        return len(self.class_names)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word by its number; the first fills prompts up."""
        signed = [f"{field}{sign}" for field in self.camera_fields for sign in "-+"]
        motions = [f"{word}{level}" for word in signed for level in range(1, CAMERA_LEVELS + 1)]
        return ("_", *self.class_names, *motions)


class JointAttention(nn.Module):
    """Attention over video and text tokens, queries and keys normalised, video rotated."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, video: int, rotary: _Rotary
    ) -> torch.Tensor:
        """Attend within ``(B, N, H * D)``, whose first ``video`` tokens are rotated."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # (B, N, H, D)
        q, k = self.norm_q(q), self.norm_k(k)
        q, k = (
            torch.cat([rotate(x[:, :video], *rotary), x[:, video:].float()], dim=1).to(v.dtype)
            for x in (q, k)
        )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return out.transpose(1, 2).flatten(2)


class _Stream(nn.Module):
    """Projections, MLP and modulation of one kind of token in a dual block."""

    def __init__(self, config: JointDiTConfig, mlp_width: int):
        super().__init__()
        width, inner = config.width, config.heads * config.head_dim
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, width)
        )
        # Blocks share one modulation of the code and add their own; both start at zero.
        self.table = nn.Parameter(torch.zeros(6, width))

    def project(
        self, x: torch.Tensor, modulation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v ``(B, N, H * D)`` of tokens under ``modulation`` ``(B, 6, width)``."""
        shift, scale, *_ = self._parts(modulation)
        x = self.norm1(x) * (1 + scale) + shift
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def update(
        self, x: torch.Tensor, attended: torch.Tensor, modulation: torch.Tensor
    ) -> torch.Tensor:
        """The tokens after attention and MLP."""
        _, _, gate1, shift2, scale2, gate2 = self._parts(modulation)
        x = x + gate1 * self.to_out(attended)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def _parts(self, modulation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (modulation + self.table.to(modulation.dtype)).unsqueeze(2).unbind(1)


class DualBlock(nn.Module):
    """Text and video with weights of their own, joined in the attention."""

    def __init__(self, config: JointDiTConfig):
        super().__init__()
        self.video = _Stream(config, config.mlp_width)
        self.text = _Stream(config, config.text_mlp_width)
        self.attn = JointAttention(config.head_dim)

    def forward(
        self, video: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rotary: _Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform ``(B, N, width)`` and ``(B, M, width)`` under ``(B, 6, width)``."""
        count = video.shape[1]
        streams = (self.video.project(video, modulation), self.text.project(text, modulation))
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        out = self.attn(q, k, v, count, rotary)
        video = self.video.update(video, out[:, :count], modulation)
        return video, self.text.update(text, out[:, count:], modulation)


class SingleBlock(nn.Module):
    """Text and video in one sequence; attention and MLP side by side."""

    def __init__(self, config: JointDiTConfig):
        super().__init__()
        width, inner = config.width, config.heads * config.head_dim
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.attn = JointAttention(config.head_dim)
        self.mlp_in = nn.Linear(width, config.mlp_width)
        self.to_out = nn.Linear(inner + config.mlp_width, width)
        self.table = nn.Parameter(torch.zeros(3, width))

    def forward(
        self, tokens: torch.Tensor, video: int, modulation: torch.Tensor, rotary: _Rotary
    ) -> torch.Tensor:
        """Transform ``(B, N + M, width)``, ``video`` tokens first, under ``(B, 6, width)``."""
        shift, scale, gate = (
            (modulation[:, :3] + self.table.to(modulation.dtype)).unsqueeze(2).unbind(1)
        )
        x = self.norm(tokens) * (1 + scale) + shift
        attended = self.attn(self.to_q(x), self.to_k(x), self.to_v(x), video, rotary)
        hidden = F.gelu(self.mlp_in(x), approximate="tanh")
        return tokens + gate * self.to_out(torch.cat([attended, hidden], dim=-1))


class JointDiT(PixelDiT):
    """A video diffusion transformer in pixel space whose conditions are words of a prompt."""

    config_type = JointDiTConfig

    def __init__(self, config: JointDiTConfig):
        super().__init__(config)
        width, cond_width = config.width, config.cond_width
        self.text_tokens = config.text_tokens
        self.words_in = nn.Embedding(len(config.vocabulary), width)
        self.places_in = nn.Embedding(config.text_tokens, width)
        self.prompt_in = two_layers(width, cond_width)
        self.modulation = nn.Linear(cond_width, 6 * width)
        self.dual_blocks = nn.ModuleList(DualBlock(config) for _ in range(config.dual_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_layers))
        # adaLN-zero: every block starts as the identity, the estimate as grey.
        self.initialise(self.modulation)
        nn.init.normal_(self.words_in.weight, std=0.5)
        nn.init.normal_(self.places_in.weight, std=0.1)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in order."""
        return [*self.dual_blocks, *self.single_blocks]

    def conditions(self, label: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The prompt ``(B, text_tokens)`` int64: the class, then a word for each motion."""
        classes, fields = len(self.config.class_names), len(self.config.camera_fields)
        level = torch.ceil(camera.abs() * CAMERA_LEVELS).clamp(max=CAMERA_LEVELS).long()  # (B, C)
        signed = 2 * torch.arange(fields, device=camera.device) + (camera > 0)
        motion = torch.where(level > 0, classes + signed * CAMERA_LEVELS + level, 0)
        words = F.pad(
            torch.cat([label[:, None] + 1, motion], dim=1),
            (0, self.config.text_tokens - 1 - fields),
        )
        return (words.masked_fill((label == self.config.null_label)[:, None], 0),)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """The flow-matching velocity ``noise - clip`` at a noisy clip.

        ``x`` is ``(B, 3, T, H, W)``, best in float32 whatever the weights' dtype: the velocity is
        formed in its precision. ``timestep`` is ``(B,)`` float in [0, 1000], 1000 being pure noise;
        ``prompt`` ``(B, text_tokens)`` int64 from ``conditions``. Returns the shape and dtype of
        ``x``.
        """
        video, rotary = self.embed(x, self.config.head_dim)
        words = self.words_in(prompt)
        text = (words + self.places_in.weight).to(video.dtype)
        code = F.silu(self.timestep_code(timestep) + self.prompt_in(words.mean(dim=1)))
        modulation = self.modulation(code).unflatten(-1, (6, -1))
        for block in self.dual_blocks:
            video, text = block(video, text, modulation, rotary)
        count = video.shape[1]
        tokens = torch.cat([video, text], dim=1)
        for block in self.single_blocks:
            tokens = block(tokens, count, modulation, rotary)
        return self.velocity(x, tokens[:, :count], code, timestep)
