"""Which memory attention reads and writes: what a reader of graphs can miss, kind by kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from surroundings import (
    BATCH,
    DIM,
    HEADS,
    INF,
    TOKENS,
    Body,
    Cases,
    attend,
    of_scores,
    row,
    scores,
    sdpa,
)
from torch import Tensor

from svg_ear_compile.passes.site import Reason


def into(write: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Body:
    """Attention whose output is written into a given tensor, which is returned."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        given = torch.zeros(v.shape)
        write(scores(q, k), v, given, valid)
        return given + 1

    return body


def out_of_scores(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    s = torch.zeros(BATCH, HEADS, TOKENS, TOKENS)
    torch.matmul(q, k.mT, out=s)
    return attend(s, v) + s.sum()


OUT: Cases = {
    "product": (into(lambda s, v, o, m: torch.matmul(s.softmax(-1), v, out=o)), Reason.PATTERN),
    "bmm": (
        into(lambda s, v, o, m: torch.bmm(
            s.softmax(-1).flatten(0, 1), v.flatten(0, 1), out=o.view(-1, TOKENS, DIM)
        )),
        Reason.PATTERN,
    ),
    "first product": (out_of_scores, Reason.PATTERN),
    "scale": (of_scores(lambda s: torch.mul(s, 0.5, out=torch.empty_like(s))), Reason.PATTERN),
    "softmax": (
        lambda q, k, v, _: torch.softmax(
            scores(q, k), -1, out=torch.empty(BATCH, HEADS, TOKENS, TOKENS)
        ) @ v,
        Reason.PATTERN,
    ),
    "mask": (
        of_scores(lambda s: torch.add(s, s[:1, :1, :1] * 0, out=torch.empty_like(s))),
        Reason.PATTERN,
    ),
}  # fmt: skip


@torch.library.custom_op("svg_ear_tests::halve", mutates_args=("x",))
def halve(x: Tensor) -> None:
    x.mul_(0.5)


def writing(write: Callable[[Tensor], object], which: int = 1) -> Body:
    """One of q, k, v is written after it was read by the first product."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        given = [q.contiguous(), k.contiguous(), v.contiguous()]
        s = scores(given[0], given[1])
        write(given[which])
        return attend(s, given[2]) + given[which]

    return body


def set_part(x: Tensor) -> None:
    x[:, :, 3:9] = 0.0


WRITES: Cases = {
    "ravel": (writing(lambda k: k.ravel().zero_()), Reason.WRITTEN),
    "hsplit": (writing(lambda k: torch.hsplit(k, 2)[1].zero_()), Reason.WRITTEN),
    "as_strided": (writing(lambda k: k.as_strided((9,), (3,)).fill_(2.0)), Reason.WRITTEN),
    "mT": (writing(lambda k: k.mT.mul_(2.0)), Reason.WRITTEN),
    "data": (writing(lambda k: k.data.mul_(2.0)), Reason.WRITTEN),
    "detached": (writing(lambda q: q.detach().add_(1.0), 0), Reason.WRITTEN),
    "slice": (writing(set_part), Reason.WRITTEN),
    "foreach": (writing(lambda k: torch._foreach_mul_([k], 2.0)), Reason.WRITTEN),
    "out": (writing(lambda k: torch.mul(k, 2, out=k)), Reason.WRITTEN),
    "inplace flag": (writing(lambda q: F.relu(q, inplace=True), 0), Reason.WRITTEN),
    "function": (writing(lambda q: torch.relu_(q.view(-1)), 0), Reason.WRITTEN),
    "custom operator": (writing(halve), Reason.WRITTEN),
    "swapped": (writing(lambda k: k.swapaxes(0, 1).neg_()), Reason.WRITTEN),
    "copied": (writing(lambda k: k.flatten(0, 1)[1:].copy_(k.flatten(0, 1)[:-1].clone())),
               Reason.WRITTEN),
    "real": (writing(lambda k: k.real.neg_()), Reason.WRITTEN),
    "diagonal": (writing(lambda k: k.diagonal(dim1=2, dim2=3).zero_()), Reason.WRITTEN),
    # The second product reads v after the write, and so does the operator.
    "values": (writing(lambda v: v.ravel().mul_(2.0), 2), 1),
    "a copy": (writing(lambda k: k.clone().zero_()), 1),
}  # fmt: skip


def statement(write: Callable[[Tensor], object]) -> Body:
    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        s = scores(q, k)
        write(s)
        return attend(s, v)

    return body


def into_mask(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    bias = torch.zeros(BATCH, HEADS, TOKENS, TOKENS).masked_fill(~row(valid), -INF)
    bias += scores(q, k)
    return attend(bias, v) + bias[..., :1].clamp(min=-9)


SCORES: Cases = {
    "transposed": (
        statement(lambda s: s.mT.masked_fill_(torch.arange(TOKENS) < 20, -INF)), Reason.PATTERN
    ),
    "part": (statement(lambda s: s[..., :30].mul_(3.0)), Reason.PATTERN),
    "ravel": (statement(lambda s: s.ravel().mul_(0.5)), Reason.PATTERN),
    "foreach": (statement(lambda s: torch._foreach_mul_([s], 0.5)), Reason.PATTERN),
    "custom operator": (statement(halve), Reason.PATTERN),
    "set": (statement(lambda s: s.data.fill_(0.25)), Reason.PATTERN),
    "transposed in place": (statement(lambda s: s.transpose_(2, 3)), Reason.WRITTEN),
    "into the mask": (into_mask, Reason.PATTERN),
    "whole": (statement(lambda s: s.mul_(0.5)), 1),
}  # fmt: skip


def shared_mask(write: Callable[[Tensor], object], added: bool) -> Body:
    """Two calls with one mask that is written between them."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        mask = row(valid).repeat(1, 1, TOKENS, 1)
        if added:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -INF)
        first = sdpa(q, k, v, mask)
        write(mask)
        return first + sdpa(q, k, v, mask)

    return body


