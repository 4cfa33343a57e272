"""Which tokens of a joint sequence are text: read off the graph where it shows."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Size, TextSpan, TokenCount
from svg_ear_compile.passes.symbolic import hint, hints_of, is_same, shape_of

_CONSTANTS = frozenset({"zeros", "new_zeros", "zeros_like", "ones", "new_ones", "full", "new_full"})


def text_span(
    flow: Dataflow, q: Node, reader: Node, tokens: Size, attention: Set[Node]
) -> TextSpan:
    """Text tokens of a sequence that was concatenated along its tokens, nearest `cat` first.

    The longest part is the video; what stands before and after it is text. The walk stays on nodes
    that still have the whole sequence in a dimension, so it never crosses a slice, a patch
    embedding or another sequence, and never passes another attention call, whose keys may be
    other tokens that happen to be as many.

    A sequence that arrives in one piece (a block compiled by itself) shows its text where RoPE is
    applied to the video tokens alone.
    """
    for node in flow.backward(q, lambda n: n in attention or not _has_extent(n, tokens), reader):
        span = _concatenated(node, tokens) if operation(node) == "cat" else None
        span = span or _rotated_in_part(node, tokens)
        if span is not None:
            return span
    return TextSpan()


def _concatenated(node: Node, tokens: Size) -> TextSpan | None:
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    shape = shape_of(node)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
        return None
    dim %= len(shape)
    # Features are last and the batch is first: neither is the sequence.
    if dim in (0, len(shape) - 1) or not is_same(shape[dim], tokens):
        return None
    nodes = [part for part in parts if isinstance(part, Node) and hints_of(part)]
    if len(nodes) != len(parts) or any(operation(part) in _CONSTANTS for part in nodes):
        return None  # filled up with zeros, or with nothing
    lengths = [hints_of(part)[dim] or 0 for part in nodes]
    whole = hint(tokens)
    if 2 * max(lengths) <= (whole or 0) or max(lengths) == 0:
        return None
    video = lengths.index(max(lengths))
    texts = [_count(part, dim) for part in nodes]
    return TextSpan(tuple(texts[:video]), tuple(texts[video + 1 :]))


def _count(part: Node, dim: int) -> int | TokenCount:
    shape = shape_of(part)
    assert shape is not None
    length = shape[dim]
    return length if isinstance(length, int) else TokenCount(part, dim)


def _rotated_in_part(node: Node, tokens: Size) -> TextSpan | None:
    """`q[:, :, text:] = rotated`: a write into a slice of the tokens."""
    whole = hint(tokens)
    if operation(node) != "setitem" or not isinstance(node.args[1], tuple) or whole is None:
        return None
    into = node.args[0]
    shape = hints_of(into) if isinstance(into, Node) else ()
    for size, part in zip(shape, _indices(node.args[1], len(shape)), strict=False):
        if size != whole or not isinstance(part, slice) or part.step not in (None, 1):
            continue
        start, stop = part.start or 0, whole if part.stop is None else part.stop
        if not isinstance(start, int) or not isinstance(stop, int):
            continue  # symbolic: only a concatenation gives a length that can be read at run time
        start, stop = start % (whole + 1), stop if stop >= 0 else whole + stop
        if stop - start < whole and 2 * (stop - start) > whole:
            return TextSpan((start,) if start else (), (whole - stop,) if stop < whole else ())
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
