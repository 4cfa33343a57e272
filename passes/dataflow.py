"""Which node's data reaches which: a graph and its child graphs as one networkx graph.

Writes in place are edges too: RoPE is often written by `setitem` into a buffer that is no FX
ancestor of the query it becomes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import networkx as nx
import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.effects import Effects, viewed_anew
from svg_ear_compile.passes.memory import storages
from svg_ear_compile.passes.operation import (
    CASTS,
    CONVOLUTIONS,
    LINEAR,
    REARRANGEMENTS,
    operation,
)

# A tensor's size says nothing of what it holds; nor do new tensors in its likeness.
_SIZES = frozenset({
    "size", "shape", "sym_size", "numel", "sym_numel", "dim", "stride", "zeros_like", "ones_like",
    "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
})  # fmt: skip
# Of these, the argument says shape or dtype alone.
_LIKENESSES = {"expand_as": 1, "view_as": 1, "reshape_as": 1, "type_as": 1, "to": 1}


def values_read(node: Node) -> list[Node]:
    """The inputs of a node whose values it may read, not their shapes and dtypes alone."""
    name, inputs = operation(node), node.all_input_nodes
    alike: tuple[Node, ...] = ()
    if name in _SIZES:
        alike = _at(node, 0, "input", "self")
    elif name in _LIKENESSES:
        alike = _at(node, _LIKENESSES[name], "other")
    if not alike:
        return inputs
    # The same tensor may be another argument, too.
    leaves = [n for n in tree_leaves((node.args, dict(node.kwargs))) if isinstance(n, Node)]
    return [n for n in inputs if n not in alike or leaves.count(n) > 1]


def _at(node: Node, place: int, *names: str) -> tuple[Node, ...]:
    given = node.args[place] if len(node.args) > place else None
    found = (given, *(node.kwargs.get(name) for name in names))
    return tuple(n for n in found if isinstance(n, Node))


class Dataflow:
    """The dataflow of a graph module.

    Attributes:
        graph: edges from every node to the nodes that read its data; a write in place reaches all
            later readers of the written memory. Child graphs (branches, checkpoints) are part of
            it: what a call hands to its child is the child's input.
        position: place of each node in the order of execution; a child graph's nodes come right
            before the call that runs them.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.graph = nx.DiGraph()
        self.position: dict[Node, int] = {}
        self._effects = Effects()
        self._memory: dict[Node, frozenset[int]] = {}
        self._one_memory = nx.utils.UnionFind()  # storages that a call and its child call otherwise
        self._written: dict[Node, list[Node]] = {}
        self._writers: dict[int, list[Node]] = {}
        self._viewed_anew: set[int] = set()
        self._projections: dict[Node, frozenset[Node]] = {}
        self._add(gm)
        for module in gm.modules():
            if isinstance(module, GraphModule):
                self._add(module)

    def _add(self, gm: GraphModule) -> None:
        if next(iter(gm.graph.nodes)) in self.graph:
            return
        for node in gm.graph.nodes:
            self.graph.add_node(node)
            self._memory[node] = self._storages(node)
            children = _children(gm, node)
            for child in children:
                self._enter(node, child)
            self.position[node] = len(self.position)
            for source in values_read(node):
                self.graph.add_edge(source, node)
                # Earlier writers reach the last one: a writer reads what it writes into.
                self.graph.add_edges_from((w, node) for w in self._writers_of(source)[-1:])
            targets = self._effects.written(node)
            anew = viewed_anew(node)
            if anew is not None:
                self._viewed_anew.add(id(anew.meta.get("example_value")))
            for child in children:
                targets = targets + self._leave(node, child)
            self._written[node] = targets
            for storage in self._memory_of(targets):
                self._writers.setdefault(storage, []).append(node)

    def _storages(self, node: Node) -> frozenset[int]:
        if "example_value" in node.meta:
            return storages(node.meta["example_value"])
        # Nothing is known of its value: it may lie in any memory that it was given.
        return frozenset().union(*(self._memory[n] for n in node.all_input_nodes))

    def _memory_of(self, nodes: Iterable[Node]) -> set[int]:
        """The memory of the nodes, under one name where a call and its child have two."""
        return {self._one_memory[storage] for node in nodes for storage in self._memory[node]}

    def _enter(self, call: Node, child: GraphModule) -> None:
        """What the call hands over is the child's input. Inputs come last among its arguments."""
        inputs, handed = _inputs(child), _handed(call)
        self._add(child)
        for source, inside in zip(reversed(handed), reversed(inputs), strict=False):
            self.graph.add_edge(source, inside)
            self._join(self._memory[source], self._memory[inside])

    def _leave(self, call: Node, child: GraphModule) -> list[Node]:
        """What the child returns is the call's result; returns what it wrote into."""
        (output,) = child.graph.find_nodes(op="output")
        self.graph.add_edge(output, call)
        self._join(self._memory[call], *(self._memory[n] for n in output.all_input_nodes))
        pairs = zip(reversed(_handed(call)), reversed(_inputs(child)), strict=False)
        return [source for source, inside in pairs if self._writers_of(inside)]

    def _join(self, *memories: frozenset[int]) -> None:
        every = frozenset().union(*memories)
        if every:
            self._one_memory.union(*every)
            # Writers are kept under the name that the joined memory has now.
            writers = [w for s in every for w in self._writers.pop(s, ())]
            if writers:
                unique = sorted(dict.fromkeys(writers), key=self.position.__getitem__)
                self._writers[self._one_memory[next(iter(every))]] = unique

    def _writers_of(self, tensor: Node) -> list[Node]:
        memory = self._memory_of([tensor])
        found = [w for storage in memory for w in self._writers.get(storage, ())]
        if len(memory) == 1:
            return found
        return sorted(dict.fromkeys(found), key=self.position.__getitem__)

    def written(self, node: Node) -> list[Node]:
        """The tensors that the node writes into."""
        return self._written[node]

    def is_ever_written(self, tensor: Node) -> bool:
        """True if anything in the graph writes into the memory of `tensor`."""
        return bool(self._writers_of(tensor))

    def is_written_after_use(self, tensor: Node) -> bool:
        """True if something writes into the memory of `tensor` once another node has read it."""
        writers = self._writers_of(tensor)
        uses = [self.position[user] for user in tensor.users if user not in writers]
        return any(self.position[writer] > min(uses, default=-1) for writer in writers)

    def is_viewed_anew(self, tensor: Node) -> bool:
        """True if something in the graph gives the tensor another shape, or memory, in place."""
        return id(tensor.meta.get("example_value")) in self._viewed_anew

    def is_viewed_anew_between(self, tensors: Iterable[Node], last: Node) -> bool:
        """`is_viewed_anew` of any of the tensors, of `last`, or of anything from them to it."""
        if not self._viewed_anew:
            return False
        into = nx.ancestors(self.graph, last) | {last}
        onward = {n for t in tensors for n in (t, *nx.descendants(self.graph, t))}
        return any(map(self.is_viewed_anew, onward & into))

    def sharing(self, node: Node) -> list[Node]:
        """Every node whose tensor lies in memory of the node's."""
        found = dict.fromkeys(n for m in self._memory_of([node]) for n in self._nodes_in[m])
        return sorted(found, key=self.position.__getitem__)

    @functools.cached_property
    def _nodes_in(self) -> dict[int, list[Node]]:
        """The nodes whose tensors lie in a memory, by its name."""
        found: dict[int, list[Node]] = {}
        for node in self.position:
            for memory in self._memory_of([node]):
                found.setdefault(memory, []).append(node)
        return found

    def sources(self, node: Node) -> Iterator[Node]:
        """The nodes whose data the node reads."""
        return self.graph.predecessors(node)

    def readers(self, node: Node) -> Iterator[Node]:
        """The nodes that read the node's data, also what it has written."""
        return self.graph.successors(node)

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

    def projections(self, start: Node, reader: Node) -> frozenset[Node]:
        """The first projection on every path back from `start` as `reader` sees it.

        Embeddings and products are passed: RoPE tables are made of them.
        """
        starts = (start, *self.writes_before(start, reader))
        return frozenset().union(*map(self._projections_of, starts))

    def _projections_of(self, start: Node) -> frozenset[Node]:
        """The same, found once for each node: in some models no projection is near."""
        known = self._projections
        walked = list(self.backward(start, lambda n: n in known or is_projection(n)))
        for node in sorted(walked, key=self.position.__getitem__):
            if node in known:
                continue
            if is_projection(node):
                known[node] = frozenset({node})
                continue
            sources = list(self.sources(node))
            if not known.keys() >= {
                *sources
            }:  # a child graph that is called again reads later ones
                return frozenset(n for n in self.backward(start, is_projection) if is_projection(n))
            parts = {known[source] for source in sources}
            known[node] = parts.pop() if len(parts) == 1 else frozenset().union(*parts)
        return known[start]

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


