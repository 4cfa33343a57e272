"""Which stream every token of every activation comes from, followed forward through a graph.

Text, audio and conditioning enter a model as inputs of their own and come to the video's tokens by
`cat`, by index or by a mask. The analysis gives every input a stream and follows it: an operation
on tokens keeps the streams of its tokens, and one that joins, cuts or reorders tokens does the same
to their streams. Where an operation is not understood the streams are lost, never guessed. What
conditions tokens (a timestep, positions) has fewer elements than they have and no stream.

Longer than other files: every kind of operation on tokens has its rule here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.dataflow import Dataflow, projected_input, values_read
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.operation import LINEAR, REARRANGEMENTS, operation
from svg_ear_compile.passes.symbolic import Size, hint, hints_of, is_same, shape_of
from svg_ear_compile.passes.vectors import (
    FILLED,
    LEARNED,
    OTHER,
    UNROTATED,
    Bounds,
    Flipped,
    Joined,
    Part,
    Placed,
    Rolled,
    Stream,
    Taken,
    TokenCount,
    Vector,
    cut,
    joined,
    leaves,
)

_CONSTANTS = frozenset({
    "zeros", "new_zeros", "zeros_like", "ones", "new_ones", "ones_like", "full", "new_full",
    "full_like", "empty", "new_empty", "empty_like",
})  # fmt: skip
_RESHAPES = frozenset({
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
})  # fmt: skip
_PERMUTATIONS = frozenset({"transpose", "permute", "movedim", "moveaxis", "mT", "T", "t"})
_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
_OVER_SPACE = frozenset({"conv2d", "conv3d"})
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm"})
_INTO_PLACES = frozenset({"index_copy", "index_copy_", "scatter", "scatter_", "index_put"})
_MANY = 1 << 20  # stands for a length that is not known while tracing
_MOST_PARTS = 64  # of a vector: cuts inside of parts, one after the other, would add up
_PIXEL_RANK = 5  # (batch, channels, frames, height, width)


@dataclass(frozen=True)
class Mixed:
    """The streams of a tensor's tokens, which lie along `dim`."""

    dim: int
    vector: Vector


class Lost:
    """The streams of a tensor are not known."""


LOST = Lost()
State = Stream | Mixed | Lost | None
"""What is known of a tensor: one stream, a mixture, nothing any more, or that it has no tokens."""


