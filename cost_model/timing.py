"""Timing of calls as they run in a generation, and of the roofs of a device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_ear_compile.cost_model.calibration import Roofs
from svg_ear_compile.kernels.dense import dense_attention

_PATIENCE_MS = 1500.0  # for the repeats of one call; there are two of them at least
# An idle GPU has a clock up to a fifth higher than one that was busy for so long.
_BUSY_MS, _MOST_CALLS = 150.0, 150
# Short calls wait for the host, whose delays vary: they are repeated for so long.
_SAMPLED_MS, _MOST_SAMPLES = 50.0, 40


class Clock:
    """Timer of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"

    def ms(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Milliseconds of a call after a first one to warm up.

        On a GPU, the median of calls back to back on a busy device, as in a generation. On a CPU,
        the least of the repeats, because other processes only ever add time, and add much. There
        are fewer repeats where a call takes seconds.
        """
        if self.on_gpu:
            with torch.cuda.device(self.device):
                return statistics.median(busy_ms(call, repeats))
        call()
        samples: list[float] = []
        while len(samples) < repeats and (len(samples) < 2 or sum(samples) < _PATIENCE_MS):
            began = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - began))
        return min(samples)


def busy_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls back to back on the current GPU.

    The device is kept busy before. Short calls are repeated up to 40 times, very long ones twice.
    """
    seconds = _keep_busy(call)
    repeats = max(repeats, min(_MOST_SAMPLES, math.ceil(_SAMPLED_MS / 1e3 / seconds)))
    repeats = patient(repeats, seconds)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def busy_kernels_ms(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Mean device milliseconds of each kernel in a call, over `repeats` calls on a busy GPU.

    There are fewer repeats where a call takes seconds.
    """
    repeats = patient(repeats, _keep_busy(call))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1e3 / repeats for e in profile.key_averages()}


def patient(repeats: int, seconds: float) -> int:
    """Number of repeats of a call that takes so many seconds."""
    return max(2, min(repeats, math.ceil(_PATIENCE_MS / 1e3 / seconds)))


def _keep_busy(call: Callable[[], object]) -> float:
    """Repeat a call until the GPU's clock is that of a long run; returns the seconds of a call.

    The first two calls are not timed: one compiles, one captures a graph.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    for _ in range(min(_MOST_CALLS, math.ceil(_BUSY_MS / 1e3 / seconds))):
        call()
    return seconds


def fastest_dense_ms(q: Tensor, k: Tensor, v: Tensor, repeats: int = 5) -> float:
    """Milliseconds of the fastest dense attention that takes these inputs.

    Args:
        q: (B, H, N_q, D). k, v: (B, H_kv, N_k, D).
        repeats: timed calls of each backend.
    """
    clock = Clock(q.device)
    scale = q.shape[3] ** -0.5

    def default() -> object:
        return dense_attention(q, k, v, None, scale, False)

    times = [clock.ms(default, repeats)]
    if clock.on_gpu:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                if backend_takes(q, k, v):
                    times.append(clock.ms(default, repeats))
    return min(times)


def backend_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the backend that `sdpa_kernel` selects has a kernel for such inputs."""
    try:
        F.scaled_dot_product_attention(q[:, :, :16], k[:, :, :16], v[:, :, :16])
    except RuntimeError:  # "No available kernel": PyTorch has no other way to ask
        return False
    return True


def measure_roofs(device: torch.device, dtypes: Iterable[str], side: int, copied: int) -> Roofs:
    """Roofs from matrix products of `side` squared, a copy of `copied` bytes, small operators."""
    clock = Clock(device)
    rates = {}
    for name in dtypes:
        a = torch.randn(side, side, device=device).to(getattr(torch, name))
        rates[name] = 2e-9 * side**3 / clock.ms(lambda a=a: a @ a)  # type: ignore[misc]
    source = torch.zeros(copied // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2e-6 * copied / clock.ms(lambda: target.copy_(source))
    small = torch.zeros(16, device=device)

    def many() -> None:
        for _ in range(200):
            small.add_(1.0)

    return Roofs(rates, bandwidth, clock.ms(many) / 200)
