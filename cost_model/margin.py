"""What errors seen on a few inputs say of inputs never seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

KEPT_BY = 0.95
"""Share of unseen forwards whose error `unseen_error` is meant not to exceed."""

USUAL_SPREAD = 0.47
"""Standard deviation of the natural log of a budget's error from one clip to another: ten clips of
the video DiT (`benchmarks/results/cpu/max_error`). Counts as `_WEIGHT` degrees of freedom, so that
it decides where few clips were seen and is forgotten where many were."""

_WEIGHT = 6


def unseen_error(seen: Sequence[Sequence[float]]) -> float:
    """Error that `KEPT_BY` of the forwards on other inputs stay within.

    Errors of one budget differ from input to input by factors, so their logarithms are taken to be
    normal, with a mean for each timestep and one spread for all; the bound is that of a prediction
    interval (Student's t), which counts that the mean itself is known from a few inputs only.

    Args:
        seen: at each of some timesteps the errors of one forward of each clip; 0 where nothing was
            sparse.

    Returns:
        The largest bound of a timestep, 0 if all errors are.

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
