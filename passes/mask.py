"""What a mask may be: key padding by its shape, something its values have to prove, or neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.constants import number
from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.operation import CASTS, REARRANGEMENTS, operation
from svg_ear_compile.passes.packed import constant
from svg_ear_compile.passes.site import Call, Operand, Padding, Reason, Size
from svg_ear_compile.passes.symbolic import hint, hints_of

_Bounds = tuple[int, int]
_COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "sub"})
# What gives several tokens the number of one chunk.
_BY_CHUNK = frozenset({
    "floordiv", "floor_divide", "repeat_interleave", "bucketize", "searchsorted", "kron",
})  # fmt: skip
_ALWAYS: dict[str, Callable[[_Bounds, _Bounds], bool]] = {
    "lt": lambda one, other: one[1] < other[0],
    "le": lambda one, other: one[1] <= other[0],
    "gt": lambda one, other: one[0] > other[1],
    "ge": lambda one, other: one[0] >= other[1],
}
"""Which comparisons hold for all numbers between bounds."""
_OPPOSITES = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
_MOST_POSITIONS = 1 << 20
_TRIANGLES = frozenset({"tril", "triu", "tril_", "triu_"})


def judge_mask(
    flow: Dataflow, call: Call, q_shape: tuple[Size, ...], k_shape: tuple[Size, ...]
) -> Reason | Padding | None:
    """Why the mask of a call is no padding, or how it is made of padding, or None: it has to prove.

    A bool mask without a row for each query is key padding by its shape, and so is one that the
    graph makes of such masks and of their transposes. A mask that is added to the logits can hold
    any bias, a square one can hold causality: where the graph does not show that it does, the
    values are looked at, at run time. A mask that is full leaves nothing out. One that compares
    chunks may give all queries of a chunk the same keys, which its values have to prove, too.
    """
    mask = call.mask
    assert mask is not None
    value = mask.tensor.node.meta.get("example_value")
    sizes = mask.tensor.sizes("bhqk")
    if not isinstance(value, torch.Tensor) or sizes is None:
        return Reason.MASK
    is_bool = value.dtype == torch.bool
    if mask.added == is_bool or value.is_complex():
        return Reason.MASK  # a bool that is added counts as 0 or 1, a number to fill by as nothing
    batch, heads, rows, keys = (hint(size) for size in sizes)
    fits = (
        batch in (1, hint(q_shape[0]))
        and heads in (1, hint(k_shape[1]))
        and rows in (1, hint(q_shape[2]))
        and keys == hint(k_shape[2])
    )
    if not fits:
        return Reason.MASK
    if is_bool and is_always(not mask.inverted, flow, mask.tensor.node, call.node):
        return Padding()
    if is_bool and rows == 1:
        return Padding(keys=(mask.tensor,))
    if is_bool and not mask.inverted:
        extents = (hint(q_shape[0]), hint(k_shape[1]), hint(q_shape[2]), hint(k_shape[2]))
        padding = _factors(flow, mask.tensor, call.node, dict(zip("bhqk", extents, strict=True)))
        if padding is not None:
            return padding
    compared = [] if rows == 1 else _positions(flow, mask.tensor.node, call.node)
    tokens = {hint(q_shape[2]), keys}
    if not all(_may_be_by_chunk(flow, each, tokens) for each in compared):
        return Reason.CAUSAL if len(tokens) == 1 else Reason.CAUSAL_CHUNK
    return Reason.MASK if _is_learned(flow, mask.tensor.node, call.node) else None


def _factors(
    flow: Dataflow, mask: Operand, reader: Node, fits: Mapping[str, int | None]
) -> Padding | None:
    """A square mask as padding of keys and of queries, as far as the graph shows it.

    Args:
        mask: a bool mask, its dimensions aligned with the last ones of the logits'.
        reader: the call that reads it.
        fits: what extents other than 1 the call's dimensions have, by letter.
    """
    node, dims = mask.node, mask.dims
    value = node.meta.get("example_value")
    shape = hints_of(node)
    if not is_plain(value) or value.dtype != torch.bool or len(shape) != len(dims) or "f" in dims:
        return None
    if flow.writes_before(node, reader):
        return None
    extents = {**dict.fromkeys("bhqk", 1), **dict(zip(dims, shape, strict=True))}
    if any(extents[letter] not in (1, fits[letter]) for letter in "bh"):
        return None
    if extents["q"] == 1 and extents["k"] == fits["k"]:
        return Padding(keys=(mask,))
    if extents["k"] == 1 and extents["q"] == fits["q"]:
        return Padding(rows=(mask,))
    name, args = operation(node), arguments(node)
    if args is None:
        return None
    parts = []
    for source, letters in _parts(node, name, args, dims):
        found = _factors(flow, Operand(source, letters), reader, fits)
        if found is None:
            return None
        parts.append(found)
    if not parts:
        return None
    return Padding(*(tuple(sum((getattr(p, f) for p in parts), ())) for f in ("keys", "rows")))


def _parts(node: Node, name: str, args: Arguments, dims: str) -> list[tuple[Node, str]]:
    """Masks whose conjunction the node is, each with its letters; [] where that is not known."""
    first = args.take("self")
    if not isinstance(first, Node):
        return []
    rank = len(hints_of(first))
    if name == "logical_and":
        other = args.take("other")
        if not isinstance(other, Node) or not args.rest_has_defaults:
            return []
        return [(m, _last(dims, len(hints_of(m)))) for m in (first, other)]
    if name in ("expand", "expand_as", "repeat"):
        args.take_all(except_for="out")
        # Only what has extent 1 is repeated: more would be put one after the other.
        pairs = zip(reversed(hints_of(first)), reversed(hints_of(node)), strict=False)
        repeats = all(before in (1, after) for before, after in pairs)
        return [(first, _last(dims, rank))] if repeats else []
    if name in CASTS | {"clone", "detach"}:
        args.take_all(except_for="out")
        return [(first, dims)] if rank == len(dims) else []
    if name in ("transpose", "mT"):
        swapped = (-2, -1) if name == "mT" else (args.take("dim0"), args.take("dim1"))
        if not all(isinstance(d, int) for d in swapped) or not args.rest_has_defaults:
            return []
        letters = list(dims)
        one, two = swapped
        letters[one], letters[two] = letters[two], letters[one]
        return [(first, "".join(letters))]
    return []


def _last(letters: str, count: int) -> str:
    return letters[len(letters) - count :]


def _positions(flow: Dataflow, mask: Node, reader: Node) -> list[Node]:
    """Where positions of queries and keys are compared on the way to the mask.

    Causal and windowed masks are made so; padding compares a position with a length.
    """
    found = []
    for node in flow.backward(mask, lambda n: projected_input(n) is not None, reader):
        sides = node.all_input_nodes
        compares = operation(node) in _COMPARISONS and len(sides) == 2
        if operation(node) in _TRIANGLES or (compares and all(_counts(flow, s) for s in sides)):
            found.append(node)
    return found


def _may_be_by_chunk(flow: Dataflow, compared: Node, tokens: set[int | None]) -> bool:
    """True if chunks of tokens are told apart by a comparison, and maybe not single tokens.

    Args:
        tokens: numbers of queries and of keys.
    """
    extents = hints_of(compared)[-2:]
    fewest = min((n for n in tokens if n is not None), default=0)
    if len(extents) == 2 and all(n is not None and n < fewest for n in extents):
        return True  # numbers of chunks are compared, each repeated for its tokens later
    if operation(compared) in _TRIANGLES:
        return False
    return any(
        _numbers_chunks(source, fewest)
        for side in compared.all_input_nodes
        for source in flow.backward(side, lambda n: projected_input(n) is not None)
    )


def _numbers_chunks(node: Node, fewest: int) -> bool:
    """True if a node gives tokens, at least so many, the number of a chunk that they share."""
    if operation(node) == "arange":
        return all(n is not None and n < fewest for n in hints_of(node))
    rounded = operation(node) == "div" and node.kwargs.get("rounding_mode") is not None
    return rounded or operation(node) in _BY_CHUNK


def is_always(wanted: bool, flow: Dataflow, mask: Node, reader: Node) -> bool:
    """True if a bool mask is `wanted` everywhere when `reader` reads it, for every input.

    The mask of a chunk of queries that sees the whole cache is always True: positions are compared,
    and the graph makes both of constants.
    """
    value, name = mask.meta.get("example_value"), operation(mask)
    if not is_plain(value) or value.dtype != torch.bool or flow.writes_before(mask, reader):
        return False
    if number(mask, flow) == float(wanted):
        return True
    first = mask.args[0] if mask.args else None
    other = mask.args[1] if len(mask.args) == 2 and not mask.kwargs else None
    if name in _ALWAYS:
        if (one := _bounds(first, mask, flow)) and (two := _bounds(other, mask, flow)):
            return _ALWAYS[name if wanted else _OPPOSITES[name]](one, two)
        return False
    if name in ("logical_and", "logical_or"):
        sides = (isinstance(s, Node) and is_always(wanted, flow, s, reader) for s in (first, other))
        return (all if (name == "logical_and") is wanted else any)(sides)
    if not isinstance(first, Node):
        return False
    if name == "logical_not":
        return is_always(not wanted, flow, first, reader)
    same = name in CASTS | REARRANGEMENTS | {"clone", "repeat"}
    return same and is_always(wanted, flow, first, reader)


def _bounds(side: object, reader: Node, flow: Dataflow) -> _Bounds | None:
    """Least and largest whole number that one side of a comparison holds, None where not known."""
    if isinstance(side, int):
        return side, side
    held = constant(side, reader, flow, _MOST_POSITIONS) if isinstance(side, Node) else None
    if held is None or held.numel() == 0 or held.is_floating_point() or held.is_complex():
        return None
    return int(held.min()), int(held.max())


def _counts(flow: Dataflow, node: Node) -> bool:
    return any(
        operation(source) == "arange"
        for source in flow.backward(node, lambda n: projected_input(n) is not None)
    )


def _is_learned(flow: Dataflow, mask: Node, reader: Node) -> bool:
    """True if a parameter or a projection reaches the mask: a bias, not padding."""
    return any(
        projected_input(node) is not None
        or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        for node in flow.backward(mask, lambda n: projected_input(n) is not None, reader)
    )
