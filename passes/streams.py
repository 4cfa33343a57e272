"""Which stream every token of every activation comes from, followed forward through a graph.

Text, audio and conditioning enter a model as inputs of their own and come to the video's tokens by
`cat`, by index or by a mask. The analysis gives every input a stream and follows it: an operation
on every token by itself keeps their streams, and one that joins, cuts or reorders tokens does the
same to their streams. Where an operation of PyTorch's is not understood the streams are lost, never
guessed; one of another library (a quantised layer, a fused norm) that keeps the number of tokens is
taken for one on every token. What conditions tokens (a timestep, positions) has fewer elements than
they have and no stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.contracted_tokens import CONTRACTED
from svg_ear_compile.passes.dataflow import Dataflow, projected_input, values_read
from svg_ear_compile.passes.joined_tokens import JOINED, PIXEL_RANK
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.operation import CASTS, COPIES, REARRANGEMENTS, operation
from svg_ear_compile.passes.rearranged_tokens import REARRANGED
from svg_ear_compile.passes.symbolic import hint, shape_of
from svg_ear_compile.passes.token_states import (
    LOST,
    Lost,
    Mixed,
    State,
    agree,
    is_condition,
    is_of_an_input,
    kept_by,
    state_of,
    streams_of,
    tokens_of,
    weight,
)
from svg_ear_compile.passes.tokenwise import is_tokenwise
from svg_ear_compile.passes.vectors import (
    FILLED,
    LEARNED,
    OTHER,
    STORED,
    Part,
    Stream,
    Taken,
    Vector,
    changed,
    leaves,
    overlay,
)

_CONSTANTS = frozenset({
    "zeros", "new_zeros", "zeros_like", "ones", "new_ones", "ones_like", "full", "new_full",
    "full_like", "empty", "new_empty", "empty_like",
})  # fmt: skip
_OVER_SPACE = frozenset({"conv2d", "conv3d"})
_SUMS = frozenset({"add", "sub"})
_CHOICES = frozenset({"where", "maximum"})
_CHANNELS = {"linear": -1, "addmm": -1, "conv1d": -2}
_SCALES = frozenset({"mul_", "div_"})
_NEGATIONS = frozenset({"sub", "rsub", "neg", "add"})  # 1 - mask
_DEEPEST_MASK = 8
_MANY = 1 << 20  # stands for a length that is not known while tracing


class Streams:
    """The streams of all tensors of a graph module and its child graphs.

    Attributes:
        of: state of every node; of a tuple of tensors, a list of states.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.of: dict[Node, Any] = {}
        for node in flow.position:
            written = flow.written(node)
            streams = frozenset(
                s for n in (*values_read(node), *written) for s in streams_of(self.one(n))
            )
            views = {n: self.one(n) for into in written for n in flow.sharing(into) if n in self.of}
            self.of[node] = self._state(node)
            self._spread(node, views)
            for found in (node, *written, *views):
                self.of[found] = _with_streams(self.of[found], streams)

    def along(self, node: Node, dim: int) -> Vector | None:
        """The streams of the tokens of a tensor along `dim`; None where they are not known."""
        state, shape = self.one(node), shape_of(node)
        if shape is None or not -len(shape) <= dim < len(shape):
            return None
        dim %= len(shape)
        if isinstance(state, Mixed):
            return state.vector if state.dim == dim else None
        if isinstance(state, Lost):
            return None
        nothing = STORED if _is_stored(node) else OTHER
        return Part(tokens_of(node, dim), nothing if state is None else state)

    def possible(self, node: Node) -> frozenset[Stream]:
        """The streams that tokens of a tensor may come from, wherever they are."""
        return streams_of(self.one(node))

    def one(self, node: object) -> State:
        """The state of a tensor; of several in one value it is lost."""
        state = self.of.get(node) if isinstance(node, Node) else None
        return LOST if isinstance(state, list) else state

    def _spread(self, node: Node, views: Mapping[Node, State]) -> None:
        """After a write: what lies in the same memory may hold tokens that it did not have.

        Args:
            node: writes, and has its state.
            views: what lies in the memory, with the states before. What the rule of the operation
                has changed is known.
        """
        for into in (n for n in self.flow.written(node) if n in views):
            now = streams_of(self.one(into)) | streams_of(self.one(node))
            new = self._new(now, views[into])
            for other, before in views.items():
                if new and before is not None and self.one(other) == before:
                    whole = other is into and shape_of(node) == shape_of(into)
                    lost = Lost(streams_of(before) | new)
                    self.of[other] = self.one(node) if whole else lost
            # A part of one stream may be filling: what is added to it may be all that it holds.
            added = self._new(self._added(node, into), views[into])
            held = [n for n, before in views.items() if isinstance(before, Stream)] if added else []
            for other in held:
                if self.one(other) == views[other] and _numel(other) > _numel(into):
                    self.of[other] = Lost(added | streams_of(views[other]))

    def _new(self, streams: frozenset[Stream], before: State) -> frozenset[Stream]:
        """Tokens of inputs among the streams that a tensor did not have before."""
        return frozenset(s for s in streams - streams_of(before) if is_of_an_input(s))

    def _added(self, node: Node, into: Node) -> frozenset[Stream]:
        """The streams of as many tokens as there are in what a node adds to."""
        if operation(node) in _SCALES:
            return frozenset()
        read = [n for n in values_read(node) if n is not into and _numel(n) == _numel(into)]
        return frozenset(s for n in read for s in streams_of(self.one(n)))

    def _state(self, node: Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return self._of_input(node)
        if node.op == "output":
            return [self.one(n) for n in tree_leaves(node.args) if isinstance(n, Node)]
        child = [s for s in self.flow.sources(node) if s.op == "output"]
        if child:
            states = self.of[child[0]]
            value = node.meta.get("example_value")
            return states if isinstance(value, (tuple, list)) or not states else states[0]
        name = operation(node)
        if name in REARRANGED:
            return self._rearranged(node, name)
        rule = _RULES.get(name)
        if rule is None:
            return self.tokenwise(node)
        args = arguments(node)
        return LOST if args is None and name != "cat" else rule(self, node, args)

    def _rearranged(self, node: Node, name: str) -> Any:
        source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
        if not isinstance(source, Node):
            return LOST
        known, values = self.of.get(source), node.meta.get("example_value")
        if isinstance(known, list) and name == "getitem":
            place = node.args[1]
            return known[place] if isinstance(place, int) and place < len(known) else LOST
        state, shape, args = self.one(source), shape_of(source), arguments(node)
        if name == "pad" and isinstance(state, Stream) and args is not None:
            state = self._tokens_to_pad(args, state, source)
        if isinstance(state, Mixed) and shape is not None and (args or name == "roll"):
            found = REARRANGED[name](node, args or Arguments({}, {}), state, shape)
            return _but_for_filling(state.vector, found)
        state = LOST if isinstance(state, Mixed) else state
        return [state] * len(values) if isinstance(values, (tuple, list)) else state

    def _tokens_to_pad(self, args: Arguments, state: Stream, source: Node) -> State:
        """The tokens of one stream along the dimension that is padded, (B, N, C) along N."""
        shape, pads = shape_of(source) or (), args.take("pad")
        if len(shape) != 3 or not isinstance(pads, (tuple, list)) or len(pads) != 4:
            return state
        return Mixed(1, Part(tokens_of(source, 1), state))

    def _of_input(self, node: Node) -> State:
        handed = [s for s in self.flow.sources(node) if s in self.of]
        if handed and node.op == "placeholder":
            return self.one(handed[0])
        value = node.meta.get("example_value")
        if not is_plain(value) or not value.dtype.is_floating_point or value.dim() < 2:
            return None
        if isinstance(value, torch.nn.Parameter):
            return LEARNED
        source = getattr(node, "_dynamo_source", None)
        name = "" if source is None else (source.name() if callable(source.name) else source.name)
        if "_buffers" in str(name) or node.op == "get_attr":
            return None
        return Stream(node, pixels=value.dim() >= PIXEL_RANK)

    def tokenwise(self, node: Node) -> Any:
        """An operation on every token by itself, or one that is not known."""
        projects = projected_input(node)
        if projects is not None:
            return self._projected(node, projects)
        inputs = [n for n in values_read(node) if self.of.get(n) is not None]
        if not inputs:
            return FILLED if operation(node) in _CONSTANTS else None
        sizes = {n: _numel(n) for n in inputs}
        largest = [n for n in inputs if sizes[n] == max(sizes.values())]
        name = operation(node).rstrip("_")
        if name in _SUMS | _CHOICES:
            overlaid = self._overlaid(largest, summed=name in _SUMS)
            if overlaid is not None:
                return overlaid
        mixed = [n for n in inputs if isinstance(self.one(n), Mixed)]
        if mixed and not (is_tokenwise(node) and agree(map(self.one, largest))):
            return LOST
        chosen = max(largest, key=lambda n: weight(self.one(n)))  # the first of equal ones
        if weight(self.one(chosen)) == 0:
            # A small tensor of tokens on a large one of constants: what it holds is spread over it.
            others = [self.one(n) for n in inputs if weight(self.one(n)) > 0]
            if others:
                return others[0] if isinstance(others[0], Stream) else LOST
        return self.like(node, chosen)

    def _overlaid(self, nodes: list[Node], summed: bool) -> State:
        """Tokens that have filling in each other's places, as a sum joins them; None for others."""
        states = [s for s in map(self.one, nodes) if isinstance(s, Mixed)]
        ranks = {len(shape_of(n) or ()) for n in nodes}
        if len(states) == 2 == len(nodes) and len(ranks) == 1 and states[0] != states[1]:
            dims = {state.dim for state in states}
            if len(dims) == 1 and all(map(_is_filled_up, states)):
                found = overlay(*(s.vector for s in states))
                if found is not None:
                    return state_of(states[0].dim, found)
        wholes = [s for s in map(self.one, nodes) if is_of_an_input(s)]
        if summed and len(states) == 1 == len(wholes) and len(nodes) == 2 == len(ranks) + 1:
            whole = wholes[0]
            vector = changed(states[0].vector, lambda s: whole if s == FILLED else s)
            return state_of(states[0].dim, vector)
        sources = {s.source for n in nodes for s in streams_of(self.one(n)) if not is_condition(s)}
        # Masks that are known at run time alone say which of them a token is.
        return LOST if len(sources - {None}) > 1 and any(map(_is_masked, nodes)) else None

    def like(self, node: Node, source: Node) -> Any:
        """The state of an operation's result whose tokens are those of one of its inputs."""
        state, before = self.one(source), shape_of(source)
        value = node.meta.get("example_value")
        if isinstance(value, (tuple, list)):
            return [kept_by(state, before, each) for each in value]
        return kept_by(state, before, value)

    def _projected(self, node: Node, source: Node) -> State:
        state = self.one(source)
        over_space = operation(node) in _OVER_SPACE
        if isinstance(state, Mixed):
            if over_space:
                streams = [part.stream for part in leaves(state.vector) if part.stream.source]
                return replace(streams[0], pixels=True, projected=True) if streams else LOST
            shape = shape_of(source)
            if shape is None or state.dim - len(shape) == _CHANNELS.get(operation(node)):
                return LOST
            kept = self.like(node, source)
            if not isinstance(kept, Mixed):
                return LOST
            return Mixed(kept.dim, changed(kept.vector, _projected))
        if isinstance(state, Stream) and state.source is not None:
            return replace(state, pixels=state.pixels or over_space, projected=True)
        return OTHER if state is FILLED else state


def _with_streams(state: Any, streams: frozenset[Stream]) -> Any:
    """A state; where it has just been lost, with the streams of what was read."""
    if isinstance(state, list):
        return [_with_streams(each, streams) for each in state]
    return Lost(frozenset(s for s in streams if not is_condition(s))) if state == LOST else state


def _is_stored(node: Node) -> bool:
    """True for a buffer (B, N, C) or of more dimensions, and for a part of one."""
    while operation(node) in REARRANGEMENTS | CASTS | COPIES | {"roll"} and node.all_input_nodes:
        node = node.all_input_nodes[0]
    value = node.meta.get("example_value")
    if node.op not in ("placeholder", "get_attr") or not is_plain(value):
        return False
    return value.dim() >= 3 and value.dtype.is_floating_point


def _is_masked(node: Node) -> bool:
    """True for tokens of which a bool mask leaves some as they are and makes the others 0."""
    if operation(node).rstrip("_") == "masked_fill":
        return True
    return operation(node).rstrip("_") == "mul" and any(map(_is_of_a_mask, node.all_input_nodes))


def _is_of_a_mask(node: Node, depth: int = 0) -> bool:
    """True for a bool mask in numbers, reshaped and negated maybe."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return True
    if operation(node) not in CASTS | REARRANGEMENTS | _NEGATIONS or depth > _DEEPEST_MASK:
        return False
    return any(_is_of_a_mask(source, depth + 1) for source in node.all_input_nodes)


def _is_filled_up(state: Mixed) -> bool:
    return any(part.stream == FILLED for part in leaves(state.vector))


def _but_for_filling(vector: Vector, found: Any) -> Any:
    """One stream in place of a lost one, where all other tokens were filling."""
    streams = {part.stream for part in leaves(vector)} - {FILLED}
    return streams.pop() if isinstance(found, Lost) and len(streams) == 1 else found


def embedded(streams: Streams, node: Node, args: Arguments) -> State:
    tensors = node.all_input_nodes
    ids = [n for n in tensors if not _is_floating(n)]
    state = streams.one(args.take("weight"))
    if isinstance(state, Mixed):  # tokens (N, C), and which of them to take
        followed = state.dim == 0 and len(ids) == 1 and len(shape_of(ids[0]) or ()) == 1
        return Mixed(0, Taken(state.vector, ids[0], tokens_of(node, 0))) if followed else LOST
    if state is not None and state not in (LEARNED, FILLED):
        return state
    return Stream(ids[0], projected=True) if ids else LOST


def attended(streams: Streams, node: Node, args: Arguments) -> State:
    query = args.take("query", "self")
    return streams.like(node, query) if isinstance(query, Node) else LOST


_RULES: Mapping[str, Callable[[Streams, Node, Any], Any]] = {
    **JOINED,
    **CONTRACTED,
    "embedding": embedded,
    "scaled_dot_product_attention": attended,
}


def _projected(stream: Stream) -> Stream:
    """What a projection makes of each token."""
    if stream == STORED:
        return LEARNED
    return stream if stream.source is None else replace(stream, projected=True)


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
