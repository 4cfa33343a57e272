"""Which tokens of a joint sequence are text: read off the graph where it shows."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Size, TextSpan, TokenCount
from svg_ear_compile.passes.symbolic import expression, hint, hints_of, is_same, shape_of

_CONSTANTS = frozenset({"zeros", "new_zeros", "zeros_like", "ones", "new_ones", "full", "new_full"})


@dataclass(frozen=True)
class _Found:
    """Text of a sequence of `tokens` tokens, where the node at `place` shows it."""

    span: TextSpan
    tokens: Size
    place: int


class TextSpans:
    """Text tokens of every sequence of a graph that shows them, the latest concatenation first.

    The longest part of a concatenation along the tokens is the video; what stands before and after
    it is text. A sequence that arrives in one piece (a block compiled by itself) shows its text
    where RoPE is applied to the video tokens alone. Both are followed forward through nodes that
    still have the whole sequence in a dimension, so never across a slice, a patch embedding or
    another sequence, and never through an attention call, whose keys may be other tokens that
    happen to be as many.
    """

    def __init__(self, flow: Dataflow, attention: Set[Node]) -> None:
        self.flow = flow
        self._found: dict[Node, tuple[_Found, ...]] = {}
        for node, place in flow.position.items():
            if node not in attention:
                self._follow(node, place)

    def of(self, q: Node, reader: Node, tokens: Size) -> TextSpan:
        """Text among the `tokens` tokens of q as `reader` reads it."""
        shown = [q, *self.flow.writes_before(q, reader)]
        found = [
            f for node in shown for f in self._found.get(node, ()) if is_same(f.tokens, tokens)
        ]
        return max(found, key=lambda f: f.place).span if found else TextSpan()

    def _follow(self, node: Node, place: int) -> None:
        latest: dict[object, _Found] = {}
        for source in self.flow.sources(node):
            for found in self._found.get(source, ()):
                known = latest.get(_key(found.tokens))
                newer = known is None or found.place > known.place
                if newer and _has_extent(node, found.tokens):
                    latest[_key(found.tokens)] = found
        own = _concatenated(node) if operation(node) == "cat" else _rotated_in_part(node)
        if own is not None:
            tokens, span = own
            latest[_key(tokens)] = _Found(span, tokens, place)
        if latest:
            self._found[node] = tuple(latest.values())


def _key(tokens: Size) -> object:
    return expression(tokens)


def _concatenated(node: Node) -> tuple[Size, TextSpan] | None:
    """The tokens of a concatenated sequence and which of them are text, or None if it is none."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    shape = shape_of(node)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
        return None
    dim %= len(shape)
    # Features are last and the batch is first: neither is the sequence.
    if dim in (0, len(shape) - 1):
        return None
    nodes = [part for part in parts if isinstance(part, Node) and hints_of(part)]
    if len(nodes) != len(parts) or any(operation(part) in _CONSTANTS for part in nodes):
        return None  # filled up with zeros, or with nothing
    lengths = [hints_of(part)[dim] or 0 for part in nodes]
    if 2 * max(lengths) <= (hint(shape[dim]) or 0) or max(lengths) == 0:
        return None
    video = lengths.index(max(lengths))
    texts = [_count(part, dim) for part in nodes]
    return shape[dim], TextSpan(tuple(texts[:video]), tuple(texts[video + 1 :]))


def _count(part: Node, dim: int) -> int | TokenCount:
    shape = shape_of(part)
    assert shape is not None
    length = shape[dim]
    return length if isinstance(length, int) else TokenCount(part, dim)


def _rotated_in_part(node: Node) -> tuple[Size, TextSpan] | None:
    """The same for a write into a slice of the tokens: `q[:, :, text:] = rotated`."""
    into = node.args[0] if operation(node) == "setitem" else None
    if not isinstance(into, Node) or not isinstance(node.args[1], tuple):
        return None
    shape = shape_of(into) or ()
    for size, part in zip(shape[1:-1], list(_indices(node.args[1], len(shape)))[1:], strict=False):
        whole = hint(size)
        if whole is None or not isinstance(part, slice) or part.step not in (None, 1):
            continue
        start, stop = part.start or 0, whole if part.stop is None else part.stop
        if not isinstance(start, int) or not isinstance(stop, int):
            continue  # symbolic: only a concatenation gives a length that can be read at run time
        start, stop = start % (whole + 1), stop if stop >= 0 else whole + stop
        if stop - start < whole and 2 * (stop - start) > whole:
            text = TextSpan((start,) if start else (), (whole - stop,) if stop < whole else ())
            return size, text
    return None


def _indices(index: tuple[object, ...], rank: int) -> Iterator[object]:
    """One index for each leading dimension, an ellipsis written out."""
    for part in index:
        if part is Ellipsis:
            yield from [slice(None)] * (rank - len(index) + 1)
        else:
            yield part


def _has_extent(node: Node, extent: Size) -> bool:
    if operation(node) == "setitem":  # has no value of its own
        return True
    value = node.meta.get("example_value")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(
        isinstance(t, torch.Tensor) and any(is_same(size, extent) for size in t.shape)
        for t in tensors
    )
