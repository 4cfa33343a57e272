"""Refuses the budget of another model, if Dynamo's graph shows which model is compiled."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import Node

from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.passes.site import AttentionSite


def refuse_foreign(budget: Budget, sites: Sequence[AttentionSite]) -> None:
    """Raise a ValueError if Dynamo is tracing another model than the budget's.

    If a layer of the graph has a path of the budget, the graph is that of a whole model, and the
    model's fingerprint is compared. A graph of one block, or of a model inside a wrapper, does not
    show the model; `bind` compares it there.
    """
    whole = [site.call.node for site in sites if site.layer in budget.layers]
    model = _traced_module(whole[0]) if whole else None
    if model is not None:
        budget.check_model(fingerprint_of(model))


def _traced_module(node: Node) -> nn.Module | None:
    """The module at the root of Dynamo's layer names; None if Dynamo's state does not show it."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    root = re.match(r"L\['(\w+)'\]", next(iter(stack.values()))[0])
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # Dynamo traces nothing now: the graph was traced before
        return None
    found = None if root is None else scope.get(root[1])
    return found if isinstance(found, nn.Module) else None
