"""The parameter that tells, at run time, which layer of a graph that several share is running."""

from __future__ import annotations

import itertools

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from svg_ear_compile.passes.dataflow import Dataflow, is_projection
from svg_ear_compile.passes.module_path import (
    innermost,
    module_path,
    owner_path,
    root_of,
    source_of,
)


class LayerParameters:
    """The parameters and buffers of a graph module by the modules that they lie in."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._by_path: dict[tuple[Graph, str], list[tuple[Node, str]]] = {}
        for node in flow.position:
            if node.op in ("placeholder", "get_attr") and _is_plain_state(node):
                names = [name for name in owner_path(node).split(".") if name]
                for path in ("", *itertools.accumulate(names, "{}.{}".format)):
                    where = self._by_path.setdefault((node.graph, path), [])
                    where.append((node, root_of(source_of(node))))
        self._inside: dict[tuple[Graph, str], dict[Node, None]] = {}

    def of(self, q: Node, reader: Node, call: Node) -> Node | None:
        """A parameter or buffer inside of the module that attends, None if there is none.

        One outside proves nothing: data of an earlier layer reaches q, too. The nearest
        projection's is taken first; a norm's on the way may be shared by all layers, whose session
        then goes by order.

        Args:
            q: the queries. reader: the node that reads them. call: the attention.
        """
        inside = self._of_layer(call)
        if not inside:
            return None
        projections = self.flow.projections(q, reader)
        if any(source in inside for node in projections for source in node.all_input_nodes):
            for node in self.flow.backward(q, is_projection, reader):
                if node in projections:
                    for source in node.all_input_nodes:
                        if source in inside:
                            return source
        near = self.flow.backward(q, inside.__contains__, reader)
        return next((node for node in near if node in inside), next(iter(inside)))

    def _of_layer(self, call: Node) -> dict[Node, None]:
        """Parameters, then buffers, inside of the module that attends, in the graph of its call."""
        layer = innermost(call)
        if (call.graph, layer) not in self._inside:
            root = root_of(layer)
            # Exported models say no variable; of another one, the same path is another module.
            roots = ("", root)
            held = self._by_path.get((call.graph, module_path(layer)), ())
            found = [node for node, of in held if root == "" or of in roots]
            found.sort(key=lambda n: not isinstance(n.meta["example_value"], torch.nn.Parameter))
            self._inside[call.graph, layer] = dict.fromkeys(found)
        return self._inside[call.graph, layer]


def _is_plain_state(node: Node) -> bool:
    """A parameter or buffer that any operator takes: subclasses refuse those unknown to them."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        return False
    return isinstance(value, torch.nn.Parameter) or "_buffers" in source_of(node)
