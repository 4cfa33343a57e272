"""Operations that cut, join or reorder the tokens of a mixture, and do the same to its streams.

Every rule gets the call, its arguments, the state of its tensor, and that tensor's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments
from svg_ear_compile.passes.operation import CASTS, COPIES, RESHAPES, operation
from svg_ear_compile.passes.permutations import PERMUTATIONS, permutation
from svg_ear_compile.passes.symbolic import Size, hint, hints_of, is_same, shape_of
from svg_ear_compile.passes.token_states import LOST, Mixed, State, state_of, tokens_of
from svg_ear_compile.passes.vectors import (
    FILLED,
    Flipped,
    Part,
    Rolled,
    Taken,
    TokenCount,
    Vector,
    cut,
    joined,
)

Shape = tuple[Size, ...]
Rule = Callable[[Node, Arguments, Mixed, Shape], Any]


def reshaped(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    after = shape_of(node)
    dim = None if after is None else _place_after(shape, state.dim, after)
    if dim is not None:
        return Mixed(dim, state.vector)
    return LOST if after is None else _row_by_row(state, shape, after)


def _row_by_row(state: Mixed, before: Shape, after: Shape) -> State:
    """Tokens of every frame put one after the other, or the same tokens of each taken apart."""
    known, sizes = ([n for n in shape if isinstance(n, int)] for shape in (before, after))
    if len(known) < len(before) or len(sizes) < len(after) or 0 in known:
        return LOST
    tokens, inside = known[state.dim], math.prod(known[state.dim + 1 :])
    step = math.prod(sizes)
    for dim, size in enumerate(sizes):
        step = step // size
        if step != inside:
            continue
        if size % tokens == 0:
            return state_of(dim, joined([state.vector] * (size // tokens)))
        rows = tokens // size if tokens % size == 0 else 0
        parts = [cut(state.vector, r * size, (r + 1) * size, None, None) for r in range(rows)]
        return state_of(dim, parts[0]) if parts and parts == parts[:1] * rows else LOST
    return LOST


def permuted(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    order = permutation(node)
    return LOST if order is None else Mixed(order.index(state.dim), state.vector)


def indexed(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    if shape_of(node) is None:
        return None
    dim, at = 0, 0
    index: Any = node.args[1]
    if operation(node) == "index":  # of ATen: None is a whole dimension there
        index = tuple(slice(None) if entry is None else entry for entry in index)
    for entry in indices(entries(index, of_units=0), len(shape)):
        if entry is None:
            at += 1
            continue
        if dim == state.dim:
            return state_of(at, _taken(state.vector, entry, tokens_of(node, at)))
        if isinstance(entry, slice):
            at += 1
        elif not isinstance(entry, int):
            return LOST
        dim += 1
    return Mixed(at + state.dim - dim, state.vector)


def selected(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    dim, index = args.take("dim"), args.take("index")
    if not isinstance(dim, int):
        return LOST
    dim %= len(shape)
    if operation(node) == "select":
        return LOST if dim == state.dim else Mixed(state.dim - (dim < state.dim), state.vector)
    if dim != state.dim:
        return state
    return state_of(dim, _taken(state.vector, index, tokens_of(node, dim)))


def narrowed(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    dim, start = args.take("dim"), args.take("start")
    if not isinstance(dim, int):
        return LOST
    if dim % len(shape) != state.dim:
        return state
    if operation(node) == "slice":
        stop, step = args.take("end"), args.take("step")
    elif isinstance(start, int) and isinstance(length := args.take("length"), int):
        # Up to the end, a negative start would stop at 0.
        stop, step = None if start + length == 0 else start + length, 1
    else:
        return LOST
    taken = _taken(state.vector, slice(start, stop, step), tokens_of(node, state.dim))
    return state_of(state.dim, taken)


def gathered(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    """Tokens taken by an index that is the same for all their features."""
    dim, index = args.take("dim"), args.take("index", "indices")
    if not isinstance(dim, int):
        return LOST
    if dim % len(shape) != state.dim:
        return state
    index = index_along(index, state.dim, len(shape))
    if index is None:
        return LOST
    return Mixed(state.dim, Taken(state.vector, index, tokens_of(node, state.dim)))


def index_along(index: object, dim: int, rank: int) -> Node | None:
    """An index or a mask, if it is the same along every other dimension than `dim`.

    Args:
        index: aligned with the last of `rank` dimensions, maybe expanded to them.
        dim: the dimension along which it says places.
    """
    if not isinstance(index, Node) or shape_of(index) is None:
        return None
    differs, sizes = differing(index), hints_of(index)
    along = dim - rank
    if -along > len(sizes) or not differs <= {along}:
        return None
    return index if along in differs or sizes[along] == 1 else None


def differing(index: Node) -> frozenset[int]:
    """Dimensions, from the last, along which the elements of a tensor may differ."""
    name, sizes = operation(index), hints_of(index)
    source = index.args[0] if index.args else None
    if not isinstance(source, Node) or name not in _REPEATS | _ELEMENTWISE:
        return frozenset(d - len(sizes) for d, size in enumerate(sizes) if size != 1)
    before = hints_of(source)
    pairs = {-d: (before[-d], sizes[-d]) for d in range(1, len(before) + 1)}
    return differing(source) | {d for d, (one, other) in pairs.items() if one not in (1, other)}


_REPEATS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})
_ELEMENTWISE = CASTS | COPIES | {"logical_not", "long", "int"}


def split(node: Node, args: Arguments, state: Mixed, shape: Shape) -> list[State]:
    values, dim = node.meta["example_value"], args.take("dim")
    if not isinstance(dim, int):
        return [LOST] * len(values)
    dim %= len(shape)
    if operation(node) == "unbind":
        kept = Mixed(state.dim - (dim < state.dim), state.vector)
        return [LOST if dim == state.dim else kept] * len(values)
    if dim != state.dim:
        return [state] * len(values)
    found: list[State] = []
    start: Size = 0
    for value in values:
        size = value.shape[dim]
        stop = start + size
        count = size if isinstance(size, int) else None
        found.append(state_of(dim, cut(state.vector, start, stop, None, count)))
        start = stop
    return found


def flipped(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    dims = args.take("dims", "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        return LOST
    if state.dim not in [d % len(shape) for d in dims]:
        return state
    return Mixed(state.dim, Flipped(state.vector))


def rolled(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    # One number in place of a list, as `roll` takes them, is in no schema.
    given = {**dict(zip(("self", "shifts", "dims"), node.args, strict=False)), **node.kwargs}
    shifts, dims = (_listed(given.get(name)) for name in ("shifts", "dims"))
    pairs = list(zip(shifts, dims, strict=False))
    for shift, dim in pairs:
        if isinstance(dim, int) and dim % len(shape) == state.dim:
            return Mixed(state.dim, Rolled(state.vector, shift))
    return state if pairs and all(isinstance(d, int) for _, d in pairs) else LOST


def padded(node: Node, args: Arguments, state: Mixed, shape: Shape) -> State:
    pads, mode = args.take("pad"), args.take("mode")
    if not isinstance(pads, (tuple, list)) or mode not in (None, "constant"):
        return LOST
    place = 2 * (len(shape) - 1 - state.dim)
    if place >= len(pads):
        return state
    before, after = pads[place : place + 2]
    if not (isinstance(before, int) and isinstance(after, int)) or min(before, after) < 0:
        return LOST
    return state_of(state.dim, joined((Part(before, FILLED), state.vector, Part(after, FILLED))))


_BY_INDEX = frozenset({"gather", "take_along_dim"})
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
REARRANGED: Mapping[str, Rule] = {
    **dict.fromkeys(RESHAPES, reshaped),
    **dict.fromkeys(PERMUTATIONS, permuted),
    **dict.fromkeys(_SPLITS, split),
    "getitem": indexed,
    "index": indexed,
    "narrow": narrowed,
    "slice": narrowed,
    "select": selected,
    "index_select": selected,
    **dict.fromkeys(_BY_INDEX, gathered),
    "flip": flipped,
    "roll": rolled,
    "pad": padded,
}
"""The rule of each operation; the first of its tensors is the one that it rearranges."""


def entries(index: object, of_units: int | slice) -> tuple[object, ...]:
    """The entries of an index; a mask that is longer than 1 in its last dimension alone is of that.

    Args:
        of_units: the entry of the mask's other dimensions.
    """
    found: list[object] = []
    for entry in index if isinstance(index, tuple) else (index,):
        if is_sequence(entry):
            found += [of_units] * (len(shape_of(entry) or ()) - 1)
        found.append(entry)
    return tuple(found)


def is_sequence(entry: object) -> TypeGuard[Node]:
    """True for an index tensor, or a mask, that says places in one dimension."""
    value = entry.meta.get("example_value") if isinstance(entry, Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    units = value.dtype == torch.bool and all(hint(size) == 1 for size in value.shape[:-1])
    return value.dim() == 1 or (units and value.dim() > 1)


def indices(index: tuple[object, ...], rank: int) -> list[object]:
    """One index for each dimension, an ellipsis and what is left out written out."""
    count = sum(1 for entry in index if entry is not None and entry is not Ellipsis)
    missing = [slice(None)] * (rank - count)
    if any(entry is Ellipsis for entry in index):
        place = next(i for i, entry in enumerate(index) if entry is Ellipsis)
        return [*index[:place], *missing, *index[place + 1 :]]
    return [*index, *missing]


def _taken(vector: Vector, entry: object, count: int | TokenCount) -> Vector | None:
    """The tokens of a vector that an index entry takes; None where it takes no sequence."""
    if isinstance(entry, slice):
        if entry == slice(None):
            return vector
        bounds = (entry.start, entry.stop)
        fits = all(b is None or isinstance(b, (int, Node)) for b in bounds)
        step = entry.step
        if not fits or not (step is None or (isinstance(step, int) and step > 0)):
            return None
        return cut(vector, *bounds, step, count)
    return Taken(vector, entry, count) if is_sequence(entry) else None


def _place_after(before: Sequence[Size], dim: int, after: Sequence[Size]) -> int | None:
    """Where a dimension is after a reshape that left it whole; None if it did not."""
    leading = [n for size in before[:dim] if (n := hint(size)) is not None]
    if len(leading) < dim:
        same = len(after) > dim and all(map(is_same, before[: dim + 1], after))
        return dim if same else None
    product = 1
    for place, size in enumerate(after):
        if product == math.prod(leading) and is_same(size, before[dim]):
            return place
        known = hint(size)
        if known is None:
            return None
        product *= known
    return None


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
