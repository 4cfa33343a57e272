"""What the documentation's code calls `pipe`, `model` and `inputs`, at a size that a CPU takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_diffusers import CHANNELS, TEXT_WIDTH, VIDEO, wan_parts
from torch import nn

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model.budget import Budget, Choice, Schedule
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.fingerprint import fingerprint_of

LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
"""Attentions of the model that can go sparse."""


def wan_inputs() -> tuple[torch.Tensor, ...]:
    """Latents of 192 tokens, a timestep, a text."""
    torch.manual_seed(1)
    text = torch.randn(1, 7, TEXT_WIDTH)
    return torch.randn(1, CHANNELS, 3, 16, 16), torch.tensor([500.0]), text


class SmallWanPipeline(diffusers.WanPipeline):
    """diffusers' pipeline: two steps of a tiny video, whatever the caller asks for."""

    def __call__(self, prompt: str, **asked: Any) -> Any:
        small = VIDEO | {"num_inference_steps": 2, "max_sequence_length": 16}
        return super().__call__(prompt, **(asked | small))


def wan_pipeline() -> SmallWanPipeline:
    """All parts with random weights; nothing is downloaded."""
    return SmallWanPipeline(**wan_parts())


def write_budget(model: nn.Module, path: Path) -> None:
    """A budget of two phases that fits the model and `wan_inputs`."""
    layers = dict.fromkeys(LAYERS, (Choice(0.5), Choice(0.2)))
    schedule = Schedule(phase_starts=(0.5,))
    found = Budget(
        budgets.VERSION, fingerprint_of(model), 192, describe("cpu"), "density 0.2", "tuned",
        schedule, layers,
    )  # fmt: skip
    found.save(path)
