"""A budget: what every layer may spend at every phase of the denoising, and how that was found.

Written and read as JSON with the schema `schema()`. A budget belongs to one model and one number of
tokens; `Budget.fits` says whether it can be used for another.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.kernels.checked import (
    Count,
    Fraction,
    InvalidValueError,
    NotNegative,
    Range,
    Size,
    printable,
    shown,
)
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

VERSION = 2

Timestep = Annotated[float, Range(-1e9, 1e9)]

SCALED_WITHIN = 2.0
"""A budget is scaled to token counts up to this factor away from its own: cluster counts grow in
proportion, densities stay. Further away its errors and times say nothing."""


@dataclass(frozen=True)
class Choice:
    """What one layer does in one phase.

    Attributes:
        density: fraction of the area computed exactly; 1 is dense.
        q_clusters, k_clusters: cluster counts at the budget's token count, None for the default.
        compensation: form of the blocks that are skipped.
        threshold: smallest `rho` computed exactly; where given, it routes instead of the density.
    """

    density: Fraction
    q_clusters: Size | None = None
    k_clusters: Size | None = None
    compensation: Compensation = AttentionPlan.compensation
    threshold: NotNegative | None = None

    def plan(self, base: AttentionPlan) -> AttentionPlan:
        """`base` (iterations, seed, score) with this choice in it."""
        if self.density >= 1.0:
            return replace(base, density=self.density)
        routed: dict[str, Any] = {"routing": "density"}
        if self.threshold is not None:
            routed = {"routing": "threshold", "threshold": self.threshold}
        return replace(
            base,
            density=self.density,
            q_clusters=self.q_clusters,
            k_clusters=self.k_clusters,
            compensation=self.compensation,
            **routed,
        )


DENSE = Choice(1.0)


@dataclass(frozen=True)
class Schedule:
    """Which phase a denoising step belongs to.

    Timesteps are those that the model gets. They fall from noise to video, or rise where
    `ascending`.

    Attributes:
        dense_steps: leading steps of a generation that stay dense.
        phase_starts: timestep from which each phase but the first counts, from noise to video.
        dense_from: timestep from which the last steps stay dense again, None for never.
        ascending: the timestep rises from noise to video.
    """

    dense_steps: Count = 0
    phase_starts: tuple[Timestep, ...] = ()
    dense_from: Timestep | None = None
    ascending: bool = False

    def phase(self, timestep: float) -> int | None:
        """Index of the phase, None where the last steps are dense."""
        sign = 1.0 if self.ascending else -1.0
        if self.dense_from is not None and sign * timestep >= sign * self.dense_from:
            return None
        return bisect_right([sign * start for start in self.phase_starts], sign * timestep)

    @property
    def phases(self) -> int:
        """Number of phases."""
        return len(self.phase_starts) + 1


@dataclass(frozen=True)
class Performance:
    """Error, time and density of a budget, predicted or measured; None for unknown values.

    Attributes:
        error: largest relative RMS error of the model's output in one forward.
        ms: milliseconds of one sparse forward of the whole model.
        speedup: speed-up of that forward over a forward compiled by Inductor.
        density: mean fraction of the attention area computed exactly.
    """

    error: NotNegative | None = None
    ms: NotNegative | None = None
    speedup: NotNegative | None = None
    density: Fraction | None = None


@dataclass(frozen=True)
class Point:
    """A budget that was not chosen: milliseconds of a forward and predicted error."""

    ms: NotNegative
    error: NotNegative


@dataclass(frozen=True)
class Fingerprint:
    """Which model a budget is for.

    Attributes:
        model: class name.
        config: digest of its configuration, "" where it has none.
        parameters: digest of the names and shapes of its parameters.
    """

    model: str
    config: str
    parameters: str


def fingerprint(
    model: str, config: Mapping[str, Any] | None, shapes: Mapping[str, Sequence[int]]
) -> Fingerprint:
    """Fingerprint of plain facts: class name, configuration, parameter shapes by name."""

    def digest(data: object) -> str:
        text = json.dumps(data, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return Fingerprint(
        model,
        "" if config is None else digest(dict(config)),
        digest({name: list(shape) for name, shape in shapes.items()}),
    )


@dataclass(frozen=True)
class Budget:
    """See the module.

    Attributes:
        version: of this format.
        fingerprint: the model.
        tokens: tokens of its attention, text included.
        device: what its times hold for.
        objective: objective of the tuning, e.g. ``"target_speedup 2"``.
        outcome: ``"tuned"``, or ``"uniform"`` where tuning was not better than one density for
            all, with the reason in `note`.
        schedule: see `Schedule`.
        layers: layer path to one choice for each phase of the schedule.
        predicted, measured: see `Performance`.
        uniform: measured performance of one density for all layers at the same time.
        frontier: other budgets on the way from dense to sparse.
        note: anything that a reader should know.
    """

    version: Count
    fingerprint: Fingerprint
    tokens: Size
    device: Device
    objective: str
    outcome: Literal["tuned", "uniform"]
    schedule: Schedule
    layers: dict[str, tuple[Choice, ...]]
    predicted: Performance = Performance()
    measured: Performance = Performance()
    uniform: Performance = Performance()
    frontier: tuple[Point, ...] = field(default=(), repr=False)
    note: str = ""

    def choice(self, layer: str, timestep: float) -> Choice | None:
        """What a layer does at a timestep; None for a layer that the budget does not know."""
        choices = self.layers.get(layer)
        if choices is None:
            return None
        phase = self.schedule.phase(timestep)
        return DENSE if phase is None else choices[phase]

    def densest(self, layer: str) -> Choice | None:
        """The densest choice that is not dense: for a call that cannot know its phase.

        None for a layer that the budget does not know; dense where it is dense in every phase.
        """
        choices = self.layers.get(layer)
        if choices is None:
            return None
        sparse = [c for c in choices if c.density < 1.0]
        return max(sparse, key=lambda c: c.density, default=DENSE)

    def scaled(self, tokens: int) -> Budget:
        """The budget for another number of tokens: cluster counts in proportion.

        Raises:
            ValueError: `tokens` is further than `SCALED_WITHIN` from the budget's own.
        """
        if tokens == self.tokens:
            return self
        factor = tokens / self.tokens
        if not 1 / SCALED_WITHIN <= factor <= SCALED_WITHIN:
            raise InvalidValueError(
                f"the budget was made for {self.tokens:,} tokens and is good from "
                f"{math.ceil(self.tokens / SCALED_WITHIN):,} to "
                f"{math.floor(self.tokens * SCALED_WITHIN):,}, not for {tokens:,}"
            )

        def count(clusters: int | None) -> int | None:
            return None if clusters is None else max(1, round(clusters * factor))

        return replace(
            self,
            tokens=tokens,
            layers={
                path: tuple(
                    replace(c, q_clusters=count(c.q_clusters), k_clusters=count(c.k_clusters))
                    for c in choices
                )
                for path, choices in self.layers.items()
            },
        )

    def check_model(self, other: Fingerprint) -> None:
        """Raise a ValueError that says in what another model differs from the budget's."""
        mine = self.fingerprint
        if mine.model != other.model:
            raise InvalidValueError(
                printable(f"the budget is for {mine.model}, not for {other.model}")
            )
        for name in ("parameters", "config"):
            if getattr(mine, name) != getattr(other, name):
                what = {"parameters": "parameters of other shapes", "config": "another config"}
                raise InvalidValueError(f"the budget is for a {mine.model} with {what[name]}")


