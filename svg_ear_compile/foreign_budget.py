"""Refuses the budget of another model as far as Dynamo's graph tells which model it is of."""

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
    """Raise a ValueError if the graph that Dynamo is tracing is that of another model.

    A graph whose layers have the paths of the budget is that of a whole model, and the model is
    compared. One block of a model, or a model inside of a wrapper, does not show whose it is:
    `bind`, which has the model, compares these.
    """
    whole = [site.call.node for site in sites if site.layer in budget.layers]
    model = _traced_module(whole[0]) if whole else None
    if model is not None:
        budget.check_model(fingerprint_of(model))


def _traced_module(node: Node) -> nn.Module | None:
    """The module that Dynamo's names of layers start from; None where it does not show."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    root = re.match(r"L\['(\w+)'\]", next(iter(stack.values()))[0])
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # nothing is being traced: the graph was kept
        return None
    found = None if root is None else scope.get(root[1])
    return found if isinstance(found, nn.Module) else None
