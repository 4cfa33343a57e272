"""What a node computes, however it is spelled: `q @ k`, `torch.matmul`, `Tensor.matmul` alike."""

from __future__ import annotations

import functools
import inspect
import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

_SPACES = (torch, F, torch._C._nn, torch.special, torch.linalg, torch.Tensor)
_SYNONYMS = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "invert": "logical_not",
    "bitwise_not": "logical_not",
    "and": "logical_and",
    "bitwise_and": "logical_and",
    "or": "logical_or",
    "bitwise_or": "logical_or",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "linalg_matmul": "matmul",
}
_IN_PLACE_OPERATORS = {
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
    "iand": "logical_and_",
    "ior": "logical_or_",
    "ixor": "bitwise_xor_",
    "ipow": "pow_",
}

RESHAPES = frozenset({
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
})  # fmt: skip
"""The same elements in the same order in another shape; `view(dtype)` is told by `reinterprets`."""


def operation(node: Node) -> str:
    """Name of the tensor operation that a node calls, "" for anything else.

    Calls through methods, functions, operators and ATen give the same name; one that writes into
    its first argument ends in "_", as PyTorch's own names do. Functions are told by identity, so a
    function that is merely called like one of PyTorch's has no name here.
    """
    if node.op == "call_method":
        return _common(str(node.target))
    if node.target is getattr and len(node.args) > 1:  # x.mT
        return str(node.args[1])
    return name_of(node.target) if node.op == "call_function" else ""


@functools.lru_cache(maxsize=4096)
def name_of(target: object) -> str:
    """The same for the function, method or operator that a node calls."""
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return _common(name) if space == "aten" else ""
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, _, name = target._qualified_op_name.partition("::")
        return _common(name) if space == "aten" else ""
    name = getattr(target, "__name__", "")
    plain = name.removeprefix("special_")  # torch.special.softmax is called "special_softmax"
    names = (name, plain, name.removeprefix("linalg_"))
    if any(getattr(space, n, None) is target for space in _SPACES for n in names):
        return _common(plain)  # torch.linalg.diagonal is another function than torch.diagonal
    if getattr(operator, name, None) is target:
        return _IN_PLACE_OPERATORS.get(name) or _common(name.rstrip("_"))
    return ""


def reinterprets(node: Node) -> bool:
    """True for a view of another dtype, `x.view(torch.int16)`: other numbers in the same bits."""
    if operation(node) != "view" or not node.all_input_nodes:
        return False
    viewed, view = (n.meta.get("example_value") for n in (node.all_input_nodes[0], node))
    return getattr(viewed, "dtype", None) != getattr(view, "dtype", None)


def is_builtin(target: object) -> bool:
    """True for a function of PyTorch's or Python's that is not itself written in Python."""
    return name_of(target) != "" and not inspect.isfunction(target)


# Operators of PyTorch's, whose meaning `operation` tells or that are no attention, and ours.
_OWN_SPACES = frozenset({
    "aten", "prims", "prim", "rngprims", "quantized", "inductor", "c10d", "_c10d_functional",
    "_dtensor", "profiler", "svg_ear",
})  # fmt: skip


@functools.lru_cache(maxsize=4096)
def is_foreign(target: object) -> bool:
    """True for an operator or function that is neither PyTorch's nor Python's nor ours."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in _OWN_SPACES
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] not in _OWN_SPACES
    if not inspect.isroutine(target):
        return False
    return (target.__module__ or "").partition(".")[0] not in ("torch", "builtins", "_operator", "")


@functools.lru_cache(maxsize=4096)
def aten_overloads(name: str) -> tuple[torch._ops.OpOverload, ...]:
    """ATen's overloads of an operation that have results of their own (no `out=`), in order."""
    in_place = name.endswith("_") and not name.endswith("__")
    plain = name[:-1] if in_place else name
    spelled = {plain, *(n for n, common in _SYNONYMS.items() if common == plain)}
    found = []
    for each in sorted(spelled, key=lambda n: n != plain):
        packet = getattr(torch.ops.aten, each + "_" * in_place, None)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return tuple(o for o in found if not any(a.is_out for a in o._schema.arguments))


def _common(name: str) -> str:
    if name.startswith("__") and name.endswith("__"):  # q.__matmul__(k)
        operator_name = name.strip("_")
        return _IN_PLACE_OPERATORS.get(operator_name) or _common(operator_name)
    in_place = name.endswith("_") and not name.endswith("__")
    plain = name[:-1] if in_place else name
    return _SYNONYMS.get(plain, plain) + ("_" if in_place else "")


# The same elements under another shape, or some of them: what a token-by-token walk passes.
# fmt: off
REARRANGEMENTS = frozenset({
    "view", "reshape", "transpose", "permute", "unflatten", "flatten", "unsqueeze", "squeeze",
    "expand", "narrow", "select", "chunk", "split", "split_with_sizes", "unbind", "movedim",
    "view_as", "reshape_as", "expand_as", "t", "getitem", "slice", "tensor_split", "_unsafe_view",
    "diagonal", "unfold", "squeeze_", "unsqueeze_", "transpose_", "alias", "detach", "lift_fresh",
    "mT", "T", "data",
})
# fmt: on
# Results are the same tokens under another type or in other memory. `to` and its kin return their
# argument itself where nothing is to be changed.
# fmt: off
CASTS = frozenset({
    "to", "_to_copy", "type_as", "type", "float", "half", "bfloat16", "double", "bool",
    "contiguous",
})
# fmt: on
COPIES = frozenset({"clone", "dropout"})
LINEAR = frozenset({"linear", "addmm"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
