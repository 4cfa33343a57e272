"""Budget: density, clusters and compensation of each layer in each phase of the denoising.

A budget is written and read as JSON, see `schema`. It belongs to one model and to one number of
tokens: `Budget.check_model` refuses another model, `Budget.scaled` adapts it to other lengths.
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

_RENAMED_IN_2 = {"wish": "objective", "verdict": "outcome"}

Timestep = Annotated[float, Range(-1e9, 1e9)]

SCALED_WITHIN = 2.0
"""Largest factor between a budget's number of tokens and one that it is scaled to. Further away its
measured errors and times say nothing."""


@dataclass(frozen=True)
class Choice:
    """How one layer attends in one phase.

    Attributes:
        density: fraction of the query-key area computed exactly; 1 is dense.
        q_clusters, k_clusters: cluster counts at the budget's number of tokens, None for the
            default.
        compensation: compensation of the skipped blocks.
        threshold: routing threshold: blocks whose score `rho` reaches it are computed exactly. None
            routes by density.
    """

    density: Fraction
    q_clusters: Size | None = None
    k_clusters: Size | None = None
    compensation: Compensation = AttentionPlan.compensation
    threshold: NotNegative | None = None

    def plan(self, base: AttentionPlan) -> AttentionPlan:
        """`base` with the density, clusters, compensation and routing of this choice."""
        if self.density >= 1.0:
            return replace(base, density=self.density, is_tuned=True)
        routed: dict[str, Any] = {"routing": "density"}
        if self.threshold is not None:
            routed = {"routing": "threshold", "threshold": self.threshold}
        return replace(
            base,
            density=self.density,
            q_clusters=self.q_clusters,
            k_clusters=self.k_clusters,
            compensation=self.compensation,
            is_tuned=True,
            **routed,
        )


DENSE = Choice(1.0)


@dataclass(frozen=True)
class Schedule:
    """Assignment of denoising steps to phases, by the timestep that the model gets.

    Attributes:
        dense_steps: leading dense steps of a generation (warm-up).
        phase_starts: first timestep of each phase but the first, ordered from noise to video.
        dense_from: timestep from which the last steps are dense, None for no such steps.
        ascending: True if timesteps rise from noise to video; by default they fall.
    """

    dense_steps: Count = 0
    phase_starts: tuple[Timestep, ...] = ()
    dense_from: Timestep | None = None
    ascending: bool = False

    def phase(self, timestep: float) -> int | None:
        """Index of the phase of a timestep, None from `dense_from` on."""
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
    """Predicted or measured performance of a budget; None for a number that is not known.

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
    """A point of the frontier: predicted milliseconds of a forward and predicted error."""

    ms: NotNegative
    error: NotNegative


@dataclass(frozen=True)
class Fingerprint:
    """Identity of the model that a budget belongs to.

    Attributes:
        model: class name.
        config: digest of its configuration, "" if it has none.
        parameters: digest of the names and shapes of its parameters.
    """

    model: str
    config: str
    parameters: str


def fingerprint(
    model: str, config: Mapping[str, Any] | None, shapes: Mapping[str, Sequence[int]]
) -> Fingerprint:
    """Fingerprint of a model from its class name, configuration and parameter shapes by name."""

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
    """A budget and the measurements behind it.

    Attributes:
        version: version of the file format, see `VERSION`.
        fingerprint: the model that the budget belongs to.
        tokens: tokens of its attention, text included.
        device: the device on which times were predicted and measured.
        objective: objective of the tuning, e.g. ``"target_speedup 2"``.
        outcome: ``"tuned"``, or ``"uniform"`` if tuning was not better than one density for all
            layers; `note` says why.
        schedule: see `Schedule`.
        layers: layer path to one choice for each phase of the schedule.
        predicted, measured: performance of this budget.
        uniform: measured performance of one density for all layers at the same time.
        frontier: predicted performance of other budgets, from dense to sparse.
        note: remarks of the tuning, for people.
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

    def save(self, path: str | Path) -> None:
        """Write a budget file.

        Raises:
            OSError: the file cannot be written.
        """
        json_record.write(Path(path), check(self))

    @staticmethod
    def load(path: str | Path) -> Budget:
        """Read a budget file of this format version or of version 1.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is broken or has another version; the message names file and fault.
        """
        path = Path(path)
        with json_record.naming(path):
            data = _with_current_names(json_record.parse(json_record.read_bytes(path)))
            return check(json_record.decode(Budget, data))

    def choice(self, layer: str, timestep: float) -> Choice | None:
        """The choice of a layer at a timestep; None if the budget has no such layer."""
        choices = self.layers.get(layer)
        if choices is None:
            return None
        phase = self.schedule.phase(timestep)
        return DENSE if phase is None else choices[phase]

    def densest(self, layer: str) -> Choice | None:
        """The sparse choice of largest density, for a call whose phase is not known.

        `DENSE` if the layer is dense in every phase; None if the budget has no such layer.
        """
        choices = self.layers.get(layer)
        if choices is None:
            return None
        sparse = [c for c in choices if c.density < 1.0]
        return max(sparse, key=lambda c: c.density, default=DENSE)

    def scaled(self, tokens: int) -> Budget:
        """The budget for another number of tokens: cluster counts change in proportion.

        Raises:
            ValueError: `tokens` differs from the budget's own by more than `SCALED_WITHIN`.
        """
        if tokens == self.tokens:
            return self
        factor = tokens / self.tokens
        if not 1 / SCALED_WITHIN <= factor <= SCALED_WITHIN:
            raise InvalidValueError(
                f"the budget was tuned at {self.tokens:,} tokens and is good from "
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
        """Raise a ValueError if `other` is not the fingerprint of the budget's model."""
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
    """Return the budget if its fields are in their ranges and consistent.

    Raises:
        ValueError: the format version differs, a field has the wrong type or is out of range, or a
            layer has not one choice for each phase; the message names the fault.
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


def schema() -> dict[str, Any]:
    """JSON Schema of a budget file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | json_record.schema(Budget)


def _with_current_names(data: object) -> object:
    """Parsed JSON of a budget in the names of the current version."""
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or type(version) is not int:
        return data  # `json_record.decode` says what is wrong
    if version != 1:
        _check_version(version)
        return data
    if data.keys() & _RENAMED_IN_2.values():
        raise InvalidValueError("it has names of version 2, but says version 1")
    return {_RENAMED_IN_2.get(name, name): x for name, x in data.items()} | {"version": VERSION}


def _check_version(version: int) -> None:
    if version != VERSION:
        raise InvalidValueError(
            f"its format has version {shown(version)}; this package reads 1 and {VERSION}"
        )
