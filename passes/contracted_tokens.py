"""Products and contractions: the tokens of the result, and whether its sums go over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments
from svg_ear_compile.passes.symbolic import shape_of
from svg_ear_compile.passes.token_states import (
    LOST,
    Mixed,
    State,
    is_condition,
    is_of_an_input,
    weight,
)
from svg_ear_compile.passes.vectors import FILLED, LEARNED, Stream

if TYPE_CHECKING:
    from svg_ear_compile.passes.streams import Streams


def product(streams: Streams, node: Node, args: Arguments) -> State:
    sides = args.take("batch1", "self", "input"), args.take("batch2", "mat2", "other")
    return _of_sides(streams, node, *sides)


def sum_of_product(streams: Streams, node: Node, args: Arguments) -> State:
    """`addmm` and its kin, linear layers among them: a product added to another tensor."""
    added, *sides = (
        args.take(*names) for names in (("self", "input"), ("mat1", "batch1"), ("mat2", "batch2"))
    )
    weights = streams.one(sides[1])
    if weight(weights) == 0 or (isinstance(weights, Stream) and is_condition(weights)):
        return streams.tokenwise(node)
    found = _of_sides(streams, node, *sides)
    known = streams.one(added)
    if not is_of_an_input(known) or not is_of_an_input(found):
        return found if weight(known) == 0 else LOST
    return known if known.source is found.source else LOST


def _of_sides(streams: Streams, node: Node, first: object, second: object) -> State:
    for side, contracted in ((first, -1), (second, -2)):
        state = streams.one(side)
        if not isinstance(side, Node) or weight(state) == 0:
            continue
        if isinstance(state, Stream) and is_condition(state):
            continue
        if not isinstance(state, Mixed):
            return state
        of_sum = state.dim - len(shape_of(side) or ()) == contracted
        return LOST if of_sum else streams.like(node, side)
    return streams.tokenwise(node)


def einsum(streams: Streams, node: Node, args: Arguments) -> State:
    equation, *rest = node.args
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return LOST
    terms, result = equation.replace(" ", "").split("->")
    for term, operand in zip(terms.split(","), operands, strict=False):
        state = streams.one(operand)
        if isinstance(state, Mixed):
            letter = term[state.dim]
            return Mixed(result.index(letter), state.vector) if letter in result else LOST
        if isinstance(state, Stream) and state not in (LEARNED, FILLED) and not is_condition(state):
            return state
    return streams.tokenwise(node)


CONTRACTED: Mapping[str, Callable[[Streams, Node, Any], State]] = {
    **dict.fromkeys(("matmul", "bmm", "mm"), product),
    **dict.fromkeys(
        ("addmm", "addbmm", "baddbmm", "addmm_", "addbmm_", "baddbmm_"), sum_of_product
    ),
    "einsum": einsum,
}
"""The rule of each operation."""
