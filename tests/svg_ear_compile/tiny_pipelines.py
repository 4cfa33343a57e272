"""diffusers' video pipelines with tiny random models, called with embedded prompts on a CPU."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TEXT = 16
"""Width of the embedded text."""

OPTIONS = {"min_tokens": 32, "q_clusters": 4, "k_clusters": 8}
"""Options that make so few tokens worth routing."""


def wan_transformer(seed: int = 0, **changes: Any) -> nn.Module:
    """Two layers; 144 tokens in the calls of `wan`."""
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32,
        "in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(**(config | changes)).eval()


def wan() -> diffusers.WanPipeline:
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=wan_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_two_experts() -> diffusers.WanPipeline:
    """As Wan 2.2: one expert above half of the noise, another below."""
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=wan_transformer(0),
        transformer_2=wan_transformer(1),
        boundary_ratio=0.7,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_call(prompts: int = 1, **asked: Any) -> dict[str, Any]:
    """What `wan` and `wan_two_experts` are called with: guided, four steps."""
    # Four latent channels, though the pipeline would ask a VAE that is not there.
    return {
        "latents": noise((prompts, 4, 3, 12, 16), seed=5),
        "height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 4,
        "prompt_embeds": noise((prompts, 7, TEXT), seed=6),
        "negative_prompt_embeds": noise((prompts, 7, TEXT), seed=7),
        "guidance_scale": 3.0, "output_type": "latent", **asked,
    }  # fmt: skip


def ltx() -> diffusers.LTXPipeline:
    """Batched guidance; repeated blocks."""
    torch.manual_seed(0)
    return diffusers.LTXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32,
            cross_attention_dim=64, num_layers=2, caption_channels=TEXT,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def ltx_call(**asked: Any) -> dict[str, Any]:
    return {
        "latents": noise((1, 4 * 6 * 8, 4), seed=5),
        "height": 192, "width": 256, "num_frames": 25, "num_inference_steps": 4,
        "prompt_embeds": noise((1, 7, TEXT), seed=6),
        "negative_prompt_embeds": noise((1, 7, TEXT), seed=7),
        "prompt_attention_mask": torch.ones(1, 7),
        "negative_prompt_attention_mask": torch.ones(1, 7),
        "guidance_scale": 3.0, "output_type": "latent", **asked,
    }  # fmt: skip


def cogvideox() -> diffusers.CogVideoXPipeline:
    """Batched guidance, text and video in one attention, no repeated blocks named."""
    torch.manual_seed(0)
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
            time_embed_dim=8, text_embed_dim=TEXT, num_layers=2, sample_width=16, sample_height=12,
            sample_frames=9, max_text_seq_length=7, use_rotary_positional_embeddings=True,
        ).eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip


def cogvideox_call(**asked: Any) -> dict[str, Any]:
    return {
        "latents": noise((1, 3, 4, 12, 16), seed=5),
        "height": 96, "width": 128, "num_frames": 9, "num_inference_steps": 4,
        "prompt_embeds": noise((1, 7, TEXT), seed=6),
        "negative_prompt_embeds": noise((1, 7, TEXT), seed=7),
        "guidance_scale": 3.0, "output_type": "latent", **asked,
    }  # fmt: skip


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generate(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The latents that a call of a pipeline ends with."""
    pipe.set_progress_bar_config(disable=True)
    found: Tensor = pipe(**call).frames
    return found


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline that `accelerate` could leave behind."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        "class": type(pipe),
        "attributes": dict(vars(pipe)),
        "modules": {
            (name, path): dict(vars(module))
            for name, model in models.items()
            for path, module in model.named_modules()
        },
    }
