"""Operations that put tokens of several tensors into one: `cat`, `stack`, writes by place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.rearranged_tokens import indices, unexpanded
from svg_ear_compile.passes.symbolic import hints_of, shape_of
from svg_ear_compile.passes.token_states import LOST, Lost, Mixed, State, state_of, weight
from svg_ear_compile.passes.unrotated import put_back_bare, rotated_from_a_place
from svg_ear_compile.passes.vectors import (
    FILLED,
    LEARNED,
    Bounds,
    Placed,
    Stream,
    joined,
    leaves,
)

if TYPE_CHECKING:
    from svg_ear_compile.passes.streams import Streams

PIXEL_RANK = 5
"""Dimensions of a clip: batch, channels, frames, height, width."""
# The last four write to places of several dimensions, which are not followed: tokens are lost.
_INTO_PLACES = frozenset({
    "index_copy", "index_copy_", "scatter", "scatter_", "index_put", "index_put_", "masked_scatter",
    "masked_scatter_", "index_add", "index_add_", "scatter_add", "scatter_add_",
})  # fmt: skip


def joined_by_cat(streams: Streams, node: Node, args: Arguments | None) -> State:
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = node.kwargs.get("axis", dim)
    shape = shape_of(node)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
        return LOST
    dim %= len(shape)
    nodes = [part for part in parts if isinstance(part, Node) and hints_of(part) != (0,)]
    states = [streams.one(part) for part in nodes]
    real = [s for s in states if s is not None and s not in (FILLED, LEARNED)]
    if any(isinstance(s, Lost) for s in real):
        return LOST
    single = [s for s in real if isinstance(s, Stream)]
    if not real or dim == len(shape) - 1 or len(shape) >= PIXEL_RANK:
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
    base, dim = args.take("self"), args.take("dim")
    index, values = args.take("index"), args.take("source", "src")
    if isinstance(index, Node) and operation(index) in ("expand", "expand_as"):
        index = unexpanded(index)
    held = streams.one(base)
    if operation(node).rstrip("_").endswith("_add") and not _has_filling(held):
        return held  # what is added to tokens, such as their timestep, makes no others of them
    state = _write(streams, base, dim, index, values)
    if operation(node).endswith("_") and isinstance(base, Node):
        streams.of[base] = state
    return state


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
    where = list(indices(index if isinstance(index, tuple) else (index,), len(shape)))
    if None in where:
        streams.of[base] = LOST
        return
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
    for other in streams.flow.sharing(into):
        known = streams.of.get(other)
        viewed = isinstance(into, Node) and other in into.args[:1]
        if other is not into and not viewed and known not in (None, FILLED, state):
            streams.of[other] = LOST
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
    if isinstance(values, Node):
        written = shape_of(values) or ()
        what = streams.along(values, dim - len(shape) + len(written))
    else:
        return known  # a number
    if isinstance(where, slice):
        if where.step not in (None, 1):
            return LOST
        at: Bounds | Node = (where.start, where.stop)
    elif isinstance(where, Node) and len(shape_of(where) or ()) == 1:
        at = where
        if streams.flow.is_ever_written(where):
            return LOST
    else:
        return LOST
    if into is None or what is None:
        return LOST
    return state_of(dim, Placed(into, at, what))


JOINED: Mapping[str, Callable[[Streams, Node, Any], Any]] = {
    "cat": joined_by_cat,
    "stack": stacked,
    **dict.fromkeys(_INTO_PLACES, placed),
    "setitem": setitem,
    "copy_": copied,
}
"""The rule of each operation."""
