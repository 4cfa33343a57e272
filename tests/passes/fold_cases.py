"""Batch and heads folded into one dimension or taken apart between the two products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from surroundings import BATCH, DIM, HEADS, TOKENS, Body, Cases, row, scores
from torch import Tensor

from svg_ear_compile.passes.site import Reason


def folded(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


def apart(t: Tensor) -> Tensor:
    return t.view(BATCH, HEADS, *t.shape[1:])


def bmm(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(folded(q), folded(k).mT) * 0.3


def megatron(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    w = apart(bmm(q, k)).masked_fill(~row(valid), -1e4).softmax(-1)
    return torch.bmm(w.view(BATCH * HEADS, TOKENS, TOKENS), folded(v)).view(v.shape)


def values_apart(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    unread = q.new_zeros(1, 1, 1)
    s = torch.baddbmm(unread, folded(q), folded(k).mT, alpha=0.3).view(BATCH, HEADS, TOKENS, TOKENS)
    return (s + (~row(valid)).float() * -1e9).softmax(-1) @ v


def folded_mask(mask: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, m: torch.bmm(
        folded(scores(q, k)).masked_fill(~mask(m), -1e4).softmax(-1), folded(v)
    )


def as_statement(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    s = scores(q, k)
    flat = s.view(-1, TOKENS, TOKENS)
    flat.masked_fill_(~valid[:1, None], -1e4)
    return s.softmax(-1) @ v


def heads_lead(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->hbij", q, k)
    return folded(s).softmax(-1) @ folded(v.transpose(0, 1))


FOLDED: Cases = {
    "apart between": (megatron, 1),
    "apart from then on": (values_apart, 1),
    "mask of each": (folded_mask(lambda m: m.repeat_interleave(HEADS, 0)[:, None]), 1),
    "mask of rows": (
        folded_mask(lambda m: (r := m.repeat_interleave(HEADS, 0))[:, None] & r[:, :, None]), 1
    ),
    "mask of all": (folded_mask(lambda m: m[:1, None]), 1),
    "for the softmax": (
        lambda q, k, v, m: apart(folded(scores(q, k)).softmax(-1)) @ v, 1
    ),
    "heads first": (heads_lead, 1),
    "otherwise": (
        lambda q, k, v, m: torch.bmm(
            folded(bmm(q, k).view(4, 1, TOKENS, TOKENS).softmax(-1)), folded(v)
        ), 1,
    ),
    "heads and queries": (
        lambda q, k, v, m: scores(q, k).flatten(1, 2).softmax(-1).view(2, 2, TOKENS, TOKENS) @ v, 1
    ),
    "of one head": (
        lambda q, k, v, m: (q[:, 0] @ k[:, 0].mT).unsqueeze(1).masked_fill(~row(m), -1e4)
        .softmax(-1).squeeze(1) @ v[:, 0], 1,
    ),
    "queries and keys": (
        lambda q, k, v, m: scores(q, k).flatten(2).softmax(-1).view(BATCH, HEADS, TOKENS, -1) @ v,
        Reason.PATTERN,
    ),
    "over heads and queries": (
        lambda q, k, v, m: scores(q, k).flatten(1, 2).softmax(1).view(BATCH, HEADS, TOKENS, -1) @ v,
        Reason.PATTERN,
    ),
    "queries as heads": (
        lambda q, k, v, m: scores(q, k).flatten(1, 2).softmax(-1) @ v[:, 0], Reason.PATTERN
    ),
    "three at once": (
        lambda q, k, v, m: scores(q, k).flatten(0, 2).softmax(-1).view(2, 2, TOKENS, TOKENS) @ v, 1
    ),
    "into rows, with a mask of all": (
        lambda q, k, v, m: scores(q, k).reshape(-1, TOKENS).masked_fill(~m[:1], -1e4)
        .softmax(1).view(BATCH, HEADS, TOKENS, TOKENS) @ v, 1,
    ),
    "into rows, with a mask of each": (
        lambda q, k, v, m: scores(q, k).reshape(-1, TOKENS)
        .masked_fill(~m.repeat_interleave(HEADS * TOKENS, 0), -1e4)
        .softmax(1).view(BATCH, HEADS, TOKENS, TOKENS) @ v, Reason.MASK,
    ),
    "queries in parts": (
        lambda q, k, v, m: scores(q, k).unflatten(2, (-1, 1)).softmax(-1).flatten(1, 2)
        .view(BATCH, HEADS, TOKENS, TOKENS) @ v, 1,
    ),
    "keys in parts": (
        lambda q, k, v, m: scores(q, k).softmax(-1).unflatten(3, (-1, 1)).flatten(3) @ v, 1
    ),
    "other heads come back": (
        lambda q, k, v, m: folded(scores(q, k)).softmax(-1).view(1, 4, TOKENS, -1) @ v.reshape(
            1, 4, TOKENS, DIM
        ), 1,
    ),
    "written through a view": (as_statement, Reason.PATTERN),
}  # fmt: skip
KINDS = {"folded": FOLDED}
