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

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import CASTS, operation
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.passes.symbolic import is_same

_LARGEST_SHIFT = 30.0
"""A larger number added to every logit rounds them: what eager computes then is another thing."""


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


@dataclass(frozen=True)
class Step:
    """What a step does to scores or weights.

    Attributes:
        factor: they are multiplied by this number.
        shift: this number is added to them.
        added: a mask added to them.
        mask: a bool mask that leaves keys out.
        inverted: True in `mask` leaves a key out.
        fill: the logit of a key that is left out.
        order: dimensions are permuted so.
        reason: why attention with this step has to stay as it is, or None.
    """

    factor: float = 1.0
    shift: float = 0.0
    added: Node | None = None
    mask: Node | None = None
    inverted: bool = False
    fill: float = -math.inf
    order: tuple[int, ...] | None = None
    reason: Reason | None = None

    @property
    def keeps_weights(self) -> bool:
        """True if weights may pass it, not only scores."""
        return replace(self, order=None, reason=None) == Step()


@dataclass(frozen=True)
class Given:
    """What a reader of a step is given.

    Attributes:
        node: the node that it reads.
        scores: the input that carries the scores or weights.
        args: the node's arguments; what the reader leaves must have its default.
        flow: the graph's dataflow.
    """

    node: Node
    scores: Node
    args: Arguments
    flow: Dataflow


ProductReader = Callable[[Node, Arguments], Product | None]
StepReader = Callable[[Given], Step | None]
Example = Callable[[Tensor, Tensor, Tensor], Tensor]
Reader = TypeVar("Reader", ProductReader, StepReader)


@dataclass(frozen=True)
class Spelling(Generic[Reader]):
    """One way to write a step.

    Attributes:
        name: in words.
        read: takes a node's arguments, by name; None if the node is not written so.
        example: attention of q, k, v (B, H, N, D) that contains the spelling.
    """

    name: str
    read: Reader
    example: Example


def read_product(node: Node) -> Product | None:
    """The product that a node computes, or None for another node."""
    for read in _READ_PRODUCT:
        args = arguments(node)
        product = read(node, args) if args is not None else None
        if args is not None and product is not None:
            left_out = None if args.rest_has_defaults else Reason.SPELLING
            return replace(product, reason=product.reason or left_out)
    return None


def read_step(node: Node, scores: Node, flow: Dataflow) -> Step | None:
    """What a node does to the scores or weights in `scores`, or None where that is not known."""
    for read in _READ_STEP:
        args = arguments(node)
        step = read(Given(node, scores, args, flow)) if args is not None else None
        if args is not None and step is not None:
            known = args.rest_has_defaults and _keeps_shape(node, scores, step)
            return step if known else replace(step, reason=step.reason or Reason.SPELLING)
    return None


