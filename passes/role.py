"""The role of an attention call, from where its queries, keys and values come."""

from __future__ import annotations

import itertools
import math

from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.operation import CASTS, COPIES, REARRANGEMENTS, operation
from svg_ear_compile.passes.site import Role
from svg_ear_compile.passes.symbolic import hints_of

# What a model does to every token by itself before it projects it.
_TOKENWISE = frozenset(
    {"add", "sub", "mul", "div", "layer_norm", "rms_norm", "native_layer_norm", "silu", "gelu"}
)

# More than any model does to its tokens right before it projects them; a residual stream goes on.
_NEAR = 48


def projected(flow: Dataflow, start: Node, reader: Node) -> frozenset[Node]:
    """The activations whose projections reach `start` as `reader` sees it."""
    found = map(projected_input, flow.projections(start, reader))
    return frozenset(source for source in found if source is not None)


class TokenSources:
    """Where q, k and v of one call come from.

    Two activations are the same tokens if each is made of one activation token by token: either may
    have been normalised, modulated, reshaped or given positions by itself.
    """

    def __init__(
        self, flow: Dataflow, q: frozenset[Node], k: frozenset[Node], v: frozenset[Node]
    ) -> None:
        self.flow = flow
        self.q, self.k, self.v = ({_tokens(source) for source in part} for part in (q, k, v))
        self._made_of: dict[Node, set[Node]] = {}

    @property
    def role(self) -> Role:
        """Role by projection source; UNKNOWN where no projection reaches q nor k (a function)."""
        if not self.q and not self.k:
            return Role.UNKNOWN
        queries_are_keys = bool(self.q) and self._are_among(self.q, self.k)
        if not queries_are_keys and self.q and self._are_cut_from(self.q, self.k):
            return Role.PREFIX
        if queries_are_keys and self._are_among(self.k, self.q):
            return Role.SELF if len(self.q) == 1 else Role.JOINT
        return Role.PREFIX if queries_are_keys else Role.CROSS

    @property
    def values_are_of_the_keys(self) -> bool:
        """True if keys and values are projections of the same tokens."""
        return self._are_among(self.v, self.k)

    def _are_among(self, some: set[Node], others: set[Node]) -> bool:
        if some <= others:
            return True
        known: set[Node] = set().union(*(self._origins(node) for node in others))
        return all(known & self._origins(node) for node in some)

    def _are_cut_from(self, some: set[Node], others: set[Node]) -> bool:
        """True if tokens are a part of others: these are joined of them, or they are a slice."""
        wholes = set().union(*(self._origins(node) for node in others))
        parts = {part for whole in wholes for part in _joined_of(whole)}
        known = wholes.union(*(self._origins(part) for part in parts))
        return all(
            known & (origins | {whole for o in origins if (whole := _slice_of(o))})
            for origins in map(self._origins, some)
        )

    def _origins(self, source: Node) -> set[Node]:
        """The activations that `source` is made of token by token, itself among them."""
        if source not in self._made_of:
            tokens = hints_of(source)[1:-1]

            def stop(node: Node) -> bool:
                return operation(node).rstrip("_") not in _TOKENWISE | CASTS | COPIES

            # Conditions that modulate every token are no tokens.
            near = itertools.islice(self.flow.backward(source, stop), _NEAR)
            self._made_of[source] = {n for n in near if hints_of(n)[1:-1] == tokens}
        return self._made_of[source]


def _tokens(node: Node) -> Node:
    """Through casts, reshapes and stacked projections (LoRA) to the activation behind them."""
    while True:
        source = projected_input(node)
        if source is None:
            first = node.args[0] if node.args else node.kwargs.get("input")
            name = operation(node)
            reshaped = (
                name in REARRANGEMENTS and isinstance(first, Node) and _numel(first) == _numel(node)
            )
            if isinstance(first, Node) and (name in CASTS | COPIES or reshaped):
                source = first
        if source is None:
            return node
        node = source


def _joined_of(node: Node) -> list[Node]:
    """The tensors (B, N, C) whose tokens a tensor has, one after the other; [] for another."""
    if operation(node) != "cat":
        return []
    parts, dim = (*node.args, None, None)[:2]
    parts = node.kwargs.get("tensors", parts)
    dim = node.kwargs.get("dim", node.kwargs.get("axis", dim))
    if len(hints_of(node)) != 3 or dim not in (1, -2) or not isinstance(parts, (list, tuple)):
        return []
    return [_tokens(part) for part in parts if isinstance(part, Node)]


def _slice_of(node: Node) -> Node | None:
    """The tensor (B, N, C) of which a node is a slice of tokens."""
    whole, index = (*node.args, None, None)[:2]
    if operation(node) not in ("getitem", "narrow") or not isinstance(whole, Node):
        return None
    same = [n for place, n in enumerate(hints_of(node)) if place != 1]
    of_whole = [n for place, n in enumerate(hints_of(whole)) if place != 1]
    by_slices = operation(node) == "narrow" or (
        isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
    )
    return _tokens(whole) if by_slices and len(same) == 2 and same == of_whole else None


def _numel(node: Node) -> int:
    shape = hints_of(node)
    return math.prod(size or 0 for size in shape) if shape else -1
