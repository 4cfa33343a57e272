"""Shapes as Dynamo traced them, read without specialising a symbol."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.experimental.sym_node import SymNode

Size = int | torch.SymInt


def hint(size: Size | None) -> int | None:
    """The traced value of a size; None where it is known at run time only.

    The ragged size of a nested tensor has no value at all.
    """
    if size is None or isinstance(size, int):
        return size
    value = size.node.hint if isinstance(size.node, SymNode) else None
    return value if isinstance(value, int) else None


def is_same(size: Size, other: Size) -> bool:
    """True if two sizes are one number or one expression; guards nothing."""
    # A sum whose symbols cancel is a symbol without a hint still, and equals a number.
    return expression(size) == expression(other) or hint(size) == hint(other) is not None


def expression(size: Size) -> object:
    """What stands for the size in comparisons: equal for one number or one expression."""
    if isinstance(size, int):
        return size
    return size.node.expr if isinstance(size.node, SymNode) else size.node


def shape_of(node: Node) -> tuple[Size, ...] | None:
    """Shape of the node's tensor, or None for another value."""
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def hints_of(node: Node) -> tuple[int | None, ...]:
    """The traced shape of the node's tensor, () for another value."""
    return tuple(hint(size) for size in shape_of(node) or ())
