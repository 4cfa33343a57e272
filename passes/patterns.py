"""How people write attention by hand: one entry for each pattern of a step.

Hand-written attention is a product of queries and keys, some steps on its scores, a softmax, some
steps on the weights, and a product with the values. Each of these is written in several ways, and
every way can meet every other, so an entry describes one step and not a whole attention. To teach
the pass a new pattern, add a function that reads it off a node and an entry with an example, a
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

from svg_ear_compile.passes import products, steps
from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.products import Product
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.passes.steps import Given, Step, keeps_shape

ProductReader = Callable[[Node, Arguments], Product | None]
StepReader = Callable[[Given], Step | None]
Example = Callable[[Tensor, Tensor, Tensor], Tensor]
Reader = TypeVar("Reader", ProductReader, StepReader)


@dataclass(frozen=True)
class Pattern(Generic[Reader]):
    """One way to write a step.

    Attributes:
        name: in words.
        read: takes a node's arguments, by name; None if the node is not written so.
        example: attention of q, k, v (B, H, N, D) that contains the pattern.
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
            left_out = None if args.rest_has_defaults else Reason.PATTERN
            return replace(product, reason=product.reason or left_out)
    return None


def read_step(node: Node, scores: Node, flow: Dataflow) -> Step | None:
    """What a node does to the scores or weights in `scores`, or None where that is not known."""
    for read in _READ_STEP:
        args = arguments(node)
        step = read(Given(node, scores, args, flow)) if args is not None else None
        if args is not None and step is not None:
            known = args.rest_has_defaults and keeps_shape(node, scores, step)
            return step if known else replace(step, reason=step.reason or Reason.PATTERN)
    return None


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


def _with_subtracted_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = -(q @ k.mT)
    scores = (scores + scores) / 7.0
    return (scores - (1 - _padding(k).to(q.dtype)) * 3e4).softmax(-1) @ v


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


def _apart_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = _heads_first(q, k, v)
    scores = torch.bmm(a, b.mT).view(*q.shape[:3], -1)
    scores = scores.masked_fill(~_padding(k), -1e4)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), c).view_as(q)


def _decomposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.where(_padding(k), 0.0, -math.inf)
    scores = 0.2 * (q @ k.mT) + bias
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1)
    return torch.where(empty, torch.zeros_like(weights), weights).expand(scores.shape) @ v


def _with_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(0.2 * (q @ k.mT), dim=-1).exp() @ v


def _in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).view(-1, k.shape[2])
    return scores.softmax(1).view(*q.shape[:3], -1) @ v


PRODUCTS: tuple[Pattern[ProductReader], ...] = (
    Pattern("matmul, mm, bmm, @", products.matmul, _operators),
    Pattern("einsum", products.einsum, _einsums),
    Pattern("einsum, one key head", products.einsum, _one_key_head),
    Pattern("baddbmm", products.baddbmm, _with_baddbmm),
    Pattern("baddbmm with a mask", products.baddbmm, _with_added_baddbmm),
)
STEPS: tuple[Pattern[StepReader], ...] = (
    Pattern("divided or multiplied by a number", steps.scale, _divided),
    Pattern("scaled in place", steps.scale, _scaled_in_place),
    Pattern("scaled and masked by statements", steps.scale, _scaled_by_statement),
    Pattern("q and k scaled before", steps.scale, _scaled_on_both),
    Pattern("mask added", steps.added_mask, _with_added_mask),
    Pattern("negated, added to itself", steps.scale, _with_subtracted_mask),
    Pattern("mask subtracted", steps.added_mask, _with_subtracted_mask),
    Pattern("masked_fill", steps.masked_fill, _with_masked_fill),
    Pattern("rows without keys are 0", steps.rows_without_keys, _decomposed),
    Pattern("where", steps.where, _with_where),
    Pattern("cast, copy", steps.same_values, _in_float32),
    Pattern("dropout that is off", steps.dropout, _in_float32),
    Pattern("weights transposed", steps.transposed, _channels_first),
    Pattern("batch and heads folded or apart", steps.reshaped, _apart_between),
    Pattern("rows of all queries in one dimension", steps.reshaped, _in_rows),
    Pattern("exponential of a log_softmax", steps.same_values, _with_logarithm),
    Pattern("keys by queries", steps.transposed, _keys_by_queries),
)
_READ_PRODUCT = tuple(dict.fromkeys(pattern.read for pattern in PRODUCTS))
_READ_STEP = tuple(dict.fromkeys(pattern.read for pattern in STEPS))
