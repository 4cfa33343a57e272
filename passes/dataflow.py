"""Which node's data reaches which: the FX graph as a networkx graph, writes in place included."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Set
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

# Their results share memory with their first argument: a write into one is seen by readers of the
# other.
# fmt: off
VIEW_METHODS = frozenset({
    "view", "reshape", "transpose", "permute", "unflatten", "flatten", "unsqueeze", "squeeze",
    "expand", "narrow", "select", "chunk", "split", "unbind", "swapaxes", "movedim", "view_as",
    "expand_as", "t", "mT",
})
# fmt: on
VIEW_FUNCTIONS = frozenset(
    {
        operator.getitem,
        torch.transpose,
        torch.permute,
        torch.reshape,
        torch.flatten,
        torch.unflatten,
        torch.unsqueeze,
        torch.squeeze,
        torch.chunk,
        torch.split,
        torch.unbind,
        torch.narrow,
        torch.select,
    }
)
# Their results are the same tokens under another type or in other memory.
SAME_METHODS = frozenset(
    {"to", "type_as", "contiguous", "clone", "float", "half", "bfloat16", "detach", "type"}
)
SAME_FUNCTIONS = frozenset({F.dropout, torch.clone, torch.detach})

LINEAR_FUNCTIONS = frozenset({F.linear, torch._C._nn.linear, torch.addmm})
CONV_FUNCTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d})


def calls(node: Node, methods: frozenset[str], functions: Set[Any]) -> bool:
    """True if the node calls one of these, by identity of the target."""
    if node.op == "call_method":
        return node.target in methods
    return node.op == "call_function" and node.target in functions


def memory_of(node: Node) -> Node:
    """The node that made the memory that `node` is a view of."""
    while calls(node, VIEW_METHODS, VIEW_FUNCTIONS):
        viewed = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(viewed, Node):
            break
        node = viewed
    return node


def written(node: Node) -> Node | None:
    """The tensor that the node writes into, or None."""
    in_place = node.op == "call_function" and node.target is operator.setitem
    if node.op == "call_method" and isinstance(node.target, str):
        in_place = node.target.endswith("_") and not node.target.endswith("__")
    if in_place and node.args and isinstance(node.args[0], Node):
        return node.args[0]
    out = node.kwargs.get("out")
    return out if isinstance(out, Node) else None


def dataflow(graph: Graph) -> nx.DiGraph:
    """Edges from every node to the nodes that read its data.

    A write in place reaches all later readers of the written memory, though it is no FX ancestor of
    theirs (RoPE is often written by `setitem` into a buffer).
    """
    flow = nx.DiGraph()
    writers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        flow.add_node(node)
        for source in node.all_input_nodes:
            flow.add_edge(source, node)
            for writer in writers.get(memory_of(source), ()):
                flow.add_edge(writer, node)
        target = written(node)
        if target is not None:
            writers.setdefault(memory_of(target), []).append(node)
    return flow


def projected_input(node: Node) -> Node | None:
    """The activation that a linear layer or convolution projects, or None for another node."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        found: object = node.args[0] if isinstance(module, kinds) else None
    elif calls(node, frozenset(), LINEAR_FUNCTIONS | CONV_FUNCTIONS):
        position = 1 if node.target is torch.addmm else 0
        found = node.args[position] if len(node.args) > position else node.kwargs.get("input")
    else:
        return None
    return found if isinstance(found, Node) else None


def backward(
    flow: nx.DiGraph, start: Node, stop: Callable[[Node], bool], reader: Node | None = None
) -> Iterator[Node]:
    """Nodes from which data reaches `start`, nearest first; what `stop` accepts is not passed.

    Given the node that reads `start`, what was written into its memory before that counts too.
    """
    queue = [start]
    for node in flow.predecessors(reader) if reader is not None else ():
        target = written(node)
        if target is not None and node is not start and memory_of(target) is memory_of(start):
            queue.append(node)
    seen = set(queue)
    for node in queue:
        yield node
        if stop(node):
            continue
        for source in flow.predecessors(node):
            if source not in seen:
                seen.add(source)
                queue.append(source)
