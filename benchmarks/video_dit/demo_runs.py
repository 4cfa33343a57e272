"""The runs of the demo: what is generated, how it is compiled, and what a run leaves behind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import svg_ear_compile
from benchmarks.video_dit.data import DEMO_SHAPE, LABELS, TRAIN_SHAPE
from benchmarks.video_dit.model import VideoDiT
from benchmarks.video_dit.sample import generate

TITLES = {"centroid": "paper's rule", "gaussian": "svg_ear"}

# pan right, drift up, zoom in, turn a little; no cut-out. Everything in the picture moves, so no
# frame is a copy of another.
CAMERA = (0.7, -0.3, 0.6, 0.35, 0.0)

# Below the backend's own limit, where dense attention is cheaper: the demo is about fidelity.
_MIN_TOKENS = 1024

# Half the backend's own cluster sizes, which suit tens of thousands of tokens and a GPU's tiles:
# a clip this short would be cut into so few blocks that each mixes several things.
_QUERIES_PER_CLUSTER, _KEYS_PER_CLUSTER = 64, 32


@dataclass(frozen=True)
class DemoSettings:
    """What is generated, and how much of its attention stays exact.

    ``shape`` is (frames, height, width); of ``steps`` denoising steps the first ``dense_steps``
    are dense in every run; ``density`` is the fraction of the attention area that the others
    compute exactly; ``compensations`` has one sparse run for each entry.
    """

    device: str
    shape: tuple[int, int, int]
    steps: int
    dense_steps: int
    density: float = 0.2
    label: int = LABELS.index("astronaut")
    seed: int = 0
    guidance: float = 2.0
    compensations: tuple[str, ...] = ("centroid", "gaussian")

    @classmethod
    def for_device(cls, device: str) -> DemoSettings:
        """A clip of 2,304 tokens on a CPU, one of 6,912 tokens with more steps on a GPU."""
        if device.startswith("cuda"):
            return cls(device, TRAIN_SHAPE, steps=24, dense_steps=5)
        return cls(device, DEMO_SHAPE, steps=16, dense_steps=4)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32


@dataclass(frozen=True)
class LayerDensity:
    """One rewritten attention: its layer, the density its last call reached, how it was told."""

    path: str
    density: float | None
    identity: str


@dataclass(frozen=True)
class Run:
    """One generation: its clip ``(T, H, W, 3)``, the seconds of each step, its rewritten layers.

    ``compensation`` is None for the dense run.
    """

    title: str
    compensation: str | None
    frames: torch.Tensor
    step_seconds: tuple[float, ...]
    layers: tuple[LayerDensity, ...] = ()

    def median_seconds(self, dense_steps: int) -> float:
        """Median over the steps that are sparse in a sparse run, without the one that compiles."""
        steady = self.step_seconds[max(dense_steps, 1) :]
        return statistics.median(steady or self.step_seconds)

    def mean_density(self) -> float | None:
        """Mean over the layers that reached one, None for a dense run."""
        reached = [layer.density for layer in self.layers if layer.density is not None]
        return sum(reached) / len(reached) if reached else None


def sparse_options(settings: DemoSettings, patch: int, compensation: str) -> dict[str, Any]:
    """The backend's options for one sparse run of a model with patches of ``patch`` pixels."""
    frames, height, width = settings.shape
    tokens = frames * (height // patch) * (width // patch)
    options = {
        "density": settings.density,
        "min_tokens": _MIN_TOKENS,
        "q_clusters": math.ceil(tokens / _QUERIES_PER_CLUSTER),
        "k_clusters": math.ceil(tokens / _KEYS_PER_CLUSTER),
        "compensation": compensation,
    }
    if compensation == "centroid":
        # The paper's rule with the paper's clusters, every branch's and step's own.
        options |= {"cluster_metric": "euclidean", "warm_iterations": 2}
        # Its first rounds look at all tokens: twelve on a third of them are as many as four on all.
        options |= {"first_iterations": 13}
        options |= {"max_drift": 0.0, "shared_branches": False}
    return options


def explain_rewrite(settings: DemoSettings, model: VideoDiT) -> str:
    """The table of every attention in ``model`` and what the backend plans for it."""
    device = settings.device
    explanation = svg_ear_compile.explain(
        model,
        torch.zeros(1, 3, *settings.shape, device=device),
        torch.full((1,), 500.0, device=device),
        torch.tensor([settings.label], device=device),
        torch.tensor([CAMERA], device=device),
        options=sparse_options(settings, model.config.patch, settings.compensations[-1]),
    )
    return str(explanation)


def generate_run(
    settings: DemoSettings,
    model: VideoDiT,
    compensation: str | None,
    on_step: Callable[[int, float], None],
) -> Run:
    """Compile ``model`` and generate the clip: dense if ``compensation`` is None.

    Raises:
        RuntimeError: the clip has values that are not finite.
    """
    # Every run traces and compiles; Inductor's caches on disk still spare later runs a part.
    torch.compiler.reset()
    session = None
    if compensation is None:
        title = "dense"
        compiled = torch.compile(model, backend="inductor")
    else:
        title = TITLES[compensation]
        options = sparse_options(settings, model.config.patch, compensation)
        compiled = torch.compile(model, backend="svg_ear", options=options)
        session = svg_ear_compile.bind(compiled, dense_steps=settings.dense_steps)

    seconds: list[float] = []

    def keep_time(step: int, duration: float) -> None:
        seconds.append(duration)
        on_step(step, duration)

    frames = generate(
        compiled,
        label=settings.label,
        camera=CAMERA,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        shape=settings.shape,
        device=settings.device,
        dtype=settings.dtype,
        on_step=keep_time,
    )
    if not frames.isfinite().all():
        raise RuntimeError(f"the clip of the run {title!r} is not finite")
    layers = (
        ()
        if session is None
        else tuple(
            LayerDensity(layer.path, layer.density, layer.identity) for layer in session.report()
        )
    )
    return Run(title, compensation, frames, tuple(seconds), layers)
