"""Where the features of a tensor's tokens lie: people write (B, N, C) and (B, C, N)."""

from __future__ import annotations

from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.operation import CONVOLUTIONS, LINEAR, operation
from svg_ear_compile.passes.rearranged_tokens import REARRANGED
from svg_ear_compile.passes.symbolic import hints_of, shape_of
from svg_ear_compile.passes.token_states import Mixed
from svg_ear_compile.passes.vectors import FILLED, Part

_FARTHEST = 16


def features_dim(node: Node, depth: int = 0) -> int | None:
    """Dimension of the features, followed back to their projection; None if unknown."""
    name, rank = operation(node), len(shape_of(node) or ())
    if name in LINEAR:
        return rank - 1
    if name in CONVOLUTIONS:
        return 1
    if depth == _FARTHEST:
        return None
    if name in REARRANGED:
        return _rearranged(node, name, depth)
    alike = (n for n in node.all_input_nodes if len(hints_of(n)) == rank)
    return next((dim for n in alike if (dim := features_dim(n, depth + 1)) is not None), None)


def _rearranged(node: Node, name: str, depth: int) -> int | None:
    source, args = node.args[0] if node.args else None, arguments(node)
    shape = shape_of(source) if isinstance(source, Node) else None
    if not isinstance(source, Node) or shape is None or (args is None and name != "roll"):
        return None
    dim = features_dim(source, depth + 1)
    if dim is None:
        return None
    marked = Mixed(dim, Part(0, FILLED))
    found = REARRANGED[name](node, args or Arguments({}, {}), marked, shape)
    return found.dim if isinstance(found, Mixed) else None
