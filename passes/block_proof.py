"""Writes into a graph the proof that a block mask is padding, for the values of every run.

A function of pairs that is made of one part for queries and one for keys is padding. Where it
compares the two (`key < ends[query]`, `document[query] == document[key]`), bounds of both sides
tell, for each query, whether the comparison holds for all keys, or for none: in time that grows
with the tokens, not with the pairs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import svg_ear_compile.kernels.block_lists  # noqa: F401  # registers listed_padding
from svg_ear_compile.passes.block_mask import (
    HEAD,
    INDICES,
    KEY,
    QUERY,
    SAMPLE,
    BlockMask,
    element,
    is_own,
    result_of,
)
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Call
from svg_ear_compile.passes.symbolic import expression, is_symbol

_FARTHEST = 1 << 62
# Which comparison of bounds (a side's, of the left and of the right) makes it hold for all pairs,
# and which for none: "h" is the highest, "l" the lowest number of a side.
_ALL_AND_NONE = {
    "lt": ((operator.lt, "h", "l"), (operator.ge, "l", "h")),
    "le": ((operator.le, "h", "l"), (operator.gt, "l", "h")),
    "gt": ((operator.gt, "l", "h"), (operator.le, "h", "l")),
    "ge": ((operator.ge, "l", "h"), (operator.lt, "h", "l")),
}


class BlockProof(NamedTuple):
    """Nodes of a graph that prove a block mask.

    Attributes:
        keys: (B|1, 1, 1, N_k) bool, keys that take part; None for all.
        rows: (B|1, 1, N_q, 1) bool, queries that do; None for all.
        own: (B|1, 1, N_q, 1) bool, other queries, which see themselves alone; None for none.
        proven: () bool on the CPU.
        left: the numbers of partial and of full blocks, 0 where the mask is proven.
    """

    keys: Node | None
    rows: Node | None
    own: Node | None
    proven: Node
    left: tuple[Node, Node | None]


class _All(NamedTuple):
    """Bool nodes (B|1, 1, N_q|1, 1): something holds for all keys of a region, or for none."""

    every: Node
    none: Node


class BlockProofs:
    """The proofs of one graph module; calls that share a mask share its proof.

    Args:
        flow: of the graph as it was found.
        now: the node that holds what a node held then.
    """

    def __init__(self, flow: Dataflow, now: Callable[[Node], Node]) -> None:
        self.flow = flow
        self.now = now
        self.known: dict[object, tuple[Node, BlockProof]] = {}

    def of(self, call: Call, q: Node, k: Node) -> BlockProof:
        """The proof for a call with a block mask, written where its graph inserts now.

        Args:
            q, k: the call's queries and keys as (B, H, N, D).
        """
        mask, graph = call.block_mask, call.node.graph
        assert mask is not None
        like = [x.node.meta["example_value"] for x in (call.q, call.k)]
        key = (graph, mask.key, *(expression(x.shape[dim]) for x in like for dim in (0, 2)))
        if key in self.known:
            at, proof = self.known[key]
            if not any(self.flow.is_written_between(t, at, call.node) for t in mask.tensors):
                return proof
        proof = _Writer(graph, mask, q, k, like[0].device, self.now).write()
        self.known[key] = call.node, proof
        return proof


def left_to_flex(call: Call, proof: BlockProof) -> tuple[Node, Node | None]:
    """Output and log-sum-exp of flex_attention, of no blocks where the mask is proven."""
    flex = call.steps[0]
    graph = flex.graph
    copy = graph.node_copy(flex)
    arguments: tuple[Any, ...] = flex.args
    queries, keys, _, order, _, *rest = arguments[4]
    lists = (queries, keys, proof.left[0], order, proof.left[1], *rest)
    copy.args = (*arguments[:4], lists, *arguments[5:])
    out, lse = (graph.call_function(operator.getitem, (copy, place)) for place in (0, 1))
    return out, None if call.lse is None else lse


class _Writer:
    def __init__(
        self, graph: Graph, mask: BlockMask, q: Node, k: Node, device: torch.device,
        now: Callable[[Node], Node],
    ) -> None:  # fmt: skip
        self.graph = graph
        self.mask = mask
        self.now = now
        self.device = device
        self.samples, self.queries, self.keys = (
            self._call(torch.ops.aten.sym_size.int, x, dim) for x, dim in ((q, 0), (q, 2), (k, 2))
        )
        self.places = {
            SAMPLE: self._numbers(self.samples, (-1, 1, 1, 1)),
            QUERY: self._numbers(self.queries, (1, 1, -1, 1)),
            KEY: self._numbers(self.keys, (1, 1, 1, -1)),
        }
        # Of queries alone, or of keys alone: what is of both is never made for all pairs.
        self.values = self._run(self.places, lambda node: not mask.is_of_pairs(node))

    def write(self) -> BlockProof:
        mask = self.mask
        every_key, every_row = (
            self._made(torch.ones, (1, 1, *shape), dtype=torch.bool)
            for shape in ((1, self.keys), (self.queries, 1))
        )
        keys, rows = every_key, every_row
        own: Node | None = None
        holds: Node | None = None
        if any(map(mask.is_of_pairs, mask.terms)):
            keys = self._and(self._seen_by_some(), every_key)
            kept = self._judged(result_of(mask.function), keys)
            dropped = self._judged(result_of(mask.function), self._not(keys))
            rows = self._and(self._and(kept.every, dropped.none), every_row)
            leaves = self._and(self._and(kept.none, dropped.none), every_row)
            holds = self._or(rows, leaves)
            if mask.has_own:
                on_itself = self._and(self._of({**self.places, KEY: self.places[QUERY]}), every_row)
                is_kept = self._call(torch.transpose, keys, 2, 3)
                same = self._call(torch.eq, on_itself, is_kept)
                holds = self._and(holds, self._or(self._not(rows), same))
                own = self._and(self._not(rows), on_itself)
        else:
            for term in mask.terms:
                if QUERY in mask.reads[term]:
                    rows = self._and(rows, self.values[term])
                else:
                    keys = self._and(keys, self.values[term])
        counts, order, *full = (None if n is None else self.now(n) for n in mask.lists)
        done = self._call(
            torch.ops.svg_ear.listed_padding.default,
            keys, rows, own, holds, counts, order, *full,
            *(self.now(b) if isinstance(b, Node) else b for b in mask.block),
        )  # fmt: skip
        proven, seen, partial, whole = (self._call(operator.getitem, done, i) for i in range(4))
        left = partial, None if full[0] is None else whole
        if mask.is_everything:
            return BlockProof(None, None, None, proven, left)
        reads_rows = any(QUERY in mask.reads[term] for term in mask.terms)
        return BlockProof(
            keys, rows if reads_rows else None, None if own is None else seen, proven, left
        )

    def _seen_by_some(self) -> Node:
        """(B|1, 1, 1, N_k) bool: keys that the first, the middle or the last query sees.

        Any query that takes part tells which keys do. If these three see different ones, what they
        see together is not what each sees, and the proof fails.
        """
        last = self._call(operator.sub, self.queries, 1)
        steps = self._call(operator.mul, self._numbers(3, (1, 1, -1, 1)), last)
        few = self._call(torch.div, steps, 2, rounding_mode="floor")
        seen = self._of({**self.places, QUERY: few}, apart=True)
        pairs = self._and(seen, self._made(torch.ones, (1, 1, 3, self.keys), dtype=torch.bool))
        return self._call(torch.any, pairs, 2, keepdim=True)

    def _judged(self, node: Node, region: Node) -> _All:
        """What holds for the keys of a region (B|1, 1, 1, N_k), other than the query's own."""
        name, reads = operation(node), self.mask.reads
        sides: tuple[Any, ...] = node.args
        if is_own(node):
            yes, no = (
                self._made(torch.full, (), value, dtype=torch.bool) for value in (True, False)
            )
            return _All(no, yes) if name == "eq" else _All(yes, no)
        if not self.mask.is_of_pairs(node):
            value = self.values[node]
            both = _All(value, self._not(value))
            return _All(*(self._in(region, x) for x in both)) if KEY in reads[node] else both
        if name == "logical_not":
            return _All(*reversed(self._judged(sides[0], region)))
        if name in ("logical_and", "logical_or"):
            one, other = (self._judged(side, region) for side in sides)
            if name == "logical_and":
                return _All(self._and(one.every, other.every), self._or(one.none, other.none))
            return _All(self._or(one.every, other.every), self._and(one.none, other.none))
        bounds = [self._bounds(side, region) for side in sides]
        if name in ("eq", "ne"):
            at_most, at_least = (self._compared(name, bounds) for name in ("le", "ge"))
            same = self._and(at_most.every, at_least.every)
            apart = self._or(self._compared("lt", bounds).every, self._compared("gt", bounds).every)
            return _All(same, apart) if name == "eq" else _All(apart, same)
        return self._compared(name, bounds)

    def _compared(self, name: str, bounds: list[dict[str, Any]]) -> _All:
        left, right = bounds
        return _All(*(self._call(of, left[a], right[b]) for of, a, b in _ALL_AND_NONE[name]))

    def _bounds(self, side: object, region: Node) -> dict[str, Any]:
        """The lowest and the highest number of one side, "l" and "h", over the keys of a region."""
        if not isinstance(side, Node):
            return {"l": side, "h": side}
        value = self.values[side]
        if KEY not in self.mask.reads[side]:
            return {"l": value, "h": value}
        numbers = self.graph.call_method("to", (value, torch.int64))
        return {
            name: self._call(
                of, self._call(torch.where, region, numbers, outside), -1, keepdim=True
            )
            for name, of, outside in (("l", torch.amin, _FARTHEST), ("h", torch.amax, -_FARTHEST))
        }

    def _in(self, region: Node, value: Node) -> Node:
        """Is a value of keys True for all of a region?"""
        return self._call(torch.all, self._or(self._not(region), value), -1, keepdim=True)

    def _of(self, numbers: dict[int, Node], apart: bool = False) -> Node:
        """The function of these numbers, which broadcast.

        Args:
            apart: a query and a key count as having different places, wherever they are.
        """
        return self._run(numbers, lambda node: True, apart)[result_of(self.mask.function)]

    def _run(
        self, numbers: dict[int, Node], wanted: Callable[[Node], bool], apart: bool = False
    ) -> dict[Node, Node]:
        inputs = list(self.mask.function.graph.find_nodes(op="placeholder"))
        held = {inputs[place]: node for place, node in numbers.items()}
        held |= zip(inputs[INDICES:], map(self.now, self.mask.captured), strict=True)
        for node, read in self.mask.reads.items():
            if node.op == "placeholder" or HEAD in read or not wanted(node):
                continue
            if apart and is_own(node):
                held[node] = self._made(torch.full, (), operation(node) == "ne", dtype=torch.bool)
            elif operation(node) in ("ones", "new_ones", "zeros", "new_zeros"):
                value = operation(node).endswith("ones")
                dtype = node.meta["example_value"].dtype
                held[node] = self._made(torch.full, (), value, dtype=dtype)
            elif operation(node) == "getitem":
                tensor, places = element(node)
                if len(places) == tensor.meta["example_value"].dim():
                    held[node] = self._element(tensor, places, held)
            else:
                args = map_arg(node.args, held.__getitem__)
                held[node] = self.graph.create_node(node.op, node.target, args)
        return held

    def _element(self, tensor: Node, places: tuple[object, ...], held: dict[Node, Node]) -> Node:
        """An element of a captured tensor.

        Blocks that are not listed are never asked for, so places may be out of range there.
        """
        value = tensor.meta["example_value"]
        index: list[object] = []
        for dim, (place, stride) in enumerate(zip(places, value.stride(), strict=True)):
            if stride == 0 or not isinstance(place, Node):
                index.append(place if isinstance(place, int) else 0)
                continue
            if is_symbol(place.meta["example_value"]):
                index.append(held[place])
                continue
            size = self._call(torch.ops.aten.sym_size.int, held[tensor], dim)
            bounds = self._call(operator.neg, size), self._call(operator.sub, size, 1)
            index.append(self._call(torch.clamp, held[place], *bounds))
        return self._call(operator.getitem, held[tensor], tuple(index))

    def _numbers(self, count: int | Node, shape: tuple[int, ...]) -> Node:
        return self.graph.call_method("view", (self._made(torch.arange, count), shape))

    def _made(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self._call(target, *args, device=self.device, **kwargs)

    def _and(self, one: Node, other: Node) -> Node:
        return self._call(torch.logical_and, one, other)

    def _or(self, one: Node, other: Node) -> Node:
        return self._call(torch.logical_or, one, other)

    def _not(self, node: Node) -> Node:
        return self._call(torch.logical_not, node)

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)
