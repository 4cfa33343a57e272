"""How much sparse attention in one layer changes the model's output, from measurements.

Errors are relative RMS distances of the model's output in one forward, sparse in that layer alone
against dense: |sparse - dense| / |dense|. Errors of several layers are taken to be independent and
add in squares; how far that holds is measured when a budget is verified.
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
        density: asked for, in [0, 1).
        error: relative RMS of the model's output, finite.
    """

    density: float
    error: float


@dataclass(frozen=True)
class ErrorCurve:
    """Error of one layer, phase and cluster choice over density: falls, and is 0 at density 1.

    Attributes:
        densities: rising, in [0, 1).
        errors: smoothed error at each, falling.
    """

    densities: tuple[float, ...]
    errors: tuple[float, ...]

    def at(self, density: float) -> float:
        """Error at a density: linear between the measured ones, down to 0 at density 1.

        Below the least measured density it is taken to grow as density^-0.5, about as the recorded
        tensors of the video DiT have it (`default_error`).
        """
        if density >= 1.0:
            return 0.0
        if density <= self.densities[0]:
            return self.errors[0] * (self.densities[0] / max(density, 1e-6)) ** 0.5
        grid, values = (*self.densities, 1.0), (*self.errors, 0.0)
        right = bisect_left(grid, density)
        share = (density - grid[right - 1]) / (grid[right] - grid[right - 1])
        return values[right - 1] + share * (values[right] - values[right - 1])


def fit_curve(measurements: Iterable[Measurement]) -> ErrorCurve:
    """A falling curve through repeated measurements.

    Errors spread over orders of magnitude and their noise is a factor, so their logarithms are
    averaged over the repeats and made to fall by isotonic regression.

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
    """Error of several layers that are sparse at once: the root of the sum of squares."""
    return math.sqrt(math.fsum(error * error for error in errors))
