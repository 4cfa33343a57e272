"""The role of an attention call, from where its queries, keys and values come."""

from __future__ import annotations

from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.operation import CASTS, COPIES, operation
from svg_ear_compile.passes.site import Role
from svg_ear_compile.passes.symbolic import hints_of

# What a model does to every token by itself before it projects it.
_TOKENWISE = frozenset(
    {"add", "sub", "mul", "div", "layer_norm", "rms_norm", "native_layer_norm", "silu", "gelu"}
)


def projection_sources(flow: Dataflow, start: Node, reader: Node) -> frozenset[Node]:
    """The activations whose projections reach `start` as `reader` sees it.

    Walks back to the first linear layer or convolution on every path. Embeddings and products are
    passed: RoPE tables are made of them.
    """
    found = set()
    for node in flow.backward(start, lambda n: projected_input(n) is not None, reader):
        if (source := projected_input(node)) is not None:
            found.add(_tokens(source))
    return frozenset(found)


def _tokens(node: Node) -> Node:
    """Through casts and stacked projections (LoRA) to the activation that was projected first."""
    while True:
        source = projected_input(node)
        if source is None and operation(node) in CASTS | COPIES:
            first = node.args[0] if node.args else node.kwargs.get("input")
            source = first if isinstance(first, Node) else None
        if source is None:
            return node
        node = source


def role_of(q_sources: frozenset[Node], k_sources: frozenset[Node]) -> Role:
    """Role by projection source; UNKNOWN where no projection reaches q nor k (a bare function)."""
    if not q_sources and not k_sources:
        return Role.UNKNOWN
    if q_sources == k_sources:
        return Role.SELF if len(q_sources) == 1 else Role.JOINT
    if q_sources < k_sources:
        return Role.PREFIX
    return Role.CROSS


def are_same_tokens(
    flow: Dataflow, k_sources: frozenset[Node], v_sources: frozenset[Node], tokens: int | None
) -> bool:
    """True if keys and values are projections of the same tokens.

    Either may have been normalised, modulated or given positions by itself.
    """
    if v_sources <= k_sources:
        return True
    reached = {n for source in k_sources for n in _before_tokenwise(flow, source, tokens)}
    return all(reached & _before_tokenwise(flow, source, tokens) for source in v_sources)


def _before_tokenwise(flow: Dataflow, source: Node, tokens: int | None) -> set[Node]:
    """The activations that `source` was made of token by token, itself among them."""

    def stop(node: Node) -> bool:
        return operation(node).rstrip("_") not in _TOKENWISE | CASTS | COPIES

    # Conditions that modulate every token are no tokens.
    return {n for n in flow.backward(source, stop) if n is source or tokens in hints_of(n)}