class Streams:
    """The streams of all tensors of a graph module and its child graphs.

    Attributes:
        of: state of every node; of a tuple of tensors, a list of states.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.of: dict[Node, Any] = {}
        for node in flow.position:
            self.of[node] = self._state(node)

    def tokens(self, node: Node, dim: int) -> Vector | None:
        """The streams of the tokens of a tensor along `dim`; None where they are not known."""
        return self._along(node, dim)

    def _one(self, node: object) -> State:
        state = self.of.get(node) if isinstance(node, Node) else None
        return LOST if isinstance(state, list) else state

    def _state(self, node: Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return self._of_input(node)
        if node.op == "output":
            return [self._one(n) for n in tree_leaves(node.args) if isinstance(n, Node)]
        child = [s for s in self.flow.sources(node) if s.op == "output"]
        if child:
            states = self.of[child[0]]
            value = node.meta.get("example_value")
            return states if isinstance(value, (tuple, list)) or not states else states[0]
        name = operation(node)
        rule = _RULES.get(name)
        if rule is None:
            return self._tokenwise(node)
        args = arguments(node)
        return LOST if args is None and name not in ("cat", "roll") else rule(self, node, args)

    def _of_input(self, node: Node) -> State:
        handed = [s for s in self.flow.sources(node) if s in self.of]
        if handed and node.op == "placeholder":
            return self._one(handed[0])
        value = node.meta.get("example_value")
        if not is_plain(value) or not value.dtype.is_floating_point or value.dim() < 2:
            return None
        if isinstance(value, torch.nn.Parameter):
            return LEARNED
        source = getattr(node, "_dynamo_source", None)
        name = "" if source is None else (source.name() if callable(source.name) else source.name)
        if "_buffers" in str(name) or node.op == "get_attr":
            return None
        return Stream(node, pixels=value.dim() >= _PIXEL_RANK)

    def _tokenwise(self, node: Node) -> Any:
        """An operation on every token by itself, or one that is not known."""
        projects = projected_input(node)
        if projects is not None:
            return self._projected(node, projects)
        inputs = [n for n in values_read(node) if self.of.get(n) is not None]
        if not inputs:
            return FILLED if operation(node) in _CONSTANTS else None
        sizes = {n: _numel(n) for n in inputs}
        largest = [n for n in inputs if sizes[n] == max(sizes.values())]
        chosen = max(largest, key=lambda n: _weight(self._one(n)))  # the first of equal ones
        if _weight(self._one(chosen)) == 0:
            # A small tensor of tokens on a large one of constants: what it holds is spread over it.
            others = [self._one(n) for n in inputs if _weight(self._one(n)) > 0]
            if others:
                return others[0] if isinstance(others[0], Stream) else LOST
        return self._like(node, chosen)

    def _like(self, node: Node, source: Node) -> Any:
        """The state of an operation's result whose tokens are those of one of its inputs."""
        state = self._one(source)
        value = node.meta.get("example_value")
        if isinstance(value, (tuple, list)):
            return [state if isinstance(state, Stream) else LOST for _ in value]
        if not isinstance(state, Mixed):
            return state
        before, after = shape_of(source), shape_of(node)
        if before is None or after is None:
            return LOST
        dim = len(after) - len(before) + state.dim
        kept = dim >= 0 and is_same(after[dim], before[state.dim])
        return Mixed(dim, state.vector) if kept else LOST

    def _projected(self, node: Node, source: Node) -> State:
        state = self._one(source)
        over_space = operation(node) in _OVER_SPACE
        if isinstance(state, Mixed):
            if over_space:
                streams = [part.stream for part in leaves(state.vector) if part.stream.source]
                return replace(streams[0], pixels=True, projected=True) if streams else LOST
            shape = shape_of(source)
            if shape is None or (operation(node) in LINEAR and state.dim == len(shape) - 1):
                return LOST
            kept = self._like(node, source)
            return Mixed(kept.dim, _projected(kept.vector)) if isinstance(kept, Mixed) else LOST
        if isinstance(state, Stream) and state.source is not None:
            return replace(state, pixels=state.pixels or over_space, projected=True)
        return OTHER if state is FILLED else state

    def _along(self, node: Node, dim: int) -> Vector | None:
        """The tokens of a tensor along a dimension, None where they are not known."""
        state, shape = self._one(node), shape_of(node)
        if shape is None or not -len(shape) <= dim < len(shape):
            return None
        dim %= len(shape)
        if isinstance(state, Mixed):
            return state.vector if state.dim == dim else None
        if isinstance(state, Lost):
            return None
        return Part(_count(node, dim), OTHER if state is None else state)

    def cat(self, node: Node, args: Arguments | None) -> State:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = node.kwargs.get("axis", dim)
        shape = shape_of(node)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
            return LOST
        dim %= len(shape)
        nodes = [part for part in parts if isinstance(part, Node) and hints_of(part) != (0,)]
        states = [self._one(part) for part in nodes]
        real = [s for s in states if s is not None and s not in (FILLED, LEARNED)]
        if any(isinstance(s, Lost) for s in real):
            return LOST
        streams = [s for s in real if isinstance(s, Stream)]
        if not real or dim == len(shape) - 1 or len(shape) >= _PIXEL_RANK:
            # Nothing, features, or parts of a clip.
            first = next((s for s in [*real, *states] if s is not None), None)
            return first if not isinstance(first, Mixed) or first.dim != dim else LOST
        alike = len({(s.source, s.kind) for s in streams}) == 1 and len(streams) == len(real)
        if alike and None not in states and LEARNED not in states:
            return self._unrotated(nodes, dim) or streams[0]
        elsewhere = [s for s in real if isinstance(s, Mixed) and s.dim != dim]
        if elsewhere:  # along the batch, for example
            return elsewhere[0] if all(s == elsewhere[0] for s in real) else LOST
        vectors = [self._along(part, dim) for part in nodes]
        known = [vector for vector in vectors if vector is not None]
        return _state(dim, joined(known)) if len(known) == len(vectors) else LOST

    def _unrotated(self, nodes: Sequence[Node], dim: int) -> Mixed | None:
        """Tokens put back as they were beside others that were rotated: a guess at text."""
        bare = [_is_cut(part) for part in nodes]
        if all(bare) or not any(bare) or operation(nodes[0]) == "cat":
            return None
        sizes = [hint((shape_of(part) or (0,) * (dim + 1))[dim]) for part in nodes]
        known = [size for size in sizes if size is not None]
        small = sum(s for s, b in zip(known, bare, strict=False) if b)
        if len(known) < len(sizes) or 2 * small >= sum(known):
            return None
        parts = []
        for part, is_bare in zip(nodes, bare, strict=True):
            vector = self._along(part, dim)
            if not isinstance(vector, Part):
                return None
            parts.append(replace(vector, stream=UNROTATED) if is_bare else vector)
        return Mixed(dim, joined(parts))

    def reshaped(self, node: Node, args: Arguments) -> State:
        source = args.take("self")
        state = self._one(source)
        if not isinstance(state, Mixed):
            return state
        before, after = shape_of(source), shape_of(node)
        if before is None or after is None:
            return LOST
        dim = _place_after(before, state.dim, after)
        return LOST if dim is None else Mixed(dim, state.vector)

    def permuted(self, node: Node, args: Arguments) -> State:
        source = args.take("self")
        state = self._one(source)
        if not isinstance(state, Mixed):
            return state
        shape = shape_of(source)
        if shape is None:
            return LOST
        # The same call on a tensor whose extents tell its dimensions apart.
        marker = torch.empty(tuple(range(2, 2 + len(shape))), device="meta")
        given = [marker if a is source else a for a in node.args]
        kwargs = {k: marker if a is source else a for k, a in node.kwargs.items()}
        if any(isinstance(a, Node) for a in tree_leaves((given, kwargs))):
            return LOST
        target: Any = node.target
        if node.op == "call_method":
            moved = getattr(given[0], target)(*given[1:], **kwargs)
        else:
            moved = target(*given, **kwargs)
        return Mixed(list(moved.shape).index(2 + state.dim), state.vector)

    def getitem(self, node: Node, args: Arguments) -> Any:
        source, index = node.args[0], node.args[1]
        state = self.of.get(source) if isinstance(source, Node) else None
        if isinstance(state, list):
            return state[index] if isinstance(index, int) and index < len(state) else LOST
        if not isinstance(state, Mixed) or not isinstance(source, Node):
            return state
        shape = shape_of(source)
        value = node.meta.get("example_value")
        if shape is None or not isinstance(value, torch.Tensor):
            return None if not isinstance(value, torch.Tensor) else LOST
        where = _indices(index if isinstance(index, tuple) else (index,), len(shape))
        dim, at = 0, 0
        for entry in where:
            if entry is None:
                at += 1
                continue
            if dim == state.dim:
                return _state(at, _indexed(state.vector, entry, _count(node, at)))
            if isinstance(entry, slice):
                at += 1
            elif not isinstance(entry, int):
                return LOST
            dim += 1
        return Mixed(at + state.dim - dim, state.vector)

    def narrowed(self, node: Node, args: Arguments) -> State:
        source, dim = args.take("self"), args.take("dim")
        start, length = args.take("start"), args.take("length")
        state, shape = self._one(source), shape_of(source)
        if not isinstance(state, Mixed) or shape is None or not isinstance(dim, int):
            return state if not isinstance(state, Mixed) else LOST
        if dim % len(shape) != state.dim:
            return state
        if not (isinstance(start, int) and isinstance(length, int)) or start < 0:
            return LOST
        return _state(state.dim, cut(state.vector, start, start + length, None, length))

    def selected(self, node: Node, args: Arguments) -> State:
        source, dim, index = args.take("self"), args.take("dim"), args.take("index")
        state, shape = self._one(source), shape_of(source)
        if not isinstance(state, Mixed) or shape is None or not isinstance(dim, int):
            return state if not isinstance(state, Mixed) else LOST
        dim %= len(shape)
        if operation(node) == "select":
            if dim == state.dim:
                return LOST
            return Mixed(state.dim - (dim < state.dim), state.vector)
        if dim != state.dim:
            return state
        return _state(dim, _indexed(state.vector, index, _count(node, dim)))

    def split(self, node: Node, args: Arguments) -> Any:
        source, dim = args.take("self"), args.take("dim")
        state, shape = self._one(source), shape_of(source)
        values = node.meta.get("example_value")
        if not isinstance(values, (tuple, list)) or shape is None:
            return LOST
        if not isinstance(state, Mixed):
            return [state] * len(values)
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
            found.append(_state(dim, cut(state.vector, start, stop, None, count)))
            start = stop
        return found

    def flipped(self, node: Node, args: Arguments) -> State:
        source, dims = args.take("self"), args.take("dims", "dim")
        state, shape = self._one(source), shape_of(source)
        if not isinstance(state, Mixed) or shape is None:
            return state if not isinstance(state, Mixed) else LOST
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
            return LOST
        if state.dim not in [d % len(shape) for d in dims]:
            return state
        return Mixed(state.dim, Flipped(state.vector))

    def rolled(self, node: Node, args: Arguments | None) -> State:
        # One number in place of a list, as `roll` takes them, is in no schema.
        given = {**dict(zip(("self", "shifts", "dims"), node.args, strict=False)), **node.kwargs}
        source = given.get("self", given.get("input"))
        shifts, dims = given.get("shifts"), given.get("dims")
        state = self._one(source)
        shape = shape_of(source) if isinstance(source, Node) else None
        if not isinstance(state, Mixed) or shape is None:
            return state if not isinstance(state, Mixed) else LOST
        pairs: list[tuple[Any, Any]] = list(zip(_listed(shifts), _listed(dims), strict=False))
        for shift, dim in pairs:
            if isinstance(dim, int) and dim % len(shape) == state.dim:
                return Mixed(state.dim, Rolled(state.vector, shift))
        return state if pairs and all(isinstance(d, int) for _, d in pairs) else LOST

    def padded(self, node: Node, args: Arguments) -> State:
        source, pads = args.take("self"), args.take("pad")
        state, shape = self._one(source), shape_of(source)
        if not isinstance(state, Mixed) or shape is None:
            return state if not isinstance(state, Mixed) else LOST
        if not isinstance(pads, (tuple, list)):
            return LOST
        place = 2 * (len(shape) - 1 - state.dim)
        if place >= len(pads):
            return state
        before, after = pads[place : place + 2]
        if not (isinstance(before, int) and isinstance(after, int)):
            return LOST
        vector: Vector = state.vector
        if before < 0 or after < 0:
            stop = after if after < 0 else None
            found = cut(vector, max(-before, 0), stop, None, _count(node, state.dim))
            if found is None:
                return LOST
            vector = found
        parts = (Part(max(before, 0), FILLED), vector, Part(max(after, 0), FILLED))
        return _state(state.dim, joined(parts))

    def placed(self, node: Node, args: Arguments) -> State:
        """`index_copy` and its kin: tokens written to places that an index tensor says."""
        base, dim = args.take("self"), args.take("dim")
        index, values = args.take("index", "indices"), args.take("source", "src", "values")
        if isinstance(index, (tuple, list)):  # index_put: one entry a dimension
            given = [i for i, entry in enumerate(index) if entry is not None]
            if len(given) != 1:
                return LOST
            dim, index = given[0], index[given[0]]
        if isinstance(index, Node) and operation(index) in ("expand", "expand_as"):
            index = self._unexpanded(index, dim)
        state = self._write(base, dim, index, values)
        if operation(node).endswith("_") and isinstance(base, Node):
            self.of[base] = state
        return state

    def _unexpanded(self, index: Node, dim: object) -> Node | None:
        """The index of one dimension that was expanded to the shape of what is written."""
        source = index.args[0]
        while isinstance(source, Node) and operation(source) in REARRANGEMENTS:
            if len(shape_of(source) or ()) == 1:
                break
            source = source.args[0]
        return source if isinstance(source, Node) and len(shape_of(source) or ()) == 1 else None

    def setitem(self, node: Node, args: Arguments) -> None:
        base, index, values = node.args[:3]
        shape = shape_of(base) if isinstance(base, Node) else None
        if not isinstance(base, Node) or shape is None:
            return
        where = list(_indices(index if isinstance(index, tuple) else (index,), len(shape)))
        if None in where:
            self.of[base] = LOST
            return
        cut = [d for d, entry in enumerate(where) if entry != slice(None)]
        if all(d == len(shape) - 1 for d in cut):  # all tokens, some of their features
            state = self._one(values)
            self.of[base] = state if state is not None else self._one(base)
            return
        tokens = [d for d in cut if d != len(shape) - 1]
        if len(tokens) != 1:
            known = self._one(base)
            self.of[base] = known if known == self._one(values) else LOST
            return
        self.of[base] = self._write(base, tokens[0], where[tokens[0]], values)

    def copied(self, node: Node, args: Arguments) -> State:
        """`copy_` into a tensor or a view of one."""
        into, values = args.take("self"), args.take("other", "src", "source")
        state = self._one(values)
        for other in self.flow.sharing(into):
            known = self.of.get(other)
            if other is not into and known not in (None, FILLED, state):
                self.of[other] = LOST
        self.of[into] = state
        return state

    def _write(self, base: object, dim: object, where: object, values: object) -> State:
        shape = shape_of(base) if isinstance(base, Node) else None
        if not isinstance(base, Node) or shape is None or not isinstance(dim, int):
            return LOST
        dim %= len(shape)
        known, new = self._one(base), self._one(values)
        if isinstance(values, Node) and isinstance(new, Stream) and new == known:
            return self._rotated(base, dim, where) or known
        into = self._along(base, dim)
        if isinstance(values, Node):
            written = shape_of(values) or ()
            what = self._along(values, dim - len(shape) + len(written))
        else:
            return known  # a number
        if isinstance(where, slice):
            if where.step not in (None, 1):
                return LOST
            at: Bounds | Node = (where.start, where.stop)
        elif isinstance(where, Node) and len(shape_of(where) or ()) == 1:
            at = where
            if self.flow.is_ever_written(where):
                return LOST
        else:
            return LOST
        if into is None or what is None:
            return LOST
        return _state(dim, Placed(into, at, what))

    def _rotated(self, base: Node, dim: int, where: object) -> Mixed | None:
        """Tokens of one stream that get positions from some place on: a guess at text."""
        shape = shape_of(base) or ()
        whole = hint(shape[dim])
        if dim in (0, len(shape) - 1) or whole is None or not isinstance(where, slice):
            return None
        start, stop = where.start or 0, whole if where.stop is None else where.stop
        if not (isinstance(start, int) and isinstance(stop, int)) or where.step not in (None, 1):
            return None
        start, stop, _ = slice(start, stop).indices(whole)
        if not whole > stop - start > whole / 2:
            return None
        vector = self._along(base, dim)
        if not isinstance(vector, Part):
            return None
        rotated = replace(vector, count=stop - start)
        return Mixed(dim, joined([Part(start, UNROTATED), rotated, Part(whole - stop, UNROTATED)]))

    def product(self, node: Node, args: Arguments) -> State:
        first = args.take("batch1") if operation(node) == "baddbmm" else args.take("self", "input")
        if not isinstance(first, Node):
            return LOST
        shape = shape_of(first)
        state = self._one(first)
        if state is None or state in (LEARNED, FILLED):
            return self._tokenwise(node)
        if not isinstance(state, Mixed):
            return state
        if shape is None or state.dim == len(shape) - 1:
            return LOST
        return self._like(node, first)

    def einsum(self, node: Node, args: Arguments) -> State:
        equation, *rest = node.args
        operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            return LOST
        terms, result = equation.replace(" ", "").split("->")
        for term, operand in zip(terms.split(","), operands, strict=False):
            state = self._one(operand)
            if isinstance(state, Mixed):
                letter = term[state.dim]
                return Mixed(result.index(letter), state.vector) if letter in result else LOST
            if isinstance(state, Stream) and state not in (LEARNED, FILLED):
                return state
        return self._tokenwise(node)

    def embedded(self, node: Node, args: Arguments) -> State:
        tensors = node.all_input_nodes
        ids = [n for n in tensors if not _is_floating(n)]
        return Stream(ids[0], projected=True) if ids else LOST

    def stacked(self, node: Node, args: Arguments) -> State:
        parts, dim = node.args[0] if node.args else node.kwargs.get("tensors"), args.take("dim")
        shape = shape_of(node)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
            return LOST
        states = [s for s in map(self._one, parts) if _weight(s) > 0]
        if not states or any(s != states[0] for s in states):
            return LOST if states else None
        found = states[0]
        if isinstance(found, Mixed):
            return Mixed(found.dim + (dim % len(shape) <= found.dim), found.vector)
        return found

    def attended(self, node: Node, args: Arguments) -> State:
        query = args.take("query", "self")
        return self._like(node, query) if isinstance(query, Node) else LOST


