"""What is measured, most important first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fidelity.rules import RULES
from benchmarks.fidelity.sol import BLOCK
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

RIVALS = tuple(name for name, rule in RULES.items() if rule.timed_as or rule.needs_kitchen)
"""Ways to use Sol-Attn."""

TIMED_CALLS = ("uniform", "kitchen_top_k", "kitchen_tokens", "kitchen_tau")
"""Rules outside of the operator that are timed."""

IN_KERNELS = tuple(name for name, rule in RULES.items() if rule.compensation is not None)
"""Rules that the operator has: these can be timed."""

# Sol-Attn, with its blocks in place of clusters.
_BLOCKS = (BLOCK, BLOCK)
_BY_SHARE = (
    "sol_top_k", "sol_top_k_cubes", "kitchen_top_k", "kitchen_top_k_cubes", "sol_tokens",
    "sol_tokens_cubes", "kitchen_tokens", "top_k_drop",
)  # fmt: skip
_BY_TAU = ("sol_tau", "sol_tau_cubes", "kitchen_tau", "kitchen_tau_cubes")
_TAUS = (1.0, 2.0)

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
        density: fraction of the video query-key area computed exactly; 0 where tau decides.
        queries, keys: mean tokens of a query cluster and of a key cluster, or of Sol-Attn's blocks.
        warm_up: fraction of the denoising steps, rounded to whole ones, that lead and stay dense.
        tau: threshold of Sol-Attn in deviations (`sol.py`); 0 where the density decides.
    """

    model: str
    rule: str
    density: float
    queries: int
    keys: int
    warm_up: float = WARM_UPS[0]
    tau: float = 0.0

    @property
    def budget(self) -> str:
        """What was asked for: ``"0.1"``, or ``"tau1"``."""
        return f"tau{self.tau:g}" if self.tau else f"{self.density:g}"

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
            routing="threshold" if self.tau else "density",
            threshold=self.tau,
            q_clusters=math.ceil(tokens / self.queries),
            k_clusters=math.ceil(tokens / self.keys),
        )


def cells(models: Sequence[str]) -> list[Cell]:
    """Every cell in the order of what it decides.

    First the paper's rule and the default; then densities around these, so that they can be read at
    equal time, how much density SVG2 needs, and Sol-Attn; then the other rules of the operator,
    other clusters, shorter warm-ups, and rules that nobody ships.
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

    by_tau = [
        Cell(model, rule, 0.0, *_BLOCKS, tau=tau)
        for model in models
        for tau in _TAUS
        for rule in _BY_TAU
    ]
    ordered = [
        *made([PAPER, OURS], DENSITIES, CLUSTERS),
        *made([PAPER, OURS], _OUTER, CLUSTERS),
        *made(REDUCED, DENSITIES, CLUSTERS),
        *made([DROPPING], _SVG2, [FINE]),
        *made(_BY_SHARE, DENSITIES, [_BLOCKS]),
        *by_tau,
        *made(IN_KERNELS, DENSITIES, CLUSTERS),
        *made([OURS], DENSITIES, _OTHER_CLUSTERS),
        *made([PAPER, OURS], DENSITIES, [FINE], WARM_UPS[1]),
        *made(["uniform", "values", "score", "first_order", "second_order"], DENSITIES, [FINE]),
    ]
    return list(dict.fromkeys(ordered))
