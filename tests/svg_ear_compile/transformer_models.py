"""Small models for the tests: a hand-made video transformer and diffusers' own classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, WIDTH, HEADS = 128, 64, 2


class Block(nn.Module):
    """Self-attention and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Blocks of one class, as video transformers have them."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * (1 + timestep.view(-1, 1, 1) / 1000)


def stack(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Stack, tuple[Any, ...]]:
    """A seeded stack and its inputs."""
    torch.manual_seed(0)
    model = Stack().to(device, dtype).eval()
    return model, (
        torch.randn(1, TOKENS, WIDTH, device=device, dtype=dtype),
        torch.tensor([500.0], device=device, dtype=dtype),
    )


def wan() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """diffusers' Wan with random weights; 192 video tokens, 7 of text."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    inputs = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 7, 16))
    return model, inputs, {"return_dict": False}


def explained_stack() -> tuple[nn.Module, tuple[Any, ...]]:
    """What `svg-ear explain --model` calls."""
    return stack()


def tuned_stack() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    """What `svg-ear tune --model` calls: three layers of unlike weight, four calls."""
    torch.manual_seed(0)
    model = Stack(layers=3).eval().requires_grad_(False)
    for scale, block in zip((0.3, 1.0, 3.0), model.blocks, strict=True):
        block.to_v.weight.mul_(scale)
        block.to_q.weight.mul_(3.0)  # sharper attention, so that sparsity costs something
    calls = [
        (torch.randn(1, 256, WIDTH), torch.tensor([timestep]))
        for timestep in (900.0, 700.0, 300.0, 100.0)
    ]
    return model, calls


def explained_tuned_stack() -> tuple[nn.Module, tuple[Any, ...]]:
    """What is tuned, as `svg-ear explain --model` calls it."""
    model, calls = tuned_stack()
    return model, calls[0]


def odd_stack() -> tuple[nn.Module, tuple[Any, ...]]:
    """Blocks whose keys are a path, markup, a formula and a control character at once."""
    _, inputs = stack()
    return Values().eval(), inputs


class Values(nn.Module):
    """Blocks in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"/up/[bold]x[/bold]$\\frac{\x1b[31m": Block()})

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x * (1 + timestep.view(-1, 1, 1) / 1000)


def wrong_pair() -> tuple[int, int]:
    """No model."""
    return 3, 4


class Pipeline:
    """What is around a transformer; a call of it makes a video."""

    def __init__(self) -> None:
        self.transformer = Stack()

    def __call__(self, prompt: str) -> None:
        raise NotImplementedError


def pipeline() -> tuple[Pipeline, tuple[str]]:
    """A pipeline where its transformer is wanted."""
    return Pipeline(), ("a prompt",)


def pipeline_and_options() -> tuple[Pipeline, dict[str, int]]:
    """What `compare` takes, and no other command."""
    return Pipeline(), {"num_inference_steps": 50}


def with_arguments(prompt: str) -> None:
    """Wants an argument."""


def wrong_inputs() -> tuple[nn.Module, int]:
    """A model without inputs."""
    return Stack(), 4


def raising() -> None:
    """Fails."""
    raise ZeroDivisionError("first line\nsecond line")


class UnspeakableError(Exception):
    """Cannot be written."""

    def __str__(self) -> str:
        raise ZeroDivisionError


def unspeakable() -> None:
    """Fails with an error whose message cannot be written."""
    raise UnspeakableError


def interrupted() -> None:
    """As if Ctrl-C were pressed."""
    raise KeyboardInterrupt
