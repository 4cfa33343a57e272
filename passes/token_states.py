"""What is known of the tokens of a tensor: the stream that they come from, or a mixture of some."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

from torch.fx import Node

from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.runs import length
from svg_ear_compile.passes.symbolic import Size, is_same, shape_of
from svg_ear_compile.passes.traced_tokens import traced_runs
from svg_ear_compile.passes.vectors import (
    FILLED,
    LEARNED,
    Stream,
    TokenCount,
    Vector,
    leaves,
    simplest,
)

_MOST_PARTS = 64  # of a vector: cuts inside of parts, one after the other, would add up


@dataclass(frozen=True)
class Mixed:
    """The streams of a tensor's tokens, which lie along `dim`."""

    dim: int
    vector: Vector


@dataclass(frozen=True)
class Lost:
    """Which token comes from which stream is not known.

    Attributes:
        streams: those that they may come from.
    """

    streams: frozenset[Stream] = frozenset()


LOST = Lost()
State = Stream | Mixed | Lost | None
"""What is known of a tensor: one stream, a mixture, nothing any more, or that it has no tokens."""


def state_of(dim: int, vector: Vector | None) -> State:
    """The state of tokens along `dim`: one stream where all tokens are of it."""
    if vector is None:
        return LOST
    vector = simplest(vector)  # what is written again and again has no parts that nothing shows
    parts = list(itertools.islice(leaves(vector), _MOST_PARTS))
    streams = {part.stream for part in parts}
    if len(streams) == 1:
        return streams.pop()
    return Mixed(dim, vector) if len(parts) < _MOST_PARTS else LOST


def streams_of(state: State) -> frozenset[Stream]:
    """The streams that tokens of this state may come from."""
    if isinstance(state, Mixed):
        return frozenset(part.stream for part in leaves(state.vector))
    if isinstance(state, Lost):
        return state.streams
    return frozenset() if state is None else frozenset({state})


def tokens_of(node: Node, dim: int) -> int | TokenCount:
    """How many tokens a tensor has along a dimension."""
    size = (shape_of(node) or ())[dim]
    return size if isinstance(size, int) else TokenCount(node, dim)


def weight(state: State) -> int:
    """How much the state of an operand says of the tokens of a result."""
    if state is None or state in (LEARNED, FILLED):
        return 0
    if isinstance(state, Lost):
        return 1
    if isinstance(state, Mixed):
        return 4
    return 2 if is_condition(state) else 3


def is_condition(stream: Stream) -> bool:
    """True for (batch, channels) or (batch, tokens): pooled text, or a timestep of each token."""
    return (
        stream.source is not None and len(shape_of(stream.source) or ()) < 3 and not stream.pixels
    )


def is_of_an_input(state: State) -> TypeGuard[Stream]:
    """True for tokens of one input, which condition no others."""
    return isinstance(state, Stream) and state.source is not None and not is_condition(state)


def kept_by(state: State, before: tuple[Size, ...] | None, value: object) -> State:
    """The state of a result whose tokens are those of a tensor of this state and shape."""
    if not isinstance(state, Mixed):
        return state
    after = value.shape if is_plain(value) else None
    if before is None or after is None:
        return LOST
    dim = len(after) - len(before) + state.dim
    kept = dim >= 0 and is_same(after[dim], before[state.dim])
    return Mixed(dim, state.vector) if kept else LOST


def agree(states: Iterable[State]) -> bool:
    """False where one tensor has tokens of an input in other places than another tensor."""
    mixed = [state for state in states if isinstance(state, Mixed)]
    tokens = [{t for t in streams_of(s) if t.source and not is_condition(t)} for s in mixed]
    vectors = [state.vector for state, of in zip(mixed, tokens, strict=True) if of]

    def differ(one: Vector, other: Vector, source: Node | None) -> bool:
        first, second = (traced_runs(v, lambda t: t.source is source) for v in (one, other))
        if first is None or second is None or length(first) != length(second):
            return False  # one token may stand for all
        return first != second

    sources = {stream.source for of in tokens for stream in of}
    return not any(differ(vectors[0], v, source) for v in vectors[1:] for source in sources)
