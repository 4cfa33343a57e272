"""Pipelines that are compared in seconds on a CPU: a plain one, and diffusers' Wan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.video_dit.data import CAMERA_FIELDS, LABELS
from benchmarks.video_dit.model import VideoDiT, VideoDiTConfig
from benchmarks.video_dit.sample import generate

TOKENS = 3 * 8 * 8

SPARSE = {"min_tokens": 32, "q_clusters": 8, "k_clusters": 12}
"""Options that make so few tokens worth routing."""


@dataclass
class Output:
    """What diffusers' pipelines return."""

    frames: torch.Tensor


class DiTPipeline:
    """The video DiT as a pipeline: a prompt is the name of a class."""

    def __init__(self, transformer: nn.Module, steps: int) -> None:
        self.transformer = transformer
        self.steps = steps

    def __call__(self, prompt: str, seed: int, shape: tuple[int, int, int] = (3, 48, 48)) -> Output:
        clip = generate(
            self.transformer,
            label=LABELS.index(prompt),
            camera=(0.7, -0.3, 0.6, 0.35, 0.0),
            seed=seed,
            steps=self.steps,
            guidance=2.0,
            shape=shape,
            device="cpu",
            dtype=torch.float32,
        )
        return Output(clip[None])


def tiny_dit() -> DiTPipeline:
    """Two layers, random weights, three steps: frames of 48 x 48."""
    config = VideoDiTConfig(
        class_names=LABELS, camera_fields=CAMERA_FIELDS,
        width=32, heads=1, layers=2, mlp_width=64, cond_width=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = VideoDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return DiTPipeline(model, steps=3)


def tiny_wan() -> tuple[Any, dict[str, Any]]:
    """diffusers' Wan pipeline with random weights, and the call that makes 5 frames of 64 x 64."""
    torch.manual_seed(0)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "fox": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_width = 16
    pipeline = diffusers.WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=8, d_model=text_width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
            )
        ).eval(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16,
            out_channels=16, text_dim=text_width, freq_dim=32, ffn_dim=64, num_layers=2,
            rope_max_seq_len=64,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    call = {
        "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2,
        "guidance_scale": 2.0, "max_sequence_length": 16,
    }  # fmt: skip
    return pipeline, call
