"""Reads a product of two tensors off a node: queries with keys, or weights with values."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

from torch.fx import Node
from torch.nn import Parameter

from svg_ear_compile.passes.arguments import Arguments
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.passes.symbolic import hints_of, rank_of


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


_NAMES = frozenset({
    "matmul", "mm", "bmm", "einsum", "addmm", "addbmm", "baddbmm", "tensordot", "inner", "dot",
    "chain_matmul", "linalg_multi_dot", "linalg_vecdot", "rmatmul",
})  # fmt: skip


def is_product(node: Node) -> bool:
    """True for a product of tensors, also for one that no reader knows."""
    name = operation(node)
    if name == "linear":  # of an activation, not of a layer's weight
        weight = node.all_input_nodes[-1].meta.get("example_value")
        return not isinstance(weight, Parameter)
    return name in _NAMES or is_outer(node) or any(map(is_outer, _summed(node)))


def is_outer(node: Node) -> bool:
    """True for a product of elements that repeats both tensors and is summed: a matrix product."""
    if operation(node) != "mul" or len(node.all_input_nodes) != 2:
        return False
    shape, sides = hints_of(node), [hints_of(side) for side in node.all_input_nodes]
    sums = any(operation(user) == "sum" for user in node.users)
    return sums and all(len(side) == len(shape) > 2 and side != shape for side in sides)


def factors(node: Node) -> list[Node]:
    """The tensors that a product is of."""
    outer = next(filter(is_outer, _summed(node)), node)
    return outer.all_input_nodes


def _summed(node: Node) -> list[Node]:
    return node.all_input_nodes if operation(node) == "sum" else []


def matmul(node: Node, args: Arguments) -> Product | None:
    if operation(node) not in ("matmul", "mm", "bmm", "rmatmul"):
        return None
    left, right = args.take("self"), args.take("other", "mat2", "1")
    if operation(node) == "rmatmul":  # k.__rmatmul__(q) is q @ k
        left, right = right, left
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    rank = rank_of(left)
    if rank < 2 or rank_of(right) != rank:
        return None
    batch = "uvwxyz"[: rank - 2]
    return Product(left, right, f"{batch}ad", f"{batch}dc", f"{batch}ac")


def einsum(node: Node, args: Arguments) -> Product | None:
    if operation(node) != "einsum":
        return None
    equation, operands = args.take("equation"), args.take("tensors")
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    if len(operands) != 2 or not all(isinstance(n, Node) for n in operands):
        return None
    equation = _without_ellipsis(equation.replace(" ", ""), [rank_of(n) for n in operands])
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2:
        return None
    if any(len(set(term)) != len(term) for term in (*terms, out)):
        return None
    left, right = operands
    return Product(left, right, terms[0], terms[1], out)


def _without_ellipsis(equation: str, ranks: list[int]) -> str:
    """The equation with letters for "..." where it stands for as many dimensions in both terms."""
    terms = equation.partition("->")[0].split(",")
    hidden = {rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=False)}
    letters = [x for x in ascii_letters if x not in equation]
    if len(hidden) != 1 or not all("..." in term for term in terms):
        return equation
    return equation.replace("...", "".join(letters[: hidden.pop()]))


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
