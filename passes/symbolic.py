"""Shapes as Dynamo traced them, read without specialising a symbol."""

from __future__ import annotations

from typing import TypeGuard

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.sym_node import SymNode

Size = int | torch.SymInt
_MANY = 1 << 20


def hint(size: Size | None) -> int | None:
    """The traced value of a size; None where it is known at run time only.

    The ragged size of a nested tensor has no value at all.
    """
    if size is None or isinstance(size, int):
        return size
    value = size.node.hint if isinstance(size.node, SymNode) else None
    return value if isinstance(value, int) else None


def estimate(size: Size) -> int:
    """The traced value of a size; what is known at run time only counts as many, to compare by."""
    known = hint(size)
    if known is not None:
        return known
    expr = expression(size)
    if not isinstance(expr, sympy.Expr):
        return _MANY
    value = expr.subs(dict.fromkeys(expr.free_symbols, _MANY))
    return int(value) if value.is_number else _MANY


def is_same(size: Size, other: Size) -> bool:
    """True if two sizes are one number or one expression; guards nothing."""
    # A sum whose symbols cancel is a symbol without a hint still, and equals a number.
    return expression(size) == expression(other) or hint(size) == hint(other) is not None


def expression(size: Size) -> object:
    """What stands for the size in comparisons: equal for one number or one expression."""
    if isinstance(size, int):
        return size
    return size.node.expr if isinstance(size.node, SymNode) else size.node


def known(value: object) -> object:
    """The number in place of a node of which the graph was traced for that number alone.

    Floats that a function reads from outside are symbols where shapes are dynamic; 0.0 and other
    numbers that the trace has asked for are none.
    """
    symbol = value.meta.get("example_value") if isinstance(value, Node) else None
    if not is_symbol(symbol):
        return value
    expr = symbol.node.expr if isinstance(symbol.node, SymNode) else None
    if isinstance(symbol, torch.SymInt):
        return int(expr) if isinstance(expr, sympy.Integer) else value
    return float(expr) if isinstance(expr, sympy.Number) else value


def is_symbol(value: object) -> TypeGuard[torch.SymInt | torch.SymFloat]:
    """True for a number that the graph is told at run time."""
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def shape_of(node: Node) -> tuple[Size, ...] | None:
    """Shape of the node's tensor, or None for another value."""
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def rank_of(node: Node) -> int:
    """Number of dimensions of the node's tensor, -1 for another value."""
    shape = shape_of(node)
    return -1 if shape is None else len(shape)


def hints_of(node: Node) -> tuple[int | None, ...]:
    """The traced shape of the node's tensor, () for another value."""
    return tuple(hint(size) for size in shape_of(node) or ())
