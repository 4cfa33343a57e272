"""diffusers' pipelines at a size that a CPU takes; all weights are random, nothing is downloaded.

Each function returns a pipeline and the keyword arguments of a call. Wan is whole. The others get
embeddings in place of a text and return latents.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

Made = tuple[Any, dict[str, Any]]

CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 4, 16, 9
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
VIDEO: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 4}
LATENTS: dict[str, Any] = {**VIDEO, "output_type": "latent"}

OPTIONS = {"min_tokens": 100}
"""Options for `accelerate`: videos as short as these would stay dense."""


def wan() -> Made:
    """Wan 2.1: 192 tokens, guidance by one forward for each branch."""
    return diffusers.WanPipeline(**wan_parts()), {**VIDEO, "max_sequence_length": 16}


def wan22() -> Made:
    """Wan 2.2: the first expert denoises down to half of the noise, the second the rest."""
    pipe = diffusers.WanPipeline(
        **wan_parts(), transformer_2=wan_transformer(seed=1), boundary_ratio=0.5
    )
    return pipe, {**VIDEO, "max_sequence_length": 16}


def hunyuan_video() -> Made:
    """HunyuanVideo 1.5: text and video in one attention."""
    torch.manual_seed(0)
    model = diffusers.HunyuanVideo15Transformer3DModel(
        **HEADS, in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, text_embed_dim=TEXT_WIDTH, text_embed_2_dim=TEXT_WIDTH,
        image_embed_dim=TEXT_WIDTH, rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1,
        downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideo15Pipeline(
        None, None, model.eval(), vae.eval(), flow_scheduler(), None, None,
        diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    call = dict(LATENTS)
    for which in ("prompt_embeds", "negative_prompt_embeds"):
        for encoder in ("", "_2"):
            call[which + encoder] = text()
            mask = which.replace("embeds", "embeds_mask") + encoder
            call[mask] = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    return pipe, call


def cogvideox() -> Made:
    """CogVideoX: text before the video in one attention, guidance along the batch."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=CHANNELS, out_channels=CHANNELS, time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH, sample_width=16, sample_height=16, sample_frames=9,
        max_text_seq_length=TEXT_TOKENS, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        None, None, None, model.eval(), diffusers.CogVideoXDDIMScheduler()
    )
    return pipe, LATENTS | {"prompt_embeds": text(), "negative_prompt_embeds": text()}


def minimax_h3() -> Made:
    """MiniMax-H3, text to video with sound: text, sound and video are one sequence."""
    torch.manual_seed(0)
    model = diffusers.MiniMaxH3Transformer3DModel(
        **HEADS, hidden_size=64, num_refiner_layers=1, ffn_dim=64, text_dim=TEXT_WIDTH, freq_dim=16,
        time_embed_hidden_dim=32, time_embed_dim=32, rope_freq_dim=4,
    )  # fmt: skip
    blocks = diffusers.MiniMaxH3Blocks().get_workflow("t2va")
    for part in [name for name in blocks.sub_blocks if "text" in name or "decode" in name]:
        blocks.sub_blocks.pop(part)
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=model.eval(),
        scheduler=diffusers.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    call = {"height": 64, "width": 64, "num_frames": 124, "num_inference_steps": 4}
    tags = torch.full((TEXT_TOKENS,), pipe.text_tag)
    return pipe, call | {"prompt_embeds": text(), "text_token_tags": tags}


def wan_parts() -> dict[str, Any]:
    """Every part of Wan's pipeline."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformer = wan_transformer()
    encoder = UMT5Config(
        vocab_size=8, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )  # fmt: skip
    return {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": UMT5EncoderModel(encoder).eval(),
        "vae": vae.eval(),
        "scheduler": flow_scheduler(),
        "transformer": transformer,
    }


def wan_transformer(seed: int = 0) -> nn.Module:
    """Wan's transformer with two layers."""
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(
        **HEADS, patch_size=(1, 2, 2), in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def flow_scheduler() -> Any:
    """The scheduler of Wan and HunyuanVideo."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def text() -> Tensor:
    """Embeddings of a text, (1, TEXT_TOKENS, TEXT_WIDTH)."""
    return torch.randn(1, TEXT_TOKENS, TEXT_WIDTH)
