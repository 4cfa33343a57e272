"""Refuses the budget of another model, if Dynamo's graph shows which model is compiled."""

from __future__ import annotations

from collections.abc import Sequence

from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.passes.site import AttentionSite
from svg_ear_compile.tracing import traced_module


def refuse_foreign(budget: Budget, sites: Sequence[AttentionSite]) -> None:
    """Raise a ValueError if Dynamo is tracing another model than the budget's.

    If a layer of the graph has a path of the budget, the graph is that of a whole model, and the
    model's fingerprint is compared. A graph of one block, or of a model inside a wrapper, does not
    show the model; `bind` compares it there.
    """
    whole = [site.call.node for site in sites if site.layer in budget.layers]
    model = traced_module(whole[0]) if whole else None
    if model is not None:
        budget.check_model(fingerprint_of(model))
