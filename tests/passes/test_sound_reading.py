"""Whatever surrounds attention, the compiled function returns what the eager one does.

Every kind of code that a reader of graphs can misread stands here with a few members: what is read
right is rewritten, what is not provably softmax attention is left, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_graphs import ALL_BLOCKS, Rewriting, run_rewritten

from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.site import Reason

BATCH, HEADS, TOKENS, DIM, WIDTH = 2, 2, 61, 32, 24
INF = math.inf
Body = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Cases = dict[str, tuple[Body, Reason | int]]


class Layer(nn.Module):
    """q, k, v (B, H, N, D) by linear layers, then whatever `body` does with them and a mask.

    The mask (B, N) says which tokens are valid.
    """

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.body(q, k, v, valid)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = 2 * torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
    return x, torch.arange(TOKENS) < torch.tensor([[40], [TOKENS]])


def check(body: Body, wanted: Reason | int, dtype: torch.dtype = torch.float32) -> None:
    """`wanted` is the number of rewritten calls, or why the call stays."""
    layer, x = Layer(body).to(dtype), given(dtype)
    with torch.no_grad():
        expected = layer(*(t.clone() for t in x))
    for plan, aot in ((ALL_BLOCKS, True), (AttentionPlan(density=1.0), False)):
        backend = Rewriting(plan, aot)
        found = run_rewritten(layer, *(t.clone() for t in x), backend=backend)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            found, expected, atol=tolerance, rtol=tolerance, equal_nan=True, check_stride=True
        )
        if isinstance(wanted, Reason):
            assert (backend.rewritten, backend.reasons[:1]) == (0, [wanted])
        else:
            assert (backend.rewritten, backend.reasons) == (wanted, [])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def attend(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v


def of_scores(change: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, valid: attend(change(scores(q, k)), v)


def of_weights(change: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, valid: change(scores(q, k).softmax(-1)) @ v


def constant(value: float, write: Callable[[Tensor], object]) -> Tensor:
    made = torch.full((TOKENS, TOKENS), value)
    write(made)
    return made


def by_slices(made: Tensor) -> None:
    made[:, :7] = -3.0


def masks_of_all(body: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Body:
    return body


CONSTANTS: Cases = {
    "triu": (of_scores(lambda s: s + constant(-INF, lambda b: b.triu_(1))), Reason.CAUSAL),
    "slices": (of_scores(lambda s: s + constant(0.0, by_slices)), 1),
    "view": (of_scores(lambda s: s + constant(0.0, lambda b: b.view(-1)[3::5].fill_(-2.0))), 1),
    "out": (of_scores(lambda s: s + constant(-INF, lambda b: torch.triu(b, 1, out=b))), Reason.CAUSAL),
    "foreach": (of_scores(lambda s: s * constant(2.0, lambda b: torch._foreach_mul_([b], [0.5]))), Reason.SCALE),
    "scale by slices": (of_scores(lambda s: s * constant(1.0, by_slices)), Reason.SCALE),
    "scalar written": (
        of_scores(lambda s: s * torch.full((), 3.0).sub_(2.7)), Reason.SCALE
    ),
    "integers": (of_scores(lambda s: s * torch.full((), 2.7, dtype=torch.int64)), 1),
    "bool": (of_scores(lambda s: s / torch.full((), 2.7, dtype=torch.bool)), 1),
    "rounded away": (of_scores(lambda s: s * torch.full((), 0.3, dtype=torch.int64)), Reason.SPELLING),
    "new_full": (of_scores(lambda s: s * s.new_full((1,), fill_value=0.7)), 1),
    "full_like": (of_scores(lambda s: s / torch.full_like(s, fill_value=2.0)), 1),
    "fill written": (
        of_scores(lambda s: torch.where(s < 9, s, torch.full_like(s, -1e9).mul_(-1e-9))),
        Reason.SPELLING,
    ),
}  # fmt: skip
WEIGHTS: Cases = {
    "number added": (of_weights(lambda w: w + 1e-2), Reason.SPELLING),
    "number added by function": (of_weights(lambda w: torch.add(1e-2, w)), Reason.SPELLING),
    "number added in place": (of_weights(lambda w: w.add_(1e-2)), Reason.SPELLING),
    "tensor added": (of_weights(lambda w: w + torch.full((), 1e-2)), Reason.SPELLING),
    "times": (of_weights(lambda w: 1.5 * w), Reason.SPELLING),
    "nan_to_num": (of_weights(lambda w: w.nan_to_num(0.0)), Reason.SPELLING),
    "clamp": (of_weights(lambda w: w.clamp(min=0.02)), Reason.SPELLING),
    "round": (of_weights(lambda w: w.round(decimals=1)), Reason.SPELLING),
    "masked": (of_weights(lambda w: w.masked_fill(w < 0.01, 0.0)), Reason.SPELLING),
    "reshaped": (
        lambda q, k, v, _: scores(q, k).softmax(-1).flatten(0, 1).relu() @ v.flatten(0, 1),
        Reason.SPELLING,
    ),
    "softmax twice": (of_weights(lambda w: w.softmax(-1)), Reason.SPELLING),
    "cast to integers": (of_weights(lambda w: (w * 9).int().float()), Reason.SPELLING),
    "cloned": (of_weights(lambda w: w.clone(memory_format=torch.contiguous_format)), 1),
}  # fmt: skip


def into(write: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Body:
    """Attention whose output is written into a given tensor, which is returned."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        given = torch.zeros_like(v)
        write(scores(q, k), v, given, valid)
        return given + 1

    return body


