"""How a density is spread over the denoising steps: more in the first, which decide the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from svg_ear_compile.kernels.checked import Range

EARLY_PART = 0.25
"""Fraction of the steps that are early, rounded to whole steps: 1 of 4, 6 of 24, 12 of 50."""

EARLY_FACTOR = 2.0
"""Density of the first half of the early steps over that of a later step."""

EarlyFactor = Annotated[float, Range(1.0, 100.0)]


@dataclass(frozen=True)
class EarlySteps:
    """The early steps of a generation; `benchmarks.fidelity.schedules` compares their choices.

    Attributes:
        steps: denoising steps of the generation, at least 1.
        factor: density of the first half of the early steps over that of a later step. The second
            half has the mean of both.
    """

    steps: int
    factor: float

    @property
    def count(self) -> int:
        """Number of early steps."""
        return round(EARLY_PART * self.steps) if self.factor > 1.0 else 0

    def factors(self) -> list[float]:
        """Density of each step over that of a later one, where none is beyond 1."""
        first = round(EARLY_PART / 2 * self.steps) if self.factor > 1.0 else 0
        second = self.count - first
        between = (1.0 + self.factor) / 2
        return [self.factor] * first + [between] * second + [1.0] * (self.steps - first - second)

    def density(self, mean: float, step: int) -> float:
        """The density of a step, in [0, 1]; its mean over the generation is `mean`.

        Steps that the factors would take beyond 1 are dense, and the others share the rest.

        Args:
            mean: density of a plan.
            step: index of the step; those past the last one are late.
        """
        factors = self.factors()
        left = mean * self.steps
        level = left / sum(factors)
        for dense, factor in enumerate(factors):  # from the largest on
            level = (left - dense) / sum(factors[dense:])
            if factor * level <= 1.0:
                break
        factor = factors[step] if step < self.count else 1.0
        return min(1.0, max(0.0, factor * level))
