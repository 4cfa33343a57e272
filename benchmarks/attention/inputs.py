"""Tensors that are attended to: synthetic ones of any size, or captured from the video DiT."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.attention.data import video_like
from benchmarks.tuning.captured import capture
from benchmarks.video_dit.data import TRAIN_SHAPE
from svg_ear_compile import bench
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.plan import AttentionPlan

# name: (B, H, video tokens, text tokens, D)
MODEL_SHAPES = {
    name: (shape.batch, shape.heads, shape.video, shape.text, shape.head_dim)
    for name, shape in bench.SHAPES.items()
    if name != "short"
}
# The longest with few heads: dense attention alone would take minutes.
SWEEP = {
    f"sweep-{n // 1000}k": (1, 4 if n == 300000 else 24, n, 0, 128)
    for n in (8192, 10240, 16384, 65536, 131072, 300000)
}
NARROW = {f"narrow-{n // 1000}k": (1, 24, n, 0, 64) for n in (8192, 32768, 75600)}
"""Heads of 64 channels: no model of `MODEL_SHAPES` has long videos of them."""
SHAPES = MODEL_SHAPES | SWEEP | NARROW
CAPTURED = "video-dit"
"""One layer of the video DiT half way through a generation: 6,912 tokens of real structure."""

PAPERS_CLUSTERS = "300/1000"
"""Query and key clusters of the paper for Wan 14B at 720p."""

_STEPS, _STEP, _LAYER = 24, 10, 4


@dataclass(frozen=True)
class Inputs:
    """Tensors of one attention call: q, k, v (B, H, N, D), text tokens last.

    Attributes:
        name: of the shape.
        text: text tokens at the end.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    text: int = 0

    @property
    def flop(self) -> float:
        """FLOPs of dense attention."""
        batch, heads, tokens, dim = self.q.shape
        return 4.0 * batch * heads * tokens**2 * dim

    @property
    def held_bytes(self) -> int:
        """Bytes of Q, K, V and the output."""
        return 4 * self.q.numel() * self.q.element_size()


def inputs_of(name: str, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs of a shape of `SHAPES`, or `CAPTURED`."""
    if name == CAPTURED:
        calls = list(capture(TRAIN_SHAPE, _STEPS, [_STEP], 0, device))
        call = calls[_LAYER]
        return Inputs(name, *(t.to(dtype) for t in (call.q, call.k, call.v)))
    batch, heads, tokens, text, dim = SHAPES[name]
    q, k, v = video_like(batch, heads, tokens, dim, text=text, device=device, dtype=dtype)
    return Inputs(name, q, k, v, text)


def plan_of(clusters: str, form: str, density: float) -> AttentionPlan:
    """The plan of a row.

    Args:
        clusters: ``"default"``, or counts such as `PAPERS_CLUSTERS`, which are warmed in two
            rounds, as the paper does.
        form: of the compensation, and with ``"/euclidean"`` after it the metric of the clusters.
        density: see `AttentionPlan`.
    """
    # The plan itself checks the names, whatever their types say.
    compensation, _, metric = form.partition("/")
    found = AttentionPlan(
        density=density,
        compensation=compensation,  # type: ignore[arg-type]
        cluster_metric=metric or AttentionPlan.cluster_metric,  # type: ignore[arg-type]
    )
    if clusters == "default":
        return found
    q_clusters, k_clusters = map(int, clusters.split("/"))
    rounds = 2 if clusters == PAPERS_CLUSTERS else found.warm_iterations
    return replace(found, q_clusters=q_clusters, k_clusters=k_clusters, warm_iterations=rounds)


def exact_pairs(result: Result, inputs: Inputs) -> float:
    """Query-key pairs that are computed exactly, text's among them."""
    batch, heads, tokens, _ = inputs.q.shape
    video = tokens - inputs.text
    return float(result.exact_pairs) + batch * heads * inputs.text * (2 * video + inputs.text)
