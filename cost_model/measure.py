"""Measurement of one device: roofs, one attention call as a whole and by stage.

On a GPU a profiler of its kernels gives the times of the stages; on a CPU the whole sparse call is
one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from svg_ear_compile.cost_model.calibration import Roofs, Sample
from svg_ear_compile.cost_model.stages import STAGES
from svg_ear_compile.cost_model.synthetic import video_like
from svg_ear_compile.cost_model.timing import (
    Clock,
    busy_kernels_ms,
    fastest_dense_ms,
    measure_roofs,
)
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import captured_attention, sparse_attention

QKV = tuple[Tensor, Tensor, Tensor]

# Stage of each kernel; all other kernels belong to clustering.
STAGE_OF_KERNEL = {
    "score_kernel": "score",
    "route_kernel": "route",
    "kv_offset_kernel": "route",
    "kv_indices_kernel": "route",
    "attend_kernel": "attend",
    "attend_wgmma_kernel": "attend",
    "query_tile_kernel": "attend",
    "covariance_kernel": "correction",
    "pooled_kernel": "correction",
    "logit_correction_kernel": "correction",
    "finish_kernel": "correction",
}


def stages_ms(clock: Clock, call: Callable[[], object], plan: AttentionPlan) -> dict[str, float]:
    """Milliseconds of a sparse call on a GPU by `STAGES`."""
    # Kernels that this call does not run are not expected in its profile.
    known = {
        kernel: stage
        for kernel, stage in STAGE_OF_KERNEL.items()
        if stage != "correction" or plan.compensation == "gaussian"
    }
    with torch.cuda.device(clock.device):
        return by_stage(busy_kernels_ms(call, 5), known)


def by_stage(spent: dict[str, float], stage_of: dict[str, str]) -> dict[str, float]:
    """Milliseconds by stage, summed over kernels; kernels without a stage count as clustering.

    Args:
        spent: milliseconds by kernel.
        stage_of: stage by kernel.

    Raises:
        RuntimeError: no kernel of a stage was seen, because kernels were renamed.
    """
    missing = set(stage_of.values()) - {stage_of[name] for name in spent if name in stage_of}
    if missing:
        raise RuntimeError(
            f"the profiler saw no kernel of the stages {', '.join(sorted(missing))}: "
            "STAGE_OF_KERNEL does not have the names of the kernels that run"
        )
    found = dict.fromkeys(STAGES["cuda"], 0.0)
    for name, ms in spent.items():
        found[stage_of.get(name, "cluster")] += ms
    return found


def measure(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dense: float, *, text: int = 0,
    fitted: bool = False,
) -> Sample:  # fmt: skip
    """Time one sparse call with warm centroids, as a whole and by stage.

    Args:
        q, k, v: (B, H, N, D), all of one shape.
        plan: plan that is not dense.
        dense: milliseconds of dense attention on q, k and v, see `fastest_dense_ms`.
        text: number of text tokens at the end.
        fitted: whether coefficients will be fitted to the sample.
    """
    clock = Clock(q.device)
    batch, heads, tokens, head_dim = q.shape
    captured = captured_attention(q.device)
    kinds = exact_at_ends(q, k, 0, text)
    cold = captured(q, k, v, plan, kinds=kinds)
    warm = (cold.queries.centroids, cold.keys.centroids)

    def call() -> object:
        return captured(q, k, v, plan, kinds=kinds, centroids=warm)

    op_ms = clock.ms(call)
    stages = stages_ms(clock, call, plan) if clock.on_gpu else {"sparse": op_ms}
    q_clusters, k_clusters = plan.clusters(tokens - text, tokens - text)
    return Sample(
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=str(q.dtype).removeprefix("torch."),
        density=plan.density,
        compensation=plan.compensation,
        q_clusters=q_clusters,
        k_clusters=k_clusters,
        dense_ms=dense,
        op_ms=op_ms,
        stages_ms=stages,
        fitted=fitted,
        batch=batch,
        text=text,
    )


class DeviceUnderTest:
    """The measurements of a calibration on a device of this machine.

    Args:
        device: CUDA or CPU.
        heads: heads of every call.
        roof_side: rows of the square matrices whose product gives the roof of operations.
        copied: bytes of the copy that gives the roof of memory.
    """

    def __init__(self, device: torch.device, heads: int, roof_side: int, copied: int) -> None:
        self.device = device
        self._heads, self._roof_side, self._copied = heads, roof_side, copied
        # Tensors and time of dense attention of the case before, which often has the same length.
        self._before: tuple[tuple[str, int, int], QKV, float] | None = None

    def compile(self, dtype: str, head_dim: int, plans: Iterable[AttentionPlan]) -> None:
        """Compile the kernels of some plans by small calls.

        The route kernel is compiled again later, for larger numbers of clusters.
        """
        if self.device.type == "cuda":
            for plan in plans:
                sparse_attention(*self._small(dtype, head_dim), plan)
            torch.cuda.synchronize(self.device)

    def roofs(self, dtypes: Iterable[str]) -> Roofs:
        """The roofs; see `measure_roofs`."""
        return measure_roofs(self.device, dtypes, self._roof_side, self._copied)

    def host_ms(self, dtype: str, head_dim: int) -> float:
        """Milliseconds of a warm call so small that the host takes all of the time; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        tensors = self._small(dtype, head_dim)
        call, plan = captured_attention(self.device), AttentionPlan(density=0.5)
        cold = call(*tensors, plan)
        warm = (cold.queries.centroids, cold.keys.centroids)
        return Clock(self.device).ms(lambda: call(*tensors, plan, centroids=warm), 7)

    def sample(
        self, dtype: str, head_dim: int, tokens: int, plan: AttentionPlan, fitted: bool
    ) -> Sample:
        """Time one sparse call, and dense attention of its shape; see `measure`."""
        key = (dtype, head_dim, tokens)
        if self._before is None or self._before[0] != key:
            self._before = None  # frees the tensors before others are made
            made = video_like(self._heads, tokens, head_dim, self.device, getattr(torch, dtype))
            self._before = key, made, fastest_dense_ms(*made)
        _, tensors, dense = self._before
        return measure(*tensors, plan, dense, fitted=fitted)

    def _small(self, dtype: str, head_dim: int) -> QKV:
        return video_like(1, 256, head_dim, self.device, getattr(torch, dtype))