def check(budget: Budget) -> Budget:
    """The budget itself if its fields are in their ranges and fit together.

    Raises:
        ValueError: the format is another one, a field is of the wrong type or out of its range, or
            a layer has not one choice for each phase; the message says which.
    """
    _check_version(budget.version)
    json_record.check(budget)
    schedule = budget.schedule
    starts = schedule.phase_starts if schedule.ascending else schedule.phase_starts[::-1]
    if list(starts) != sorted(set(starts)):
        raise InvalidValueError("schedule.phase_starts must run from noise to video")
    if not budget.layers:
        raise InvalidValueError("layers is empty")
    for path, choices in budget.layers.items():
        if len(choices) != schedule.phases:
            raise InvalidValueError(
                f"layers[{shown(path)}] has {len(choices)} choices for {schedule.phases} phases"
            )
    return budget


def _check_version(version: int) -> None:
    if version != VERSION:
        raise InvalidValueError(
            f"its format has version {shown(version)}; this package reads {VERSION}: tune it again"
        )


def schema() -> dict[str, Any]:
    """JSON Schema of a budget file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | json_record.schema(Budget)


def save(budget: Budget, path: Path) -> None:
    """Write a budget file."""
    json_record.write(path, check(budget))


def load(path: Path) -> Budget:
    """Read a budget file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is broken; the message names the file and what is wrong in it.
    """
    with json_record.naming(path):
        data = json_record.parse(json_record.read_bytes(path))
        # The version comes first: a budget of another version may have other fields.
        if isinstance(data, dict) and type(data.get("version")) is int:
            _check_version(data["version"])
        return check(json_record.decode(Budget, data))
