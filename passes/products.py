"""Reads a product of two tensors off a node: queries with keys, or weights with values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Reason


@dataclass(frozen=True)
class Product:
    """A contraction of two tensors: `left` and `right` have the letters of `dims`, in einsum's way.

    `factor` multiplies it; `added`, if any, is added to it; `reason` says why it has to stay.
    """

    left: Node
    right: Node
    left_dims: str
    right_dims: str
    out_dims: str
    factor: float = 1.0
    added: Node | None = None
    reason: Reason | None = None


def matmul(node: Node, args: Arguments) -> Product | None:
    if operation(node) not in ("matmul", "bmm"):
        return None
    left, right = args.take("self"), args.take("other", "mat2")
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    rank = _rank(left)
    if rank < 2 or _rank(right) != rank:
        return None
    batch = "uvwxyz"[: rank - 2]
    return Product(left, right, f"{batch}ad", f"{batch}dc", f"{batch}ac")


def einsum(node: Node, args: Arguments) -> Product | None:
    if operation(node) != "einsum":
        return None
    equation, operands = args.take("equation"), args.take("tensors")
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in inputs or len(terms) != 2 or len(operands) != 2:
        return None
    if any(len(set(term)) != len(term) for term in (*terms, out)):
        return None
    left, right = operands
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return Product(left, right, terms[0], terms[1], out)


def baddbmm(node: Node, args: Arguments) -> Product | None:
    if operation(node) != "baddbmm":
        return None
    added, left, right = (args.take(name) for name in ("self", "batch1", "batch2"))
    beta, alpha = args.take("beta"), args.take("alpha")
    if not all(isinstance(n, Node) for n in (added, left, right)):
        return None
    if not isinstance(alpha, (int, float)) or beta not in (0, 1):
        return None
    return Product(
        left, right, "uad", "udc", "uac", float(alpha), added if beta == 1 else None
    )  # beta 0: what `added` holds is not even read


def _rank(node: Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else -1
