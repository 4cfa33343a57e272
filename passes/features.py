"""Where the features of a tensor's tokens lie: people write (B, N, C) and (B, C, N)."""

from __future__ import annotations

from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.operation import CONVOLUTIONS, LINEAR, operation
from svg_ear_compile.passes.rearranged_tokens import REARRANGED
from svg_ear_compile.passes.symbolic import hints_of, shape_of
from svg_ear_compile.passes.token_states import Mixed
from svg_ear_compile.passes.vectors import FILLED, Part

_MOST_SEEN = 64  # nodes: branches that meet again are followed once


def features_dim(node: Node, seen: set[Node] | None = None) -> int | None:
    """Dimension of the features, followed back to their projection; None if unknown."""
    seen = set() if seen is None else seen
    if node in seen or len(seen) == _MOST_SEEN:
        return None
    seen.add(node)
    name, rank = operation(node), len(shape_of(node) or ())
    if name in LINEAR:
        return rank - 1
    if name in CONVOLUTIONS:
        return 1
    if name in REARRANGED:
        return _rearranged(node, name, seen)
    alike = (n for n in node.all_input_nodes if len(hints_of(n)) == rank)
    return next((dim for n in alike if (dim := features_dim(n, seen)) is not None), None)


def _rearranged(node: Node, name: str, seen: set[Node]) -> int | None:
    source, args = node.args[0] if node.args else None, arguments(node)
    shape = shape_of(source) if isinstance(source, Node) else None
    if not isinstance(source, Node) or shape is None or (args is None and name != "roll"):
        return None
    dim = features_dim(source, seen)
    if dim is None:
        return None
    marked = Mixed(dim, Part(0, FILLED))
    found = REARRANGED[name](node, args or Arguments({}, {}), marked, shape)
    return found.dim if isinstance(found, Mixed) else None