def open_some(mask: Tensor) -> None:
    mask.flatten()[::7] = 1.0


SHARED: Cases = {
    "flat": (shared_mask(open_some, added=False), 2),
    "flat, added": (shared_mask(open_some, added=True), 2),
    "mT": (shared_mask(lambda m: m.mT[..., :9].zero_(), added=False), 2),
    "hsplit": (shared_mask(lambda m: m.hsplit([1])[0].copy_(m[:, :1].mT.clone()), added=False), 2),
    "foreach": (shared_mask(lambda m: torch._foreach_zero_([m]), added=True), 2),
    "data": (shared_mask(lambda m: m.data.zero_(), added=True), 2),
}  # fmt: skip


def chain(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    for _ in range(3):
        q = k = v = sdpa(q, k, v)
    return q


def masked_by_output(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    first = sdpa(q, k, v)
    return sdpa(q, k, v, first[:, :1, :1, :1].expand(-1, -1, 1, TOKENS) > 9)


FED: Cases = {
    "q": (lambda q, k, v, m: sdpa(sdpa(q, k, v), k, v), 2),
    "k": (lambda q, k, v, m: sdpa(q, sdpa(q, k, v), v), 2),
    "all": (chain, 3),
    "written by hand": (lambda q, k, v, m: attend(scores(attend(scores(q, k), v), k), v), 2),
    "mixed": (lambda q, k, v, m: attend(scores(q, sdpa(q, k, v)), sdpa(k, q, v)), 3),
    "as mask": (masked_by_output, 2),
    "transposed": (lambda q, k, v, m: sdpa(sdpa(q, k, v).contiguous(), k, v, row(m)), 2),
}  # fmt: skip
VIEWED: Cases = {
    "view": (lambda q, k, v, m: attend(scores(q, k), v).view(BATCH, -1), 1),
    "contiguous q": (
        lambda q, k, v, m: attend(scores(q.contiguous(), k), v).view(BATCH * HEADS, -1), 1
    ),
    "mT": (lambda q, k, v, m: (v.mT @ scores(q, k).softmax(-1).mT).view(BATCH, -1), 1),
    "einsum": (
        lambda q, k, v, m: torch.einsum(
            "bhij,bhjd->bihd", scores(q, k).softmax(-1), v
        ).transpose(1, 2), 1,
    ),
    "flat": (
        lambda q, k, v, m: torch.bmm(
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
        ).view(BATCH, HEADS, TOKENS, DIM).view(BATCH, -1), 1,
    ),
    "sdpa": (lambda q, k, v, m: sdpa(q.contiguous(), k, v).transpose(1, 2).flatten(2), 1),
    "as_strided": (
        lambda q, k, v, m: attend(scores(q, k), v).as_strided((BATCH, TOKENS), (TOKENS * DIM, 1)), 1
    ),
    "permuted q": (
        lambda q, k, v, m: attend(
            scores(q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), k), v
        ).view(-1), 1,
    ),
}  # fmt: skip


def turned(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    out = sdpa(q, k, v)
    for tensor in (q, k, v):
        tensor.transpose_(1, 2)
    return out


def mask_turned(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    mask = valid[:1].clone()
    out = sdpa(q, k, v, mask.expand(TOKENS, TOKENS))
    mask.t_()
    return out


def masks_turned(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    mask = row(valid).clone()
    out = sdpa(q, k, v, mask & mask.expand(-1, 1, TOKENS, -1))
    mask.transpose_(2, 3)
    return out


def view_of_mask_turned(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    view = valid[:1].clone()[:, :]
    out = sdpa(q, k, v, view.expand(TOKENS, TOKENS))
    view.transpose_(0, 1)
    return out


def transposed_turned(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    keys = k.mT
    weights = (q @ keys * 0.3).softmax(-1)
    keys.transpose_(0, 1)
    return weights @ v


@torch.compiler.allow_in_graph
def add_flat(x: Tensor) -> Tensor:
    """Writes into x where `reshape` is a view."""
    x.reshape(-1).add_(1.0)
    return x.sum()


def written_by_one_of_two_equal_calls(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q = q.contiguous()
    copied = add_flat(q.mT)
    logits = scores(q, k)
    written = add_flat(q)
    return attend(logits, v) + copied + written


def interleaved(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    bias = (valid[:, None, None] + torch.zeros(1, 1, TOKENS, 1) - 1) * 1e9
    first, second = (scores(x, k) + bias for x in (q, k))
    ours, other = first.softmax(-1), second.softmax(-1)
    later = other @ v
    return ours @ v + 2 * later


LATER: Cases = {
    "the softmax that comes first": (interleaved, 2),
    "of two equal calls, one writes": (written_by_one_of_two_equal_calls, Reason.WRITTEN),
}
ANEW: Cases = {
    "output": (lambda q, k, v, m: sdpa(q, k, v).unsqueeze_(0), Reason.WRITTEN),
    "output, written by hand": (
        lambda q, k, v, m: attend(scores(q, k), v).transpose_(1, 2),
        Reason.WRITTEN,
    ),
    "operands": (turned, Reason.WRITTEN),
    "a mask": (mask_turned, Reason.WRITTEN),
    "a mask of two": (masks_turned, Reason.WRITTEN),
    "a view of a mask": (view_of_mask_turned, Reason.WRITTEN),
    "a transposed operand": (transposed_turned, Reason.WRITTEN),
}
KINDS = {
    "later": LATER,
    "in another shape": ANEW,
    "out": OUT, "writes": WRITES, "writes into scores": SCORES, "shared masks": SHARED, "fed": FED,
    "viewed": VIEWED,
}  # fmt: skip
