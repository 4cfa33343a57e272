"""Allocation: one choice for every layer and phase, from measured errors and predicted times.

Computes with shapes, error curves and a calibration; runs no model. `tuning` measures the curves,
and corrects an allocation by what whole forwards of the model do.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from svg_ear_compile.cost_model import knapsack
from svg_ear_compile.cost_model.budget import DENSE, Choice
from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.error import ErrorCurve, together
from svg_ear_compile.cost_model.latency import call_ms, ms_per_unit_density
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.cost_model.threshold import routing_threshold
from svg_ear_compile.kernels.checked import checked
from svg_ear_compile.kernels.plan import AttentionPlan

Allocation = Mapping[str, tuple[Choice, ...]]
"""Layer path to one choice for each phase, for all layers of a model."""

_FRONTIER = 12
_HALVINGS = 40


_Name = Literal["target_speedup", "max_error", "density"]


@dataclass(frozen=True)
class Objective:
    """Objective of a budget: a speed-up of a whole forward, a largest error, or a mean density."""

    name: _Name
    value: float

    @classmethod
    def of(
        cls, target_speedup: float | None, max_error: float | None, density: float | None
    ) -> Objective:
        """The objective of the argument that is not None.

        Raises:
            ValueError: none or several arguments are given, or one is out of its range.
            TypeError: the argument is no number.
        """
        named: dict[_Name, float | None] = {
            "target_speedup": target_speedup, "max_error": max_error, "density": density,
        }  # fmt: skip
        given = [(name, value) for name, value in named.items() if value is not None]
        if len(given) != 1:
            raise ValueError("give one of target_speedup, max_error and density")
        ((name, value),) = given
        return cls(name, checked(name, value, float))

    def __post_init__(self) -> None:
        low = 1.0 if self.name == "target_speedup" else 0.0
        high = 1.0 if self.name == "density" else math.inf
        if not low < self.value < high:
            raise ValueError(f"{self.name} must be between {low:g} and {high:g}, got {self.value}")

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"


@dataclass(frozen=True)
class AllocationProblem:
    """Measurements and shapes from which allocations are computed.

    Attributes:
        sites: layer and shape of every attention call.
        phases: number of phases of the denoising.
        kinds: measured cluster counts and compensation forms, as choices of density 0. Uniform
            allocations use the first.
        densities: measured densities, rising.
        curves: (layer, phase, kind) to the error curve of the model's output.
        calibration: of the device.
    """

    sites: tuple[tuple[str, AttentionShape], ...]
    phases: int
    kinds: tuple[Choice, ...]
    densities: tuple[float, ...]
    curves: Mapping[tuple[str, int, Choice], ErrorCurve]
    calibration: Calibration

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Layer paths in the order of the calls."""
        return tuple(dict.fromkeys(layer for layer, _ in self.sites))

    @cached_property
    def options(self) -> tuple[Choice, ...]:
        """Choices for a layer: dense, every measured one, and one between each two densities."""
        grid = self.densities
        between = (math.sqrt(a * b) for a, b in zip(grid, [*grid[1:], 1.0], strict=True))
        every = sorted({*grid, *(round(d, 3) for d in between)})
        return (DENSE, *(dataclasses.replace(k, density=d) for k in self.kinds for d in every))

    @cached_property
    def _ms(self) -> dict[tuple[str, Choice], float]:
        return {(layer, c): self._layer_ms(layer, c) for layer in self.layers for c in self.options}

    @cached_property
    def _areas(self) -> dict[str, float]:
        """Fraction of the whole attention area by layer."""
        areas = dict.fromkeys(self.layers, 0.0)
        for layer, s in self.sites:
            areas[layer] += s.batch * s.heads * s.q_tokens * s.k_tokens
        total = sum(areas.values())
        return {layer: area / total for layer, area in areas.items()}

    def same(self, choice: Choice) -> Allocation:
        """One choice for every layer and phase."""
        return dict.fromkeys(self.layers, (choice,) * self.phases)

    def uniform(self, density: float) -> Allocation:
        """One density for all layers and phases, with the first kind."""
        return self.same(dataclasses.replace(self.kinds[0], density=density))

    def attention_ms(self, allocation: Allocation) -> float:
        """Predicted milliseconds of all attention in one forward, the mean over phases."""
        total = math.fsum(
            self._ms.get((layer, choice), 0.0) or self._layer_ms(layer, choice)
            for layer, choices in allocation.items()
            for choice in choices
        )
        return total / self.phases

    def _layer_ms(self, layer: str, choice: Choice) -> float:
        plan = choice.plan(AttentionPlan())
        shapes = (shape for name, shape in self.sites if name == layer)
        return math.fsum(call_ms(shape, plan, self.calibration) for shape in shapes)

    @cached_property
    def dense_ms(self) -> float:
        """Predicted milliseconds of all attention in one dense forward."""
        return self.attention_ms(self.same(DENSE))

    def density(self, allocation: Allocation) -> float:
        """Mean fraction of the attention area computed exactly."""
        total = math.fsum(
            self._areas[layer] * statistics.fmean(choice.density for choice in choices)
            for layer, choices in allocation.items()
        )
        return min(total, 1.0)  # rounding

    def layer_error(self, layer: str, phase: int, choice: Choice) -> float:
        """Error of the model's output with this choice for one layer, all others dense."""
        if choice.density >= 1.0:
            return 0.0
        kind = dataclasses.replace(choice, density=0.0, threshold=None)
        return self.curves[layer, phase, kind].at(choice.density)

    def error(self, allocation: Allocation) -> float:
        """Error of the model's output in one forward, the largest over the phases."""
        return max(
            together(
                self.layer_error(layer, phase, choices[phase])
                for layer, choices in allocation.items()
            )
            for phase in range(self.phases)
        )

    def solve(self, objective: Objective, allowed: float) -> Allocation:
        """The allocation of least error within a limit, or of least time within an error.

        Args:
            objective: its name gives the unit of `allowed`; its value is not used.
            allowed: limit: milliseconds of attention in a forward, mean density, or error of a
                forward.

        Raises:
            knapsack.UnreachableError: no allocation is within a time or density; `least` has the
                unit of `allowed`. Every error can be kept, by dense attention.
        """
        slots = [(layer, phase) for phase in range(self.phases) for layer in self.layers]
        if objective.name == "max_error":  # a forward belongs to one phase: each has the limit
            by_phase = [
                slots[i : i + len(self.layers)] for i in range(0, len(slots), len(self.layers))
            ]
            taken = [
                at
                for part in by_phase
                for at in knapsack.solve(
                    [
                        [knapsack.Option(o.loss, o.cost) for o in group]
                        for group in self._groups(part, self._time)
                    ],
                    allowed**2,
                )
            ]
        else:
            cost = self._area if objective.name == "density" else self._time
            taken = list(knapsack.solve(self._groups(slots, cost), allowed))
        chosen = {slot: self.options[at] for slot, at in zip(slots, taken, strict=True)}
        return {layer: tuple(chosen[layer, p] for p in range(self.phases)) for layer in self.layers}

    def _time(self, layer: str, choice: Choice) -> float:
        return self._ms[layer, choice] / self.phases

    def _area(self, layer: str, choice: Choice) -> float:
        return choice.density * self._areas[layer] / self.phases

    def _groups(
        self, slots: list[tuple[str, int]], cost: Callable[[str, Choice], float]
    ) -> list[list[knapsack.Option]]:
        """Every option of every slot, with the squared error of the model's output as its loss."""
        return [
            [
                knapsack.Option(cost(layer, c), self.layer_error(layer, phase, c) ** 2)
                for c in self.options
            ]
            for layer, phase in slots
        ]

    def density_at(self, wanted: float) -> float:
        """The density of the uniform allocation whose attention takes so many milliseconds."""
        low, high = 0.0, 0.999
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.attention_ms(self.uniform(middle)) <= wanted:
                low = middle
            else:
                high = middle
        return low

    def frontier(self, objective: Objective) -> Iterator[Allocation]:
        """Allocations from the sparsest to dense, spread over the unit of the objective."""
        steps = [i / _FRONTIER for i in range(1, _FRONTIER + 1)]
        if objective.name == "max_error":
            most = self.error(self.uniform(self.densities[0]))
            allowed = [most * step**2 for step in steps]
        elif objective.name == "density":
            least = self.densities[0]
            allowed = [least ** (1 - step) for step in steps]
        else:
            least = math.fsum(
                min(self._ms[layer, c] for c in self.options) for layer in self.layers
            )
            allowed = [least + (self.dense_ms - least) * step for step in steps]
        for each in allowed:
            yield self.solve(objective, each)

    def multiplier(self, allocation: Allocation) -> float:
        """Squared error that one more millisecond of a forward saves, at the allocation's time."""
        slots = [(layer, phase) for phase in range(self.phases) for layer in self.layers]
        groups = self._groups(slots, self._time)
        allowed = self.attention_ms(allocation)
        return knapsack.multiplier(groups, allowed)

    def thresholds(
        self, allocation: Allocation, seen: Mapping[tuple[str, int], tuple[float, float]]
    ) -> Allocation:
        """The allocation with a routing threshold, which follows from the multiplier, in each
        sparse choice.

        Args:
            allocation: an allocation of least error.
            seen: (layer, phase) to the relative error of the attention output at its choice, and
                the mean over queries of the squared norm of that output.
        """
        multiplier = self.multiplier(allocation)

        def routed(layer: str, phase: int, choice: Choice) -> Choice:
            if choice.density >= 1.0:
                return choice
            error, square = seen[layer, phase]
            shape = next(shape for name, shape in self.sites if name == layer)
            slope = ms_per_unit_density(shape, choice.plan(AttentionPlan()), self.calibration)
            # The sensitivity may be 0: the limit keeps the threshold finite.
            sensitivity = max((self.layer_error(layer, phase, choice) / error) ** 2, 1e-12)
            found = routing_threshold(multiplier, slope / self.phases, sensitivity, square, shape)
            return dataclasses.replace(choice, threshold=found)

        return {
            layer: tuple(routed(layer, phase, choice) for phase, choice in enumerate(choices))
            for layer, choices in allocation.items()
        }