def _keeps_shape(node: Node, scores: Node, step: Step) -> bool:
    """True if a step only permutes: a factor or a mask that is larger repeats the scores."""
    before, after = (n.meta.get("example_value") for n in (scores, node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    order = step.order or range(before.dim())
    return before.dim() == after.dim() and all(
        is_same(before.shape[d], size) for d, size in zip(order, after.shape, strict=True)
    )


def _rank(node: Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else -1


def _number(value: object, flow: Dataflow) -> float | None:
    """A number, also where it was made into a constant tensor first that nothing writes into."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    name = {"tensor": "data", "scalar_tensor": "s"}.get(operation(value), "fill_value") if (
        isinstance(value, Node) and operation(value) in _NUMBERS
    ) else None  # fmt: skip
    args = arguments(value) if isinstance(value, Node) and name is not None else None
    if args is None or name is None or not isinstance(value, Node):
        return None
    made, number = value.meta.get("example_value"), args.take(name)
    plain = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not plain or not isinstance(made, Tensor) or flow.is_ever_written(value):
        return None
    return float(torch.tensor(number).to(made.dtype))  # as the tensor holds it


_NUMBERS = frozenset({"full", "full_like", "new_full", "scalar_tensor", "tensor"})


# Products


def _matmul(node: Node, args: Arguments) -> Product | None:
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


def _einsum(node: Node, args: Arguments) -> Product | None:
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


def _baddbmm(node: Node, args: Arguments) -> Product | None:
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


# Steps


def _scale(given: Given) -> Step | None:
    name = operation(given.node).rstrip("_")
    if name not in ("mul", "div"):
        return None
    first, second = given.args.take("self"), given.args.take("other")
    if first is second or (name == "div" and first is not given.scores):
        return None
    factor = _number(second if first is given.scores else first, given.flow)
    if factor is None:
        return Step(reason=Reason.SCALE)
    if factor == 0 or not math.isfinite(factor):
        return None
    return Step(factor=factor if name == "mul" else 1.0 / factor)


def _added_mask(given: Given) -> Step | None:
    name = operation(given.node).rstrip("_")
    if name not in ("add", "sub"):
        return None
    first, second = given.args.take("self"), given.args.take("other")
    other = second if first is given.scores else first
    if first is second or (name == "sub" and first is not given.scores):
        return None
    number = _number(other, given.flow)
    if number is not None:
        return Step(shift=number) if abs(number) <= _LARGEST_SHIFT else None
    is_tensor = isinstance(other, Node) and _rank(other) >= 0
    return Step(added=other) if is_tensor and name == "add" else None


def _fill(given: Given, mask: object, inverted: bool, value: object) -> Step | None:
    number = _number(value, given.flow)
    if not isinstance(mask, Node) or mask is given.scores or number is None:
        return None
    return Step(mask=mask, inverted=inverted, fill=number)


def _masked_fill(given: Given) -> Step | None:
    if operation(given.node).rstrip("_") != "masked_fill":
        return None
    if given.args.take("self") is not given.scores:
        return None
    return _fill(given, given.args.take("mask"), True, given.args.take("value"))


def _where(given: Given) -> Step | None:
    if operation(given.node) != "where":
        return None
    condition, kept, other = (given.args.take(name) for name in ("condition", "self", "other"))
    if kept is given.scores and other is not given.scores:
        return _fill(given, condition, False, other)
    return _fill(given, condition, True, kept) if other is given.scores else None


def _dropout(given: Given) -> Step | None:
    if operation(given.node).rstrip("_") != "dropout":
        return None
    if given.args.take("self") is not given.scores:
        return None
    given.args.take("inplace")
    probability, training = given.args.take("p"), given.args.take("training", "train")
    off = training is False or probability == 0.0
    return Step(reason=None if off else Reason.DROPOUT)


def _same_values(given: Given) -> Step | None:
    """A cast between floats or a copy: whatever else it is told concerns memory alone."""
    if operation(given.node) not in CASTS | _ALIASES:
        return None
    if given.args.take("self") is not given.scores:
        return None
    before, after = (n.meta.get("example_value") for n in (given.scores, given.node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if not after.dtype.is_floating_point or before.device != after.device:
        return None
    given.args.take_all(except_for="out")
    return Step()


_ALIASES = frozenset({"clone", "detach", "alias", "lift_fresh", "data"})


def _transposed(given: Given) -> Step | None:
    name, rank = operation(given.node), _rank(given.scores)
    if name not in ("transpose", "permute", "mT") or given.args.take("self") is not given.scores:
        return None
    order = list(range(rank))
    if name == "transpose":
        first, second = given.args.take("dim0"), given.args.take("dim1")
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        order[first], order[second] = order[second], order[first]
    elif name == "permute":
        dims = given.args.take("dims")
        if not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
            return None
        order = [d % rank for d in dims]
    else:
        order[-2:] = order[:-3:-1]
    return Step(order=tuple(order)) if sorted(order) == list(range(rank)) else None


def is_softmax(node: Node) -> bool:
    """True for a softmax in any spelling."""
    return operation(node) == "softmax"


def read_softmax(node: Node) -> tuple[Node, int, Reason | None] | None:
    """What a softmax takes, its dimension from the front, why it has to stay; None if unknown."""
    args, rank = arguments(node), _rank(node)
    if not is_softmax(node) or args is None:
        return None
    data, dim = args.take("self"), args.take("dim")
    args.take("dtype")  # the result says it
    args.take("half_to_float")
    args.take("_stacklevel")
    if not isinstance(data, Node) or not isinstance(dim, int) or rank <= 0:
        return None
    return data, dim % rank, None if args.rest_has_defaults else Reason.SPELLING


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
    Spelling("cast, copy", _same_values, _in_float32),
    Spelling("dropout that is off", _dropout, _in_float32),
    Spelling("weights transposed", _transposed, _channels_first),
    Spelling("keys by queries", _transposed, _keys_by_queries),
)
_READ_PRODUCT = tuple(dict.fromkeys(spelling.read for spelling in PRODUCTS))
_READ_STEP = tuple(dict.fromkeys(spelling.read for spelling in STEPS))
