"""Block masks of flex_attention: what their function says, as far as it can be judged.

The function of a block mask is traced; its lists of blocks and the tensors that it has captured are
data, wherever they were made. So the function is judged here, and what it says of the numbers that
are there is proven in every run: see `block_proof`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.symbolic import is_symbol

SAMPLE, HEAD, QUERY, KEY = range(4)  # the function's first arguments; what it has captured follows
INDICES = 4
COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_CONSTANTS = frozenset({"ones", "new_ones", "zeros", "new_zeros"})
# On numbers of one element, which stand for all pairs: they broadcast.
_ELEMENTWISE = COMPARISONS | frozenset({
    "logical_and", "logical_or", "logical_not", "add", "sub", "mul", "floordiv", "floor_divide",
    "mod", "remainder", "neg", "abs", "minimum", "maximum", "clamp", "where", "int", "long", "bool",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A block mask whose function can be judged.

    Attributes:
        function: takes numbers of sample, head, query and key, then what it has captured.
        captured: nodes of the graph that it has captured, tensors and symbols.
        lists: number and order of partial blocks, then of full ones, of which there may be none.
        block: extents of a block in queries and keys.
    """

    function: GraphModule
    captured: tuple[Node, ...]
    lists: tuple[Node, Node, Node | None, Node | None]
    block: tuple[int | Node, int | Node]

    @property
    def key(self) -> object:
        """Equal for masks of the same function, tensors and lists: layers share them."""
        return str(self.function.graph), self.captured, self.lists, self.block

    @property
    def tensors(self) -> list[Node]:
        """The nodes whose values say what the mask is."""
        return [n for n in (*self.captured, *self.lists) if n is not None]

    @cached_property
    def reads(self) -> dict[Node, frozenset[int]]:
        """Of which of its four numbers each node of the function is made."""
        found = indices_read(self.function.graph)
        assert found is not None
        return found

    @cached_property
    def terms(self) -> list[Node]:
        """The nodes whose conjunction is the function."""
        found, waiting = [], [result_of(self.function)]
        while waiting:
            node = waiting.pop()
            if operation(node) == "logical_and" and self.is_of_pairs(node):
                waiting += cast(tuple[Node, ...], node.args)
            else:
                found.append(node)
        return found

    def is_of_pairs(self, node: object) -> bool:
        """True if a value of the function is made of numbers of queries and of keys."""
        return isinstance(node, Node) and self.reads[node] >= {QUERY, KEY}

    @property
    def is_everything(self) -> bool:
        """True if the function is True for every pair, whatever is fed to the graph."""
        return all(_is_one(term) for term in self.terms)

    @property
    def has_own(self) -> bool:
        """True if the function asks whether a query and a key have the same place."""
        return any(map(is_own, self.reads))

    def compares_positions(self, by_chunk: bool) -> bool:
        """True if it compares where queries and keys are: it is causal, or a window.

        Args:
            by_chunk: numbers of chunks are no positions.
        """
        return any(
            not (by_chunk and all(_is_made_by(side, "floordiv", "floor_divide") for side in sides))
            for node in self.reads
            if self.is_of_pairs(node) and not is_own(node)
            for sides in [node.all_input_nodes]
            if not any(self.is_of_pairs(side) or _is_made_by(side, "getitem") for side in sides)
            and operation(node) not in ("logical_and", "logical_or")
        )

    @property
    def is_judged(self) -> bool:
        """True if `block_proof` can tell of which pairs it is True."""
        result = result_of(self.function)
        return _is_bool(result) and self._is_judged(result)

    def _is_judged(self, node: object) -> bool:
        if not isinstance(node, Node):
            return False
        if not self.is_of_pairs(node) or is_own(node):
            return _is_bool(node)
        name = operation(node)
        if name in ("logical_and", "logical_or", "logical_not"):
            return _is_bool(node) and all(map(self._is_judged, node.args))
        if name not in COMPARISONS:
            return False
        return not any(self.is_of_pairs(side) or _is_float(side) for side in node.args)


