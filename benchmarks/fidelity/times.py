"""Measured times of the attention operator at the shapes of the models and of Wan 14B at 720p.

Sparse calls are those of `benchmarks.attention`: warm, everything included, and no time without a
green gate. A model's own shape is timed on one of its captured calls, Sol-Attn where its kernels
run (`kitchen.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.attention.inputs import Inputs
from benchmarks.attention.measure import measure_shape, time_ms
from benchmarks.fidelity.grid import REDUCED, TIMED_CALLS, Cell
from benchmarks.fidelity.kitchen import Kitchen
from benchmarks.fidelity.rules import RULES

WAN = "wan14b-720p"
SHORTER = ("wan1.3b-480p", "sweep-16k")
"""Shapes at which the default and Sol-Attn's kernels are timed too."""
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
    plans = list(dict.fromkeys(replace(c, model=inputs.name, warm_up=0.0) for c in wanted))
    rows: list[dict[str, Any]] = []
    dense_ms = math.nan
    # Clusters with the same rules and densities share one call, and so its dense baseline.
    requests: dict[tuple[int, int], set[tuple[str, float]]] = {}
    for plan in plans:
        if RULES[plan.rule].compensation is not None and plan.rule not in REDUCED:  # OURS' calls
            requests.setdefault((plan.queries, plan.keys), set()).add((plan.rule, plan.density))
    groups: dict[frozenset[tuple[str, float]], list[tuple[int, int]]] = {}
    for clusters, request in requests.items():
        groups.setdefault(frozenset(request), []).append(clusters)
    for request, clusters_of in groups.items():
        forms = {
            f"{RULES[rule].compensation}/{RULES[rule].metric}": rule for rule, _ in sorted(request)
        }
        counts = {
            f"{math.ceil(tokens / q)}/{math.ceil(tokens / k)}": (q, k) for q, k in clusters_of
        }
        for row in measure_shape(
            inputs,
            sorted({d for _, d in request}),
            list(forms),
            list(counts),
            _REPEATS,
            False,
            say,
            details=False,
        ):
            dense = row["dense_samples_ms"][row["dense_backend"]]
            dense_ms = statistics.median(dense)
            queries, keys = counts[row["clusters"]]
            samples, reused = row.get("samples_ms"), row.get("reused_samples_ms")
            rows.append(
                {
                    "shape": inputs.name, "rule": forms[row["form"]], "density": row["density"],
                    "queries": queries, "keys": keys,
                    "ms": None if samples is None else statistics.median(samples),
                    "samples_ms": samples, "gate": row["gate"], "dense_ms": dense_ms,
                    "reused_ms": None if reused is None else statistics.median(reused),
                    "reused_samples_ms": reused, "reused_gate": row.get("reused_gate"),
                }
            )  # fmt: skip
    for plan in plans:
        call = RULES[plan.rule].by_call
        if plan.rule not in TIMED_CALLS or call is None:
            continue
        given = (inputs.q, inputs.k, inputs.v, plan.plan(tokens), inputs.text)
        run: Callable[[], object] = partial(call, *given, (1, 1, tokens))
        if isinstance(call, Kitchen):  # the model itself can lay its tokens out as the kernels want
            run = call.prepared(*given, torch.arange(inputs.q.shape[2], device=inputs.q.device))
        samples = time_ms(run, _REPEATS, inputs.q.is_cuda)
        rows.append(
            {
                "shape": inputs.name, "rule": plan.rule, "density": plan.density, "tau": plan.tau,
                "queries": plan.queries, "keys": plan.keys,
                "ms": statistics.median(samples), "samples_ms": samples, "gate": None,
                "dense_ms": dense_ms, "reused_ms": None, "reused_samples_ms": None,
                "reused_gate": None,
            }
        )  # fmt: skip
    return rows
