"""diffusers' transformers at their published sizes, random weights made on the device, and inputs.

Random weights make no real clusters: densities are fixed, and the spread of cluster sizes is
reported beside every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_WAN = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_WAN_SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}


def _wan(config: dict[str, Any]) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**config)


def _hunyuan(config: dict[str, Any]) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**config)


@dataclass(frozen=True)
class Size:
    """One model at one resolution.

    Attributes:
        make: builds the model from its configuration, the published one where nothing is named.
        config: what differs from the class's defaults.
        layers: names of the configuration's numbers of layers that have sparse attention.
        latents: (channels, frames, height, width).
        text: (tokens, width) of the text embeddings.
        pooled: width of a second, pooled embedding, or None.
    """

    make: Callable[[dict[str, Any]], nn.Module]
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("num_layers",)
    pooled: int | None = None

    def with_layers(self, counts: tuple[int, ...]) -> Size:
        """The same with fewer layers, one count for each name in `layers`."""
        config = {**self.config, **dict(zip(self.layers, counts, strict=True))}
        return Size(self.make, self.latents, self.text, config, self.layers, self.pooled)

    def build(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with seeded random weights, in evaluation mode and without gradients."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = self.make(self.config)
        finally:
            torch.set_default_dtype(before)
        return model.to(device, dtype).eval().requires_grad_(False)

    def inputs(self, device: str, dtype: torch.dtype, timestep: float = 500.0) -> dict[str, Any]:
        """Keyword inputs of one forward, batch 1."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        tokens, width = self.text
        found: dict[str, Any] = {
            "hidden_states": normal(1, *self.latents),
            "timestep": torch.tensor([timestep], device=device),
            "encoder_hidden_states": normal(1, tokens, width),
            "return_dict": False,
        }
        if self.pooled is not None:
            found["encoder_attention_mask"] = torch.ones(1, tokens, device=device, dtype=torch.long)
            found["pooled_projections"] = normal(1, self.pooled)
            found["guidance"] = torch.tensor([6000.0], device=device, dtype=dtype)
        return found


SIZES = {
    # 21 x 45 x 80 = 75,600 tokens.
    "wan14b-720p": Size(_wan, (16, 21, 90, 160), (512, 4096), _WAN),
    # 21 x 30 x 52 = 32,760 tokens.
    "wan1.3b-480p": Size(_wan, (16, 21, 60, 104), (512, 4096), _WAN_SMALL),
    # 33 x 45 x 80 = 118,800 tokens and 256 of text.
    "hunyuan-720p": Size(
        _hunyuan,
        (16, 33, 90, 160),
        (256, 4096),
        {"guidance_embeds": True},
        ("num_layers", "num_single_layers"),
        768,
    ),
}

TINY = Size(
    _wan,
    (4, 4, 16, 16),  # 4 x 8 x 8 = 256 tokens
    (8, 16),
    {
        "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
    },
)  # fmt: skip
"""A Wan for CPUs, to see that everything runs."""
TINY_OPTIONS = {"min_tokens": 32, "q_clusters": 4, "k_clusters": 8}
