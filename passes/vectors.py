"""Where the tokens of a sequence come from, place by place, as a small expression.

A *stream* is what tokens come from: an input of the model, learned tokens, filling. A `Vector` says
the stream of every token of a sequence, as the graph joins, cuts and reorders it. `traced_tokens`
evaluates it for the traced lengths, and `exact_nodes` writes it into a graph for the lengths and
the index tensors of every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import NoneType

import torch
from torch.fx import Node

from svg_ear_compile.passes.runs import Runs, length, merged, side_by_side, sliced, written
from svg_ear_compile.passes.symbolic import Size, hint, is_same


@dataclass(frozen=True)
class Stream:
    """What tokens come from.

    Attributes:
        source: the input of the graph, None for a stream that is no input's.
        kind: ``"input"``; ``"learned"`` for parameters; ``"filled"`` for constants; ``"other"`` for
            conditions that became tokens; ``"unrotated"`` for tokens that get no positions where
            the others do; ``"option"`` for tokens that an option names; ``"stored"`` for a buffer.
        pixels: the input has a clip's dimensions, or a convolution over space has read it.
        projected: a projection has read it.
    """

    source: Node | None
    kind: str = "input"
    pixels: bool = False
    projected: bool = False


LEARNED, FILLED, OTHER = (Stream(None, kind) for kind in ("learned", "filled", "other"))
UNROTATED, OPTION = Stream(None, "unrotated"), Stream(None, "option")
STORED = Stream(None, "stored")
"""Tokens of a buffer: keys and values of a cache, learned tokens once they are projected."""


@dataclass(frozen=True)
class TokenCount:
    """A number of tokens that is known at run time only: the size of `node` in `dim`."""

    node: Node
    dim: int

    @property
    def size(self) -> Size:
        """The number as it was traced, a symbol maybe."""
        size: Size = self.node.meta["example_value"].shape[self.dim]
        return size

    @property
    def traced(self) -> int | None:
        """The number while tracing, None where even that is not known."""
        return hint(self.size)


@dataclass(frozen=True)
class Part:
    """So many tokens of one stream."""

    count: int | TokenCount
    stream: Stream


@dataclass(frozen=True)
class Joined:
    """One vector after the other."""

    parts: tuple[Vector, ...]


@dataclass(frozen=True)
class Cut:
    """A slice of a vector, `count` tokens, None for those inside; start and stop may be nodes."""

    of: Vector
    start: int | Node | None
    stop: int | Node | None
    step: int | None
    count: int | TokenCount | None


@dataclass(frozen=True)
class Flipped:
    """A vector from its end to its start."""

    of: Vector


@dataclass(frozen=True)
class Rolled:
    """A vector rolled by a number of places."""

    of: Vector
    shift: int | Node


@dataclass(frozen=True)
class Taken:
    """The `count` tokens of a vector at these indices, or where a mask is True.

    An index tensor differs along one dimension alone.
    """

    of: Vector
    index: Node
    count: int | TokenCount


Bounds = tuple[int | Node | None, int | Node | None]


@dataclass(frozen=True)
class Placed:
    """A vector with another one written to some of its places.

    Attributes:
        into: the vector.
        at: start and stop of a slice of places, their indices, or a mask of them.
        what: what is written.
    """

    into: Vector
    at: Bounds | Node
    what: Vector


@dataclass(frozen=True)
class Chosen:
    """The tokens of one vector where a mask is True, else those of the other at these places."""

    mask: Node
    one: Vector
    other: Vector


Vector = Part | Joined | Cut | Flipped | Rolled | Taken | Placed | Chosen


def joined(vectors: Iterable[Vector]) -> Vector:
    """One vector after the other, as few parts as possible."""
    parts: list[Vector] = []
    for vector in vectors:
        for part in vector.parts if isinstance(vector, Joined) else (vector,):
            last = parts[-1] if parts else None
            if isinstance(part, Part) and part.count == 0:
                continue
            if (
                isinstance(last, Part)
                and isinstance(part, Part)
                and last.stream == part.stream
                and isinstance(last.count, int)
                and isinstance(part.count, int)
            ):
                parts[-1] = Part(last.count + part.count, part.stream)
            else:
                parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return Joined(tuple(parts)) if parts else Part(0, FILLED)


def cut(
    vector: Vector,
    start: Size | Node | None,
    stop: Size | Node | None,
    step: int | None,
    count: int | TokenCount | None,
) -> Vector | None:
    """A slice of a vector, `count` tokens; None if it cannot be written into a graph.

    Without a count only slices are known that end where parts of the vector end.

    A slice that ends where parts of the vector end is these parts, also where their lengths are
    symbolic.
    """
    atoms = vector.parts if isinstance(vector, Joined) else (vector,)
    sizes = [size_of(atom) for atom in atoms]
    bounds: list[Size] = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    if step in (None, 1):
        first, last = _bound_at(start, bounds, 0), _bound_at(stop, bounds, len(atoms))
        if first is not None and last is not None:
            found = joined(atoms[first:last])
            # A symbol of its own may stand for the length of the slice.
            if count is not None and isinstance(found, (Part, Cut, Taken)):
                return replace(found, count=count)
            return found
    if isinstance(start, (int, NoneType)) and isinstance(stop, (int, NoneType)):
        runs = _runs(vector)
        if runs is not None:
            return _vector_of(sliced(runs, start, stop, step))
    ends = [bound for bound in (start, stop) if not isinstance(bound, (int, Node, NoneType))]
    return None if ends or count is None else Cut(vector, start, stop, step, count)  # type: ignore[arg-type]


def _bound_at(bound: Size | Node | None, bounds: list[Size], default: int) -> int | None:
    """Number of parts before a bound of a slice; None where it lies inside of a part."""
    if bound is None:
        return default
    value = bound.meta.get("example_value") if isinstance(bound, Node) else bound
    if not isinstance(value, (int, torch.SymInt)):
        return None
    known = hint(value)
    ways = [value] if known is None or known >= 0 else []
    ways += [bounds[-1] + value] if known is None or known < 0 else []
    return next((i for way in ways for i, at in enumerate(bounds) if is_same(at, way)), None)


def size_of(vector: Vector) -> Size:
    """Number of tokens of a vector, as it was traced."""
    if isinstance(vector, (Part, Cut, Taken)):
        assert vector.count is not None, "a slice that an option names is no part of another vector"
        return vector.count if isinstance(vector.count, int) else vector.count.size
    if isinstance(vector, Joined):
        total: Size = 0
        for part in vector.parts:
            total = total + size_of(part)
        return total
    if isinstance(vector, Chosen):
        return size_of(vector.one)
    return size_of(vector.into if isinstance(vector, Placed) else vector.of)


def overlay(one: Vector, other: Vector) -> Vector | None:
    """Each token of the vector that has no filling there; None where both have none, or unknown."""
    first, second = _runs(one), _runs(other)
    if first is None or second is None or length(first) != length(second):
        return None
    pairs = list(side_by_side(first, second))
    if any(FILLED not in pair for *pair, _ in pairs):
        return None
    return _vector_of(merged((b if a == FILLED else a, count) for a, b, count in pairs))


def changed(vector: Vector, change: Callable[[Stream], Stream]) -> Vector:
    """The vector with other streams in the same places."""
    if isinstance(vector, Part):
        return replace(vector, stream=change(vector.stream))
    if isinstance(vector, Joined):
        return joined(changed(part, change) for part in vector.parts)
    if isinstance(vector, Placed):
        into, what = changed(vector.into, change), changed(vector.what, change)
        return replace(vector, into=into, what=what)
    if isinstance(vector, Chosen):
        one, other = changed(vector.one, change), changed(vector.other, change)
        return replace(vector, one=one, other=other)
    return replace(vector, of=changed(vector.of, change))


def simplest(vector: Vector) -> Vector:
    """The same tokens in as few parts as possible, where all numbers of tokens are known."""
    runs = _runs(vector)
    return _vector_of(runs) if runs else vector


def _vector_of(runs: Runs[Stream]) -> Vector:
    return joined(Part(count, stream) for stream, count in runs)


def _runs(vector: Vector) -> Runs[Stream] | None:
    """The streams of a vector; None where a number of tokens is symbolic."""
    if isinstance(vector, Part):
        count = vector.count
        return merged([(vector.stream, count)]) if isinstance(count, int) else None
    if isinstance(vector, Joined):
        parts = [_runs(part) for part in vector.parts]
        return None if None in parts else merged(run for part in parts if part for run in part)
    if not isinstance(vector, Placed) or isinstance(vector.at, Node):
        return None
    into, what = _runs(vector.into), _runs(vector.what)
    start, stop = vector.at
    if into is None or what is None or isinstance(start, Node) or isinstance(stop, Node):
        return None
    return written(into, start, stop, what)


def _pieces(vector: Vector) -> Iterator[Vector]:
    """A vector and everything that it is made of."""
    yield vector
    for part in inside(vector):
        yield from _pieces(part)


def inside(vector: Vector) -> tuple[Vector, ...]:
    """The vectors that one is made of."""
    if isinstance(vector, Part):
        return ()
    if isinstance(vector, Joined):
        return vector.parts
    if isinstance(vector, Placed):
        return vector.into, vector.what
    return (vector.one, vector.other) if isinstance(vector, Chosen) else (vector.of,)


def leaves(vector: Vector) -> Iterator[Part]:
    """The parts of which a vector is made."""
    return (piece for piece in _pieces(vector) if isinstance(piece, Part))


def index_nodes(vector: Vector) -> Iterator[Node]:
    """Index tensors and masks that a vector needs the values of."""
    for piece in _pieces(vector):
        if isinstance(piece, Taken):
            yield piece.index
        elif isinstance(piece, Chosen):
            yield piece.mask
        elif isinstance(piece, Placed) and isinstance(piece.at, Node):
            yield piece.at


def nodes_of(vector: Vector) -> Iterator[Node]:
    """The nodes of the graph that a vector needs."""
    yield from index_nodes(vector)
    for piece in _pieces(vector):
        held: list[object] = [getattr(piece, name, None) for name in ("start", "stop", "shift")]
        if isinstance(piece, Part) and isinstance(piece.count, TokenCount):
            held.append(piece.count.node)
        elif isinstance(piece, Placed) and not isinstance(piece.at, Node):
            held += piece.at
        yield from (node for node in held if isinstance(node, Node))


def one_answer(vector: Vector, holds: Callable[[Stream], bool]) -> bool | None:
    """Whether the streams of all tokens hold, or none of them; None where some do."""
    answers = {holds(part.stream) for part in leaves(vector)}
    return answers.pop() if len(answers) == 1 else None


def writes_over(vector: Placed) -> bool:
    """True if places are written that held tokens before, and no filling."""
    return all(part.stream != FILLED for part in leaves(vector.into))
