"""Operations that put tokens of several tensors into one: `cat`, `stack`, writes by place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.features import features_dim
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.rearranged_tokens import (
    differing,
    entries,
    index_along,
    indices,
    is_sequence,
)
from svg_ear_compile.passes.symbolic import Size, hint, hints_of, is_same, shape_of
from svg_ear_compile.passes.token_states import (
    LOST,
    Lost,
    Mixed,
    State,
    is_of_an_input,
    state_of,
    weight,
)
from svg_ear_compile.passes.unrotated import put_back_bare, rotated_from_a_place
from svg_ear_compile.passes.vectors import (
    FILLED,
    LEARNED,
    OTHER,
    Bounds,
    Chosen,
    Part,
    Placed,
    Stream,
    Vector,
    joined,
    leaves,
    size_of,
)

if TYPE_CHECKING:
    from svg_ear_compile.passes.streams import Streams

Rule = Callable[["Streams", Node, Any], Any]
PIXEL_RANK = 5
"""Dimensions of a clip: batch, channels, frames, height, width."""
# `index_put` writes to places of several dimensions, which are not followed: tokens are lost.
_INTO_PLACES = frozenset({
    "index_copy", "index_copy_", "scatter", "scatter_", "index_put", "index_put_",
    "index_add", "index_add_", "scatter_add", "scatter_add_",
})  # fmt: skip
_STACKS = {"hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2}


def joined_by_cat(streams: Streams, node: Node, args: Arguments | None) -> State:
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = node.kwargs.get("axis", dim)
    shape = shape_of(node)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
        return LOST
    return _joined(streams, node, parts, dim % len(shape), shape)


def joined_along(dim: int) -> Rule:
    """The rule of a `cat` along one dimension, which tensors of fewer dimensions do not have."""

    def rule(streams: Streams, node: Node, args: Arguments) -> State:
        parts, shape = node.args[0] if node.args else node.kwargs.get("tensors"), shape_of(node)
        if not isinstance(parts, (list, tuple)) or shape is None:
            return LOST
        if any(len(hints_of(part)) != len(shape) or dim >= len(shape) for part in parts):
            return LOST
        return _joined(streams, node, parts, dim, shape)

    return rule


def _joined(
    streams: Streams, node: Node, parts: Sequence[object], dim: int, shape: tuple[Size, ...]
) -> State:
    nodes = [part for part in parts if isinstance(part, Node) and hints_of(part) != (0,)]
    states = [streams.one(part) for part in nodes]
    real = [s for s in states if s is not None and s not in (FILLED, LEARNED)]
    if any(isinstance(s, Lost) for s in real):
        return LOST
    single = [s for s in real if isinstance(s, Stream)]
    of_features = dim == len(shape) - 1 and all(features_dim(n) in (None, dim) for n in nodes)
    if not real or of_features or len(shape) >= PIXEL_RANK:
        # Nothing, features, or parts of a clip.
        first = next((s for s in [*real, *states] if s is not None), None)
        return first if not isinstance(first, Mixed) or first.dim != dim else LOST
    alike = len({(s.source, s.kind) for s in single}) == 1 and len(single) == len(real)
    if alike and None not in states and LEARNED not in states:
        return put_back_bare(streams, nodes, dim) or single[0]
    elsewhere = [s for s in real if isinstance(s, Mixed) and s.dim != dim]
    if elsewhere:  # along the batch, for example
        return elsewhere[0] if all(s == elsewhere[0] for s in real) else LOST
    vectors = [streams.along(part, dim) for part in nodes]
    known = [vector for vector in vectors if vector is not None]
    return state_of(dim, joined(known)) if len(known) == len(vectors) else LOST


def stacked(streams: Streams, node: Node, args: Arguments) -> State:
    parts, dim = node.args[0] if node.args else node.kwargs.get("tensors"), args.take("dim")
    shape = shape_of(node)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
        return LOST
    states = [s for s in map(streams.one, parts) if weight(s) > 0]
    if not states or any(s != states[0] for s in states):
        return LOST if states else None
    found = states[0]
    if isinstance(found, Mixed):
        return Mixed(found.dim + (dim % len(shape) <= found.dim), found.vector)
    return found


def placed(streams: Streams, node: Node, args: Arguments) -> State:
    """`index_copy` and its kin: tokens written to places that an index tensor says."""
    name, base, dim = operation(node).rstrip("_"), args.take("self"), args.take("dim")
    index, values = args.take("index"), args.take("source", "src")
    rank = len(hints_of(base)) if isinstance(base, Node) else 0
    if name in ("scatter", "scatter_add") and isinstance(dim, int):
        whole = isinstance(index, Node) and isinstance(values, Node) and (
            hints_of(index) == hints_of(values)
        )  # fmt: skip
        index = index_along(index, dim % max(rank, 1), rank) if whole else None
    held = streams.one(base)
    if name.endswith("_add") and not _has_filling(held):
        if not (isinstance(held, Stream) and is_of_an_input(new := streams.one(values))):
            return held  # what is added to tokens, such as their timestep, makes no others of them
        # Some places of one stream may be filling.
        return held if new.source is held.source else _and_in_place(streams, node, base, LOST)
    state = _write(streams, base, dim, index, values)
    return _and_in_place(streams, node, base, state)


def by_mask(streams: Streams, node: Node, args: Arguments) -> State:
    """`masked_scatter`: tokens written, in order, to where a mask is True."""
    base, mask, values = args.take("self"), args.take("mask"), args.take("source")
    shape = hints_of(base) if isinstance(base, Node) else ()
    found: State = LOST
    for dim in range(1, len(shape) - 1):
        at = index_along(mask, dim, len(shape))
        if at is not None and len(hints_of(at)) > len(shape) - 1 - dim and isinstance(values, Node):
            what = streams.one(values)
            # There may be more tokens than places: which are written is known of one stream alone.
            found = LOST if isinstance(what, Mixed) else _write(streams, base, dim, at, values)
            break
    return _and_in_place(streams, node, base, found)


def _and_in_place(streams: Streams, node: Node, base: object, state: State) -> State:
    """The state of a result, which is that of `base` too where the operation wrote into it."""
    if operation(node).endswith("_") and isinstance(base, Node):
        streams.of[base] = state
    return state


def chosen(streams: Streams, node: Node, args: Arguments) -> State:
    """`where`: tokens of two tensors, by a mask that is the same for all features of a token."""
    mask, *both = (args.take(name) for name in ("condition", "self", "other"))
    states, shape = [streams.one(operand) for operand in both], shape_of(node) or ()
    found = streams.tokenwise(node)
    is_overlaid = isinstance(found, Mixed) and found not in states
    if is_overlaid or states[0] == states[1] or min(map(weight, states)) < 3:
        return found
    for dim in range(1, len(shape) - 1):
        at = index_along(mask, dim, len(shape))
        one, other = (_spread(streams, operand, dim, shape) for operand in both)
        if at is not None and one is not None and other is not None:
            return state_of(dim, Chosen(at, one, other))
    return LOST


def _spread(streams: Streams, operand: object, dim: int, shape: tuple[Size, ...]) -> Vector | None:
    """The tokens of an operand along a dimension of a result of this shape.

    One token may stand for all of them.
    """
    sizes, count = shape_of(operand) if isinstance(operand, Node) else None, shape[dim]
    if not isinstance(operand, Node) or sizes is None or len(sizes) != len(shape):
        return None
    found = streams.along(operand, dim)
    if isinstance(found, Part) and found.count == 1 and isinstance(count, int):
        return replace(found, count=count)
    return found if is_same(sizes[dim], count) else None


def slice_written(streams: Streams, node: Node, args: Arguments) -> State:
    """`slice_scatter`: a copy of a tensor with a slice of it written."""
    base, values, dim = args.take("self"), args.take("src"), args.take("dim")
    where = slice(*(args.take(name) for name in ("start", "end", "step")))
    return _write(streams, base, dim, where, values)


def _has_filling(state: State) -> bool:
    """True if some places of a tensor hold no tokens yet."""
    if isinstance(state, Mixed):
        return any(part.stream == FILLED for part in leaves(state.vector))
    return state is None or state == FILLED


def setitem(streams: Streams, node: Node, args: Arguments) -> None:
    _set(streams, *node.args[:3])


def _set(streams: Streams, base: object, index: object, values: object) -> None:
    shape = shape_of(base) if isinstance(base, Node) else None
    if not isinstance(base, Node) or shape is None:
        return
    where = indices(entries(index, of_units=slice(None)), len(shape))
    if None in where or any(isinstance(x, Node) and not is_sequence(x) for x in where):
        streams.of[base] = LOST
        return
    # The only sample of a batch is all of it.
    where = [slice(None) if shape[d] == 1 and w in (0, -1) else w for d, w in enumerate(where)]
    cut = [d for d, entry in enumerate(where) if entry != slice(None)]
    if all(d == len(shape) - 1 for d in cut):  # all tokens, some of their features
        state = streams.one(values)
        streams.of[base] = state if state is not None else streams.one(base)
        return
    tokens = [d for d in cut if d != len(shape) - 1]
    if len(tokens) != 1:
        known = streams.one(base)
        streams.of[base] = known if known == streams.one(values) else LOST
        return
    streams.of[base] = _write(streams, base, tokens[0], where[tokens[0]], values)


def copied(streams: Streams, node: Node, args: Arguments) -> State:
    """`copy_` into a tensor or a view of one."""
    into, values = args.take("self"), args.take("other", "src", "source")
    state = streams.one(values)
    if isinstance(into, Node) and operation(into) == "getitem":
        _set(streams, into.args[0], into.args[1], values)  # a view of the tensor
    elif isinstance(into, Node) and operation(into) == "narrow":
        _set_narrow(streams, into, values)
    streams.of[into] = state
    return state


def _set_narrow(streams: Streams, view: Node, values: object) -> None:
    """Tokens written into what `narrow` shows of a tensor."""
    args = arguments(view)
    dim, start, length = (args.take(n) if args else None for n in ("dim", "start", "length"))
    base = view.args[0]
    rank = len(shape_of(base) or ()) if isinstance(base, Node) else 0
    if isinstance(dim, int) and isinstance(start, int) and isinstance(length, int) and rank:
        where = [slice(None)] * rank
        where[dim] = slice(start, start + length)
        _set(streams, base, tuple(where), values)


def _write(streams: Streams, base: object, dim: object, where: object, values: object) -> State:
    shape = shape_of(base) if isinstance(base, Node) else None
    if not isinstance(base, Node) or shape is None or not isinstance(dim, int):
        return LOST
    dim %= len(shape)
    known, new = streams.one(base), streams.one(values)
    if isinstance(values, Node) and isinstance(new, Stream) and new == known:
        return rotated_from_a_place(streams, base, dim, where) or known
    into = streams.along(base, dim)
    if not isinstance(values, Node):
        return known  # a number
    if isinstance(where, slice):
        if where.step not in (None, 1):
            return LOST
        at: Bounds | Node = (where.start, where.stop)
    elif isinstance(where, Node) and len(differing(where)) <= 1:
        at = where
    else:
        return LOST
    what = _to_write(streams, values, dim - len(shape), _places_of(where, shape[dim]))
    if into is None or what is None:
        return LOST
    return state_of(dim, Placed(into, at, what))


def _places_of(where: slice | Node, size: Size) -> int | None:
    """How many places a slice of a dimension or an index says; None where that is not known."""
    if isinstance(where, slice):
        fixed = all(isinstance(n, (int, NoneType)) for n in (size, where.start, where.stop))
        return len(range(size)[where]) if fixed else None
    value = where.meta["example_value"]
    sizes = [hint(value.shape[dim]) for dim in differing(where)]
    return None if value.dtype == torch.bool else next(iter(sizes), 1)


def _to_write(streams: Streams, values: Node, dim: int, places: int | None) -> Vector | None:
    """The tokens along `dim`, counted from the last, that are written to so many places.

    One token may be written to all of them.
    """
    state, written = streams.one(values), shape_of(values) or ()
    what = streams.along(values, dim + len(written)) if -dim <= len(written) else None
    if -dim > len(written) and not isinstance(state, (Mixed, Lost)):
        what = Part(1, OTHER if state is None else state)
    if isinstance(what, Part) and what.count == 1:
        return None if places is None else replace(what, count=places)
    known = None if what is None else hint(size_of(what))
    return None if places is not None and known not in (None, places) else what


JOINED: Mapping[str, Rule] = {
    "cat": joined_by_cat,
    **{name: joined_along(dim) for name, dim in _STACKS.items()},
    "stack": stacked,
    "masked_scatter": by_mask,
    "masked_scatter_": by_mask,
    "slice_scatter": slice_written,
    "where": chosen,
    **dict.fromkeys(_INTO_PLACES, placed),
    "setitem": setitem,
    "copy_": copied,
}
"""The rule of each operation."""
