"""Seconds, attention's fraction of them, compile time and memory of forwards and generations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import svg_ear_compile
from benchmarks.end_to_end.models import Size
from benchmarks.video_dit.sample import shifted_sigmas
from svg_ear_compile.kernels.clusters import Result

# Everything that computes attention in a compiled graph, by the name of its event.
_ATTENTION_EVENTS = ("svg_ear::attention", "aten::_scaled_dot_product", "aten::_flash_attention")


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call with everything that it starts on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def attention_fraction(call: Callable[[], object], device: str) -> float:
    """Fraction of a call's device time that is spent inside attention, clustering and all."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        seconds_of(call, device)
    events = profiled.events() or []
    inside = [e for e in events if e.name.startswith(_ATTENTION_EVENTS) and not _is_nested(e)]
    if on_gpu:
        # Operators carry the time of their kernels, which are events too.
        kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        spent = sum(e.self_device_time_total for e in kernels)
        return sum(e.device_time_total for e in inside) / spent
    return sum(e.cpu_time_total for e in inside) / sum(e.self_cpu_time_total for e in events)


def _is_nested(event: Any) -> bool:
    """True if an event stands inside another one of attention: the outer one counts."""
    outer = event.cpu_parent
    return outer is not None and (outer.name.startswith(_ATTENTION_EVENTS) or _is_nested(outer))


@contextmanager
def collected_clusters(device: str) -> Iterator[list[dict[str, list[float]]]]:
    """Collect mean and deviation of the cluster sizes of every sparse call in the with block."""
    if device == "cuda":
        from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs as form
    else:
        from svg_ear_compile.kernels import registry as form
    found: list[dict[str, list[float]]] = []
    sparse = form.sparse_attention  # of a class or of a module: a plain function of either

    def collecting(*args: Any, **kwargs: Any) -> Result:
        result: Result = sparse(*args, **kwargs)
        sizes = {"queries": result.queries.sizes, "keys": result.keys.sizes}
        found.append(
            {name: [float(x) for x in torch.std_mean(s.float())[::-1]] for name, s in sizes.items()}
        )
        return result

    form.sparse_attention = collecting
    try:
        yield found
    finally:
        form.sparse_attention = sparse


def forward(
    size: Size, backend: str, options: dict[str, Any], repeats: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """One transformer forward under a backend: raw samples of the steady state, and what it took.

    A bound model is called at falling timesteps, so that its clustering starts warm as in a
    generation. It recomputes its clusters at every step: the inputs do not change, and blocks
    would be reused more often than in any generation.
    """
    torch.compiler.reset()
    model = size.build(device, dtype)
    if backend == "svg_ear":
        options = {**options, "max_drift": 0.0}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    compiled = torch.compile(model, backend=backend, options=options or None)
    session = svg_ear_compile.bind(compiled) if backend == "svg_ear" else None
    timesteps = iter(range(1000, 0, -1))

    def call() -> Tensor:
        with torch.no_grad():
            inputs = size.inputs(device, dtype, float(next(timesteps)))
            return compiled(**inputs)[0]

    first = seconds_of(call, device)
    with collected_clusters(device) as clusters:
        call()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    samples = [seconds_of(call, device) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    out = call()
    return {
        "backend": backend,
        "options": options,
        "first_seconds": first,
        "samples_seconds": samples,
        "attention_fraction": attention_fraction(call, device),
        "weights_bytes": weights,
        "peak_bytes": peak,
        "finite": bool(out.isfinite().all()),
        "densities": [layer.density for layer in session.report()] if session else [],
        "clusters": clusters,
    }


def generation(
    size: Size,
    backend: str,
    options: dict[str, Any],
    *,
    steps: int,
    dense_steps: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """A whole sampling loop with classifier-free guidance, started from compile caches.

    Three steps of two layers fill the caches before. The whole loop then finds everything
    on disk, and its first clustering is cold. Blocks are compiled one by one, as diffusers
    recommends: a whole model takes minutes. Without dense steps the density has its default
    schedule.
    """
    few_layers = size.with_layers((2,) * len(size.layers))
    _sampled(few_layers, backend, options, 3, min(1, dense_steps), device, dtype)
    return {
        "backend": backend,
        "options": options,
        "steps": steps,
        "dense_steps": dense_steps if backend == "svg_ear" else steps,
        **_sampled(size, backend, options, steps, dense_steps, device, dtype),
    }


def _sampled(
    size: Size, backend: str, options: dict[str, Any], steps: int, dense_steps: int, device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one sampling loop, fractions of reused calls, and whether all is finite."""
    torch.compiler.reset()
    gc.collect()  # the model of the loop before
    model = size.build(device, dtype)
    model.compile_repeated_blocks(backend=backend, options=options or None, fullgraph=True)
    session = None
    if backend == "svg_ear":
        session = svg_ear_compile.bind(model, dense_steps=dense_steps, steps=steps)
    latents = torch.empty(0)

    def run() -> None:
        nonlocal latents
        latents = sample(model, size, steps, device, dtype)

    seconds = seconds_of(run, device)
    reused: list[float] = []
    if session is not None:
        fractions = (layer.reused_fraction for layer in session.report())
        reused = [fraction for fraction in fractions if fraction is not None]
        session.close()
    return {"seconds": seconds, "reused": reused, "finite": bool(latents.isfinite().all())}


@torch.no_grad()
def sample(
    model: nn.Module,
    size: Size,
    steps: int,
    device: str,
    dtype: torch.dtype,
    guidance: float = 5.0,
    shift: float = 3.0,
) -> Tensor:
    """Euler steps along the flow from noise; two forwards a step. Latents (1, C, T, H, W)."""
    inputs = size.inputs(device, dtype)
    x = inputs.pop("hidden_states").float()
    text = inputs.pop("encoder_hidden_states")
    for sigma, lower in pairwise(shifted_sigmas(steps, shift)):
        inputs["timestep"] = torch.full((1,), 1000 * sigma, device=device)
        told, untold = (
            model(hidden_states=x.to(dtype), encoder_hidden_states=t, **inputs)[0].float()
            for t in (text, torch.zeros_like(text))
        )
        x = x + (lower - sigma) * (untold + guidance * (told - untold))
    return x
