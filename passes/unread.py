"""Attention that is seen for what it is although something in it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.products import is_product
from svg_ear_compile.passes.site import Call, Operand, Reason
from svg_ear_compile.passes.symbolic import expression

_FARTHEST = 48


def unread(softmax: Node, flow: Dataflow) -> Call | None:
    """A softmax between two products, with a step or a product that nothing reads."""
    before = _nearby(softmax, flow.sources, of_its_size=True)
    after = _nearby(softmax, lambda node: node.users)
    if before is None or after is None:
        return None
    operands = [Operand(node, "") for node in before.all_input_nodes]
    values = [Operand(node, "") for node in after.all_input_nodes]
    steps = (before, softmax, after)
    return Call(after, steps, operands[0], operands[-1], values[-1], reason=Reason.PATTERN)


def _nearby(
    start: Node,
    neighbours: Callable[[Node], Iterable[Node]],
    of_its_size: bool = False,
) -> Node | None:
    """The nearest product that tensors of as many elements as `start` has lead to, or None."""
    size, queue, seen = _numel(start), [start], {start}
    for node in queue:
        for other in neighbours(node):
            if is_product(other) and (not of_its_size or _numel(other) == size):
                return other
            if other not in seen and _numel(other) == size and len(seen) < _FARTHEST:
                seen.add(other)
                queue.append(other)
    return None


def _numel(node: Node) -> object:
    """Number of elements as an expression, of a list together; None for anything else."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (list, tuple)) else [value]
    plain = [part for part in parts if is_plain(part)]
    if not plain or len(plain) < len(parts):
        return None
    return expression(sum(part.numel() for part in plain))
