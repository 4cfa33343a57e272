"""How a density is spread over the denoising steps: more in the first, which decide the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from svg_ear_compile.kernels.checked import Range

EARLY_PART = 0.125
"""Fraction of the steps that are early, rounded to whole steps: none of 4, 3 of 24, 6 of 50."""

EARLY_FACTOR = 2.0
"""Density of an early step over that of a later one."""

EarlyFactor = Annotated[float, Range(1.0, 100.0)]


@dataclass(frozen=True)
class EarlySteps:
    """The early steps of a generation; `benchmarks.fidelity.schedules` compares their choices.

    Attributes:
        steps: denoising steps of the generation, at least 1.
        factor: density of an early step over that of a later one.
    """

    steps: int
    factor: float

    @property
    def count(self) -> int:
        """Number of early steps."""
        return round(EARLY_PART * self.steps) if self.factor > 1.0 else 0

    def density(self, mean: float, step: int) -> float:
        """The density of a step, in [0, 1]; its mean over the generation is `mean`.

        Where the factor would take early steps beyond 1, they are dense and the others share the
        rest.

        Args:
            mean: density of a plan.
            step: index of the step.
        """
        early, late = self.count, self.steps - self.count
        if early == 0:
            return mean
        level = mean * self.steps / (early * self.factor + late)
        level = min(1.0, max(level, (mean * self.steps - early) / late))
        return min(1.0, self.factor * level) if step < early else level
