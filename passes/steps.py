"""Reads a step between the two products off a node: what it does to scores or weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.constants import number
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import CASTS, RESHAPES, operation, reinterprets
from svg_ear_compile.passes.permutations import permutation
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.passes.symbolic import Size, expression, is_same, is_symbol, rank_of, shape_of

_LARGEST_SHIFT = 30.0
"""A larger number added to every logit rounds them: what eager computes then is another thing."""


@dataclass(frozen=True)
class Step:
    """What a step does to scores or weights.

    Attributes:
        factor: they are multiplied by this number.
        symbol: they are multiplied by this number that is known at run time, or divided by it.
        divides: they are divided by `symbol`.
        shift: this number is added to them.
        added: a mask added to them.
        sign: -1 where that mask is subtracted.
        mask: a bool mask that leaves keys out.
        inverted: True in `mask` leaves a key out.
        fill: the logit of a key that is left out.
        order: dimensions are permuted so.
        shape: they are viewed in this shape.
        emptied: weights are 0 where these scores are nothing but -inf along this dimension.
        beside: nodes that find these rows.
        reason: why attention with this step has to stay as it is, or None.
    """

    factor: float = 1.0
    symbol: Node | None = None
    divides: bool = False
    shift: float = 0.0
    added: Node | None = None
    sign: float = 1.0
    mask: Node | None = None
    inverted: bool = False
    fill: float = -math.inf
    order: tuple[int, ...] | None = None
    shape: tuple[Size, ...] | None = None
    emptied: tuple[Node, int] | None = None
    beside: tuple[Node, ...] = ()
    reason: Reason | None = None

    @property
    def keeps_weights(self) -> bool:
        """True if weights may pass it, not only scores."""
        kept = replace(self, order=None, shape=None, emptied=None, beside=(), reason=None)
        return kept == Step()


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


def keeps_shape(node: Node, scores: Node, step: Step) -> bool:
    """True if a step only permutes: a factor or a mask that is larger repeats the scores."""
    before, after = (n.meta.get("example_value") for n in (scores, node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if step.shape is not None:  # read off the shapes
        return True
    order = step.order or range(before.dim())
    return before.dim() == after.dim() and all(
        is_same(before.shape[d], size) for d, size in zip(order, after.shape, strict=True)
    )


def scale(given: Given) -> Step | None:
    name = operation(given.node).rstrip("_")
    if name not in ("mul", "div", "neg", "add"):
        return None
    first, second = given.args.take("self"), given.args.take("other")
    if name == "neg":
        return Step(factor=-1.0)
    if name == "add":  # of the scores to themselves
        return Step(factor=2.0) if first is second else None
    if first is second or (name == "div" and first is not given.scores):
        return None
    other = second if first is given.scores else first
    if isinstance(other, Node) and is_symbol(other.meta.get("example_value")):
        return Step(symbol=other, divides=name == "div")
    factor = number(other, given.flow)
    if factor is None:
        return Step(reason=Reason.SCALE)
    if factor == 0 or not math.isfinite(factor):
        return None
    return Step(factor=factor if name == "mul" else 1.0 / factor)


def added_mask(given: Given) -> Step | None:
    name = operation(given.node).rstrip("_")
    if name not in ("add", "sub"):
        return None
    first, second = given.args.take("self"), given.args.take("other")
    other = second if first is given.scores else first
    if first is second or (name == "sub" and first is not given.scores):
        return None
    return _added(other, -1.0 if name == "sub" else 1.0, given.flow)


def _added(other: object, sign: float, flow: Dataflow) -> Step | None:
    """A number or a mask that is added to scores; None where it is neither."""
    shift = number(other, flow)
    if shift is not None:
        return Step(shift=sign * shift) if abs(shift) <= _LARGEST_SHIFT else None
    return Step(added=other, sign=sign) if isinstance(other, Node) and rank_of(other) >= 0 else None


def added_by_product(added: Node, flow: Dataflow) -> Step:
    """What a product adds to the scores that it makes, as `baddbmm` does."""
    return _added(added, 1.0, flow) or Step(reason=Reason.PATTERN)


def filled_by_index(given: Given) -> Step | None:
    """`scores[mask] = number`: a statement whose result is the scores themselves."""
    if operation(given.node) != "setitem" or len(given.node.args) != 3:
        return None
    scores, mask, value = given.node.args
    chosen = mask.meta.get("example_value") if isinstance(mask, Node) else None
    whole = given.scores.meta.get("example_value")
    if scores is not given.scores or not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
        return None
    if not isinstance(whole, Tensor) or chosen.dim() != whole.dim():
        return None  # of fewer dimensions, it is aligned with the first ones
    return _fill(given, mask, True, value)


def _fill(given: Given, mask: object, inverted: bool, value: object) -> Step | None:
    logit = number(value, given.flow)
    if not isinstance(mask, Node) or mask is given.scores or logit is None:
        return None
    return Step(mask=mask, inverted=inverted, fill=logit)


def masked_fill(given: Given) -> Step | None:
    if operation(given.node).rstrip("_") != "masked_fill":
        return None
    if given.args.take("self") is not given.scores:
        return None
    return _fill(given, given.args.take("mask"), True, given.args.take("value"))


def where(given: Given) -> Step | None:
    if operation(given.node) != "where":
        return None
    condition, kept, other = (given.args.take(name) for name in ("condition", "self", "other"))
    if kept is given.scores and other is not given.scores:
        return _fill(given, condition, False, other)
    return _fill(given, condition, True, kept) if other is given.scores else None


def dropout(given: Given) -> Step | None:
    if operation(given.node).rstrip("_") != "dropout":
        return None
    if given.args.take("self") is not given.scores:
        return None
    given.args.take("inplace")
    probability, training = given.args.take("p"), given.args.take("training", "train")
    off = training is False or probability == 0.0
    return Step(reason=None if off else Reason.DROPOUT)


def same_values(given: Given) -> Step | None:
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


# Expanded to the shape that it has, it is a view of itself.
_ALIASES = frozenset({"clone", "detach", "alias", "lift_fresh", "data", "expand"})


def transposed(given: Given) -> Step | None:
    if given.args.take("self") is not given.scores:
        return None
    order = permutation(given.node)
    if order is None:
        return None
    given.args.take_all(except_for="out")
    return Step(order=order)


def reshaped(given: Given) -> Step | None:
    """The same elements in the same order in another shape, which says all."""
    if operation(given.node) not in RESHAPES or given.args.take("self") is not given.scores:
        return None
    before, after = (shape_of(n) for n in (given.scores, given.node))
    if before is None or after is None or reinterprets(given.node):
        return None
    given.args.take_all(except_for="out")
    same = [expression(n) for n in before] == [expression(n) for n in after]
    return Step() if same else Step(shape=after)


def is_softmax(node: Node) -> bool:
    """True for a softmax in any pattern, also in one that cannot be read."""
    return operation(node) in ("softmax", "_safe_softmax", "log_softmax", "softmin")


@dataclass(frozen=True)
class Softmax:
    """A softmax.

    Attributes:
        scores: what it takes.
        weights: the node that holds its result.
        dim: its dimension, from the front.
        zeroes_empty_rows: a row of nothing but -inf gives 0; else it gives NaN.
        reason: why attention with it has to stay as it is, or None.
    """

    scores: Node
    weights: Node
    dim: int
    zeroes_empty_rows: bool
    reason: Reason | None


def read_softmax(node: Node) -> Softmax | None:
    """The softmax that a node computes, alone or with the exponential after it; None if unknown."""
    name, args, rank = operation(node), arguments(node), rank_of(node)
    if name not in ("softmax", "_safe_softmax", "log_softmax") or args is None:
        return None
    data, dim = args.take("self"), args.take("dim")
    args.take("dtype")  # the result says it
    args.take("half_to_float")
    args.take("_stacklevel")
    if not isinstance(data, Node) or not isinstance(dim, int) or rank <= 0:
        return None
    weights = node
    if name == "log_softmax":
        exponentials = [user for user in node.users if operation(user) == "exp"]
        if len(exponentials) != 1:
            return None
        (weights,) = exponentials
    reason = None if args.rest_has_defaults else Reason.PATTERN
    return Softmax(data, weights, dim % rank, name == "_safe_softmax", reason)


def rows_without_keys(given: Given) -> Step | None:
    """`where(no key is left, 0, weights)`, as PyTorch decomposes its attention."""
    if operation(given.node) != "where":
        return None
    condition, zero, kept = (given.args.take(name) for name in ("condition", "self", "other"))
    if kept is not given.scores or number(zero, given.flow) != 0.0:
        return None
    found = _chain(condition, ("logical_not", "any", "logical_not", "eq"))
    found = found or _chain(condition, ("all", "eq"))
    if found is None:
        return None
    reduction = next(node for node in found if operation(node) in ("any", "all"))
    reduced, compared = arguments(reduction), arguments(found[-1])
    if reduced is None or compared is None:
        return None
    dim, keepdim = reduced.take("dim"), reduced.take("keepdim")
    scores, lowest = compared.take("self"), compared.take("other")
    if not isinstance(scores, Node) or lowest != -math.inf:
        return None
    if not isinstance(dim, int) or keepdim is not True:
        return None
    return Step(emptied=(scores, dim % rank_of(given.scores)), beside=tuple(found))


def _chain(node: object, names: tuple[str, ...]) -> list[Node] | None:
    """The node and what it was made of, each by the operation of these names."""
    found = []
    for name in names:
        if not isinstance(node, Node) or operation(node) != name:
            return None
        found.append(node)
        node = node.args[0]
    return found
