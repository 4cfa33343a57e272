"""Masks that are made of the scores, subtracted from them or filled into them, kind by kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from surroundings import HEADS, INF, Body, Cases, attend, row, scores
from torch import Tensor

from svg_ear_compile.passes.site import Reason

LOW = -1e4


def like_scores(make: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """A mask made of the scores and of the keys that take part is added to the scores."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        s = scores(q, k)
        return attend(s + make(s, row(valid)), v)

    return body


def by_index(s: Tensor, keep: Tensor) -> Tensor:
    bias = s.new_zeros(keep.shape)
    bias[~keep] = -INF
    return bias


def with_values(s: Tensor, keep: Tensor) -> Tensor:
    bias = torch.empty_like(s)
    bias.copy_(s)
    return bias.masked_fill(~keep, LOW)


LIKE_SCORES: Cases = {
    "new_full": (like_scores(lambda s, m: s.new_full(m.shape, -INF).masked_fill(m, 0.0)), 1),
    "zeros_like": (like_scores(lambda s, m: torch.zeros_like(s).masked_fill(~m, -INF)), 1),
    "by index": (like_scores(by_index), 1),
    "cast to the scores": (like_scores(lambda s, m: (~m).to(s) * LOW), 1),
    "expanded to the scores": (like_scores(lambda s, m: ((~m).type_as(s) * LOW).expand_as(s)), 1),
    "in place": (
        lambda q, k, v, m: attend(
            (s := scores(q, k)).add_(torch.zeros_like(s).masked_fill_(~row(m), LOW)), v
        ),
        1,
    ),
    "returned": (lambda q, k, v, m: attend(s := scores(q, k), v) + torch.ones_like(s)[..., :1], 1),
    "of their values": (like_scores(with_values), Reason.WEIGHTS),
    "of their row": (
        like_scores(lambda s, m: torch.zeros_like(s) + s[..., :1].masked_fill(~m, LOW)),
        Reason.WEIGHTS,
    ),
    "of their cast": (like_scores(lambda s, m: s.to(s) * 0), Reason.WEIGHTS),
}
SUBTRACTED: Cases = {
    "float": (like_scores(lambda s, m: -((1 - m.float()) * 1e9)), 1),
    "subtracted": (
        lambda q, k, v, m: attend(scores(q, k) - (1 - row(m).float()) * 1e9, v), 1
    ),
    "in place": (
        lambda q, k, v, m: attend(scores(q, k).sub_((~row(m)) * 1e9), v), 1
    ),
    "then scaled": (
        lambda q, k, v, m: attend((scores(q, k) - (1 - row(m).int()) * 100000) * 0.3, v), 1
    ),
    "then turned": (
        lambda q, k, v, m: attend(-(scores(q, k) + (1 - row(m).float()) * 1e6), v), 1
    ),
    "made small": (
        lambda q, k, v, m: attend((scores(q, k) + (1 - row(m).float()) * -1e4) * 1e-4, v), 1
    ),
    "from the mask": (
        lambda q, k, v, m: attend((1 - row(m).float()) * 1e9 - scores(q, k), v), Reason.PATTERN
    ),
    "some": (lambda q, k, v, m: attend(torch.sub(scores(q, k), row(m).float(), alpha=3), v),
             Reason.PATTERN),
}  # fmt: skip


def chosen(choose: Callable[[Tensor, Tensor], object], fill: object = -INF) -> Body:
    """`scores[...] = fill`."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        s = scores(q, k)
        s[choose(s, row(valid))] = fill  # type: ignore[index, assignment]
        return attend(s, v)

    return body


INDEXED: Cases = {
    "mask": (chosen(lambda s, m: ~m.expand_as(s)), 1),
    "finite": (chosen(lambda s, m: (~m).expand(s.shape), LOW), 1),
    "small": (chosen(lambda s, m: (~m).expand_as(s), -1.0), Reason.PATTERN),
    "slice": (chosen(lambda s, m: (..., slice(0, 3))), Reason.PATTERN),
    "numbers": (chosen(lambda s, m: torch.tensor([0])), Reason.PATTERN),
    "first dimensions": (chosen(lambda s, m: m[:, 0, 0, :HEADS]), Reason.PATTERN),
    "of the scores": (chosen(lambda s, m: s < 0), Reason.WEIGHTS),
}
KINDS = {"like the scores": LIKE_SCORES, "subtracted": SUBTRACTED, "indexed": INDEXED}