def out_of_scores(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    s = torch.zeros(BATCH, HEADS, TOKENS, TOKENS)
    torch.matmul(q, k.mT, out=s)
    return attend(s, v) + s.sum()


OUT: Cases = {
    "product": (into(lambda s, v, o, m: torch.matmul(s.softmax(-1), v, out=o)), Reason.SPELLING),
    "bmm": (
        into(lambda s, v, o, m: torch.bmm(
            s.softmax(-1).flatten(0, 1), v.flatten(0, 1), out=o.view(-1, TOKENS, DIM)
        )),
        Reason.SPELLING,
    ),
    "first product": (out_of_scores, Reason.SPELLING),
    "scale": (of_scores(lambda s: torch.mul(s, 0.5, out=torch.empty_like(s))), Reason.SPELLING),
    "softmax": (
        lambda q, k, v, _: torch.softmax(scores(q, k), -1, out=torch.empty(BATCH, HEADS, TOKENS, TOKENS)) @ v,
        Reason.SPELLING,
    ),
    "mask": (
        of_scores(lambda s: torch.add(s, s[:1, :1, :1] * 0, out=torch.empty_like(s))),
        Reason.SPELLING,
    ),
}  # fmt: skip


def row(valid: Tensor) -> Tensor:
    return valid[:, None, None]


ADDED: Cases = {
    "bool": (lambda q, k, v, m: attend(scores(q, k) + row(m), v), Reason.MASK),
    "bool first": (lambda q, k, v, m: attend(row(m) + scores(q, k), v), Reason.MASK),
    "bool in place": (lambda q, k, v, m: attend(scores(q, k).add_(row(m)), v), Reason.MASK),
    "square bool": (
        lambda q, k, v, m: attend(torch.add(scores(q, k), row(m) & row(m).mT), v), Reason.MASK
    ),
    "integers": (lambda q, k, v, m: attend(scores(q, k) + row(m).long() * -9999, v), Reason.MASK),
    "doubled": (lambda q, k, v, m: attend(torch.add(scores(q, k), row(m).float(), alpha=2), v),
                Reason.SPELLING),
    "larger": (
        lambda q, k, v, m: attend(scores(q[:1], k[:1]) + row(m).float(), v), Reason.SPELLING
    ),
    "added to itself": (of_scores(lambda s: s + s), Reason.SPELLING),
    "times itself": (of_scores(lambda s: s * s), Reason.SPELLING),
    "float": (lambda q, k, v, m: attend(scores(q, k) + (1 - row(m).float()) * -1e4, v), 1),
}  # fmt: skip
CASTS: Cases = {
    "int32": (of_scores(lambda s: (s * 4).to(torch.int32).float()), Reason.SPELLING),
    "long": (of_scores(lambda s: s.long().float()), Reason.SPELLING),
    "bool": (of_scores(lambda s: s.bool().float()), Reason.SPELLING),
    "type": (of_scores(lambda s: s.type(torch.int16).type_as(s)), Reason.SPELLING),
    "half": (of_scores(lambda s: (9 * s).half().float()), Reason.DTYPE),
    "bfloat16": (of_scores(lambda s: s.to(dtype=torch.bfloat16).to(s)), Reason.DTYPE),
    "float8": (of_scores(lambda s: s.to(torch.float8_e4m3fn).float()), Reason.DTYPE),
    "softmax in half": (
        lambda q, k, v, _: scores(q, k).softmax(-1, dtype=torch.float16).float() @ v, Reason.DTYPE
    ),
    "product in half": (
        lambda q, k, v, _: attend((q.half() @ k.half().mT).float(), v), Reason.DTYPE
    ),
    "double": (of_scores(lambda s: s.double().float()), 1),
    "double softmax": (lambda q, k, v, _: scores(q, k).double().softmax(-1).float() @ v, 1),
    "complex": (of_scores(lambda s: s.to(torch.complex64).abs()), Reason.SPELLING),
}  # fmt: skip
UNREAD: Cases = {
    "floor": (of_scores(lambda s: torch.div(s, 0.25, rounding_mode="floor")), Reason.SPELLING),
    "trunc": (of_scores(lambda s: s.div_(0.25, rounding_mode="trunc")), Reason.SPELLING),
    "no rounding": (of_scores(lambda s: s.div(0.25, rounding_mode=None)), 1),
    "alpha": (of_scores(lambda s: torch.sub(s, 3, alpha=2)), Reason.SPELLING),
    "beta": (
        lambda q, k, v, m: attend(
            torch.baddbmm(
                row(m)[:, 0].float().expand(-1, TOKENS, -1), q[:, 0], k[:, 0].mT, beta=0.5
            ), v[:, 0]
        ),
        None,
    ),
    "floor division": (of_scores(lambda s: s // 0.25), Reason.SPELLING),
    "divided by scores": (of_scores(lambda s: 1.0 / s), Reason.SPELLING),
    "from a number": (of_scores(lambda s: 1.0 - s), Reason.SPELLING),
    "large shift": (of_scores(lambda s: s + 1e6 - 1e6), Reason.SPELLING),
    "small shift": (of_scores(lambda s: s + 1.5 - 1), 1),
    "infinite": (of_scores(lambda s: s * INF), Reason.SPELLING),
    "nothing": (of_scores(lambda s: s * 0), Reason.SPELLING),
}  # fmt: skip
del UNREAD["beta"]


def filled(value: float, change: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, m: attend(change(scores(q, k).masked_fill(~row(m), value)), v)


FILLS: Cases = {
    "made small": (filled(-1e4, lambda s: s * 1e-4), Reason.SPELLING),
    "divided": (filled(-1e9, lambda s: s / 1e8), Reason.SPELLING),
    "by a tensor": (filled(-1e4, lambda s: s * torch.full((), 0.5)), Reason.SPELLING),
    "still low": (filled(-1e9, lambda s: s * 1e-3), 1),
    "made low": (filled(-10.0, lambda s: s * 1e4), 1),
    "small from the start": (filled(-50.0, lambda s: s), Reason.SPELLING),
    "turned": (filled(-1e9, lambda s: s * -1), Reason.SPELLING),
    "turned to infinity": (filled(-INF, lambda s: -1.0 * s), Reason.SPELLING),
    "turned twice": (filled(-1e9, lambda s: s * -0.5 / -0.5), 1),
    "infinite": (filled(-INF, lambda s: s * 1e-4), 1),
    "where": (
        lambda q, k, v, m: attend(torch.where(row(m), scores(q, k), -1e4) / 64, v), Reason.SPELLING
    ),
    "not a number": (filled(math.nan, lambda s: s), Reason.SPELLING),
}  # fmt: skip


def emptied(fill: float) -> Body:
    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        kept = row(valid) & (torch.arange(BATCH) > 0)[:, None, None, None]  # nobody in the first
        return attend(scores(q, k).masked_fill(~kept, fill), v)

    return body


def emptied_rows(fill: float) -> Body:
    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        pairs = row(valid) & row(valid).mT
        return attend(torch.where(pairs, scores(q, k), fill), v)

    return body


EMPTY: Cases = {
    "infinite": (emptied(-INF), 1),
    "finite": (emptied(-1e9), 1),
    "infinite rows": (emptied_rows(-INF), 1),
    "finite rows": (emptied_rows(-1e9), 1),
    "proven rows": (
        lambda q, k, v, m: attend(
            scores(q, k).masked_fill(~(row(m) & row(m).mT).contiguous(), -INF), v
        ), 1,
    ),
}  # fmt: skip


@torch.library.custom_op("svg_ear_tests::halve", mutates_args=("x",))
def halve(x: Tensor) -> None:
    x.mul_(0.5)


def writing(write: Callable[[Tensor], object], which: int = 1) -> Body:
    """One of q, k, v is written after it was read by the first product."""

    def body(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        given = [q * 1.0, k * 1.0, v * 1.0]
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
        statement(lambda s: s.mT.masked_fill_(torch.arange(TOKENS) < 20, -INF)), Reason.SPELLING
    ),
    "part": (statement(lambda s: s[..., :30].mul_(3.0)), Reason.SPELLING),
    "ravel": (statement(lambda s: s.ravel().mul_(0.5)), Reason.SPELLING),
    "foreach": (statement(lambda s: torch._foreach_mul_([s], 0.5)), Reason.SPELLING),
    "custom operator": (statement(halve), Reason.SPELLING),
    "set": (statement(lambda s: s.data.fill_(0.25)), Reason.SPELLING),
    "transposed in place": (statement(lambda s: s.transpose_(2, 3)), Reason.SPELLING),
    "into the mask": (into_mask, Reason.SPELLING),
    "whole": (statement(lambda s: s.mul_(0.5)), 1),
}  # fmt: skip


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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
    "mT": (shared_mask(lambda m: m.mT.tril_(), added=False), 2),
    "hsplit": (shared_mask(lambda m: m.hsplit([1])[0].copy_(m[:, :1].mT), added=False), 2),
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
KEYWORDS: Cases = {
    "full_like": (
        lambda q, k, v, m: attend(torch.where(
            condition=row(m), input=scores(q, k), other=torch.full_like(q[:, :, :1, :1], fill_value=-1e9)
        ), v), 1,
    ),
    "permute": (lambda q, k, v, m: (k @ q.mT).softmax(dim=2).permute(dims=(0, 1, 3, 2)) @ v, 1),
    "transpose": (lambda q, k, v, m: (k @ q.mT).softmax(-2).transpose(dim0=-1, dim1=-2) @ v, 1),
    "swapaxes": (lambda q, k, v, m: torch.swapaxes((k @ q.mT).softmax(-2), axis0=2, axis1=3) @ v, 1),
    "masked_fill": (
        lambda q, k, v, m: attend(torch.masked_fill(input=scores(q, k), mask=~row(m), value=-INF), v),
        1,
    ),
    "method where": (lambda q, k, v, m: attend(scores(q, k).where(row(m), other=-INF), v), 1),
    "mul": (lambda q, k, v, m: attend(torch.mul(input=q @ k.mT, other=0.2), v), 1),
    "add": (lambda q, k, v, m: attend(torch.add(other=scores(q, k), input=row(m).float().log()), v), 1),
    "div": (lambda q, k, v, m: attend((q @ k.mT).div(other=4.0), v), 1),
    "matmul": (
        lambda q, k, v, m: torch.matmul(other=v, input=F.softmax(input=scores(q, k), dim=-1)), 1
    ),
    "softmax": (lambda q, k, v, m: torch.softmax(dim=3, input=scores(q, k)) @ v, 1),
    "bmm": (
        lambda q, k, v, m: torch.bmm(
            input=torch.bmm(q.flatten(0, 1), mat2=k.flatten(0, 1).mT).softmax(-1),
            mat2=v.flatten(0, 1),
        ), 1,
    ),
    "sdpa": (
        lambda q, k, v, m: F.scaled_dot_product_attention(
            value=v, key=k, query=q,
            attn_mask=(row(m).repeat(1, 1, TOKENS, 1) & row(m).transpose(dim0=2, dim1=3)),
        ), 1,
    ),
    "number as tensor": (
        lambda q, k, v, m: attend(scores(q, k) * torch.tensor(data=0.5), v), 1
    ),
    "dropout": (lambda q, k, v, m: F.dropout(scores(q, k).softmax(-1), training=False) @ v, 1),
    "cast": (lambda q, k, v, m: attend(scores(q, k).to(dtype=torch.float32, copy=True), v), 1),
}  # fmt: skip


def square(make: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, m: sdpa(q, k, v, make(m))


def tiled(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """A batch of two repeated to four: elements alternate."""
    mask = row(valid).expand(2, 1, 1, TOKENS).repeat(2, 1, TOKENS, 1)
    return sdpa(*(torch.cat([t, t + 1]) for t in (q, k, v)), mask)


SQUARES: Cases = {
    "tiled": (tiled, 1),
    "tiled keys": (
        square(lambda m: torch.cat([row(m)[..., :1], row(m)[..., :30].repeat(1, 1, TOKENS, 2)[:, :, :1]], -1)), 1
    ),
    "expanded": (square(lambda m: row(m).expand(BATCH, HEADS, TOKENS, TOKENS)), 1),
    "from one row": (square(lambda m: m[1].expand(BATCH, 1, TOKENS, TOKENS)), 1),
    "repeated from a vector": (square(lambda m: m[1].repeat(BATCH, HEADS, TOKENS, 1)), 1),
    "from one value": (square(lambda m: m[1:, :1].expand(TOKENS, TOKENS)), 1),
    "both": (square(lambda m: row(m).repeat(1, 1, TOKENS, 1) & m[:, None, :, None]), 1),
    "broadcast": (square(lambda m: m[1] & row(m).mT), 1),
    "integers": (
        square(lambda m: ((2 * row(m).int()) & row(m).mT.int()).bool().logical_or(row(m))), 1
    ),
    "narrowed": (square(lambda m: (row(m).int() * 256).to(torch.uint8).bool() | row(m).mT), 1),
    "transposed by name": (
        square(lambda m: (t := row(m).repeat(1, 1, TOKENS, 1)) & t.transpose(dim0=3, dim1=2)), 1
    ),
}  # fmt: skip
VIEWED: Cases = {
    "view": (lambda q, k, v, m: attend(scores(q, k), v).view(BATCH, -1), 1),
    "contiguous q": (
        lambda q, k, v, m: attend(scores(q.contiguous(), k), v).view(BATCH * HEADS, -1), 1
    ),
    "mT": (lambda q, k, v, m: (v.mT @ scores(q, k).softmax(-1).mT).view(BATCH, -1), 1),
    "einsum": (
        lambda q, k, v, m: torch.einsum("bhij,bhjd->bihd", scores(q, k).softmax(-1), v).transpose(1, 2),
        1,
    ),
    "flat": (
        lambda q, k, v, m: torch.bmm(
            scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1)
        ).view(BATCH, HEADS, TOKENS, DIM).view(BATCH, -1), 1,
    ),
    "sdpa": (lambda q, k, v, m: sdpa(q.contiguous(), k, v).transpose(1, 2).flatten(2), 1),
    "as_strided": (
        lambda q, k, v, m: attend(scores(q, k), v).as_strided((BATCH, TOKENS), (TOKENS * DIM, 1)), 1
    ),
    "permuted q": (
        lambda q, k, v, m: attend(scores(q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), k), v)
        .view(-1), 1,
    ),
}  # fmt: skip
BROADCAST: Cases = {
    "head dim": (
        lambda q, k, v, m: torch.einsum(
            "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k[..., :1]).softmax(-1), v
        ), Reason.LAYOUT,
    ),
    "batch of keys": (lambda q, k, v, m: attend(scores(q, k[:1]), v[:1]), Reason.LAYOUT),
    "one key head": (lambda q, k, v, m: attend(scores(q, k[:, :1]), v[:, :1]), 1),
    "one value head": (lambda q, k, v, m: attend(scores(q, k), v[:, :1]), Reason.LAYOUT),
    "one query head": (lambda q, k, v, m: attend(scores(q[:, :1], k), v), Reason.LAYOUT),
}  # fmt: skip


def exact(body: Body) -> tuple[Body, int]:
    return body, 1


OVER_OTHERS: Cases = {
    # Attention over heads or channels is attention all the same.
    "heads": exact(lambda q, k, v, m: attend(scores(q.mT.mT.transpose(1, 2), k.transpose(1, 2)), v.transpose(1, 2))),
    "channels of padded tokens": exact(
        lambda q, k, v, m: attend(*(lambda a, b, c: (scores(a, b), c))(*(F.pad(t.mT, (0, 3)) for t in (q, k, v))))
    ),
}  # fmt: skip
KINDS = {
    "constants": CONSTANTS, "weights": WEIGHTS, "out": OUT, "added": ADDED, "casts": CASTS,
    "unread arguments": UNREAD, "fills": FILLS, "empty rows": EMPTY, "writes": WRITES,
    "writes into scores": SCORES, "shared masks": SHARED, "fed": FED, "keywords": KEYWORDS,
    "squares": SQUARES, "viewed": VIEWED, "broadcast": BROADCAST, "over others": OVER_OTHERS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "wanted"),
    [pytest.param(*case, id=f"{kind}, {name}") for kind, cases in KINDS.items() for name, case in cases.items()],
)
def test_what_surrounds_attention(body: Body, wanted: Reason | int) -> None:
    check(body, wanted)
