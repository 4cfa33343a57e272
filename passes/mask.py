"""What a mask may be: key padding by its shape, something its values have to prove, or neither."""

from __future__ import annotations

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.operation import CASTS, COPIES, operation
from svg_ear_compile.passes.site import Call, Operand, Padding, Reason, Size
from svg_ear_compile.passes.symbolic import hint, hints_of

_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "sub"})
_TRIANGLES = frozenset({"tril", "triu", "tril_", "triu_"})


def judge_mask(
    flow: Dataflow, call: Call, q_shape: tuple[Size, ...], k_shape: tuple[Size, ...]
) -> Reason | Padding | None:
    """Why the mask of a call is no padding, or how it is made of padding, or None: it has to prove.

    A bool mask without a row for each query is key padding by its shape, and so is one that the
    graph makes of such masks and of their transposes. A mask that is added to the logits can hold
    any bias, a square one can hold causality: where the graph does not show that it does, the
    values are looked at, at run time.
    """
    mask = call.mask
    assert mask is not None
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
    if is_bool and rows == 1:
        return Padding(keys=(mask.tensor,))
    if is_bool and not mask.inverted:
        padding = _factors(flow, mask.tensor, call.node)
        if padding is not None:
            return padding
    if rows != 1 and _is_positional(flow, mask.tensor.node):
        return Reason.CAUSAL
    return Reason.MASK if _is_learned(flow, mask.tensor.node) else None


def _factors(flow: Dataflow, mask: Operand, reader: Node) -> Padding | None:
    """A square mask as padding of keys and of queries, as far as the graph shows it."""
    node, dims = mask.node, mask.dims
    shape = hints_of(node)
    if len(shape) != len(dims) or flow.writes_before(node, reader):
        return None
    extents = dict(zip(dims, shape, strict=True))
    if extents.get("q", 1) == 1:
        return Padding(keys=(mask,))
    if extents.get("k", 1) == 1:
        return Padding(rows=(mask,))
    name = operation(node)
    sources = [source for source in node.args if isinstance(source, Node)]
    if name in ("repeat", "expand", "expand_as") or name in CASTS | COPIES:
        value = sources[0].meta.get("example_value")
        exact = isinstance(value, torch.Tensor) and not value.dtype.is_floating_point
        return _factors(flow, Operand(sources[0], dims), reader) if exact else None
    if name in ("transpose", "mT") and (swapped := _transposed_dims(node, dims)) is not None:
        return _factors(flow, Operand(sources[0], swapped), reader)
    if name == "logical_and" and len(sources) == 2:
        found = [_factors(flow, Operand(source, dims), reader) for source in sources]
        if any(padding is None for padding in found):
            return None
        parts = [padding for padding in found if padding is not None]
        return Padding(*(tuple(sum((getattr(p, f) for p in parts), ())) for f in ("keys", "rows")))
    return None


def _transposed_dims(node: Node, dims: str) -> str | None:
    """Letters of the operand of a transpose whose result has `dims`."""
    first, second = (-2, -1) if operation(node) == "mT" else node.args[1:3]
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    letters = list(dims)
    letters[first], letters[second] = letters[second], letters[first]
    return "".join(letters)


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
    """True if a parameter or a projection reaches the mask: a bias, not padding."""
    return any(
        projected_input(node) is not None
        or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        for node in flow.backward(mask, lambda n: projected_input(n) is not None)
    )
