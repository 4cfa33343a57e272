"""What a tuning says of its own result: dense is faster, or a difference is within noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
"""Of the interval of an error's ratio: one that holds 1 is no difference."""


def on_time(ms: float, plain_ms: float, variation: float) -> list[str]:
    """Remarks on the time of a forward, at most one.

    Args:
        ms: milliseconds under the budget.
        plain_ms: milliseconds of the model compiled by Inductor alone.
        variation: largest relative difference between the times of one setting.
    """
    times = f"a forward takes {ms:.4g} ms, compiled by Inductor alone {plain_ms:.4g} ms"
    if ms >= plain_ms:
        return [f"dense attention is faster: {times}"]
    if plain_ms - ms < variation * plain_ms:
        return [
            f"the speed-up is within noise: {times}, and times of one setting differ by "
            f"{variation:.0%} here"
        ]
    return []


def on_error(tuned: Sequence[float], uniform: Sequence[float]) -> list[str]:
    """Remarks on the errors of a tuned budget and of one density for all, at most one.

    Args:
        tuned, uniform: error of each call, in the same order.

    Raises:
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    from scipy.stats import t as student

    pairs = [(a, b) for a, b in zip(tuned, uniform, strict=True) if a > 0 and b > 0]
    if not pairs:
        return []
    if len(pairs) == 1:
        return ["one call cannot tell tuning from one density for all: give calls of several clips"]
    logs = [math.log(a / b) for a, b in pairs]
    spread = statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * spread
    mean = statistics.fmean(logs)
    if abs(mean) > reach:
        return []
    low, high = math.exp(mean - reach), math.exp(mean + reach)
    return [
        "the difference between tuning and one density for all is within noise: over "
        f"{len(logs)} calls the error is {low:.2g} to {high:.2g} times that of one density"
    ]
