"""What a mask may be: key padding by its shape, something its values have to prove, or neither."""

from __future__ import annotations

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Mask, Reason, Size
from svg_ear_compile.passes.symbolic import hint

_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_TRIANGLES = frozenset({"tril", "triu", "tril_", "triu_"})


def judge_mask(
    flow: Dataflow, mask: Mask, q_shape: tuple[Size, ...], k_shape: tuple[Size, ...]
) -> Reason | bool:
    """Why a mask is no key padding, else whether its values have to prove that it is.

    A bool mask without a row for each query is key padding by its shape. A mask that is added to
    the logits can hold any bias, a square one can hold causality: where the graph does not show
    that it does, the values are looked at, at run time.
    """
    value = mask.tensor.node.meta.get("example_value")
    sizes = mask.tensor.sizes("bhqk")
    if not isinstance(value, torch.Tensor) or sizes is None:
        return Reason.MASK
    is_bool = value.dtype == torch.bool
    if not (is_bool or value.dtype.is_floating_point) or (mask.inverted and not is_bool):
        return Reason.MASK
    batch, heads, rows, keys = (hint(size) for size in sizes)
    fits = (
        batch in (1, hint(q_shape[0]))
        and heads in (1, hint(k_shape[1]))
        and rows in (1, hint(q_shape[2]))
        and keys == hint(k_shape[2])
    )
    if not fits:
        return Reason.MASK
    if is_bool and rows == 1 and not mask.finite_fill:
        return False
    if rows != 1 and _is_positional(flow, mask.tensor.node):
        return Reason.CAUSAL
    if not is_bool and _is_learned(flow, mask.tensor.node):
        return Reason.MASK
    return True


def _is_positional(flow: Dataflow, mask: Node) -> bool:
    """True if positions of queries and keys are compared on the way to the mask.

    Causal and windowed masks are made so; padding compares a position with a length.
    """
    for node in flow.backward(mask, lambda n: projected_input(n) is not None):
        name = operation(node)
        if name in _TRIANGLES:
            return True
        if name in _COMPARISONS:
            sides = [a for a in node.args[:2] if isinstance(a, Node)]
            if len(sides) == 2 and all(_counts(flow, side) for side in sides):
                return True
    return False


def _counts(flow: Dataflow, node: Node) -> bool:
    return any(
        operation(source) == "arange"
        for source in flow.backward(node, lambda n: projected_input(n) is not None)
    )


def _is_learned(flow: Dataflow, mask: Node) -> bool:
    """True if a parameter reaches the mask: a bias, such as one for each relative position."""
    return any(
        isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        for node in flow.backward(mask, lambda n: projected_input(n) is not None)
    )
