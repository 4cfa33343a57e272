"""Error curves: how much sparse attention in one layer changes the model's output, as measured.

An error is the relative RMS distance between the outputs of two forwards, one sparse in that layer
alone and one dense: |sparse - dense| / |dense|. Errors of several layers are taken to be
independent, so their squares add. Tuning measures how far that holds when it runs a whole budget.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Measurement:
    """One measured error.

    Attributes:
        density: density of the plan, in [0, 1).
        error: relative RMS error of the model's output, finite.
    """

    density: float
    error: float


@dataclass(frozen=True)
class ErrorCurve:
    """Error over density of one layer, phase and kind of plan. It falls, and is 0 at density 1.

    Attributes:
        densities: measured densities, rising, in [0, 1).
        errors: smoothed error at each density, falling.
    """

    densities: tuple[float, ...]
    errors: tuple[float, ...]

    def at(self, density: float) -> float:
        """Error at a density, linear between measured densities and from the last to 0 at 1.

        Below the least measured density the error is extrapolated as density^-0.5, which is close
        to the law of `default_error`.
        """
        if density >= 1.0:
            return 0.0
        if density <= self.densities[0]:
            return self.errors[0] * (self.densities[0] / max(density, 1e-6)) ** 0.5
        grid, values = (*self.densities, 1.0), (*self.errors, 0.0)
        right = bisect_left(grid, density)
        fraction = (density - grid[right - 1]) / (grid[right] - grid[right - 1])
        return values[right - 1] + fraction * (values[right] - values[right - 1])


def fit_curve(measurements: Iterable[Measurement]) -> ErrorCurve:
    """A falling curve through repeated measurements.

    Errors span orders of magnitude, and their noise multiplies them. So the logarithms are averaged
    over the repeats at each density, and isotonic regression makes them fall.

    Raises:
        ValueError: there is no measurement.
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    from scipy.optimize import isotonic_regression

    by_density: dict[float, list[float]] = {}
    for found in measurements:
        by_density.setdefault(found.density, []).append(math.log(max(found.error, 1e-12)))
    if not by_density:
        raise ValueError("an error curve needs at least one measurement")
    densities = sorted(by_density)
    means = [fmean(by_density[d]) for d in densities]
    weights = [len(by_density[d]) for d in densities]
    smooth = isotonic_regression(means, weights=weights, increasing=False).x
    return ErrorCurve(tuple(densities), tuple(math.exp(x) for x in smooth))


def together(errors: Iterable[float]) -> float:
    """Error with several layers sparse at once: the root of the sum of the squared errors."""
    return math.sqrt(math.fsum(error * error for error in errors))
