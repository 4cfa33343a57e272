"""Which node's data reaches which: a graph and its child graphs as one networkx graph.

Writes in place are edges too: RoPE is often written by `setitem` into a buffer that is no FX
ancestor of the query it becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from svg_ear_compile.passes.operation import CASTS, CONVOLUTIONS, LINEAR, VIEWS, operation

# A tensor's size says nothing of what it holds.
_SIZES = frozenset({"size", "shape", "sym_size", "numel", "sym_numel", "dim", "stride"})


def _viewed(node: Node) -> Node | None:
    """The tensor of which the node is a view, or None where it has memory of its own."""
    name = operation(node)
    viewed = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(viewed, Node):
        return None
    if name in VIEWS or (name.endswith("_") and not name.endswith("__")):
        return viewed
    if name in CASTS:
        before, after = (n.meta.get("example_value") for n in (viewed, node))
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            same = before.dtype == after.dtype and before.device == after.device
            if same and (name != "contiguous" or before.is_contiguous()):
                return viewed
    return None


def written(node: Node) -> list[Node]:
    """The tensors that the node writes into."""
    found: list[object] = [node.kwargs.get("out")]
    name = operation(node)
    if (name.endswith("_") and not name.endswith("__")) or name == "setitem":
        found += node.args[:1] or [node.kwargs.get("input")]
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is not None and schema.is_mutable:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[position] if position < len(node.args) else None
                found.append(node.kwargs.get(argument.name, given))
    return list(dict.fromkeys(n for n in found if isinstance(n, Node)))


class Dataflow:
    """The dataflow of a graph module.

    Attributes:
        graph: edges from every node to the nodes that read its data; a write in place reaches all
            later readers of the written memory. Child graphs (branches, checkpoints) are part of
            it: what a call hands to its child is the child's input.
        position: place of each node in the order of its own graph.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.graph = nx.DiGraph()
        self.position: dict[Node, int] = {}
        self._memory: dict[Node, Node] = {}
        self._writers: dict[Node, list[Node]] = {}
        for module in gm.modules():
            if isinstance(module, GraphModule):
                self._add(module)

    def _add(self, gm: GraphModule) -> None:
        for place, node in enumerate(gm.graph.nodes):
            self.position[node] = place
            self.graph.add_node(node)
            viewed = _viewed(node)
            self._memory[node] = node if viewed is None else self._memory[viewed]
            for source in () if operation(node) in _SIZES else node.all_input_nodes:
                self.graph.add_edge(source, node)
                # Earlier writers reach the last one: a writer reads what it writes into.
                self.graph.add_edges_from((w, node) for w in self._writers_of(source)[-1:])
            for target in written(node):
                self._writers.setdefault(self._memory[target], []).append(node)
            for child in _children(gm, node):
                self._join(node, child)

    def _join(self, call: Node, child: GraphModule) -> None:
        """Operands come last among the arguments of whatever calls a child graph."""
        inputs = [n for n in child.graph.nodes if n.op == "placeholder"]
        handed = [n for n in call.all_input_nodes if n.op != "get_attr" or _is_tensor(n)]
        for source, inside in zip(reversed(handed), reversed(inputs), strict=False):
            self.graph.add_edge(source, inside)
        (output,) = child.graph.find_nodes(op="output")
        self.graph.add_edge(output, call)

    def _writers_of(self, tensor: Node) -> list[Node]:
        return self._writers.get(self._memory[tensor], [])

    def sources(self, node: Node) -> Iterator[Node]:
        """The nodes whose data the node reads."""
        return self.graph.predecessors(node)

    def backward(
        self, start: Node, stop: Callable[[Node], bool], reader: Node | None = None
    ) -> Iterator[Node]:
        """Nodes from which data reaches `start`, nearest first; what `stop` accepts is not passed.

        Given the node that reads `start`, what was written into its memory before that counts too.
        """
        queue = [start, *(self.writes_before(start, reader) if reader is not None else ())]
        seen = set(queue)
        for node in queue:
            yield node
            if stop(node):
                continue
            for source in self.sources(node):
                if source not in seen:
                    seen.add(source)
                    queue.append(source)

    def writes_before(self, tensor: Node, reader: Node) -> list[Node]:
        """Nodes that write into the memory of `tensor` before `reader` runs, itself left out."""
        end = self.position[reader]
        return [n for n in self._writers_of(tensor) if self.position[n] < end and n is not tensor]

    def is_before(self, first: Node, last: Node) -> bool:
        """True if `first` runs before `last`, a node of the same graph."""
        return self.position[first] < self.position[last]

    def is_written_between(self, tensor: Node, first: Node, last: Node) -> bool:
        """True if something writes into the memory of `tensor` after `first` and before `last`."""
        start = self.position[first]
        return any(self.position[n] > start for n in self.writes_before(tensor, last))


def _children(gm: GraphModule, node: Node) -> list[GraphModule]:
    names = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    found = [getattr(gm, name, None) for name in names if isinstance(name, str) and "." not in name]
    return [child for child in found if isinstance(child, GraphModule)]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def projected_input(node: Node) -> Node | None:
    """The activation that a linear layer or convolution projects, or None for another node."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        found: object = node.args[0] if isinstance(module, kinds) else None
    elif (name := operation(node)) in LINEAR | CONVOLUTIONS:
        position = 1 if name == "addmm" else 0
        found = node.args[position] if len(node.args) > position else node.kwargs.get("input")
    else:
        return None
    return found if isinstance(found, Node) else None
