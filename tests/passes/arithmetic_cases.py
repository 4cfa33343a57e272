"""What attention computes: arithmetic that a reader of graphs can misread, kind by kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mask_cases import LOW, like_scores
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
    of_weights,
    row,
    scores,
    sdpa,
)
from torch import Tensor

from svg_ear_compile.passes.site import Reason


def constant(value: float, write: Callable[[Tensor], object]) -> Tensor:
    made = torch.full((TOKENS, TOKENS), value)
    write(made)
    return made


def by_slices(made: Tensor) -> None:
    made[:, :7] = -3.0


CONSTANTS: Cases = {
    "triu": (of_scores(lambda s: s + constant(-INF, lambda b: b.triu_(1))), Reason.CAUSAL),
    "slices": (of_scores(lambda s: s + constant(0.0, by_slices)), 1),
    "view": (of_scores(lambda s: s + constant(0.0, lambda b: b.view(-1)[3::5].fill_(-2.0))), 1),
    "out": (
        of_scores(lambda s: s + constant(-INF, lambda b: torch.triu(b, 1, out=b))), Reason.CAUSAL
    ),
    "foreach": (
        of_scores(lambda s: s * constant(2.0, lambda b: torch._foreach_mul_([b], [0.5]))),
        Reason.SCALE,
    ),
    "scale by slices": (of_scores(lambda s: s * constant(1.0, by_slices)), Reason.SCALE),
    "scalar written": (
        of_scores(lambda s: s * torch.full((), 3.0).sub_(2.7)), Reason.SCALE
    ),
    "integers": (of_scores(lambda s: s * torch.full((), 2.7, dtype=torch.int64)), 1),
    "bool": (of_scores(lambda s: s / torch.full((), 2.7, dtype=torch.bool)), 1),
    "rounded away": (
        of_scores(lambda s: s * torch.full((), 0.3, dtype=torch.int64)), Reason.PATTERN
    ),
    "new_full": (of_scores(lambda s: s * s.new_full((1,), fill_value=0.7)), 1),
    "full_like": (of_scores(lambda s: s / torch.full_like(s, fill_value=2.0)), 1),
    "made in steps": (of_scores(lambda s: s / torch.sqrt(torch.tensor(9.0)) * torch.ones(())), 1),
    "one element": (of_scores(lambda s: s * torch.tensor([0.7]) * s.new_tensor(1.5)), 1),
    "rounded by its dtype": (of_scores(lambda s: s * torch.full((), 2.9).long().float()), 1),
    "bits of a number": (
        of_scores(lambda s: s * torch.full((1,), 2, dtype=torch.int32).view(torch.float32)),
        Reason.SCALE,
    ),
    "two numbers": (
        of_scores(lambda s: s * torch.tensor([[0.3], [0.4]])[:, :, None]), Reason.SCALE
    ),
    "random": (of_scores(lambda s: s * (torch.rand(()) * 0 + 0.5)), Reason.SCALE),
    "written through a view": (of_scores(lambda s: s * (c := torch.ones(1)).view(()).mul_(2) * c),
                               Reason.SCALE),
    "fill written": (
        of_scores(lambda s: torch.where(s < 9, s, torch.full_like(s, -1e9).mul_(-1e-9))),
        Reason.PATTERN,
    ),
}  # fmt: skip
WEIGHTS: Cases = {
    "number added": (of_weights(lambda w: w + 1e-2), Reason.PATTERN),
    "number added by function": (of_weights(lambda w: torch.add(1e-2, w)), Reason.PATTERN),
    "number added in place": (of_weights(lambda w: w.add_(1e-2)), Reason.PATTERN),
    "tensor added": (of_weights(lambda w: w + torch.full((), 1e-2)), Reason.PATTERN),
    "times": (of_weights(lambda w: 1.5 * w), Reason.PATTERN),
    "nan_to_num": (of_weights(lambda w: w.nan_to_num(0.0)), Reason.PATTERN),
    "clamp": (of_weights(lambda w: w.clamp(min=0.02)), Reason.PATTERN),
    "round": (of_weights(lambda w: w.round(decimals=1)), Reason.PATTERN),
    "masked": (of_weights(lambda w: w.masked_fill(w < 0.01, 0.0)), Reason.PATTERN),
    "reshaped": (
        lambda q, k, v, _: scores(q, k).softmax(-1).flatten(0, 1).relu() @ v.flatten(0, 1),
        Reason.PATTERN,
    ),
    "softmax twice": (of_weights(lambda w: w.softmax(-1)), Reason.PATTERN),
    "cast to integers": (of_weights(lambda w: (w * 9).int().float()), Reason.PATTERN),
    "log_softmax": (lambda q, k, v, m: scores(q, k).log_softmax(-1).exp() @ v, 1),
    "with something added": (
        lambda q, k, v, m: torch.baddbmm(
            torch.ones(1, 1, DIM), scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1)
        ), Reason.PATTERN,
    ),
    "product and something added": (
        lambda q, k, v, m: torch.baddbmm(
            torch.ones(1, 1, DIM),
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1), alpha=0.5
        ), Reason.PATTERN,
    ),
    "cloned": (of_weights(lambda w: w.clone(memory_format=torch.contiguous_format)), 1),
}  # fmt: skip


ADDED: Cases = {
    "bool": (lambda q, k, v, m: attend(scores(q, k) + row(m), v), Reason.MASK),
    "bool first": (lambda q, k, v, m: attend(row(m) + scores(q, k), v), Reason.MASK),
    "bool in place": (lambda q, k, v, m: attend(scores(q, k).add_(row(m)), v), Reason.MASK),
    "square bool": (
        lambda q, k, v, m: attend(torch.add(scores(q, k), row(m) & row(m).mT), v), Reason.MASK
    ),
    "integers": (lambda q, k, v, m: attend(scores(q, k) + row(~m).long() * -9999, v), 1),
    "doubled": (lambda q, k, v, m: attend(torch.add(scores(q, k), row(m).float(), alpha=2), v),
                Reason.PATTERN),
    "larger": (
        lambda q, k, v, m: attend(scores(q[:1], k[:1]) + row(m).float(), v), Reason.PATTERN
    ),
    "added to itself": (of_scores(lambda s: (s + s) / 7.0), 1),
    "added to itself, scaled": (of_scores(lambda s: torch.add(s, s, alpha=2)), Reason.PATTERN),
    "negated": (of_scores(lambda s: -s * 0.3), 1),
    "times itself": (of_scores(lambda s: s * s), Reason.PATTERN),
    "float": (lambda q, k, v, m: attend(scores(q, k) + (1 - row(m).float()) * -1e4, v), 1),
}  # fmt: skip
CASTS: Cases = {
    "int32": (of_scores(lambda s: (s * 4).to(torch.int32).float()), Reason.PATTERN),
    "long": (of_scores(lambda s: s.long().float()), Reason.PATTERN),
    "bool": (of_scores(lambda s: s.bool().float()), Reason.PATTERN),
    "type": (of_scores(lambda s: s.type(torch.int16).type_as(s)), Reason.PATTERN),
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
    "complex": (of_scores(lambda s: s.to(torch.complex64).abs()), Reason.PATTERN),
}  # fmt: skip
UNREAD: Cases = {
    "part of a list": (of_scores(lambda s: s.chunk(1, 0)[0]), Reason.PATTERN),
    "floor": (of_scores(lambda s: torch.div(s, 0.25, rounding_mode="floor")), Reason.PATTERN),
    "trunc": (of_scores(lambda s: s.div_(0.25, rounding_mode="trunc")), Reason.PATTERN),
    "no rounding": (of_scores(lambda s: s.div(0.25, rounding_mode=None)), 1),
    "alpha": (of_scores(lambda s: torch.sub(s, 3, alpha=2)), Reason.PATTERN),
    "floor division": (of_scores(lambda s: s // 0.25), Reason.PATTERN),
    "divided by scores": (of_scores(lambda s: 1.0 / s), Reason.PATTERN),
    "from a number": (of_scores(lambda s: 1.0 - s), Reason.PATTERN),
    "large shift": (of_scores(lambda s: s + 1e6 - 1e6), Reason.PATTERN),
    "small shift": (of_scores(lambda s: s + 1.5 - 1), 1),
    "infinite": (of_scores(lambda s: s * INF), Reason.PATTERN),
    "nothing": (of_scores(lambda s: s * 0), Reason.PATTERN),
}  # fmt: skip


def filled(value: float, change: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, m: attend(change(scores(q, k).masked_fill(~row(m), value)), v)


FILLS: Cases = {
    "made small": (filled(-1e4, lambda s: s * 1e-4), Reason.PATTERN),
    "divided": (filled(-1e9, lambda s: s / 1e8), Reason.PATTERN),
    "by a tensor": (filled(-1e4, lambda s: s * torch.full((), 0.5)), Reason.PATTERN),
    "still low": (filled(-1e9, lambda s: s * 1e-3), 1),
    "made low": (filled(-10.0, lambda s: s * 1e4), 1),
    "small from the start": (filled(-50.0, lambda s: s), Reason.PATTERN),
    "turned": (filled(-1e9, lambda s: s * -1), Reason.PATTERN),
    "turned to infinity": (filled(-INF, lambda s: -1.0 * s), Reason.PATTERN),
    "turned twice": (filled(-1e9, lambda s: s * -0.5 / -0.5), 1),
    "infinite": (filled(-INF, lambda s: s * 1e-4), 1),
    "where": (
        lambda q, k, v, m: attend(torch.where(row(m), scores(q, k), -1e4) / 64, v), Reason.PATTERN
    ),
    "not a number": (filled(math.nan, lambda s: s), Reason.PATTERN),
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
    "added rows": (
        like_scores(lambda s, m: torch.full(s.shape, -INF).masked_fill_(m & m.mT, 0.0)), 1
    ),
    "added finite rows": (like_scores(lambda s, m: (~(m & m.mT)).float() * -1e9), 1),
    "proven rows": (
        lambda q, k, v, m: attend(
            scores(q, k).masked_fill(~(row(m) & row(m).mT).contiguous(), -INF), v
        ), 1,
    ),
}  # fmt: skip


KEYWORDS: Cases = {
    "full_like": (
        lambda q, k, v, m: attend(torch.where(
            condition=row(m), input=scores(q, k),
            other=torch.full_like(q[:, :, :1, :1], fill_value=-1e9),
        ), v), 1,
    ),
    "permute": (lambda q, k, v, m: (k @ q.mT).softmax(dim=2).permute(dims=(0, 1, 3, 2)) @ v, 1),
    "transpose": (lambda q, k, v, m: (k @ q.mT).softmax(-2).transpose(dim0=-1, dim1=-2) @ v, 1),
    "swapaxes": (
        lambda q, k, v, m: torch.swapaxes((k @ q.mT).softmax(-2), axis0=2, axis1=3) @ v, 1
    ),
    "movedim": (lambda q, k, v, m: (k @ q.mT).softmax(-2).movedim(source=-1, destination=2) @ v, 1),
    "moveaxis": (
        lambda q, k, v, m: torch.moveaxis((k @ q.mT).softmax(-2), (3, 2), (-2, -1)) @ v, 1
    ),
    "masked_fill": (
        lambda q, k, v, m: attend(
            torch.masked_fill(input=scores(q, k), mask=~row(m), value=-INF), v
        ),
        1,
    ),
    "method where": (lambda q, k, v, m: attend(scores(q, k).where(row(m), other=-INF), v), 1),
    "mul": (lambda q, k, v, m: attend(torch.mul(input=q @ k.mT, other=0.2), v), 1),
    "add": (
        lambda q, k, v, m: attend(torch.add(other=scores(q, k), input=row(m).float().log()), v), 1
    ),
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
    "special": (lambda q, k, v, m: torch.special.softmax(scores(q, k), -1) @ v, 1),
    "dunders": (
        lambda q, k, v, m: q.__matmul__(k.mT).__mul__(0.3).softmax(-1).__matmul__(v), 1
    ),
    "in-place dunder": (lambda q, k, v, m: attend((q @ k.mT).__imul__(0.3), v), 1),
    "mm": (
        lambda q, k, v, m: torch.mm(torch.mm(q[0, 0], k[0, 0].mT).softmax(-1), mat2=v[0, 0]), 1
    ),
    "ellipsis": (
        lambda q, k, v, m: torch.einsum(
            "...ij, ...jd -> ...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v
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
        square(
            lambda m: torch.cat([row(m)[..., :1], row(m)[..., :30].repeat(1, 1, 1, 2)], -1)
        ), 1
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
BROADCAST: Cases = {
    "head dim": (
        lambda q, k, v, m: torch.einsum(
            "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k[..., :1]).softmax(-1), v
        ), Reason.LAYOUT,
    ),
    "batch of keys": (lambda q, k, v, m: attend(scores(q, k[:1]), v[:1]), Reason.LAYOUT),
    "one key head": (lambda q, k, v, m: attend(scores(q, k[:, :1]), v[:, :1]), 1),
    "one value head": (lambda q, k, v, m: attend(scores(q, k), v[:, :1]), Reason.LAYOUT),
    "added vector": (
        lambda q, k, v, m: torch.bmm(
            (torch.baddbmm(q.new_zeros(TOKENS), q.flatten(0, 1), k.flatten(0, 1).mT) * 0.3)
            .masked_fill(~row(m)[1], LOW).softmax(-1), v.flatten(0, 1),
        ), 1,
    ),
    "added number": (
        lambda q, k, v, m: torch.bmm(
            torch.baddbmm(q.new_full((1, 1, 1), 9.0), q.flatten(0, 1), k.flatten(0, 1).mT)
            .softmax(-1), v.flatten(0, 1),
        ), 1,
    ),
    "added column": (
        lambda q, k, v, m: torch.bmm(
            torch.baddbmm(q.flatten(0, 1)[..., :1], q.flatten(0, 1), k.flatten(0, 1).mT)
            .softmax(-1), v.flatten(0, 1),
        ), Reason.MASK,
    ),
    "linear": (
        lambda q, k, v, m: F.linear(F.linear(q[0, 0], k[0, 0]).softmax(-1), v[0, 0].mT),
        Reason.PATTERN,
    ),
    "inner": (lambda q, k, v, m: attend(torch.inner(q[0, 0], k[0, 0]), v[0, 0]), Reason.PATTERN),
    "ranks": (lambda q, k, v, m: attend(q @ k[0].mT, v[0]), Reason.PATTERN),
    "one query head": (lambda q, k, v, m: attend(scores(q[:, :1], k), v), Reason.LAYOUT),
}  # fmt: skip


def turned(turn: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, m: attend(scores(turn(q), turn(k)), turn(v))


OVER_OTHERS: Cases = {
    # Attention over heads or channels is attention all the same.
    "heads": (turned(lambda t: t.transpose(1, 2)), 1),
    "channels": (turned(lambda t: F.pad(t.mT, (0, 3))), 1),
    "batch": (turned(lambda t: t.permute(2, 1, 0, 3)), 1),
}  # fmt: skip
KINDS = {
    "constants": CONSTANTS, "weights": WEIGHTS, "added": ADDED, "casts": CASTS,
    "unread arguments": UNREAD, "fills": FILLS, "empty rows": EMPTY, "keywords": KEYWORDS,
    "squares": SQUARES, "broadcast": BROADCAST, "over others": OVER_OTHERS,
}  # fmt: skip
