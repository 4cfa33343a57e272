"""Budgets for the small models of the tests."""

from __future__ import annotations

from typing import Any

from torch import nn

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model.budget import Budget, Choice, Schedule
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.fingerprint import fingerprint_of


def budget_for(
    model: nn.Module,
    layers: dict[str, tuple[Choice, ...]],
    tokens: int,
    schedule: Schedule | None = None,
    **fields: Any,
) -> Budget:
    """A budget that fits a model."""
    return Budget(
        budgets.VERSION, fingerprint_of(model), tokens, describe("cpu"), "density 0.2", "tuned",
        schedule or Schedule(), layers, **fields,
    )  # fmt: skip
