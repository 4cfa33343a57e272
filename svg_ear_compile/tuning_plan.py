"""The plan of a tuning: which layers, clusters and forms are tried, in which phases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from svg_ear_compile.capture import ModelCall
from svg_ear_compile.cost_model.budget import Choice, Schedule
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.explain import explain
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation


@dataclass(frozen=True)
class TuningSettings:
    """Choices that a tuning tries in each layer, and the schedule of the budget.

    Attributes:
        densities: densities to try in each layer, each in (0, 1). Dense is always a choice.
        cluster_sizes: pairs of mean queries and mean keys per cluster to try; None is the default.
        forms: compensation forms to try.
        phases: number of parts into which the timesteps of the calls are cut. The budget has one
            choice for each layer and phase.
        dense_steps: number of leading denoising steps that stay dense.
        dense_from: timestep from which the last steps stay dense; None for no such steps.
        thresholds: whether sparse layers are routed by a threshold instead of a density, see
            `AllocationProblem.thresholds`.
        timestep, ascending: see `bind`.
        compiler: ``"inductor"``, or ``"eager"`` for a quick look, in which times mean little.

    Raises:
        ValueError: a field is out of its range; the message names the field.
    """

    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    cluster_sizes: tuple[tuple[int, int] | None, ...] = (None,)
    forms: tuple[Compensation, ...] = (AttentionPlan.compensation,)
    phases: int = 1
    dense_steps: int = 0
    dense_from: float | None = None
    thresholds: bool = False
    timestep: str | None = None
    ascending: bool = False
    compiler: Literal["inductor", "eager"] = "inductor"

    def __post_init__(self) -> None:
        if not self.densities or not all(0.0 < d < 1.0 for d in self.densities):
            raise ValueError(f"densities must be in (0, 1), got {self.densities!r}")
        if self.phases < 1 or self.dense_steps < 0:
            raise ValueError("phases must be at least 1 and dense_steps not negative")
        if not self.cluster_sizes or not self.forms:
            raise ValueError("cluster_sizes and forms must not be empty")
        for form in self.forms:
            AttentionPlan(compensation=form)  # raises for unknown forms


@dataclass(frozen=True)
class Cost:
    """Expected cost of a tuning.

    Attributes:
        forwards: number of forwards with one sparse layer, on all ranks together.
        finished: number of forwards that an earlier run has measured.
        seconds: expected seconds of these forwards on this number of `ranks`.
        ranks: number of processes that divide the work.
        settling: expected seconds after that, on the first rank alone: whole budgets are run and
            compared. At most so many: the search for an objective may end early.
    """

    forwards: int
    finished: int
    seconds: float
    ranks: int
    settling: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One measurement: one layer sparse, with one choice, in one call."""

    layer: str
    choice: Choice
    call: int

    @property
    def key(self) -> str:
        """Its key in a checkpoint, of which no two trials share one."""
        choice = self.choice
        clusters = f"{choice.q_clusters}/{choice.k_clusters}"
        density = float(choice.density)  # in full: densities may differ in any digit
        return f"{self.layer} {density!r} {clusters} {choice.compensation} {self.call}"


def sites_of(model: nn.Module, call: ModelCall) -> tuple[tuple[str, AttentionShape], ...]:
    """Layer and shape of every attention call that could be sparse."""
    options = {"density": 0.5, "min_tokens": 1}
    found = explain(model, *call.args, options=options, **call.kwargs)
    sites = []
    for site in found.sites:
        if site.plan is not None:
            batch, heads, q_tokens, k_tokens, dim = (size or 0 for size in site.shape)
            kv_heads, exact = site.kv_heads or heads, [count or 0 for count in site.exact]
            shape = AttentionShape(
                batch, heads, kv_heads, q_tokens, k_tokens, dim, site.dtype, exact[1], exact[0]
            )
            sites.append((site.layer, shape))
    if not sites:
        raise ValueError("no attention of the model could be sparse; `explain` says why")
    return tuple(sites)


def kinds_of(shape: AttentionShape, settings: TuningSettings) -> tuple[Choice, ...]:
    """Cluster counts and forms to try, as choices of density 0."""
    video, kinds = shape.k_tokens - shape.text, []
    for sizes in settings.cluster_sizes:
        queries, keys = (None, None) if sizes is None else (math.ceil(video / s) for s in sizes)
        kinds += [Choice(0.0, queries, keys, form) for form in settings.forms]
    return tuple(kinds)


def schedule_of(timesteps: Sequence[float], settings: TuningSettings) -> Schedule:
    """A schedule whose phases have equal numbers of the timesteps of the calls.

    Raises:
        ValueError: there are fewer timesteps than phases.
    """
    ordered = sorted(set(timesteps), reverse=not settings.ascending)
    if len(ordered) < settings.phases:
        raise ValueError(
            f"{settings.phases} phases need calls at as many timesteps; there are {len(ordered)}"
        )
    cuts = [round(i * len(ordered) / settings.phases) for i in range(1, settings.phases)]
    starts = tuple((ordered[cut - 1] + ordered[cut]) / 2 for cut in cuts)
    return Schedule(settings.dense_steps, starts, settings.dense_from, settings.ascending)