_Rule = Callable[[Streams, Node, Any], Any]
_RULES: Mapping[str, _Rule] = {
    "cat": Streams.cat,
    **dict.fromkeys(_RESHAPES, Streams.reshaped),
    **dict.fromkeys(_PERMUTATIONS, Streams.permuted),
    **dict.fromkeys(_SPLITS, Streams.split),
    **dict.fromkeys(_INTO_PLACES, Streams.placed),
    **dict.fromkeys(_PRODUCTS, Streams.product),
    "getitem": Streams.getitem,
    "narrow": Streams.narrowed,
    "select": Streams.selected,
    "index_select": Streams.selected,
    "flip": Streams.flipped,
    "roll": Streams.rolled,
    "pad": Streams.padded,
    "setitem": Streams.setitem,
    "copy_": Streams.copied,
    "einsum": Streams.einsum,
    "embedding": Streams.embedded,
    "stack": Streams.stacked,
    "scaled_dot_product_attention": Streams.attended,
}


def _state(dim: int, vector: Vector | None) -> State:
    """The state of tokens along `dim`: one stream where all tokens are of it."""
    if vector is None:
        return LOST
    streams = {part.stream for part in itertools.islice(leaves(vector), _MOST_PARTS)}
    if len(streams) == 1:
        return streams.pop()
    parts = sum(1 for _ in itertools.islice(leaves(vector), _MOST_PARTS))
    return Mixed(dim, vector) if parts < _MOST_PARTS else LOST


