"""What the documentation's code calls `pipe`, `model` and `inputs`, at a size that a CPU takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model.budget import Budget, Choice, Schedule
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.fingerprint import fingerprint_of

TEXT_WIDTH, CHANNELS = 16, 4
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
"""Attentions of the model that can go sparse."""


def wan_transformer() -> nn.Module:
    """diffusers' Wan, two layers, seeded random weights."""
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan_inputs() -> tuple[torch.Tensor, ...]:
    """Latents of 192 tokens, a timestep, a text."""
    torch.manual_seed(1)
    text = torch.randn(1, 7, TEXT_WIDTH)
    return torch.randn(1, CHANNELS, 3, 16, 16), torch.tensor([500.0]), text


class SmallWanPipeline(diffusers.WanPipeline):
    """diffusers' pipeline: two steps of a tiny video, whatever the caller asks for."""

    def __call__(self, prompt: str, **asked: Any) -> Any:
        small = {
            "height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 2,
            "max_sequence_length": 16, "output_type": "latent",
        }  # fmt: skip
        return super().__call__(prompt, **(asked | small))


def wan_pipeline() -> SmallWanPipeline:
    """All parts with random weights; nothing is downloaded."""
    torch.manual_seed(2)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(vocab_size=8, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return SmallWanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        ).eval(),
        transformer=wan_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def write_budget(model: nn.Module, path: Path) -> None:
    """A budget of two phases that fits the model and `wan_inputs`."""
    layers = dict.fromkeys(LAYERS, (Choice(0.5), Choice(0.2)))
    schedule = Schedule(phase_starts=(0.5,))
    found = Budget(
        budgets.VERSION, fingerprint_of(model), 192, describe("cpu"), "density 0.2", "tuned",
        schedule, layers,
    )  # fmt: skip
    budgets.save(found, path)