def _inputs(child: GraphModule) -> list[Node]:
    return list(child.graph.find_nodes(op="placeholder"))


def _handed(call: Node) -> list[Node]:
    """The call's arguments without the child graphs, one for each time that it is handed over."""
    leaves = (n for n in tree_leaves((call.args, call.kwargs)) if isinstance(n, Node))
    return [n for n in leaves if n.op != "get_attr" or _is_tensor(n)]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def projected_input(node: Node) -> Node | None:
    """The activation that a linear layer or convolution projects, or None for another node.

    A product with a parameter, written as `x @ w` or by einsum, is a linear layer, too.
    """
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        found: object = node.args[0] if isinstance(module, kinds) else None
    elif (name := operation(node)) in LINEAR | CONVOLUTIONS:
        position = 1 if name == "addmm" else 0
        found = node.args[position] if len(node.args) > position else node.kwargs.get("input")
    elif name in _PRODUCTS:
        sides = node.all_input_nodes
        activations = [side for side in sides if not is_weight(side)]
        found = activations[0] if len(sides) == 2 and len(activations) == 1 else None
    else:
        return None
    return found if isinstance(found, Node) else None


def is_projection(node: Node) -> bool:
    """True for a linear layer or convolution."""
    return projected_input(node) is not None


_PRODUCTS = frozenset({"matmul", "mm", "bmm", "einsum"})
_DEEPEST_WEIGHT = 8


def is_weight(node: Node, depth: int = 0) -> bool:
    """True for a parameter, and for one that has been cast, rearranged or scaled."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    if operation(node) not in CASTS | REARRANGEMENTS | {"mul", "div"} or depth > _DEEPEST_WEIGHT:
        return False
    sources = node.all_input_nodes
    return bool(sources) and all(is_weight(source, depth + 1) for source in sources)
