"""How a density is spread over the denoising steps: more in the first, which decide the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from svg_ear_compile.kernels.checked import Range

EARLY_PART = 0.25
"""Fraction of the steps that are early, rounded to whole steps: 1 of 4, 6 of 24, 12 of 50."""

EARLY_FACTOR = 2.0
"""Density of the first half of the early steps over that of a later step."""

EARLY_MOST = 0.5
"""Density that no early step exceeds, unless the mean does: beyond it, time buys little."""

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
        """Density of each step over that of a later one, where none is beyond the most."""
        first = round(EARLY_PART / 2 * self.steps) if self.factor > 1.0 else 0
        second = self.count - first
        between = (1.0 + self.factor) / 2
        return [self.factor] * first + [between] * second + [1.0] * (self.steps - first - second)

    def density(self, mean: float, step: int) -> float:
        """The density of a step, in [0, 1]; its mean over all steps is `mean`.

        Steps that the factors would take beyond the most have that, and the others share the rest.

        Args:
            mean: density of a plan.
            step: index of the step; those past the last one are late.
        """
        return _densities(self, mean)[min(step, self.steps - 1)]


@lru_cache(maxsize=256)
def _densities(early: EarlySteps, mean: float) -> list[float]:
    factors, most = early.factors(), max(mean, EARLY_MOST)
    level = mean
    for full, factor in enumerate(factors):  # from the largest on
        level = (mean * early.steps - full * most) / sum(factors[full:])
        if factor * level <= most:
            break
    return [min(most, factor * level) for factor in factors]
