"""Bound of the error on unseen inputs, from errors measured on a few inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

KEPT_BY = 0.95
"""Fraction of unseen forwards whose errors are expected to be within `unseen_error`."""

USUAL_SPREAD = 0.47
"""Prior standard deviation of the natural log of a budget's error over clips, measured on ten clips
of the video DiT (`benchmarks/results/cpu/max_error`). The prior counts as `_WEIGHT` degrees of
freedom: it dominates where few clips were measured and hardly matters where many were."""

_WEIGHT = 6


def unseen_error(seen: Sequence[Sequence[float]]) -> float:
    """Error that a fraction `KEPT_BY` of the forwards on other inputs stays within.

    Errors of one budget differ between inputs by factors, so their logarithms are taken to be
    normal, with a mean for each timestep and one spread for all. The bound of a timestep is the
    upper end of a prediction interval (Student's t), which allows for the mean being known from few
    inputs only.

    Args:
        seen: for each timestep, the errors of one forward of each clip; 0 where nothing was sparse.

    Returns:
        The largest bound of all timesteps; 0 if all errors are 0.

    Raises:
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    from scipy.stats import t as student

    logs = [[math.log(error) for error in clips if error > 0] for clips in seen]
    logs = [clips for clips in logs if clips]
    squares = math.fsum((x - fmean(clips)) ** 2 for clips in logs for x in clips)
    freedom = _WEIGHT + sum(len(clips) - 1 for clips in logs)
    spread = math.sqrt((_WEIGHT * USUAL_SPREAD**2 + squares) / freedom)
    reach = float(student.ppf(KEPT_BY, freedom)) * spread
    bounds = (math.exp(fmean(clips) + reach * math.sqrt(1 + 1 / len(clips))) for clips in logs)
    return max(bounds, default=0.0)
