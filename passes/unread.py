"""Attention that is seen for what it is although something in it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, is_weight
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.operation import is_foreign, operation
from svg_ear_compile.passes.products import factors, is_product
from svg_ear_compile.passes.site import Call, Operand, Reason
from svg_ear_compile.passes.symbolic import Size, expression, hint

_FARTHEST = 48


# What takes a part of a tensor, or makes it a part of another.
_CUTS = frozenset(
    {"cat", "getitem", "slice", "narrow", "split", "split_with_sizes", "chunk", "pad"}
)


_POWERS = {"pow": 0, "float_power": 0, "__rpow__": 1, "rpow": 1}
"""Powers, and which argument is the base."""


def may_be_softmax(node: Node) -> bool:
    """True for what a softmax may be made with: an exponential, or a function nobody knows."""
    name = operation(node).rstrip("_")
    if name in ("exp", "exp2", "expm1"):
        return True
    if name in _POWERS:
        exponent = node.args[1 - _POWERS[name]] if len(node.args) == 2 else None
        return isinstance(exponent, Node) and is_plain(exponent.meta.get("example_value"))
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    return (is_foreign(node.target) or name == "") and _keeps_size(node)


def _keeps_size(node: Node) -> bool:
    """True if the result is as large as the first input, at least a matrix of floats."""
    first = next(iter(node.all_input_nodes), None)
    value = None if first is None else first.meta.get("example_value")
    if first is None or not is_plain(value) or value.dim() < 2 or not value.is_floating_point():
        return False
    return _is_as_large(node, first)


def unread(softmax: Node, flow: Dataflow) -> Call | None:
    """What may be a softmax between two products, with something that nothing reads."""
    before = _nearby(softmax, flow.sources, of_its_size=True)
    after = _nearby(softmax, flow.readers)
    if before is None or after is None:
        return None
    operands = [Operand(node, "") for node in factors(before)]
    values = [Operand(node, "") for node in factors(after)]
    steps = (before, softmax, after)
    return Call(after, steps, operands[0], operands[-1], values[-1], reason=Reason.PATTERN)


def _nearby(
    start: Node,
    neighbours: Callable[[Node], Iterable[Node]],
    of_its_size: bool = False,
) -> Node | None:
    """The nearest product that tensors of as many elements as `start` has lead to, or None.

    An attention sink is a column more: where something is cut off or put to it, the larger part is
    followed.
    """
    queue, seen = [start], {start}
    for node in queue:
        for other in neighbours(node):
            same = _is_as_large(node, other)
            if _is_inner_product(other) and (same or not of_its_size):
                return other
            if other not in seen and same and len(seen) < _FARTHEST:
                seen.add(other)
                queue.append(other)
    return None


def _is_inner_product(node: Node) -> bool:
    """True for a product of two activations."""
    return is_product(node) and not any(map(is_weight, factors(node)))


def _is_as_large(node: Node, other: Node) -> bool:
    one, two = _numel(node), _numel(other)
    if one is None or two is None:
        return False
    if expression(one) == expression(two):
        return True
    if not {operation(node), operation(other)} & _CUTS:
        return False
    small, large = sorted(hint(size) or 0 for size in (one, two))
    return 2 * small > large


def _numel(node: Node) -> Size | None:
    """Number of elements, of a list together; None for anything but tensors."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (list, tuple)) else [value]
    plain = [_physical(part) for part in parts if isinstance(part, Tensor)]
    if len(plain) < len(parts) or not all(map(is_plain, plain)):
        return None
    return sum(part.numel() for part in plain)


def _physical(tensor: Tensor) -> Tensor:
    """The tensor of all samples, of one inside of vmap."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
