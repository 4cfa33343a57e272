"""What is measured, most important first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fidelity.rules import RULES
from svg_ear_compile.kernels.plan import KEYS_PER_CLUSTER, QUERIES_PER_CLUSTER, AttentionPlan

DENSITIES = (0.05, 0.1, 0.2)
WARM_UPS = (0.2, 0.08)
"""Fractions of the denoising steps that stay dense: 5 and 2 of 24."""

FINE = (QUERIES_PER_CLUSTER, KEYS_PER_CLUSTER)
COARSE = (2 * QUERIES_PER_CLUSTER, KEYS_PER_CLUSTER)
CLUSTERS = (FINE, COARSE)
"""Mean tokens of a query cluster and of a key cluster."""

_OTHER_CLUSTERS = (
    (QUERIES_PER_CLUSTER // 2, KEYS_PER_CLUSTER),
    (QUERIES_PER_CLUSTER, 2 * KEYS_PER_CLUSTER),
)

PAPER, OURS, DROPPING = "paper", "gaussian", "svg2"
REDUCED = ("shared", "recomputed")
"""The default with less reuse: of another branch's blocks only, and none at all."""

IN_KERNELS = tuple(name for name, rule in RULES.items() if rule.compensation is not None)
"""Rules that the operator has: these can be timed."""

# Where the curves of the two meet: at the same time one has more exact blocks than the other.
_OUTER = (0.025, 0.4)
# SVG2 needs many more blocks for the same picture: how many is asked.
_SVG2 = (*DENSITIES, 0.3, 0.4, 0.5)


@dataclass(frozen=True, order=True)
class Cell:
    """One point: clips of one model under one rule.

    Attributes:
        model: name in `zoo.MODELS`.
        rule: name in `rules.RULES`.
        density: fraction of the video query-key area computed exactly.
        queries, keys: mean tokens of a query cluster and of a key cluster.
        warm_up: fraction of the denoising steps, rounded to whole ones, that lead and stay dense.
    """

    model: str
    rule: str
    density: float
    queries: int
    keys: int
    warm_up: float = WARM_UPS[0]

    @property
    def is_decisive(self) -> bool:
        """True for the cells that compare the default with the paper."""
        return (
            self.rule in (PAPER, OURS)
            and self.density in DENSITIES
            and (self.queries, self.keys) in CLUSTERS
            and self.warm_up == WARM_UPS[0]
        )

    def plan(self, tokens: int) -> AttentionPlan:
        """The plan of this point for that many video tokens.

        All rules are warmed in as many rounds: nothing but the rule differs.
        """
        return AttentionPlan(
            density=self.density,
            q_clusters=math.ceil(tokens / self.queries),
            k_clusters=math.ceil(tokens / self.keys),
        )


def cells(models: Sequence[str]) -> list[Cell]:
    """Every cell in the order of what it decides.

    First the paper's rule and the default; then densities around these, so that they can be read at
    equal time, and how much density SVG2 needs; then the other rules of the operator, other
    clusters, shorter warm-ups, and rules that nobody ships.
    """

    def made(
        rules: Sequence[str], densities: Sequence[float], clusters: Sequence[tuple[int, int]],
        warm_up: float = WARM_UPS[0],
    ) -> list[Cell]:  # fmt: skip
        return [
            Cell(model, rule, density, *counts, warm_up)
            for model in models
            for counts in clusters
            for density in densities
            for rule in rules
        ]

    ordered = [
        *made([PAPER, OURS], DENSITIES, CLUSTERS),
        *made([PAPER, OURS], _OUTER, CLUSTERS),
        *made(REDUCED, DENSITIES, CLUSTERS),
        *made([DROPPING], _SVG2, [FINE]),
        *made(IN_KERNELS, DENSITIES, CLUSTERS),
        *made([OURS], DENSITIES, _OTHER_CLUSTERS),
        *made([PAPER, OURS], DENSITIES, [FINE], WARM_UPS[1]),
        *made(["uniform", "values", "score", "first_order", "second_order"], DENSITIES, [FINE]),
    ]
    return list(dict.fromkeys(ordered))
