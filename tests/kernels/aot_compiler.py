"""Compiles every kernel that one attention call launches, for a GPU that is not there.

The program reads a JSON list of jobs from standard input and prints a JSON list of reports. It runs
in a process of its own, because Triton chooses at import between interpreter and compiler.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """One call of the public function for one target; see `compile_job`."""

    backend: str
    arch: int | str
    head_dim: int
    dtype: str
    compensation: str
    masked: bool


@dataclass(frozen=True)
class Report:
    """Resources of one compiled kernel.

    Attributes:
        job: the call that launches it.
        kernel: name of the kernel function.
        tile: its integer constants and launch options.
        shared: bytes of shared memory that a block asks for.
        registers: registers of a thread, the vector registers on AMD.
        spilled: bytes of a thread's spilled registers (NVIDIA), or registers spilled (AMD).
        seconds: time that the compilation took.
    """

    job: dict[str, Any]
    kernel: str
    tile: dict[str, int]
    shared: int
    registers: int
    spilled: int
    seconds: float


def resource_usage(kernel: Any) -> tuple[int, int]:
    """(registers, spills) that the assembler reports for a compiled kernel."""
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        count = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        }
        return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]
    import triton

    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text).group(1))  # type: ignore[union-attr]
        for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def compile_job(job: Job) -> list[Report]:
    """Compile what `sparse_attention` launches on contiguous, aligned inputs of `job`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from svg_ear_compile.kernels.clusters import Blocks
    from svg_ear_compile.kernels.gpu import attention
    from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, exact_at_ends
    from svg_ear_compile.kernels.plan import AttentionPlan

    target = GPUTarget(job.backend, job.arch, 64 if job.backend == "hip" else 32)
    # Each target is a device of its own, whose compiled kernels are kept.
    index = f"{job.backend}{job.arch}"
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: index,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    name = f"sm_{job.arch}" if job.backend == "cuda" else str(job.arch)
    attention.architecture = lambda device: name  # type: ignore[assignment]
    reports: list[Report] = []
    compile_and_launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before = len(self.device_caches[index][0])
        start = time.perf_counter()
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        seconds = time.perf_counter() - start
        if len(self.device_caches[index][0]) > before:
            tile = {k: v for k, v in options.items() if isinstance(v, int)}
            registers, spilled = resource_usage(kernel)
            reports.append(
                Report(
                    asdict(job), self.fn.__name__, tile, kernel.metadata.shared,
                    registers, spilled, seconds,
                )
            )  # fmt: skip
        return kernel

    q, k, v = (
        torch.zeros(1, 2048, 2, job.head_dim, dtype=getattr(torch, job.dtype)).transpose(1, 2)
        for _ in range(3)
    )
    kinds = exact_at_ends(q, k, 1, 1) if job.masked else ALL_CLUSTERED
    plan = AttentionPlan(compensation=job.compensation, first_iterations=1)  # type: ignore[arg-type]
    JITFunction.run = compile_only
    try:
        on_hopper = attention.HOPPER_GLUON.unsupported(q, k, v) is None
        used = attention.HOPPER_GLUON if on_hopper else attention.TRITON
        made = used.sparse_attention(q, k, v, plan, kinds=kinds, return_lse=True)
        if job.masked:  # once for each tile is enough
            # No kernel ran: the shapes are right, the values are arbitrary.
            centroids = (made.queries.centroids, made.keys.centroids)
            labels = (torch.zeros_like(x.labels) for x in (made.queries, made.keys))
            blocks = Blocks(*labels, made.block_mask)
            used.sparse_attention(
                q, k, v, plan, kinds=kinds, centroids=centroids, blocks=blocks, return_lse=True
            )
    finally:
        JITFunction.run = compile_and_launch
    return reports


if __name__ == "__main__":
    jobs = [Job(**fields) for fields in json.load(sys.stdin)]
    found = [asdict(report) for job in jobs for report in compile_job(job)]
    json.dump(found, sys.stdout)
