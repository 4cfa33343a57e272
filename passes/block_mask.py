"""Padding in flex_attention: the keys that a block mask keeps, where the graph shows which.

The lists of blocks of a block mask are data. They are known where the graph makes them itself, as
`create_block_mask` does, of the very function that masks the pairs inside of blocks. If that
function looks at the place of the key and at the sample alone, the mask is key padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from svg_ear_compile.passes.arguments import arguments
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.symbolic import hints_of

_SAMPLE, _KEY = 0, 3  # among the function's arguments: sample, head, query, key
_INDICES = 4
_ONES = frozenset({"ones", "new_ones"})
# On numbers of one element, which stand for all pairs: they broadcast.
_ELEMENTWISE = frozenset({
    "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not", "add", "sub",
    "mul", "floordiv", "floor_divide", "mod", "remainder",
})  # fmt: skip
# How vmap appears in a graph is no promise of PyTorch: where it appears otherwise, masks stay data.
_VMAP = getattr(torch._functorch, "predispatch", None)
_ADD_BATCH_DIM = getattr(_VMAP, "_add_batch_dim", None)
_REMOVE_BATCH_DIM = getattr(_VMAP, "_remove_batch_dim", None)


@dataclass(frozen=True)
class KeptKeys:
    """The keys that take part, as a function of the graph says.

    Attributes:
        function: takes numbers of sample, head, query and key, then what it has captured.
        captured: nodes of the graph that it has captured.
        samples: samples that differ, 1 for a mask of all.
        keys: N_k.
    """

    function: GraphModule
    captured: tuple[Node, ...]
    samples: int
    keys: int

    @property
    def are_all(self) -> bool:
        """True if every key takes part, whatever is fed to the graph."""
        return operation(result_of(self.function)) in _ONES

    def write(self, graph: Graph, like: Node, now: Callable[[Node], Node]) -> Node:
        """(B|1, 1, 1, N_k) bool, True for keys that take part, as nodes of a graph.

        Args:
            graph: nodes are inserted where it inserts now.
            like: a tensor on the device of the call.
            now: the node that holds what a node held when the sites were found.
        """
        device = like.meta["example_value"].device
        every = graph.call_function(torch.ones, ((1, 1, 1, self.keys),), {
            "dtype": torch.bool, "device": device,
        })  # fmt: skip
        inputs = list(self.function.graph.find_nodes(op="placeholder"))
        held = dict(zip(inputs[_INDICES:], map(now, self.captured), strict=True))
        for place, size, shape in (
            (_SAMPLE, self.samples, (-1, 1, 1, 1)), (_KEY, self.keys, (1, 1, 1, -1)),
        ):  # fmt: skip
            numbers = graph.call_function(torch.arange, (size,), {"device": device})
            held[inputs[place]] = graph.call_method("view", (numbers, shape))
        for node in self.function.graph.nodes:
            if node.op != "call_function" and node.op != "call_method":
                continue
            args, kwargs = node.args, node.kwargs
            if operation(node) == "getitem":
                tensor, index = node.args
                strides = tensor.meta["example_value"].stride()
                places = zip(_listed(index), strides, strict=True)
                args = (tensor, tuple(0 if stride == 0 else i for i, stride in places))
            args, kwargs = map_arg((args, dict(kwargs)), held.__getitem__)
            held[node] = graph.create_node(node.op, node.target, args, kwargs)
        return graph.call_function(torch.logical_and, (every, held[result_of(self.function)]))


def kept_keys(flex: Node, flow: Dataflow) -> KeptKeys | None:
    """The keys that a flex_attention call keeps; None unless its block mask is proven padding."""
    q, k, _, _, block_mask, *_, captured = cast(tuple[Any, ...], flex.args)
    q_tokens, k_tokens, *lists, q_block, k_block, mask_mod = block_mask
    function = graph_of(mask_mod)
    (batch, _, queries, _), keys = hints_of(q), hints_of(k)[2]
    if function is None or [q_tokens, k_tokens] != [queries, keys]:
        return None
    if not isinstance(captured, tuple) or not _captures(function, captured, flow):
        return None
    read = _indices_read(function)
    mask = _mask_of(lists[:4], q_block, k_block)
    if read is None or not read <= {_SAMPLE, _KEY} or mask is None:
        return None
    samples = hints_of(mask)[0]
    if _SAMPLE in read and samples != batch:
        return None
    if not _applies(function, captured, mask, (queries, keys)):
        return None
    assert samples is not None
    assert keys is not None
    return KeptKeys(function, captured, samples if _SAMPLE in read else 1, keys)


def graph_of(node: object) -> GraphModule | None:
    """The child graph that a node names."""
    if not isinstance(node, Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = getattr(node.graph.owning_module, str(node.target), None)
    return found if isinstance(found, GraphModule) else None


def takes_every_pair(mask_mod: object) -> bool:
    """True if a function of a flex_attention call is True for every pair."""
    function = graph_of(mask_mod)
    return function is not None and operation(result_of(function)) in _ONES


def result_of(graph: GraphModule) -> Node:
    """The node that a child graph returns."""
    (output,) = graph.graph.find_nodes(op="output")
    result = output.args[0]
    while isinstance(result, (tuple, list)) and len(result) == 1:
        (result,) = result
    assert isinstance(result, Node)
    return result


def _captures(function: GraphModule, captured: tuple[object, ...], flow: Dataflow) -> bool:
    """True if these nodes are what the function has captured, the same at every time."""
    inputs = function.graph.find_nodes(op="placeholder")
    nodes = [n for n in captured if isinstance(n, Node) and hints_of(n) is not None]
    if len(nodes) < len(captured) or len(inputs) != _INDICES + len(nodes):
        return False
    tensors = all(isinstance(n.meta.get("example_value"), torch.Tensor) for n in nodes)
    return tensors and not any(flow.is_ever_written(n) for n in nodes)


def _listed(index: object) -> tuple[object, ...]:
    return tuple(index) if isinstance(index, (tuple, list)) else (index,)


def _indices_read(function: GraphModule) -> set[int] | None:
    """Which of its four numbers the result depends on; None for an operation that is not known.

    Along a dimension of stride 0 every index reads the same element.
    """
    inputs = list(function.graph.find_nodes(op="placeholder"))
    read: dict[Node, set[int]] = {
        node: {place} if place < _INDICES else set() for place, node in enumerate(inputs)
    }
    for node in function.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        name = operation(node)
        if name in _ONES and hints_of(node) == ():
            read[node] = set()
        elif name == "getitem" and node.args[0] in inputs[_INDICES:]:
            value, places = node.args[0].meta["example_value"], _listed(node.args[1])
            if len(places) != value.dim() or not all(isinstance(p, (Node, int)) for p in places):
                return None
            strides = zip(places, value.stride(), strict=True)
            needed = [p for p, stride in strides if isinstance(p, Node) and stride != 0]
            read[node] = set().union(*(read[p] for p in needed))
        elif name in _ELEMENTWISE and not node.kwargs:
            read[node] = set().union(*(read[n] for n in node.all_input_nodes))
            if any(n in inputs[_INDICES:] and hints_of(n) != () for n in node.all_input_nodes):
                return None  # a captured tensor of several elements
        else:
            return None
    return read.get(result_of(function))


def _mask_of(lists: list[object], q_block: object, k_block: object) -> Node | None:
    """The mask (B|1, H|1, N_q, N_k) of which the lists of partial and of full blocks are made."""
    if not (isinstance(q_block, int) and isinstance(k_block, int)):
        return None
    partial, full = _blocks(*lists[:2]), _blocks(*lists[2:])
    area = q_block * k_block
    if partial is None or full is None or operation(partial) != "logical_and":
        return None
    some, rest = partial.args
    of_some, of_rest, of_full = (
        _compared(node, name, value)
        for node, name, value in ((some, "gt", 0), (rest, "lt", area), (full, "eq", area))
    )
    if of_some is None or not of_some is of_rest is of_full:
        return None
    return _summed(of_some, q_block, k_block)


def _blocks(count: object, order: object) -> Node | None:
    """Of which blocks, as bool (.., rows, columns), these are the number and the order by row."""
    number, places = _uncast(count, torch.int32), _uncast(order, torch.int32)
    if number is None or places is None:
        return None
    counted = _taken(number, "sum", {"dim": -1})
    ordered = _taken(places, "argsort", {"dim": -1, "descending": True, "stable": True})
    if counted is None or counted is not ordered:
        return None
    while isinstance(counted, Node) and counted.meta["example_value"].dtype != torch.bool:
        inner = _uncast(counted, torch.int32, torch.int8)
        if inner is None:
            return None
        counted = inner
    return counted


def _uncast(node: object, *dtypes: torch.dtype) -> Node | None:
    """The tensor of which a node is a cast to a dtype."""
    if not isinstance(node, Node) or operation(node) != "to" or not node.args:
        return None
    value, source = node.meta.get("example_value"), node.args[0]
    given = [*node.args[1:], *(v for k, v in node.kwargs.items() if k != "memory_format")]
    is_cast = len(given) == 1 and given[0] in dtypes
    fits = isinstance(value, torch.Tensor) and value.dtype in dtypes
    return source if is_cast and fits and isinstance(source, Node) else None


def _taken(node: Node, name: str, wanted: dict[str, object]) -> Node | None:
    """The tensor of an operation of this name with these arguments and no others."""
    args = arguments(node) if operation(node) == name else None
    if args is None:
        return None
    source = args.take("self")
    for key, value in wanted.items():
        given = args.take(key)
        same = list(given) == [value] if isinstance(given, (list, tuple)) else given == value
        if not same:
            return None
    return source if isinstance(source, Node) and args.rest_has_defaults else None


def _compared(node: object, name: str, value: int) -> Node | None:
    """The tensor that is compared with a number so."""
    if not isinstance(node, Node) or operation(node) != name or len(node.args) != 2:
        return None
    source, other = node.args
    return source if isinstance(source, Node) and other == value and not node.kwargs else None


def _summed(sums: Node, q_block: int, k_block: int) -> Node | None:
    """The mask whose elements a tensor (B|1, H|1, rows, columns) counts in each block."""
    args = arguments(sums) if operation(sums) == "sum" else None
    if args is None or list(_listed(args.take("dim"))) != [-2, -1]:
        return None
    permuted = args.take("self")
    if not isinstance(permuted, Node) or not args.rest_has_defaults:
        return None
    order = [a for a in permuted.args[1:] if isinstance(a, int)]
    blocks = permuted.args[0]
    if operation(permuted) != "permute" or order != [0, 1, 2, 4, 3, 5] or permuted.kwargs:
        return None
    if not isinstance(blocks, Node) or operation(blocks) != "view":
        return None
    padded = blocks.args[0]
    if not isinstance(padded, Node) or len(hints_of(padded)) != 4 or None in hints_of(padded):
        return None
    batch, heads, queries, keys = (size or 0 for size in hints_of(padded))
    parts = (queries // q_block, q_block, keys // k_block, k_block)
    if hints_of(blocks) != (batch, heads, *parts):
        return None
    return _unpadded(padded)


def _unpadded(padded: Node) -> Node | None:
    """The mask that a node pads by False at the ends of queries and keys, or the node itself."""
    if operation(padded) != "pad":
        return padded
    args = arguments(padded)
    source = None if args is None else args.take("self", "input")
    if args is None or not isinstance(source, Node):
        return None
    pads, mode, value = args.take("pad"), args.take("mode"), args.take("value")
    whole = isinstance(pads, (tuple, list)) and len(pads) == 4 and pads[0] == pads[2] == 0
    return source if whole and mode in ("constant", None) and value in (None, 0) else None


def _applies(
    function: GraphModule,
    captured: tuple[Node, ...],
    mask: Node,
    tokens: tuple[int | None, int | None],
) -> bool:
    """True if a mask (B|1, H|1, N_q, N_k) is the function of all samples, heads and pairs."""
    node: object = mask
    sizes = hints_of(mask)
    if len(sizes) != _INDICES or sizes[2:] != tokens:
        return False
    for level, size in enumerate(sizes, start=1):  # vmap of vmap, the sample outermost
        if not isinstance(node, Node) or node.target is not _REMOVE_BATCH_DIM:
            return False
        if node.args[1:] != (level, size, 0):
            return False
        node = node.args[0]
    inputs = list(function.graph.find_nodes(op="placeholder"))
    places = {n: place for place, n in enumerate(inputs[:_INDICES])}
    held = dict(zip(inputs[_INDICES:], captured, strict=True))

    def same(one: object, other: object) -> bool:
        """True if a value of the function is this one of the graph, where vmap runs it."""
        if isinstance(one, (tuple, list)):
            if not isinstance(other, (tuple, list)) or len(one) != len(other):
                return False
            return all(map(same, one, other))
        if not isinstance(one, Node):
            return type(one) is type(other) and one == other
        if one in held:
            return other is held[one]
        if not isinstance(other, Node):
            return False
        if one in places:
            return _is_number(other, places[one], sizes[places[one]])
        if operation(one) == "getitem":
            pair = (other.args[0], _listed(other.args[1])) if len(other.args) == 2 else ()
            indexes = operation(other) in ("index", "getitem") and not other.kwargs
            return indexes and same((one.args[0], _listed(one.args[1])), pair)
        return (
            operation(one) == operation(other)
            and same(one.args, other.args)
            and one.kwargs.keys() == other.kwargs.keys()
            and all(same(value, other.kwargs[key]) for key, value in one.kwargs.items())
        )

    return same(result_of(function), node)


def _is_number(node: Node, place: int, size: int | None) -> bool:
    """True if a node holds the numbers below `size`, each in a run of its own of vmap's level."""
    if node.target is not _ADD_BATCH_DIM or node.args[1:] != (0, place + 1):
        return False
    numbers = node.args[0]
    if not isinstance(numbers, Node) or operation(numbers) != "arange":
        return False
    return numbers.args == (0, size) and set(numbers.kwargs) <= {"device"}
