"""One row: a pipeline with a neighbour, dense and sparse, as a user would run it."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

import svg_ear_compile
from benchmarks.end_to_end.measure import seconds_of
from benchmarks.end_to_end.models import Size
from benchmarks.stacking.neighbours import Neighbour


def pipeline_of(size: Size, device: str, dtype: torch.dtype) -> Any:
    """Wan's pipeline around a transformer of random weights, without text encoder and VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    transformer = size.build(device, dtype)
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(size: Size, steps: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of a call of that pipeline: embeddings in, latents out."""
    _, frames, height, width = size.latents
    tokens, channels = size.text
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, tokens, channels, generator=generator).to(device, dtype)
    return {
        "prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text),
        "num_frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width,
        "num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent",
    }  # fmt: skip


def generation(
    size: Size,
    neighbour: Neighbour,
    options: dict[str, Any] | None,
    steps: int,
    device: str,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], Tensor]:
    """A whole call of the pipeline, dense by Inductor where `options` is None; and its latents.

    A first call of two steps compiles. Seconds and memory are of the call after it.
    """
    torch.compiler.reset()
    gc.collect()  # the model of the run before, which counts in the peak
    torch.manual_seed(0)
    pipe = pipeline_of(size, device, dtype)
    neighbour.prepare(pipe)
    handle = None
    if options is None:
        # Blocks are compiled one by one, as `accelerate` does.
        pipe.transformer.compile_repeated_blocks(mode=neighbour.mode)
    else:
        mode = {} if neighbour.mode is None else {"mode": neighbour.mode}
        handle = svg_ear_compile.accelerate(pipe, options={**options, **mode})
    latents = torch.empty(0)

    def run(steps: int) -> None:
        nonlocal latents
        seed = torch.Generator().manual_seed(1)
        latents = pipe(**call_of(size, steps, device, dtype), generator=seed).frames

    first = seconds_of(lambda: run(2), device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: run(steps), device)
    row: dict[str, Any] = {
        "first_seconds": first,
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "finite": bool(latents.isfinite().all()),
    }
    if handle is not None:
        layers = [layer for model in handle.report().models for layer in model.layers]
        densities = [layer.density for layer in layers if layer.density is not None]
        row |= {"sparse_layers": len(densities), "layers": len(layers), "densities": densities}
        handle.detach()
    return row, latents.float().cpu()


def stacked(
    size: Size,
    neighbour: Neighbour,
    options: dict[str, Any],
    steps: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """A neighbour's row: dense, sparse, and how far the sparse latents are from the dense ones."""
    settings = inductor.save_config()
    try:
        dense, reference = generation(size, neighbour, None, steps, device, dtype)
        sparse, latents = generation(size, neighbour, options, steps, device, dtype)
    finally:
        inductor.load_config(settings)  # quantised layers change them for the whole process
    error = (latents - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    return {
        "title": neighbour.title,
        "mode": neighbour.mode,
        "dense": dense,
        "sparse": sparse,
        "relative_error": float(error),
    }
