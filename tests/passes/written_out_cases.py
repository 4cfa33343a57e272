"""Softmax that is written out, weights that are changed afterwards, PyTorch's own decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from surroundings import INF, TOKENS, Cases, of_scores, of_weights, row, scores
from torch import Tensor

from svg_ear_compile.passes.site import Reason

Weights = Callable[[Tensor], Tensor]


def by(weights: Weights) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v, m: weights(scores(q, k)) @ v


def ratio(s: Tensor) -> Tensor:
    e = s.exp()
    return e / e.sum(-1, keepdim=True)


def stable_ratio(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def divided_last(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


MIXING = torch.nn.Parameter(torch.tensor([[1.0, 0.3], [-0.2, 0.9]]))


def mixed(s: Tensor) -> Tensor:
    return torch.einsum("bhqk,hg->bgqk", s, MIXING)


def into(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k)
    weights = torch.empty(s.shape)
    torch.softmax(s, -1, out=weights)
    return weights @ v


@torch.library.custom_op("svg_ear_test::softmax", mutates_args=())
def foreign_softmax(s: Tensor) -> Tensor:
    return s.softmax(-1)


@foreign_softmax.register_fake
def _(s: Tensor) -> Tensor:
    return torch.empty_like(s)


def with_sink(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k)
    s = torch.cat([s, torch.ones_like(s[..., :1])], -1)
    return s.softmax(-1)[..., :-1] @ v


def with_split_sink(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k)
    s = torch.cat([torch.zeros_like(s[..., :1]), s], dim=-1)
    return s.softmax(-1).split([1, TOKENS], -1)[1] @ v


def zeroed(
    empty: Callable[[Tensor], Tensor], of: Callable[[Tensor], Tensor] = lambda s: s
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Rows without keys give 0: the first sample has none at all."""

    def body(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        keep = row(m) & (torch.arange(len(m)) > 0)[:, None, None, None]
        s = scores(q, k) + torch.where(keep, 0.0, -INF)
        w = s.softmax(-1)
        return torch.where(empty(of(s)), torch.zeros_like(w), w) @ v

    return body


def all_lowest(s: Tensor) -> Tensor:
    return s.eq(-INF).all(-1, keepdim=True)


def none_finite(s: Tensor) -> Tensor:
    return torch.logical_not(torch.any(torch.logical_not(s == -INF), dim=-1, keepdim=True))


def safe(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    keep = row(m) & (torch.arange(len(m)) > 0)[:, None, None, None]
    return torch.ops.aten._safe_softmax(scores(q, k).masked_fill(~keep, -INF), -1) @ v


SOFTMAXES: Cases = {
    "logarithm": (by(lambda s: F.log_softmax(s, -1).exp()), 1),
    "logarithm, aten": (by(lambda s: torch.ops.aten._log_softmax(s, -1, False).exp()), 1),
    "logarithm over queries": (
        lambda q, k, v, m: scores(k, q).log_softmax(2).exp().mT @ v, 1
    ),
    "logarithm, read twice": (
        by(lambda s: (w := s.log_softmax(-1)).exp() + w.mean()), Reason.PATTERN
    ),
    "logarithm of two": (by(lambda s: s.log_softmax(-1).exp2()), Reason.PATTERN),
    "ratio": (by(ratio), Reason.PATTERN),
    "stable ratio": (by(stable_ratio), Reason.PATTERN),
    "divided last": (divided_last, Reason.PATTERN),
    "heads mixed before": (by(lambda s: mixed(s).softmax(-1)), Reason.PATTERN),
    "heads mixed after": (by(lambda s: mixed(s.softmax(-1))), Reason.PATTERN),
    "log-sum-exp": (by(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()), Reason.PATTERN),
    "into memory": (into, Reason.PATTERN),
    "power of e": (by(lambda s: (e := math.e ** s) / e.sum(-1, keepdim=True)), Reason.PATTERN),
    "exponential less 1": (
        by(lambda s: (e := s.expm1() + 1) / e.sum(-1, keepdim=True)), Reason.PATTERN
    ),
    "of another library": (by(foreign_softmax), Reason.PATTERN),
    "of masked tensors": (
        by(lambda s: torch.masked.softmax(s, -1, mask=s > -9)), Reason.PATTERN
    ),
    "products of linalg": (
        lambda q, k, v, m: torch.linalg.matmul(torch.linalg.matmul(q, k.mH).softmax(-1), v), 1
    ),
    "product of vectors": (
        lambda q, k, v, m: torch.linalg.vecdot(q[:, :, :, None], k[:, :, None]).softmax(-1) @ v,
        Reason.PATTERN,
    ),
    "product with something added": (
        lambda q, k, v, m: torch.addmm(v[0, 0], scores(q[0, 0], k[0, 0]).softmax(-1), v[0, 0]),
        Reason.PATTERN,
    ),
    "products in vmap": (
        lambda q, k, v, m: torch.vmap(torch.matmul)(q, k.mT).softmax(-1) @ v, Reason.PATTERN
    ),
    "a power that is none": (by(lambda s: s**2), 0),
    "sink": (with_sink, Reason.PATTERN),
    "sink in front": (with_split_sink, Reason.PATTERN),
    "sink by padding": (by(lambda s: F.pad(s, (1, 0)).softmax(-1)[..., 1:]), Reason.PATTERN),
    "sigmoid": (by(torch.sigmoid), 0),
}  # fmt: skip
PRODUCTS: Cases = {
    "reflected": (lambda q, k, v, m: k.mT.__rmatmul__(q).mul(0.3).softmax(-1) @ v, 1),
    "reflected, of values": (lambda q, k, v, m: v.__rmatmul__(scores(q, k).softmax(-1)), 1),
    "scores of elements": (
        lambda q, k, v, m: (
            (q[..., None, :] * k[..., None, :, :]).sum(-1).softmax(-1) @ v
        ), Reason.PATTERN,
    ),
    "values of elements": (
        lambda q, k, v, m: (scores(q, k).softmax(-1)[..., None] * v[..., None, :, :]).sum(-2),
        Reason.PATTERN,
    ),
    "of elements, the sum a function": (
        lambda q, k, v, m: torch.sum(k.unsqueeze(2) * q.unsqueeze(3), dim=4).exp().softmax(-1) @ v,
        Reason.PATTERN,
    ),
}  # fmt: skip
AFTERWARDS: Cases = {
    "values by linear": (
        lambda q, k, v, m: F.linear(scores(q[0, 0], k[0, 0]).softmax(-1), v[0, 0].T),
        Reason.PATTERN,
    ),
    "nan_to_num": (of_weights(lambda w: torch.nan_to_num(w)), Reason.PATTERN),
    "times": (of_weights(lambda w: w * 0.5), Reason.PATTERN),
    "left out": (of_weights(lambda w: w.masked_fill(w > 0.9, 0.0)), Reason.PATTERN),
    "normalised": (of_weights(lambda w: w / w.sum(-1, keepdim=True)), Reason.SCALE),
    "expanded to itself": (of_weights(lambda w: w.expand(w.shape)), 1),
    "scores expanded to themselves": (of_scores(lambda s: s.expand(-1, -1, -1, -1)), 1),
}
EMPTY_ROWS: Cases = {
    "all lowest": (zeroed(all_lowest), 1),
    "none finite": (zeroed(none_finite), 1),
    "safe softmax": (safe, 1),
    "keys by queries": (
        lambda q, k, v, m: torch.where(
            ((s := scores(k, q)) == -INF).all(2, keepdim=True), s * 0.0, s.softmax(2)
        ).mT @ v, Reason.PATTERN,
    ),
    "keys by queries, a constant": (
        lambda q, k, v, m: torch.where(
            ((s := scores(k, q)) == -INF).all(-2, keepdim=True), torch.zeros(()), s.softmax(-2)
        ).mT @ v, 1,
    ),
    "of transposed weights": (
        lambda q, k, v, m: torch.where(
            ((s := scores(k, q)) == -INF).all(2, keepdim=True), torch.zeros(()), s.softmax(2).mT
        ) @ v, Reason.PATTERN,
    ),
    "of other scores": (zeroed(all_lowest, lambda s: s + 1.0), Reason.PATTERN),
    "over queries": (zeroed(lambda s: s.eq(-INF).all(-2, keepdim=True)), Reason.PATTERN),
    "any lowest": (zeroed(lambda s: s.eq(-INF).any(-1, keepdim=True)), Reason.PATTERN),
    "other number": (zeroed(lambda s: s.eq(0.0).all(-1, keepdim=True)), Reason.PATTERN),
}  # fmt: skip
KINDS = {
    "softmax written out": SOFTMAXES, "products": PRODUCTS, "afterwards": AFTERWARDS,
    "zeroed rows": EMPTY_ROWS,
}  # fmt: skip
