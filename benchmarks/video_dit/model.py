"""The video diffusion transformer: pixel patches in, flow-matching velocity out.

An ordinary DiT (patch embedding, adaLN-zero blocks, 3-D rotary positions, RMS-normalised queries
and keys) in pixel space. The network estimates the clean clip and the velocity follows from it:
clean pixels lie near a low-dimensional manifold that a narrow network can hit, noise does not
("Back to basics: let denoising generative models denoise", arXiv 2511.13720).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

_ROPE_BASE = 100.0  # token grids are at most some dozens wide
_POSITION_OCTAVES = 6
_TIMESTEP_FREQUENCIES = 64
_MIN_SIGMA = 0.05


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a :class:`VideoDiT`, and the names of its classes in label order.

    ``patch`` is the side of a square patch in pixels; every frame is patched by itself.
    ``cond_width`` is the width of the code that timestep, label and camera share.
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
        q = _rotate(self.norm_q(q), cos, sin).to(v.dtype)
        k = _rotate(self.norm_k(k), cos, sin).to(v.dtype)
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


class VideoDiT(nn.Module):
    """A class- and camera-conditioned video diffusion transformer in pixel space."""

    def __init__(self, config: VideoDiTConfig):
        super().__init__()
        self.config = config
        width, cond_width = config.width, config.cond_width
        patch_values = 3 * config.patch**2
        self.patch_in = nn.Linear(patch_values, width)
        # Rotary positions are relative; a photograph also wants to know where the frame ends.
        self.position_in = nn.Linear(3 * 2 * _POSITION_OCTAVES, width)
        self.timestep_in = _two_layers(2 * _TIMESTEP_FREQUENCIES, cond_width)
        self.camera_in = _two_layers(len(config.camera_fields), cond_width)
        self.label_in = nn.Embedding(len(config.class_names) + 1, cond_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(cond_width, 2 * width)
        self.patch_out = nn.Linear(width, patch_values)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_in.weight, std=0.5)
        # adaLN-zero: every block starts as the identity, the estimate as grey.
        for layer in [*(block.modulation for block in self.blocks), self.patch_out]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.modulation_out.weight)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor, camera: torch.Tensor
    ) -> torch.Tensor:
        """The flow-matching velocity ``noise - clip`` at a noisy clip.

        ``x`` is ``(B, 3, T, H, W)``, best in float32 whatever the weights' dtype: the velocity is
        formed in its precision. ``timestep`` is ``(B,)`` float in [0, 1000], 1000 being pure noise;
        ``label`` ``(B,)`` int64, ``config.null_label`` for none; ``camera`` ``(B, C)`` float.
        Returns the shape and dtype of ``x``.
        """
        patch = self.config.patch
        batch, channels, frames, height, width = x.shape
        rows, columns = height // patch, width // patch
        dtype = self.patch_in.weight.dtype

        tokens = x.view(batch, channels, frames, rows, patch, columns, patch)
        tokens = tokens.permute(0, 2, 3, 5, 4, 6, 1).reshape(batch, frames * rows * columns, -1)
        positions = _token_positions(frames, rows, columns, x.device)  # (N, 3)
        tokens = self.patch_in(tokens.to(dtype))
        tokens = tokens + self.position_in(_position_features(positions, columns).to(dtype))
        cos, sin = _rotary_tables(positions, self.config.width // self.config.heads)

        has_condition = (label != self.config.null_label).to(dtype)[:, None]
        code = self.timestep_in(_timestep_features(timestep).to(dtype)) + self.label_in(label)
        code = F.silu(code + has_condition * self.camera_in(camera.to(dtype)))
        for block in self.blocks:
            tokens = block(tokens, code, cos, sin)

        shift, scale = self.modulation_out(code).unsqueeze(1).chunk(2, dim=-1)
        pixels = self.patch_out(self.norm_out(tokens) * (1 + scale) + shift)
        pixels = pixels.view(batch, frames, rows, columns, patch, patch, channels)
        clean = pixels.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)
        sigma = (timestep.to(x.dtype) / 1000).clamp(min=_MIN_SIGMA)
        return (x - clean.to(x.dtype)) / sigma.view(-1, 1, 1, 1, 1)

    def save(self, folder: Path | str) -> None:
        """Write ``weights.safetensors`` (bfloat16) and ``config.json`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in self.state_dict().items()
        }
        # Written aside and renamed: a run that is cut leaves the previous checkpoint whole.
        save_file(weights, folder / "weights.safetensors.part")
        (folder / "weights.safetensors.part").rename(folder / "weights.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "VideoDiT":
        """Load what :meth:`save` wrote, in evaluation mode and without gradients."""
        folder = Path(folder)
        fields = json.loads((folder / "config.json").read_text())
        for name in ("class_names", "camera_fields"):
            fields[name] = tuple(fields[name])
        model = cls(VideoDiTConfig(**fields))
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def velocity_target(
    noisy: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """What :meth:`VideoDiT.forward` should return for ``noisy`` when the clip is ``clean``.

    This is ``noise - clean`` except at the lowest noise levels, where the division is clamped in
    the same way as in the model. Shapes as in ``forward``.
    """
    sigma = (timestep / 1000).clamp(min=_MIN_SIGMA)
    return (noisy - clean) / sigma.view(-1, 1, 1, 1, 1)


def _two_layers(width_in: int, width_out: int) -> nn.Sequential:
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


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs ``(x[d], x[d + D / 2])`` of ``(B, N, H, D)`` by their tokens' angles."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _timestep_features(timestep: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of ``(B,)`` timesteps, ``(B, 128)`` float32."""
    steps = torch.arange(_TIMESTEP_FREQUENCIES, device=timestep.device)
    frequencies = 10000.0 ** (-steps / _TIMESTEP_FREQUENCIES)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
