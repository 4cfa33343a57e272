"""Where a clip's tokens were folded into the batch: attention within frames, or along time.

A model that attends in parts reshapes (B, F x P, C) to (B x F, P, C) and back. What every dimension
of every tensor is made of is followed forward through the graph, once for all attention calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, is_weight
from svg_ear_compile.passes.letters import regroup
from svg_ear_compile.passes.operation import RESHAPES, operation
from svg_ear_compile.passes.permutations import permutation
from svg_ear_compile.passes.site import Role
from svg_ear_compile.passes.symbolic import hint, hints_of, shape_of

_RESHAPES = RESHAPES | {"squeeze_", "unsqueeze_"}


@dataclass(frozen=True)
class _Axis:
    """A dimension of an input, or a part of one.

    Attributes:
        extent: its size.
        place: which dimension of its input it is, then which part of that, and so on; of two axes
            the one that varies slower comes first.
        is_batch: it numbers samples, not parts of one.
    """

    extent: int
    place: tuple[int, ...]
    is_batch: bool = False

    def apart(self, outer: int, inner: int) -> tuple[_Axis, _Axis]:
        return (
            _Axis(outer, (*self.place, 0), self.is_batch),
            _Axis(inner, (*self.place, 1), self.is_batch),
        )


Axes = tuple[tuple[_Axis, ...], ...]
"""The axes that each dimension of a tensor holds."""


def folds(flow: Dataflow) -> dict[Node, Axes]:
    """What each dimension of every tensor of a graph is made of, as far as that is known."""
    found: dict[Node, Axes] = {}
    for node in flow.position:
        shape = _sizes(node)
        if shape is not None:
            found[node] = _axes(node, shape, flow, found)
        else:  # a list of parts has the axes of what it was cut from
            data = _data(node, flow, found)
            if data is not None:
                found[node] = found[data]
    return found


def _sizes(node: Node) -> tuple[int, ...] | None:
    shape = shape_of(node)
    return None if shape is None else tuple(hint(size) or 0 for size in shape)


def _data(node: Node, flow: Dataflow, found: dict[Node, Axes]) -> Node | None:
    """Of several inputs, the data is the largest; conditions and tables are small, weights not."""
    sources = [s for s in flow.sources(node) if s in found and not is_weight(s)]
    return max(sources, key=lambda source: _numel(found[source]), default=None)


def _numel(axes: Axes) -> int:
    return math.prod(axis.extent for group in axes for axis in group)


def _axes(node: Node, shape: tuple[int, ...], flow: Dataflow, found: dict[Node, Axes]) -> Axes:
    data = _data(node, flow, found)
    if data is None:
        return tuple(
            (_Axis(size, (dim,), is_batch=dim == 0),) for dim, size in enumerate(shape)
        )  # fmt: skip
    before = found[data]
    name = operation(node)
    if name in _RESHAPES and 0 not in shape and math.prod(shape) == _numel(before):
        pieces = [axis for group in before for axis in group]
        groups = regroup(pieces, shape, lambda axis: axis.extent, _Axis.apart)
        return _like(before, shape) if groups is None else tuple(map(tuple, groups))
    order = permutation(node)
    if order is not None and len(order) == len(before):
        return tuple(before[dim] for dim in order)
    return _like(before, shape)


def _like(before: Axes, shape: tuple[int, ...]) -> Axes:
    """Axes of a tensor that keeps dimensions of the one before, and has others of its own.

    Dimensions of equal size are the same, in order; another one takes the place of what stood
    there. What leads a tensor otherwise than before numbers samples.
    """
    sizes = [math.prod(axis.extent for axis in group) for group in before]
    kept: list[int | None] = list(range(len(shape)))
    if len(sizes) != len(shape):
        start = 0
        for dim, size in enumerate(shape):
            kept[dim] = next((d for d in range(start, len(sizes)) if sizes[d] == size), None)
            start = start if (place := kept[dim]) is None else place + 1
    axes = []
    for dim, (size, place) in enumerate(zip(shape, kept, strict=True)):
        old = before[place] if place is not None else ()
        if place is not None and sizes[place] == size:
            axes.append(old)
        else:
            where = old[0].place if old else (dim,)
            axes.append((_Axis(size, where, is_batch=dim == 0),))
    return tuple(axes)


def role_in_clip(source: Node, tokens: int | None, axes: dict[Node, Axes]) -> Role | None:
    """SPATIAL or TEMPORAL if the tokens of an activation are parts of a clip, else None.

    Args:
        source: the activation whose projection makes the queries, tokens in one dimension.
        tokens: how many attend to each other.
        axes: see `folds`.
    """
    held = axes.get(source, ())
    sizes = hints_of(source)
    dims = [dim for dim in range(1, len(sizes) - 1) if sizes[dim] == tokens]
    if not dims or len(held) != len(sizes):
        return None
    folded = [axis for axis in held[0] if not axis.is_batch and axis.extent > 1]
    if not folded:
        return None
    within = [axis.place for axis in held[dims[0]] if axis.extent > 1]
    across = [axis.place for axis in folded]
    # Time comes before space where both were one sequence, or dimensions of the latents.
    if within and max(across) < min(within):
        return Role.SPATIAL
    if within and min(across) > max(within):
        return Role.TEMPORAL
    if within and min(across) < min(within) and len(min(across)) == 1:
        return Role.SPATIAL  # time is a dimension of its own, all of it across
    # Windows hold parts of both. A clip has more places than moments: cut into more parts than each
    # part has tokens, it was cut into places.
    count = math.prod(axis.extent for axis in folded)
    return Role.TEMPORAL if tokens is not None and count > tokens else Role.SPATIAL
