"""Measured times of the attention operator at the shapes of the models and of Wan 14B at 720p.

Sparse calls are those of `benchmarks.attention`: warm, everything included, and no time without a
green gate. A model's own shape is timed on one of its recorded calls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.attention.inputs import Inputs
from benchmarks.attention.measure import measure_shape, time_ms
from benchmarks.fidelity.grid import Cell
from benchmarks.fidelity.rules import RULES, uniform_attention

WAN = "wan14b-720p"
_REPEATS = 5


def measure_times(
    inputs: Inputs, wanted: Sequence[Cell], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Milliseconds of every rule that has an implementation to time, at each plan of `wanted`.

    Args:
        inputs: what is attended to, on a GPU.
        wanted: cells; rule, density and clusters count.
        say: hears a line of progress for each row.

    Returns:
        A row for each plan: shape, rule, density, queries, keys, ms, dense_ms, raw samples. A row
        whose gate failed has None for ms.
    """
    tokens = inputs.q.shape[2] - inputs.text
    plans = list(dict.fromkeys((c.rule, c.density, c.queries, c.keys) for c in wanted))
    rows = []
    counts: dict[str, tuple[int, int]] = {}
    for _, _, queries, keys in plans:
        counts[f"{math.ceil(tokens / queries)}/{math.ceil(tokens / keys)}"] = (queries, keys)
    forms = {RULES[rule].compensation: rule for rule, *_ in plans if RULES[rule].compensation}
    densities = sorted({d for rule, d, *_ in plans if RULES[rule].compensation})
    measured = measure_shape(
        inputs, densities, [str(form) for form in forms], list(counts), _REPEATS, False, say
    )
    dense_ms = {}
    for row in measured:
        dense_ms = {"dense_ms": statistics.median(row["dense_samples_ms"][row["dense_backend"]])}
        queries, keys = counts[row["clusters"]]
        samples = row.get("samples_ms")
        rows.append(
            {
                "shape": inputs.name, "rule": forms[row["form"]], "density": row["density"],
                "queries": queries, "keys": keys,
                "ms": None if samples is None else statistics.median(samples),
                "samples_ms": samples, "gate": row["gate"],
            }
        )  # fmt: skip
    for rule, density, queries, keys in plans:
        if rule != "uniform":
            continue
        samples = time_ms(
            lambda d=density: uniform_attention(inputs.q, inputs.k, inputs.v, d, inputs.text),
            _REPEATS,
            inputs.q.is_cuda,
        )
        rows.append(
            {
                "shape": inputs.name, "rule": rule, "density": density,
                "queries": queries, "keys": keys,
                "ms": statistics.median(samples), "samples_ms": samples, "gate": None,
            }
        )  # fmt: skip
    return [row | dense_ms for row in rows]
