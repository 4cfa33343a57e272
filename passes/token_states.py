"""What is known of the tokens of a tensor: the stream that they come from, or a mixture of some."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch.fx import Node

from svg_ear_compile.passes.symbolic import shape_of
from svg_ear_compile.passes.vectors import FILLED, LEARNED, Stream, TokenCount, Vector, leaves

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
