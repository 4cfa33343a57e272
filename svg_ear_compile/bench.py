"""`svg-ear bench`: dense against sparse attention on this device, at the shape of a model.

The short form of the attention benchmark of the repository: synthetic tensors, warm clusters, no
stages, and one line for each density. Errors of synthetic tensors say little of a model's pictures:
`svg-ear compare` shows those.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.synthetic import video_like
from svg_ear_compile.cost_model.timing import busy_ms, fastest_dense_ms
from svg_ear_compile.digits import three_digits
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import captured_attention


@dataclass(frozen=True)
class Shape:
    """One attention call of a model.

    Attributes:
        batch, heads, head_dim: as in q (B, H, N, D).
        video, text: tokens; text comes last and stays exact.
    """

    batch: int
    heads: int
    video: int
    text: int
    head_dim: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(B, H, N, D)."""
        return self.batch, self.heads, self.video + self.text, self.head_dim


SHAPES = {
    "wan14b-720p": Shape(1, 40, 75600, 0, 128),
    "hunyuan-720p": Shape(1, 24, 118800, 256, 128),
    "wan1.3b-480p": Shape(1, 12, 32760, 0, 128),
    "cogvideox-5b": Shape(2, 48, 17550, 226, 64),
    "minimax-h3": Shape(1, 56, 73416, 0, 128),
    # Seconds on a CPU, where none of the others ends within a minute.
    "short": Shape(1, 2, 4096, 0, 64),
}
"""Self-attention of published models at their published resolutions, and one of none."""

_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """One density.

    Attributes:
        density: asked for.
        reached: fraction of the query-key area of video tokens that was computed exactly.
        dense_ms: of the fastest dense attention on this device.
        sparse_ms: of a warm call, clustering and all.
        error: relative RMS of the output against dense, on synthetic tensors.
    """

    density: float
    reached: float
    dense_ms: float
    sparse_ms: float
    error: float

    @property
    def speedup(self) -> float:
        """Dense time over sparse time."""
        return self.dense_ms / self.sparse_ms


def bench(
    shape: str | Shape, densities: Sequence[float], device: torch.device | str
) -> Iterator[Timing]:
    """Time dense attention once and then sparse attention at every density, one by one.

    Args:
        shape: a name of `SHAPES`, or sizes.
        densities: in (0, 1).
        device: CUDA, in bfloat16, or a CPU, in float32.

    Raises:
        ValueError: an unknown shape, a density out of range or a device without kernels.
        RuntimeError: a sparse output is not finite: no time is given for a wrong result.
    """
    describe(device)  # raises for a device that is not here
    device = torch.device(device)
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    for density in densities:
        if not 0 < density < 1:
            raise ValueError(f"a density must lie between 0 and 1, got {density!r}")
    return _timings(shape, densities, device)


@torch.no_grad()
def _timings(shape: Shape, densities: Sequence[float], device: torch.device) -> Iterator[Timing]:
    batch, heads, tokens, dim = shape.size
    made = video_like(heads, tokens, dim, device, _DTYPES[device.type])
    # The same tokens in every sample of a batch: times do not depend on it.
    q, k, v = (t.expand(batch, -1, -1, -1) if batch > 1 else t for t in made)
    dense_ms = fastest_dense_ms(q, k, v, _REPEATS)
    dense = F.scaled_dot_product_attention(q, k, v)
    run = captured_attention(device)
    for density in densities:
        plan = AttentionPlan(density=density)
        kinds = exact_at_ends(q, k, 0, shape.text)
        cold = run(q, k, v, plan, kinds=kinds)
        centroids = (cold.queries.centroids, cold.keys.centroids)
        call = functools.partial(run, q, k, v, plan, kinds=kinds, centroids=centroids)
        found = call()
        if not found.out.isfinite().all():
            raise RuntimeError(f"the sparse output at density {density:g} is not finite")
        reached = float(found.exact_pairs) / (batch * heads * shape.video**2)
        error = _relative_rms(found.out, dense)
        yield Timing(density, reached, dense_ms, _ms(call, device), error)


def _relative_rms(out: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over that of `wanted`, head by head: float copies of all are large."""
    pairs = [
        (float((a.float() - b.float()).square().sum()), float(b.float().square().sum()))
        for a, b in zip(out.flatten(0, 1), wanted.flatten(0, 1), strict=True)
    ]
    return float((sum(p[0] for p in pairs) / sum(p[1] for p in pairs)) ** 0.5)


def _ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return statistics.median(busy_ms(call, _REPEATS))
    samples = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - began))
    return min(samples)  # as `fastest_dense_ms` on a CPU: whatever else runs only ever adds


def add(commands: Any) -> None:
    """Add the command to the sub-parsers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = "wan1.3b-480p" if device == "cuda" else "short"
    about = "time dense against sparse attention on this device, at the shape of a model"
    command = commands.add_parser("bench", help=about, description=about)
    command.add_argument("--shape", default=shape, help=f"{', '.join(SHAPES)} (default: {shape})")
    command.add_argument("--densities", default="0.05,0.1,0.2,0.3", help="default: %(default)s")
    command.add_argument("--device", default=device, help=f"default: {device}")
    command.set_defaults(run=_bench)


def _bench(given: argparse.Namespace) -> None:
    try:
        densities = [float(part) for part in given.densities.split(",")]
    except ValueError:
        raise ValueError(
            f"--densities must be numbers such as 0.1,0.2, got {given.densities!r}"
        ) from None
    console = Console()
    timings = bench(given.shape, densities, given.device)
    with console.status(f"timing {given.shape}"):
        found = list(timings)
    batch, heads, tokens, dim = SHAPES[given.shape].size
    table = Table(
        title=f"{given.shape}: {batch} × {heads} heads of {dim}, {tokens:,} tokens",
        caption=f"{describe(given.device).name}; synthetic tensors: not the error of a video",
    )
    for heading in ("density", "reached", "dense ms", "sparse ms", "speed-up", "error"):
        table.add_column(heading, justify="right")
    for timing in found:
        table.add_row(
            f"{timing.density:g}",
            f"{timing.reached:.3f}",
            three_digits(timing.dense_ms),
            three_digits(timing.sparse_ms),
            f"{timing.speedup:.2f} ×",
            f"{timing.error:.3f}",
        )
    console.print(table)
