"""Where a clip's tokens were folded into the batch: attention within frames, or along time.

A model that attends in parts reshapes (B, F x P, C) to (B x F, P, C) and back. Whether a tensor's
batch is such a fold is followed forward through the graph, once for all attention calls.
"""

from __future__ import annotations

import math

from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Role
from svg_ear_compile.passes.symbolic import hints_of

_RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze"}
)

_Shape = tuple[int | None, ...]


def folds(flow: Dataflow) -> dict[Node, int]:
    """For every node, into how many parts each batch element of its tensor was cut; 1 if whole."""
    found: dict[Node, int] = {}
    shapes = {node: hints_of(node) for node in flow.position}
    for node in flow.position:
        found[node] = _parts(node, flow, found, shapes)
    return found


def _parts(node: Node, flow: Dataflow, found: dict[Node, int], shapes: dict[Node, _Shape]) -> int:
    shape = shapes[node]
    # Of several inputs, the data is the largest; conditions and tables are small.
    sources = [s for s in flow.sources(node) if s in found]
    data = max(sources, key=lambda s: _numel(shapes[s]), default=None)
    if data is None:
        return 1
    before = shapes[data]
    if not shape or not before or shape[0] is None or before[0] is None:
        return found[data]  # a tuple of parts, or what is taken out of one
    if shape[0] == before[0]:
        return found[data]
    if operation(node) in _RESHAPES and _numel(shape) == _numel(before):
        if shape[0] > before[0] and shape[0] % max(before[0], 1) == 0:
            return found[data] * (shape[0] // max(before[0], 1))
        return max(1, found[data] * shape[0] // before[0])
    if _numel(shape) == _numel(before):  # a transpose: whatever leads now, it is no fold yet
        return 1
    return max((found[s] for s in sources if shapes[s][:1] == shape[:1]), default=1)


def _numel(shape: _Shape) -> int:
    return math.prod(size or 0 for size in shape) if shape else 0


def role_in_clip(source: Node, tokens: int | None, parts: dict[Node, int]) -> Role | None:
    """SPATIAL or TEMPORAL if the tokens of an activation are parts of a clip, else None.

    Args:
        source: the activation whose projection makes the queries, tokens in one dimension.
        tokens: how many attend to each other.
        parts: see `folds`.
    """
    count = parts.get(source, 1)
    if count <= 1 or tokens is None or tokens not in hints_of(source)[1:]:
        return None
    # A clip has more places than moments: cut into more parts than each part has tokens, it was
    # cut into places.
    return Role.TEMPORAL if count > tokens else Role.SPATIAL
