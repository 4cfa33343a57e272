"""How people write attention by hand: one entry for each spelling of a step.

Hand-written attention is a product of queries and keys, some steps on its scores, a softmax, some
steps on the weights, and a product with the values. Each of these is written in several ways, and
every way can meet every other, so an entry describes one step and not a whole attention. To teach
the pass a new spelling, add a function that reads it off a node and an entry with an example, a
whole attention that contains it; the example is its test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from svg_ear_compile.passes.operation import CASTS, COPIES, operation
from svg_ear_compile.passes.site import Reason

NEGATIVE = -1e4
"""A fill value from here down is meant to leave a key out."""


@dataclass(frozen=True)
class Product:
    """A contraction of two tensors: `left` and `right` have the letters of `dims`, in einsum's way.

    `factor` multiplies it; `added`, if any, is added to it.
    """

    left: Node
    right: Node
    left_dims: str
    right_dims: str
    out_dims: str
    factor: float = 1.0
    added: Node | None = None


@dataclass(frozen=True)
class Step:
    """What a step does to scores or weights.

    Attributes:
        factor: they are multiplied by this number.
        added: a mask added to them.
        mask: a bool mask that leaves keys out.
        inverted: True in `mask` leaves a key out.
        finite_fill: with a large negative number instead of -inf.
        order: dimensions are permuted so.
        reason: why attention with this step has to stay as it is, or None.
    """

    factor: float = 1.0
    added: Node | None = None
    mask: Node | None = None
    inverted: bool = False
    finite_fill: bool = False
    order: tuple[int, ...] | None = None
    reason: Reason | None = None

    @property
    def keeps_weights(self) -> bool:
        """True if weights may pass it, not only scores."""
        return replace(self, order=None, reason=None) == Step()


ProductReader = Callable[[Node], Product | None]
StepReader = Callable[[Node, Node], Step | None]
Example = Callable[[Tensor, Tensor, Tensor], Tensor]
Reader = TypeVar("Reader", ProductReader, StepReader)


@dataclass(frozen=True)
class Spelling(Generic[Reader]):
    """One way to write a step.

    Attributes:
        name: in words.
        read: takes a node, and for a step also the input that carries the scores; None if the node
            is not written so.
        example: attention of q, k, v (B, H, N, D) that contains the spelling.
    """

    name: str
    read: Reader
    example: Example


def _argument(node: Node, position: int, *names: str) -> object:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _rank(node: Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else -1


def _number(value: object) -> float | None:
    """A number, also where it was made into a constant tensor first."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node):
        place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "tensor": 0}
        name = operation(value)
        if name in place and not isinstance(value.args[place[name]], Node):
            return _number(value.args[place[name]])
    return None


# Products


def _matmul(node: Node) -> Product | None:
    if operation(node) not in ("matmul", "bmm"):
        return None
    left, right = _argument(node, 0, "input", "self"), _argument(node, 1, "other", "mat2")
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    rank = _rank(left)
    if rank < 2 or _rank(right) != rank:
        return None
    batch = "uvwxyz"[: rank - 2]
    return Product(left, right, f"{batch}ad", f"{batch}dc", f"{batch}ac")


def _einsum(node: Node) -> Product | None:
    equation = _argument(node, 0, "equation")
    if operation(node) != "einsum" or not isinstance(equation, str):
        return None
    rest = node.args[1:]
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
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


