"""What is run over several GPUs: diffusers' Wan at the shapes of several models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.context_parallel.layouts import Layout, Shape
from benchmarks.end_to_end.models import SIZES as ONE_GPU
from benchmarks.end_to_end.models import Size, _wan

SIZES = {
    "wan14b-720p": ONE_GPU["wan14b-720p"],
    "wan1.3b-480p": ONE_GPU["wan1.3b-480p"],
    # HunyuanVideo's heads, width and tokens in Wan's layers: diffusers cannot divide its own.
    "hunyuan-720p": Size(
        _wan,
        (16, 33, 90, 160),
        (256, 4096),
        {"num_attention_heads": 24, "num_layers": 60, "ffn_dim": 12288},
    ),
}


def shape_of(size: Size) -> Shape:
    """The self-attention of a Wan of this size."""
    _, frames, height, width = size.latents
    dim = size.config.get("attention_head_dim", 128)
    return Shape(size.config["num_attention_heads"], frames * height * width // 4, dim)


def divide(model: nn.Module, layout: Layout, on_gpu: bool) -> None:
    """Divide a Wan over the group of this process; a layout of one GPU leaves it as it is."""
    if layout.gpus == 1:
        return
    from diffusers import ContextParallelConfig

    if not on_gpu:
        torch.accelerator.device_count = lambda: 1  # diffusers counts GPUs, and a CPU is none
    if layout.ring > 1:
        # PyTorch's native backend gives no log-sum-exp.
        backend = "_native_cudnn" if on_gpu else "_native_flash"
        for block in model.blocks:
            block.attn1.set_attention_backend(backend)
    if layout.ring > 1 and not on_gpu:
        from diffusers.models import attention_dispatch

        attention_dispatch._native_flash_attention_forward_op = _flash_on_cpu
    parallel = ContextParallelConfig(ring_degree=layout.ring, ulysses_degree=layout.ulysses)
    model.enable_parallelism(config=parallel)


def _flash_on_cpu(
    ctx: object, query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """diffusers' operation for a part of a ring, (B, N, H, D), by PyTorch's kernel for CPUs."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.transpose(1, 2), lse.transpose(1, 2)
