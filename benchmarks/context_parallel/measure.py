"""One forward on every process of a group: seconds, communication, memory, error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import svg_ear_compile
from benchmarks.context_parallel.layouts import Layout
from benchmarks.context_parallel.models import SIZES, divide
from benchmarks.end_to_end.measure import seconds_of
from benchmarks.end_to_end.models import TINY, TINY_OPTIONS, Size


@dataclass(frozen=True)
class Task:
    """What a group measures.

    Attributes:
        model: name in `SIZES`; ignored where `tiny`.
        layers: of the model.
        layout: degrees of the group.
        densities: 1 is dense attention compiled by Inductor.
        repeats: forwards that are timed.
        tiny: processes on CPUs in place of GPUs.
    """

    model: str
    layers: int
    layout: Layout
    densities: tuple[float, ...]
    repeats: int
    tiny: bool

    @property
    def size(self) -> Size:
        return (TINY if self.tiny else SIZES[self.model]).with_layers((self.layers,))


def run(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Start a process for each GPU of the layout and measure every density.

    One GPU leaves its outputs in the folder; the groups that are run later are compared with them.

    Returns:
        A row for each density.
    """
    rows = folder / "rows.json"
    (folder / "store").unlink(missing_ok=True)
    mp.spawn(_worker, (task, str(folder)), nprocs=task.layout.gpus)
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    rows.unlink()
    return found


def _worker(rank: int, task: Task, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task.layout.gpus),
        NCCL_NVLS_ENABLE="0",  # NVLink multicast stays off
    )  # fmt: skip
    device = "cpu" if task.tiny else "cuda"
    if task.tiny:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if task.tiny else "nccl", f"file://{folder}/store", rank=rank,
        world_size=task.layout.gpus,
    )  # fmt: skip
    rows = [_measure(task, density, device, Path(folder)) for density in task.densities]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def _measure(task: Task, density: float, device: str, folder: Path) -> dict[str, Any]:
    torch.compiler.reset()
    dtype = torch.float32 if task.tiny else torch.bfloat16
    model = task.size.build(device, dtype)
    divide(model, task.layout, on_gpu=device == "cuda")
    timesteps = iter(range(1000, 0, -1))

    def inputs() -> dict[str, Any]:
        return task.size.inputs(device, dtype, float(next(timesteps)))

    model(**inputs())  # diffusers' hooks log once, which would break the first graph
    if density < 1:
        options = {"density": density, "max_drift": 0.0, **(TINY_OPTIONS if task.tiny else {})}
        compiled = torch.compile(model, backend="svg_ear", options=options)
        session = svg_ear_compile.bind(compiled)
    else:
        compiled, session = torch.compile(model, backend="inductor"), None

    def forward() -> Tensor:
        found: Tensor = compiled(**inputs())[0]
        return found

    first = _slowest(seconds_of(forward, device), device)
    forward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(task.repeats):
        dist.barrier()
        samples.append(_slowest(seconds_of(forward, device), device))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    out = forward().float().cpu()
    return {
        "gpus": task.layout.gpus,
        "ring": task.layout.ring,
        "ulysses": task.layout.ulysses,
        "density": density,
        "first_seconds": first,
        "samples_seconds": samples,
        "communication": _communication(forward, device),
        "peak_bytes": int(_slowest(float(peak), device)),
        "sparse_layers": sum(r.density is not None for r in session.report()) if session else 0,
        "finite": bool(out.isfinite().all()),
        **_errors(out, task, density, folder),
    }


def _slowest(value: float, device: str) -> float:
    """The largest of all processes' values."""
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def _communication(forward: Callable[[], Tensor], device: str) -> float:
    """Fraction of one forward of this process in communication, waiting for others included."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    dist.barrier()
    with profile(activities=activities) as profiled:
        seconds = seconds_of(forward, device)
    spent = 0.0
    for event in profiled.events() or []:
        if on_gpu and event.name.startswith(("ncclDevKernel", "ncclKernel")):
            spent += event.self_device_time_total
        if not on_gpu and event.name.startswith("gloo:"):
            spent += event.cpu_time_total
    return spent * 1e-6 / seconds


def outputs_of_one_gpu(folder: Path, densities: Sequence[float]) -> bool:
    """True if one GPU has left an output in the folder for each of the densities."""
    return all(_kept(folder, density).exists() for density in densities)


def _kept(folder: Path, density: float) -> Path:
    return folder / f"one-{density:g}.pt"


def _errors(out: Tensor, task: Task, density: float, folder: Path) -> dict[str, float]:
    """Relative L2 distances from one GPU: at the same density, and dense."""
    if task.layout.gpus == 1:
        torch.save(out, _kept(folder, density))
    same, dense = (torch.load(_kept(folder, d), weights_only=True) for d in (density, 1.0))
    return {
        "error": float((out - same).norm() / same.norm()),
        "error_to_dense": float((out - dense).norm() / dense.norm()),
    }