def read_block_mask(flex: Node) -> BlockMask | None:
    """The block mask of a flex_attention call; None for a function that is not understood."""
    _, _, _, _, block_mask, *_, captured = cast(tuple[Any, ...], flex.args)
    _, _, *lists, q_block, k_block, mask_mod = block_mask
    function = graph_of(mask_mod)
    if function is None or not isinstance(captured, tuple):
        return None
    inputs = list(function.graph.find_nodes(op="placeholder"))
    nodes = tuple(n for n in captured if isinstance(n, Node) and _is_tensor_or_symbol(n))
    reads = indices_read(function.graph)
    if len(nodes) < len(captured) or len(inputs) != INDICES + len(nodes) or reads is None:
        return None
    if HEAD in reads.get(result_of(function), {HEAD}):
        return None
    counts, order, *full = lists[:4]
    has_lists = [isinstance(n, Node) for n in lists[:4]]
    if not all(has_lists[:2]) or (full != [None, None] and not all(has_lists)):
        return None
    return BlockMask(function, nodes, (counts, order, full[0], full[1]), (q_block, k_block))


def graph_of(node: object) -> GraphModule | None:
    """The child graph that a node names."""
    if not isinstance(node, Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = getattr(node.graph.owning_module, str(node.target), None)
    return found if isinstance(found, GraphModule) else None


def takes_every_pair(mask_mod: object) -> bool:
    """True if a function of a flex_attention call is True for every pair."""
    function = graph_of(mask_mod)
    return function is not None and _is_one(result_of(function))


def result_of(graph: GraphModule) -> Node:
    """The node that a child graph returns."""
    (output,) = graph.graph.find_nodes(op="output")
    result = output.args[0]
    while isinstance(result, (tuple, list)) and len(result) == 1:
        (result,) = result
    assert isinstance(result, Node)
    return result


def indices_read(graph: Graph) -> dict[Node, frozenset[int]] | None:
    """Of which of its four numbers each node of a function is made; None where that is not known.

    Along a dimension of stride 0 every index reads the same element.
    """
    inputs = list(graph.find_nodes(op="placeholder"))
    read = {
        node: frozenset({place} if place < INDICES else ()) for place, node in enumerate(inputs)
    }
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        name = operation(node)
        if name in _CONSTANTS and _is_number(node):
            read[node] = frozenset()
        elif name == "getitem":
            tensor, places = element(node)
            if tensor not in inputs[INDICES:] or not all(map(_is_place, places)):
                return None
            value = tensor.meta["example_value"]
            strides = zip(places, value.stride()[: len(places)], strict=True)
            needed = [p for p, stride in strides if isinstance(p, Node) and stride != 0]
            read[node] = frozenset().union(*(read[p] for p in needed))
            if len(places) == value.dim() and {QUERY, KEY} <= read[node]:
                return None
        elif name in _ELEMENTWISE and not node.kwargs:
            # A captured tensor of several elements would be no number of one pair.
            if not all(_is_number(n) for n in node.all_input_nodes):
                return None
            read[node] = frozenset().union(*(read[n] for n in node.all_input_nodes))
        else:
            return None
    return read


def element(node: Node) -> tuple[Node, tuple[object, ...]]:
    """The tensor that a node takes an element or a part of, and at which places."""
    places: tuple[object, ...] = ()
    while operation(node) == "getitem" and isinstance(node.args[0], Node):
        index = node.args[1]
        places = (*(index if isinstance(index, (tuple, list)) else (index,)), *places)
        node = node.args[0]
    return node, places


def is_own(node: Node) -> bool:
    """True if a node asks whether, or whether not, a query and a key have the same place."""
    if operation(node) not in ("eq", "ne") or len(node.args) != 2:
        return False
    inputs = list(node.graph.find_nodes(op="placeholder"))
    return {*node.args} == {inputs[QUERY], inputs[KEY]}


def _is_made_by(node: Node, *names: str) -> bool:
    return operation(node) in names or any(_is_made_by(n, *names) for n in node.all_input_nodes)


def _is_one(node: Node) -> bool:
    return operation(node) in ("ones", "new_ones")


def _is_tensor_or_symbol(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) or is_symbol(value)


def _is_number(node: Node) -> bool:
    value = node.meta.get("example_value")
    return value.dim() == 0 if isinstance(value, torch.Tensor) else is_symbol(value)


def _is_place(index: object) -> bool:
    """True for a whole number, not a bool: that would be a mask."""
    if not isinstance(index, Node):
        return isinstance(index, int) and not isinstance(index, bool)
    value = index.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return isinstance(value, torch.SymInt)
    return value.dim() == 0 and value.dtype != torch.bool and not value.is_floating_point()


def _is_bool(node: object) -> bool:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _is_float(side: object) -> bool:
    value = side.meta.get("example_value") if isinstance(side, Node) else side
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return not isinstance(value, (int, torch.SymInt))
