"""Which of its inputs a node writes into.

Schemas say it of ATen's and of registered operators. What has no schema is run once more on fresh
fake tensors: their version counters tell. What cannot be run is taken to write into everything
that it is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

from svg_ear_compile.passes.memory import fake_mode_of, is_plain
from svg_ear_compile.passes.operation import aten_overloads, is_builtin, operation
from svg_ear_compile.passes.symbolic import expression


class Effects:
    """What the nodes of a graph module write; equal calls are run once."""

    def __init__(self) -> None:
        self._run: dict[object, tuple[int, ...] | None] = {}

    def written(self, node: Node) -> list[Node]:
        """The inputs that the node writes into."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return []
        tensors = [n for n in node.all_input_nodes if _holds_tensors(n)]
        if not tensors or isinstance(node.target, torch._ops.HigherOrderOperator):
            # Higher-order operators: `Dataflow` reads their child graphs.
            return [] if not tensors or _has_child(node) else tensors
        by_schema = _by_schema(node)
        if by_schema is None:
            by_schema = self._by_running(node, tensors)
        out = _nodes([node.kwargs.get("out")])
        return list(dict.fromkeys([*by_schema, *out]))

    def _by_running(self, node: Node, tensors: list[Node]) -> list[Node]:
        key = _key(node, tensors)
        if key not in self._run:
            self._run[key] = _places_written(node, tensors)
        places = self._run[key]
        return tensors if places is None else [tensors[i] for i in places]


def _by_schema(node: Node) -> list[Node] | None:
    """What the schema of the callee says is written; None where no schema is known."""
    target: Any = node.target
    if node.op == "call_module":
        return None
    if isinstance(target, torch._ops.OpOverload):
        return _nodes(_given(node, target))
    if isinstance(target, torch._ops.OpOverloadPacket):
        every = [getattr(target, name) for name in target.overloads()]
        return _nodes(g for overload in every for g in _given(node, overload))
    name = operation(node)
    if name in ("setitem", "delitem"):
        return _nodes(node.args[:1])
    if name == "getitem" or target is getattr:
        return []
    if node.op == "call_function" and not is_builtin(target):
        return None
    overloads = aten_overloads(name)
    if not overloads:
        return None
    return _nodes(g for overload in overloads for g in _given(node, overload))


def viewed_anew(node: Node) -> Node | None:
    """The tensor that gets another shape or memory in place, as by `transpose_`; None for none.

    Its fake value looks as it does at the end of the graph, to every reader.
    """
    name = operation(node)
    if not name.endswith("_") or not node.args or not isinstance(node.args[0], Node):
        return None
    anew = any(torch.Tag.inplace_view in overload.tags for overload in aten_overloads(name))
    return node.args[0] if anew else None


def _given(node: Node, overload: torch._ops.OpOverload) -> Iterable[object]:
    """What the node gives to the parameters of an overload that are written."""
    for place, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if place < len(node.args) and not argument.kwarg_only:
            yield node.args[place]
        for name in (argument.name, "input") if argument.name == "self" else (argument.name,):
            if name in node.kwargs:
                yield node.kwargs[name]


def _nodes(values: Iterable[object]) -> list[Node]:
    leaves = (leaf for value in values for leaf in tree_leaves(value))
    return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))


def _holds_tensors(node: Node) -> bool:
    if "example_value" not in node.meta:
        return True
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta["example_value"]))


def _has_child(node: Node) -> bool:
    owner = node.graph.owning_module
    return any(
        isinstance(getattr(owner, str(n.target), None), torch.fx.GraphModule)
        for n in node.all_input_nodes
        if n.op == "get_attr"
    )


def _key(node: Node, tensors: list[Node]) -> object:
    """Equal for calls that write the same places."""

    def described(argument: Node) -> Any:
        value = argument.meta.get("example_value")
        place = tensors.index(argument) if argument in tensors else -1
        if isinstance(value, Tensor):
            # Whether `reshape` gives a view or a copy depends on the strides.
            layout = [expression(n) for n in (*value.shape, *value.stride())]
            return place, str(value.dtype), str(value.device), layout
        return place, str(type(value))

    return node.op, node.target, repr(map_arg((node.args, dict(node.kwargs)), described))


def _places_written(node: Node, tensors: list[Node]) -> tuple[int, ...] | None:
    """Places in `tensors` that running the node writes, or None where it cannot be run."""
    values = {n: n.meta.get("example_value") for n in node.all_input_nodes}
    mode = fake_mode_of(*values.values())
    leaves = [leaf for n in tensors for leaf in tree_leaves(values[n]) if isinstance(leaf, Tensor)]
    if mode is None or node.op == "call_module" or not all(is_plain(leaf) for leaf in leaves):
        return None
    shapes = mode.shape_env
    quiet = contextlib.nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()
    unguarded = contextlib.nullcontext() if shapes is None else shapes.suppress_guards()
    with mode, quiet, unguarded, torch.no_grad():
        # Made anew, so that neither the shapes nor the counters of the graph's own tensors change.
        fresh = {n: tree_map_only(Tensor, _alike, value) for n, value in values.items()}
        before = [_versions(fresh[n]) for n in tensors]
        args, kwargs = map_arg((node.args, dict(node.kwargs)), fresh.__getitem__)
        target: Any = node.target
        try:
            if node.op == "call_method":
                getattr(args[0], target)(*args[1:], **kwargs)
            else:
                target(*args, **kwargs)
        except Exception:  # whatever it is: it cannot be run, so it may write anything
            return None
    return tuple(i for i, n in enumerate(tensors) if _versions(fresh[n]) != before[i])


def _alike(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )


def _versions(value: object) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