def _projected(vector: Vector) -> Vector:
    """The vector after a projection of every token."""
    if isinstance(vector, Part):
        stream = vector.stream
        made = stream if stream.source is None else replace(stream, projected=True)
        return replace(vector, stream=made)
    if isinstance(vector, Joined):
        return Joined(tuple(_projected(part) for part in vector.parts))
    if isinstance(vector, Placed):
        return replace(vector, into=_projected(vector.into), what=_projected(vector.what))
    return replace(vector, of=_projected(vector.of))


def _count(node: Node, dim: int) -> int | TokenCount:
    size = (shape_of(node) or ())[dim]
    return size if isinstance(size, int) else TokenCount(node, dim)


def _indexed(vector: Vector, entry: object, count: int | TokenCount) -> Vector | None:
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
    if isinstance(entry, Node) and len(shape_of(entry) or ()) == 1:
        return Taken(vector, entry, count)
    return None


def _indices(index: tuple[object, ...], rank: int) -> list[object]:
    """One index for each dimension, an ellipsis and what is left out written out."""
    entries = sum(1 for entry in index if entry is not None and entry is not Ellipsis)
    missing = [slice(None)] * (rank - entries)
    if any(entry is Ellipsis for entry in index):
        place = next(i for i, entry in enumerate(index) if entry is Ellipsis)
        return [*index[:place], *missing, *index[place + 1 :]]
    return [*index, *missing]


