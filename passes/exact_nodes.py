"""Writes into a graph which tokens are exact, for the lengths and index tensors of every call."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from svg_ear_compile.passes.exact_places import ExactTokens
from svg_ear_compile.passes.rearranged_tokens import differing
from svg_ear_compile.passes.symbolic import shape_of
from svg_ear_compile.passes.traced_tokens import traced_count
from svg_ear_compile.passes.vectors import (
    Chosen,
    Cut,
    Flipped,
    Joined,
    Part,
    Placed,
    Rolled,
    Taken,
    TokenCount,
    Vector,
    nodes_of,
    one_answer,
    writes_over,
)


class ExactNodes:
    """Makes the nodes of one graph; equal sequences share theirs.

    Args:
        graph: nodes are inserted where it inserts now.
        like: node of a tensor on the device of the call.
        now: the node that holds what a node held when the sites were found.
        exact: which streams are exact.
    """

    def __init__(
        self, graph: Graph, like: Node, now: Callable[[Node], Node], exact: ExactTokens
    ) -> None:
        self.graph = graph
        self.like = like
        self.now = now
        self.exact = exact

    def places(self, vector: Vector) -> Node:
        """(1, N) bool, True for exact tokens."""
        return self.graph.call_method("unsqueeze", (self._places(vector), 0))

    def clustered(self, vector: Vector, tokens: int | Node) -> int | Node | None:
        """Number of tokens that are not exact; None where only the places tell."""
        count = self._count(vector)
        if count is None:
            return None
        return self._of(operator.sub, tokens, count)

    def _of(self, target: Callable[..., object], *args: object) -> int | Node:
        if all(isinstance(a, int) for a in args):
            found = target(*args)
            assert isinstance(found, int)
            return found
        return self.graph.call_function(target, args)  # type: ignore[arg-type]

    def _size(self, count: int | TokenCount) -> int | Node:
        if isinstance(count, int):
            return count
        return self.graph.call_method("size", (self.now(count.node), count.dim))

    def _whole(self, vector: Vector) -> tuple[int | TokenCount, bool] | None:
        """Length of a piece whose tokens are all exact, or none of them, and which of both."""
        if not isinstance(vector, (Part, Cut, Taken)) or vector.count is None:
            return None
        exact = one_answer(vector, self.exact.is_exact)
        return None if exact is None else (vector.count, exact)

    def _count(self, vector: Vector) -> int | Node | None:
        """Number of exact tokens; what is written by index counts as at places of its own."""
        if not any(True for _ in nodes_of(vector)):
            return traced_count(vector, self.exact.is_exact)
        whole = self._whole(vector)
        if whole is not None:
            return self._size(whole[0]) if whole[1] else 0
        if isinstance(vector, (Flipped, Rolled)):
            return self._count(vector.of)
        if not isinstance(vector, (Joined, Placed)):
            return None
        parts = vector.parts if isinstance(vector, Joined) else (vector.into, vector.what)
        over = isinstance(vector, Placed) and writes_over(vector)
        if over and one_answer(parts[0], self.exact.is_exact) is not False:
            return None
        total: int | Node = 0
        for part in parts:
            count = self._count(part)
            if count is None:
                return None
            total = self._of(operator.add, total, count)
        return total

    def _places(self, vector: Vector) -> Node:
        graph, call = self.graph, self.graph.call_function
        whole = self._whole(vector)
        if whole is not None:  # cutting by a length that is not known makes a symbol of its own
            shape = (self._size(whole[0]),)
            given = (self.now(self.like), shape, whole[1])
            return graph.call_method("new_full", given, {"dtype": torch.bool})
        assert not isinstance(vector, Part)
        if isinstance(vector, Joined):
            return call(torch.cat, ([self._places(part) for part in vector.parts],))
        if isinstance(vector, Chosen):
            both = [self._places(part) for part in (vector.one, vector.other)]
            return call(torch.where, (self._index(vector.mask), *both))
        if isinstance(vector, Placed):
            into = self._places(vector.into)
            if not isinstance(vector.at, Node):
                bounds = [self._bound(bound) for bound in vector.at]
                return call(torch.slice_scatter, (into, self._places(vector.what), 0, *bounds))
            at = self._index(vector.at)
            return call(torch.index_put, (into, (at,), self._all(vector.what)))
        inside = self._places(vector.of)
        if isinstance(vector, Flipped):
            return call(torch.flip, (inside, (0,)))
        if isinstance(vector, Rolled):
            return call(torch.roll, (inside, self._bound(vector.shift), 0))
        if isinstance(vector, Taken):
            return call(operator.getitem, (inside, self._index(vector.index)))
        where = slice(self._bound(vector.start), self._bound(vector.stop), vector.step)
        return call(operator.getitem, (inside, where))

    def _all(self, vector: Vector) -> Node:
        """The same for a vector, or one answer for all of its tokens, however many there are."""
        exact = one_answer(vector, self.exact.is_exact)
        if exact is None:
            return self._places(vector)
        given = (self.now(self.like), (), exact)
        return self.graph.call_method("new_full", given, {"dtype": torch.bool})

    def _index(self, index: Node) -> Node:
        """An index or a mask of one dimension: it is the same along the others."""
        one, rank = self.now(index), len(shape_of(index) or ())
        if rank == 1:
            return one
        where = tuple(slice(None) if d - rank in differing(index) else 0 for d in range(rank))
        one = self.graph.call_function(operator.getitem, (one, where))
        return self.graph.call_method("reshape", (one, (-1,)))

    def _bound(self, bound: int | Node | None) -> int | Node | None:
        return self.now(bound) if isinstance(bound, Node) else bound
