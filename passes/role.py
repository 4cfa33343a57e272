"""Role and text span of an attention call, from where its queries and keys come."""

from __future__ import annotations

from collections.abc import Set

import networkx as nx
import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import (
    SAME_FUNCTIONS,
    SAME_METHODS,
    backward,
    calls,
    projected_input,
)
from svg_ear_compile.passes.site import Role, TextSpan, TokenCount


def projection_sources(flow: nx.DiGraph, start: Node, reader: Node) -> frozenset[Node]:
    """The activations whose projections reach `start` as `reader` sees it.

    Walks back to the first linear layer or convolution on every path. Embeddings and products are
    passed: RoPE tables are made of them.
    """
    found = set()
    for node in backward(flow, start, lambda n: projected_input(n) is not None, reader):
        if (source := projected_input(node)) is not None:
            found.add(_tokens(source))
    return frozenset(found)


def _tokens(node: Node) -> Node:
    """Through casts and stacked projections (LoRA) to the activation that was projected first."""
    while True:
        source = projected_input(node)
        if source is None and calls(node, SAME_METHODS, SAME_FUNCTIONS):
            first = node.args[0] if node.args else node.kwargs.get("input")
            source = first if isinstance(first, Node) else None
        if source is None:
            return node
        node = source


def role_of(flow: nx.DiGraph, q: Node, k: Node, reader: Node) -> Role:
    """Role by projection source; UNKNOWN where no projection reaches q nor k (a bare function)."""
    q_sources, k_sources = (projection_sources(flow, node, reader) for node in (q, k))
    if not q_sources and not k_sources:
        return Role.UNKNOWN
    if q_sources == k_sources:
        return Role.SELF if len(q_sources) == 1 else Role.JOINT
    if q_sources < k_sources:
        return Role.PREFIX
    return Role.CROSS


def text_span(
    flow: nx.DiGraph, q: Node, tokens: int | torch.SymInt, attention: Set[Node]
) -> TextSpan:
    """Text tokens of a sequence that was concatenated along its tokens, nearest `cat` first.

    The longest part is the video; what stands before and after it is text. The walk stays on nodes
    that still have the whole sequence in a dimension, so it never crosses a slice, a patch
    embedding or another sequence, and never passes another attention call, whose keys may be
    other tokens that happen to be as many.
    """
    whole = hint(tokens)
    if whole is None:
        return TextSpan()
    for node in backward(flow, q, lambda n: n in attention or not _has_extent(n, whole)):
        if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
            continue
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        shape = shape_of(node)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or shape is None:
            continue
        dim %= len(shape)
        # Features are last and the batch is first: neither is the sequence.
        if dim in (0, len(shape) - 1) or hint(shape[dim]) != whole:
            continue
        spans = [(part, _extent(part, dim)) for part in parts if isinstance(part, Node)]
        lengths = [hint(length) or 0 for _, length in spans]
        if len(spans) != len(parts) or 2 * max(lengths) <= whole:
            continue
        video = lengths.index(max(lengths))
        texts = [
            length if isinstance(length, int) else TokenCount(part, dim) for part, length in spans
        ]
        return TextSpan(tuple(texts[:video]), tuple(texts[video + 1 :]))
    return TextSpan()


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...] | None:
    """Shape of the node's tensor as Dynamo traced it, or None."""
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def hint(size: int | torch.SymInt | None) -> int | None:
    """The traced value of a size, without specialising it."""
    if size is None or isinstance(size, int):
        return size
    value = size.node.hint
    return None if value is None else int(value)


def _extent(node: Node, dim: int) -> int | torch.SymInt | None:
    shape = shape_of(node)
    return None if shape is None else shape[dim]


def _has_extent(node: Node, extent: int) -> bool:
    value = node.meta.get("example_value")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(
        isinstance(t, torch.Tensor) and extent in [hint(size) for size in t.shape] for t in tensors
    )
