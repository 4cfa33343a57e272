"""Tensors of a graph that hold one number in every element, whatever is fed to the graph."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.arguments import arguments
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import CASTS, operation, reinterprets

# What is made of a number, and the parameter that holds it.
_FILLED = {
    "full": ("fill_value",), "full_like": ("fill_value",), "new_full": ("fill_value",),
    "scalar_tensor": ("s",), "tensor": ("data",), "as_tensor": ("data",),
    "new_tensor": ("data", "1"),
}  # fmt: skip
_ONES = frozenset({"ones", "ones_like", "new_ones"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_SAME = CASTS | {
    "clone", "detach", "alias", "lift_fresh", "data", "view", "reshape", "expand", "expand_as",
    "unsqueeze", "squeeze", "cpu", "cuda", "int", "long", "short",
}  # fmt: skip
_ARITHMETIC = frozenset(
    {"add", "sub", "mul", "div", "pow", "sqrt", "rsqrt", "exp", "log", "neg", "reciprocal", "abs"}
)
_DEEPEST = 12


def number(value: object, flow: Dataflow) -> float | None:
    """The number that a value is, or that every element of its tensor holds; None if not known.

    A tensor counts if nothing in the graph ever writes into its memory. Parameters and buffers do
    not: their values may change between two calls of one graph.
    """
    if isinstance(value, Node):
        constant = _constant(value, flow, 0)
        return None if constant is None else float(constant)
    return float(value) if _is_number(value) else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _constant(node: Node, flow: Dataflow, depth: int) -> Tensor | None:
    """The number as a tensor () of the dtype that holds it, which may have rounded it."""
    made, name, args = node.meta.get("example_value"), operation(node), arguments(node)
    if not isinstance(made, Tensor) or made.is_complex() or args is None or depth > _DEEPEST:
        return None
    if flow.is_ever_written(node):
        return None
    given: object = None
    if name in _FILLED:
        given = _only(args.take(*_FILLED[name]))
    elif name in _ONES or name in _ZEROS:
        given = int(name in _ONES)
    elif name in _SAME:
        given = args.take("self")
    elif name in _ARITHMETIC:
        return _computed(node, made, flow, depth)
    if isinstance(given, Node):
        if reinterprets(node):
            return None
        constant = _constant(given, flow, depth + 1)
        return None if constant is None else constant.to(made.dtype)
    return torch.tensor(given).to(made.dtype) if _is_number(given) else None


def _only(data: object) -> object:
    """The one leaf of nested lists, None where there are several."""
    leaves = tree_leaves(data)
    return leaves[0] if len(leaves) == 1 else None


def _computed(node: Node, made: Tensor, flow: Dataflow, depth: int) -> Tensor | None:
    """Arithmetic on constants, done."""
    constants: dict[Node, Tensor] = {}
    for source in node.all_input_nodes:
        constant = _constant(source, flow, depth + 1)
        if constant is None:
            return None
        constants[source] = constant
    args = [constants[a] if isinstance(a, Node) else a for a in node.args]
    kwargs = {k: constants[a] if isinstance(a, Node) else a for k, a in node.kwargs.items()}
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs).to(made.dtype)
    assert callable(node.target)
    return node.target(*args, **kwargs).to(made.dtype)