def _baddbmm(node: Node) -> Product | None:
    if operation(node) != "baddbmm":
        return None
    added, left, right = (
        _argument(node, place, name) for place, name in enumerate(("input", "batch1", "batch2"))
    )
    beta, alpha = (_number(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    if not all(isinstance(n, Node) for n in (added, left, right)) or alpha is None:
        return None
    if beta not in (0.0, 1.0):
        return None
    assert isinstance(added, Node)
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return Product(
        left, right, "uad", "udc", "uac", alpha, added if beta == 1.0 else None
    )  # beta 0: what `added` holds is not even read


# Steps


def _scale(node: Node, scores: Node) -> Step | None:
    name = operation(node).rstrip("_")
    if name not in ("mul", "div") or len(node.args) < 2:
        return None
    first, second = node.args[:2]
    other = second if first is scores else first
    if name == "div" and first is not scores:
        return None
    factor = _number(other)
    if factor is None:
        return Step(reason=Reason.SCALE)
    if name == "div":
        return Step(factor=1.0 / factor) if factor else None
    return Step(factor=factor)


def _added_mask(node: Node, scores: Node) -> Step | None:
    if operation(node) not in ("add", "add_") or len(node.args) < 2:
        return None
    if node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[:2]
    other = second if first is scores else first
    if isinstance(other, Node) and _number(other) is None:
        return Step(added=other)
    return Step()  # one number more on every logit


def _fill(mask: object, inverted: bool, value: object) -> Step | None:
    number = _number(value)
    if not isinstance(mask, Node) or number is None or number > NEGATIVE:
        return None
    return Step(mask=mask, inverted=inverted, finite_fill=number > -math.inf)


def _masked_fill(node: Node, scores: Node) -> Step | None:
    if operation(node) not in ("masked_fill", "masked_fill_") or node.args[0] is not scores:
        return None
    return _fill(_argument(node, 1, "mask"), True, _argument(node, 2, "value"))


def _where(node: Node, scores: Node) -> Step | None:
    if operation(node) != "where":
        return None
    condition, kept, other = (
        _argument(node, i, n) for i, n in enumerate(("condition", "input", "other"))
    )
    if node.op == "call_method":  # scores.where(condition, fill)
        condition, kept = kept, condition
    if kept is scores:
        return _fill(condition, False, other)
    return _fill(condition, True, kept) if other is scores else None


def _same_values(node: Node, scores: Node) -> Step | None:
    name = operation(node)
    if name in ("dropout", "dropout_"):
        training = _argument(node, 2, "training", "train")
        off = training is False or _argument(node, 1, "p") == 0.0
        return Step(reason=None if off else Reason.DROPOUT)
    if name in CASTS | COPIES and node.args and node.args[0] is scores:
        return Step()
    return None


def _transposed(node: Node, scores: Node) -> Step | None:
    name, rank = operation(node), _rank(scores)
    order = list(range(rank))
    if name == "transpose":
        first, second = (_argument(node, place, f"dim{place - 1}") for place in (1, 2))
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        order[first], order[second] = order[second], order[first]
    elif name == "permute":
        given = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        order = [d % rank for d in given if isinstance(d, int)]
    elif name == "mT":
        order[-2:] = order[:-3:-1]
    else:
        return None
    return Step(order=tuple(order)) if sorted(order) == list(range(rank)) else None


def softmax_dim(node: Node) -> int | None:
    """The dimension of a softmax, counted from the front; None for another node."""
    if operation(node) != "softmax":
        return None
    dim, rank = _argument(node, 1, "dim"), _rank(node)
    return dim % rank if isinstance(dim, int) and rank > 0 else None


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [t.flatten(0, 1) for t in (q, k, v)]  # (B H, N, D)


def _heads_last(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in (q, k, v)]  # (B, N, H, D)


def _padding(k: Tensor) -> Tensor:
    return (torch.arange(k.shape[2], device=k.device) < k.shape[2] - 3)[None, None, None]


def _operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def _one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bjd->bhij", q, k[:, 0])
    return torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v[:, 0])


def _einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_last(q, k, v)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def _with_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = _heads_first(q, k, v)
    unread = torch.empty(a.shape[0], a.shape[1], b.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(unread, a, b.transpose(1, 2), beta=0, alpha=0.2)
    return torch.bmm(scores.softmax(-1), c).unflatten(0, q.shape[:2])


def _with_added_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = _heads_first(q, k, v)
    bias = torch.zeros_like(k[:, :, :, 0]).masked_fill(~_padding(k)[:, :, 0], -math.inf)
    bias = bias.flatten(0, 1)[:, None].expand(-1, a.shape[1], -1)
    scores = torch.baddbmm(bias, a, b.transpose(1, 2), beta=1, alpha=0.2)
    return torch.bmm(scores.softmax(-1), c).unflatten(0, q.shape[:2])


def _divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / math.sqrt(q.shape[-1])
    return torch.matmul(F.softmax(scores, dim=-1), v)


def _scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.matmul(k.permute(0, 1, 3, 2))
    scores *= 0.3
    return torch.softmax(scores, -1).matmul(v)


def _scaled_by_statement(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mul_(0.3)
    scores.masked_fill_(~_padding(k), -math.inf)
    return scores.softmax(-1) @ v


def _scaled_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = q.shape[-1] ** -0.25
    return ((q * root) @ (k * root).mT).softmax(-1) @ v


def _with_added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros_like(k[:, :1, None, :, 0]).masked_fill(~_padding(k), -1e4)
    return (bias + 0.2 * (q @ k.mT)).softmax(-1) @ v


def _with_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 0.2 * (q @ k.mT)
    return scores.masked_fill(~_padding(k), torch.finfo(q.dtype).min).softmax(-1) @ v


def _with_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lowest = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    return torch.where(_padding(k), 0.2 * (q @ k.mT), lowest).softmax(-1) @ v


def _in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax((q.float() @ k.float().mT) * 0.2, dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), p=0.0, training=False) @ v


def _channels_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (t.flatten(0, 1) for t in (q, k.mT, v.mT))  # (B H, N, D) and (B H, D, N)
    weights = F.softmax(torch.bmm(a, b) * 0.2, dim=2)
    return torch.bmm(c, weights.permute(0, 2, 1)).mT.unflatten(0, q.shape[:2])


def _keys_by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (k @ q.mT * 0.2).softmax(dim=-2)
    return weights.transpose(-2, -1) @ v


PRODUCTS: tuple[Spelling[ProductReader], ...] = (
    Spelling("matmul, bmm, @", _matmul, _operators),
    Spelling("einsum", _einsum, _einsums),
    Spelling("einsum, one key head", _einsum, _one_key_head),
    Spelling("baddbmm", _baddbmm, _with_baddbmm),
    Spelling("baddbmm with a mask", _baddbmm, _with_added_baddbmm),
)
STEPS: tuple[Spelling[StepReader], ...] = (
    Spelling("divided or multiplied by a number", _scale, _divided),
    Spelling("scaled in place", _scale, _scaled_in_place),
    Spelling("scaled and masked by statements", _scale, _scaled_by_statement),
    Spelling("q and k scaled before", _scale, _scaled_on_both),
    Spelling("mask added", _added_mask, _with_added_mask),
    Spelling("masked_fill", _masked_fill, _with_masked_fill),
    Spelling("where", _where, _with_where),
    Spelling("cast, dropout that is off", _same_values, _in_float32),
    Spelling("weights transposed", _transposed, _channels_first),
    Spelling("keys by queries", _transposed, _keys_by_queries),
)