def _place_after(before: Sequence[Size], dim: int, after: Sequence[Size]) -> int | None:
    """Where a dimension is after a reshape that left it whole; None if it did not."""
    leading = [hint(size) for size in before[:dim]]
    if None in leading:
        same = len(after) > dim and all(map(is_same, before[: dim + 1], after))
        return dim if same else None
    product = 1
    for place, size in enumerate(after):
        if product == math.prod(leading) and is_same(size, before[dim]):  # type: ignore[arg-type]
            return place
        known = hint(size)
        if known is None:
            return None
        product *= known
    return None


def _weight(state: State) -> int:
    """How much the state of an operand says of the tokens of a result."""
    if state is None or state in (LEARNED, FILLED):
        return 0
    if isinstance(state, Lost):
        return 1
    if isinstance(state, Mixed):
        return 4
    # (batch, channels) or (batch, tokens): pooled text, or a timestep of each token.
    is_condition = state.source is not None and len(shape_of(state.source) or ()) < 3
    return 2 if is_condition and not state.pixels else 3


def _is_cut(node: Node) -> bool:
    """True if the node is a piece of a tensor as it was."""
    return operation(node) in REARRANGEMENTS


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_floating(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _numel(node: Node) -> int:
    shape = shape_of(node)
    return (
        math.prod(_MANY if (n := hint(size)) is None else n for size in shape)
        if shape is not None
        else -1
    )
