"""Masks: what they let take part, and how they are put on the scores.

Texts as in `forms`; besides, KEYS is keep and ROWS the queries that take part, both broadcast to
the scores, and POS(...) turns an (n, m) tensor into one that broadcasts to the scores. `mask` is
bool, True takes part; i and j are the positions of queries and keys, (n, 1) and (1, m).
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.fuzz.forms import Expect

BROADCASTS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "bhqk": (("keep[:, None, None, :]", "keep[:, None, None]", "keep.view(b, 1, 1, m)",
              "keep.unsqueeze(1).unsqueeze(2)", "keep.reshape(b, 1, 1, m)"),
             "keep[:, None, :, None]", "{}"),
    "fqk": (("keep.repeat_interleave(%(h)d, 0)[:, None]",
             "keep[:, None, None].expand(b, %(h)d, 1, m).flatten(0, 1)",
             "keep[:, None, None].repeat(1, %(h)d, 1, 1).view(-1, 1, m)"),
            "keep.repeat_interleave(%(h)d, 0)[:, :, None]", "{}"),
    "bqk": (("keep[:, None]", "keep.unsqueeze(1)", "keep.view(b, 1, m)"), "keep[:, :, None]", "{}"),
    "bhkq": (("keep[:, None, :, None]", "keep.view(b, 1, m, 1)"), "keep[:, None, None]", "{}.mT"),
    "bgrqk": (("keep[:, None, None, None]",), "keep[:, None, None, :, None]", "{}"),
    "bqkh": (("keep[:, None, :, None]",), "keep[:, :, None, None]", "{}[:, :, None]"),
    "qk": (("keep[0]", "keep[:1]", "keep"), "keep[0][:, None]", "{}"),
}  # fmt: skip
"""For dimensions of scores: spellings of KEYS, ROWS, POS."""


@dataclass(frozen=True)
class Content:
    """What a mask lets take part.

    Attributes:
        texts: statements that make `mask`.
        expect: what the pass has to do where everything else is plain.
        dims: dimensions of scores that the texts are for; "" for all.
        empties: rows without any key may be left.
    """

    texts: tuple[str, ...]
    expect: Expect = "rewrite"
    dims: str = ""
    empties: bool = False
    weight: float = 1.0


CONTENTS: dict[str, Content] = {
    "keys": Content(("mask = KEYS",), weight=4),
    "keys_cloned": Content((
        "mask = KEYS.clone()", "mask = KEYS.contiguous()", "mask = KEYS.bool()",
        "mask = KEYS.to(torch.bool)", "mask = ~~KEYS", "mask = KEYS != 0",
        "mask = KEYS.to(torch.int64) > 0", "mask = KEYS.to(DTYPE) > 0.5",
    )),
    "keys_of_lengths": Content((
        "keep = torch.arange(m)[None] < keep.sum(-1, keepdim=True)\nmask = KEYS",
        "keep = torch.arange(m).expand(b, m) < keep.sum(-1)[:, None]\nmask = KEYS",
    )),
    "keys_of_data": Content(("keep = keep | (x.sum(-1) > 0)\nmask = KEYS",), expect="reason"),
    "keys_written": Content((
        "mask = KEYS.clone()\nmask[..., :3] = False", "mask = KEYS.clone()\nmask[0].fill_(True)",
        "keep = keep.clone()\nkeep[:, 2:5] = False\nmask = KEYS",
        "keep = torch.full((b, m), True)\nkeep[:, -4:] = False\nmask = KEYS",
        "keep = keep.new_ones(b, m)\nkeep[:, 1::3].zero_()\nmask = KEYS",
    ), dims="bhqk"),
    "keys_and_rows": Content((
        "mask = KEYS & ROWS", "mask = torch.logical_and(ROWS, KEYS)",
        "mask = (KEYS.to(DTYPE) * ROWS.to(DTYPE)).bool()", "mask = KEYS.mul(ROWS)",
    ), empties=True),
    "keys_expanded": Content((
        "mask = KEYS.expand(b, 1, n, m)", "mask = KEYS.expand(-1, 1, n, -1)",
        "mask = KEYS.expand(b, %(h)d, n, m)", "mask = KEYS.repeat(1, 1, n, 1)",
        "mask = KEYS.expand(b, 1, n, m).clone()", "mask = torch.broadcast_to(KEYS, (b, 1, n, m))",
        "mask = KEYS.expand(size=(b, 1, n, m))", "mask = KEYS.tile(1, 1, n, 1)",
        "mask = keep[:, None].expand(b, n, m)[:, None]",
        "mask = keep[:, None].repeat(1, n, 1).unsqueeze(1)",
        "mask = keep[:, None, :, None].expand(b, 1, m, n).transpose(dim0=2, dim1=3)",
        "mask = keep[:, None, :, None].expand(b, 1, m, n).mT",
    ), dims="bhqk", weight=1.5),
    "one_row_repeated": Content((
        "mask = keep[0][None, None, None].expand(1, 1, 1, m).repeat(b, 1, n, 1)",
        "mask = keep[:1, None, None].repeat(b, 1, n, 1)", "mask = keep[0].repeat(b, 1, n, 1)",
        "mask = keep[0].expand(b, 1, n, m)", "mask = keep[:1].repeat(n, 1)",
        "mask = keep[0].repeat(n, 1)[None, None]", "mask = keep[0].expand(n, m)", "mask = keep[0]",
        "mask = keep[:1]", "mask = keep[:1, None, None].expand(1, 1, 1, m).repeat(b, %(h)d, n, 1)",
    ), dims="bhqk", weight=1.5),
    "halves_repeated": Content((
        "mask = torch.stack([keep[0], keep[0].flip(0)])[:, None, None].repeat(b, 1, n, 1)[:b]",
        "mask = keep[:, None, None].repeat(2, 1, n, 1)[:b]",
        "mask = keep[:, None, None].repeat_interleave(2, 0).repeat(1, 1, n, 1)[:b]",
        "mask = keep[:, None, None].flip(0).expand(b, 1, n, m)",
        "mask = keep[:, None, None].roll(1, 0).repeat(1, 1, n, 1)",
    ), dims="bhqk", expect="reason"),
    "by_head": Content((
        "mask = KEYS.repeat(1, %(h)d, 1, 1)",
        "mask = torch.stack([keep, keep.flip(1) | keep])[:, :, None].transpose(0, 1)"
        ".repeat(1, %(h)d, 1, 1)[:, :%(h)d]",
    ), dims="bhqk"),
    "rows": Content(
        ("mask = ROWS", "mask = ROWS.clone()", "mask = ROWS | (torch.arange(m) < 0)[:1]"),
        expect="reason", empties=True,
    ),
    "one_value": Content((
        "mask = torch.ones(1, 1, dtype=torch.bool)", "mask = keep[:, :1, None, None]",
        "mask = torch.ones(1, 1, 1, 1) > 0", "mask = keep[:1, :1][None, None]",
        "mask = keep.any()[None, None]", "mask = keep[:, :1, None, None].expand(b, 1, n, m)",
        "mask = (torch.arange(b) > -1)[:, None, None, None]",
    ), dims="bhqk", expect="reason"),
    "causal": Content((
        "mask = POS(torch.ones(n, m, dtype=torch.bool).tril())", "mask = POS((i >= j))",
        "mask = POS(torch.triu(torch.ones(n, m), 1).eq(0))", "mask = POS((j - i <= 0))",
        "mask = POS(torch.tril(torch.ones(n, m)).bool())",
        "mask = POS(~torch.triu(torch.ones(n, m, dtype=torch.bool), diagonal=1))",
    ), expect="reason", weight=1.5),
    "causal_written": Content((
        "mask = torch.full((n, m), True)\nmask.tril_()\nmask = POS(mask)",
        "mask = torch.ones(n, m, dtype=torch.bool)\nmask[i < j] = False\nmask = POS(mask)",
        "mask = torch.zeros(n, m, dtype=torch.bool)\nmask[i >= j] = True\nmask = POS(mask)",
        "t = torch.ones(n, m)\nt = torch.tril(t, out=t)\nmask = POS((t > 0))",
        "mask = torch.ones(n, m, dtype=torch.bool)\nmask.logical_and_(i >= j)\nmask = POS(mask)",
        "mask = keep.new_full((n, m), True)\nmask.view(-1)[1:m] = False\nmask = POS(mask)",
    ), expect="reason"),
    "window": Content((
        "mask = POS(((i - j).abs() < 9))", "mask = POS((i // 8 == j // 8))",
        "mask = POS(((i - j).abs().le(5) | (j < 3)))",
    ), expect="reason"),
    "full": Content((
        "mask = POS((j // 8 <= (i + m) // 8))", "mask = POS((j <= i + m))",
        "mask = POS(((i + m > j) & (j >= 0)))", "mask = POS((torch.arange(m)[None] < i + m))",
    )),
    "chunks": Content((
        "mask = POS((j // 8 <= (i + m - n) // 8))", "mask = POS((j // 16 <= i // 16))",
        "mask = POS((j < 8 + i // 8 * 8))", "mask = POS(((i + m - n) // 32 >= j // 32))",
        "mask = POS((torch.div(i, 7, rounding_mode='floor') * 7 + 7 > j))",
        "mask = POS((i.div(9, rounding_mode='trunc') >= j.floor_divide(9)))",
        "t = torch.arange(-(-m // 8)).repeat_interleave(8)\n"
        "mask = POS((t[None, :m] <= t[:n, None]))",
    )),
    "chunks_in_a_window": Content((
        "mask = POS(((i // 8 - j // 8).abs() < 2))", "mask = POS((i // 8 == j // 8))",
        "mask = POS(((j // 8 <= i // 8) & (i // 8 - j // 8 < 3)))",
        "mask = POS(((j // 8 <= i // 8) & ((j // 8 > i // 8 - 2) | (j // 8 < 1))))",
        "mask = POS((j // 11 >= i // 11 - 1))",
    )),
    "chunks_written": Content((
        "mask = torch.zeros(n, m, dtype=torch.bool)\nfor s0 in range(0, n, 9):\n"
        "    mask[s0 : s0 + 9, : s0 + 9] = True\nmask = POS(mask)",
        "t = torch.zeros(n, dtype=torch.long)\nfor s0 in range(0, n, 10):\n"
        "    t[s0 : s0 + 10] = s0 + 10\nmask = POS((j < t[:, None]))",
        "t = torch.ones(-(-max(n, m) // 8), -(-max(n, m) // 8)).tril()\n"
        "t = t.repeat_interleave(8, 0).repeat_interleave(8, 1)[:n, :m]\nmask = POS((t > 0))",
        "t = torch.arange(-(-max(n, m) // 12))\nt = torch.kron((t[:, None] >= t[None]).int(), "
        "torch.ones(12, 12).int())[:n, :m]\nmask = POS(t.bool())",
        "mask = torch.ones(n, m, dtype=torch.bool)\nmask[:13, 13:] = False\nmask = POS(mask)",
    )),
    "chunks_of_few": Content((
        "mask = POS((j // 1 <= i // 1))", "mask = POS(((j <= i) & (j // 8 <= i // 8)))",
        "mask = POS((j // 8 <= i // 8))\nmask = mask & POS((j != 3 + i))",
        "mask = POS((j // 8 < i // 8))", "mask = POS((j // 8 <= i // 2))",
    ), expect="reason", empties=True),
    "chunks_and_keys": Content((
        "mask = POS((j // 8 <= i // 8)) & KEYS", "mask = KEYS & POS((j // 8 >= i // 8 - 1))",
    ), expect="reason", empties=True),
    "any_square": Content((
        "mask = POS(allowed)", "mask = POS(allowed).logical_or(KEYS)",
    ), expect="reason"),
    "documents": Content((
        "t = keep.cumsum(-1) // 9\nmask = (t[:, :, None] == t[:, None])[:, None]",
    ), expect="reason", dims="bhqk"),
    "no_keys_left": Content((
        "mask = KEYS.clone()\nmask[0] = False",
        "mask = KEYS & (torch.arange(b) > 0)[:, None, None, None]",
    ), dims="bhqk", expect="reason", empties=True),
}  # fmt: skip
"""Masks by what they let take part."""


@dataclass(frozen=True)
class Application:
    """How a mask gets onto the scores; `makes_nan` where a row without keys becomes NaN."""

    texts: tuple[str, ...]
    expect: Expect = "rewrite"
    makes_nan: bool = True
    weight: float = 1.0


_BIASES = (
    "bias = torch.zeros_like(s).masked_fill(~mask, -math.inf)",
    "bias = torch.zeros(mask.shape, dtype=s.dtype).masked_fill_(~mask, -math.inf)",
    "bias = torch.where(mask, 0.0, -math.inf).to(s.dtype)",
    "bias = s.new_zeros(mask.shape)\nbias[~mask] = -math.inf",
    "bias = mask.to(s.dtype).log()",
    "bias = torch.log(mask.to(s.dtype))",
    "bias = s.new_full(mask.shape, -math.inf).masked_fill(mask, 0.0)",
    "bias = torch.full(mask.shape, -math.inf, dtype=s.dtype)\nbias = torch.where(mask, 0.0, bias)",
    "bias = torch.full(mask.shape, -math.inf, dtype=s.dtype)\nbias[mask] = 0.0",
    "bias = torch.full(mask.shape, -math.inf, dtype=s.dtype)\nbias.masked_fill_(mask, 0.0)",
)
_FINITE = (
    "bias = (1.0 - mask.to(s.dtype)) * -1e4", "bias = (~mask).to(s.dtype) * -30000.0",
    "bias = (mask.to(s.dtype) - 1.0) * 1e4", "bias = torch.zeros_like(s).masked_fill(~mask, -1e4)",
    "bias = (1 - mask.int()) * -10000", "bias = torch.where(mask, 0.0, -2e4).to(s.dtype)",
    "bias = (~mask).to(s.dtype) * torch.finfo(s.dtype).min", "bias = (~mask) * -10000.0",
)  # fmt: skip
_ADDS = ("s = s + bias", "s = bias + s", "s += bias", "s = torch.add(s, bias)", "s = s.add(bias)",
         "s.add_(bias)", "s = torch.add(input=s, other=bias)", "s = s.add(other=bias)",
         "s = torch.add(s, bias, alpha=1)")  # fmt: skip
_DROPS = ("~mask", "mask == 0", "mask.logical_not()", "torch.logical_not(mask)", "mask.eq(False)",
          "mask.bitwise_not()", "mask ^ True")  # fmt: skip

APPLICATIONS: dict[str, Application] = {
    "filled": Application(tuple(f"s = {how.format(drop)}" for drop in _DROPS for how in (
        "s.masked_fill({}, -math.inf)", "s.masked_fill({}, float('-inf'))",
        "torch.masked_fill(s, {}, -math.inf)", "s.masked_fill(mask={}, value=-math.inf)",
        "torch.masked_fill(input=s, mask={}, value=-math.inf)",
        "s.masked_fill({}, torch.tensor(-math.inf))",
    )), weight=2),
    "filled_finite": Application(tuple(f"s = s.masked_fill({drop}, {fill})" for drop in _DROPS
                                       for fill in ("torch.finfo(s.dtype).min", "-1e4", "-65000.0",
                                                    "torch.tensor(-2e4, dtype=s.dtype)",
                                                    "torch.full((), -3e4)")),
                                 makes_nan=False, weight=2),
    "filled_in_place": Application((
        "s.masked_fill_(~mask, -math.inf)", "s[~mask.expand_as(s)] = -math.inf",
        "s[(~mask).expand(s.shape)] = -1e4", "s = s.masked_fill_(mask.logical_not(), -math.inf)",
        "s.masked_fill_(mask=~mask, value=-1e4)",
    )),
    "where": Application((
        "s = torch.where(mask, s, -math.inf)",
        "s = s.where(mask, torch.tensor(-math.inf, dtype=s.dtype))",
        "s = torch.where(~mask, torch.full_like(s, fill_value=-1e4), s)",
        "s = torch.where(mask, s, torch.full_like(s, -math.inf))",
        "s = torch.where(condition=mask, input=s, other=-math.inf)",
        "s = torch.where(mask, s, torch.finfo(s.dtype).min)", "s = s.where(mask, -1e4)",
        "s = torch.where(mask, s, s.new_tensor(-math.inf))",
        "s = torch.where(mask, s, s.new_full((1,), fill_value=-2e4))",
    ), weight=2),
    "where_written": Application((
        "t = torch.full_like(s, -math.inf)\nt[..., 3:7] = 0.5\ns = torch.where(mask, s, t)",
        "t = torch.full((), -1e4)\nt.fill_(0.1)\ns = torch.where(mask, s, t)",
        "t = s.new_full((1,), -1e4)\nt.data.zero_()\ns = torch.where(mask, s, t)",
        "t = torch.full((), -1e4)\nt.mul_(1e-4)\ns = s.masked_fill(~mask, t)",
        "t = torch.full((1,), -1e4)\ntorch._foreach_zero_([t])\ns = s.where(mask, t)",
    ), expect="equal", makes_nan=False),
    "fill_of_dtype": Application((
        "s = torch.where(mask, s, torch.full((), -30000.7, dtype=torch.int16))",
        "s = torch.where(mask, s, torch.full((), -70000.0, dtype=torch.float16))",
        "s = torch.where(mask, s, torch.full((), -1e4, dtype=torch.bool))",
        "s = torch.where(mask, s, torch.tensor(-1e4).to(torch.bool))",
        "s = s.masked_fill(~mask, torch.full((), -1e4).bool())",
        "s = torch.where(mask, s, torch.full_like(s, -1e4, dtype=torch.bool))",
        "s = s.masked_fill(~mask, torch.full((), 65000).to(torch.int8))",
    ), expect="equal", makes_nan=False),
    "added": Application(tuple(f"{b}\n{add}" for b in _BIASES for add in _ADDS), weight=2),
    "added_finite": Application(tuple(f"{b}\n{add}" for b in _FINITE for add in _ADDS),
                                makes_nan=False, weight=2),
    "added_times_alpha": Application((
        "bias = (~mask).to(s.dtype) * -1e4\ns = torch.add(s, bias, alpha=1e-4)",
        "bias = (~mask).to(s.dtype) * -1e4\ns = s.add(bias, alpha=2)",
        "bias = (~mask).to(s.dtype) * -1e4\ns.add_(bias, alpha=1e-4)",
        "bias = (~mask).to(s.dtype) * 1e4\ns = s.sub(bias, alpha=1e-4)",
    ), expect="equal", makes_nan=False),
    "subtracted": Application((
        "s = s - (~mask).to(s.dtype) * 1e4", "s -= (~mask) * 3e4",
        "s = torch.sub(s, (1 - mask.to(s.dtype)) * 1e4)", "s.sub_((1 - mask.int()) * 20000)",
    ), makes_nan=False),
    "multiplied_and_added": Application((
        "s = s * mask - 1e4 * (1 - mask.to(s.dtype))", "s = s * mask + (~mask) * -1e4",
    ), expect="reason", makes_nan=False),
    "bool_added": Application((
        "s = s + mask", "s = s + ~mask", "s = torch.add(s, mask)", "s.add_(mask)", "s = mask + s",
        "s += mask", "s = s + mask.bool()", "s = s.add(other=mask)", "s = s + mask.clone()",
    ), expect="equal", makes_nan=False),
    "integers_added": Application((
        "s = s + mask.int()", "s = s + mask.to(torch.uint8)", "s = s - mask.long()",
        "s = s + mask.to(s.dtype)",
    ), expect="equal", makes_nan=False),
    "multiplied": Application((
        "s = s * mask", "s = s * mask.to(s.dtype)", "s *= mask", "s = torch.mul(s, mask)",
    ), expect="equal", makes_nan=False),
    "filled_small": Application((
        "s = s.masked_fill(~mask, -5.0)", "s = s.masked_fill(~mask, 0.0)",
        "s = torch.where(mask, s, 0.0)", "s.masked_fill_(~mask, -1.0)",
        "s = s.masked_fill(~mask, 3)", "s[~mask.expand_as(s)] = 0.0",
    ), expect="equal", makes_nan=False),
    "filled_then_scaled": Application((
        "s = s.masked_fill(~mask, -1e4) * 1e-4", "s = s.masked_fill(~mask, -1e4) / 1e4",
        "s = torch.where(mask, s, -2e4) * 2e-5", "s = s.masked_fill(~mask, -1e4)\ns *= 1e-4",
        "s = s.masked_fill(~mask, -1e4)\ns = s / 100\ns = s / 50",
        "s = (s + (~mask).to(s.dtype) * -1e4) * 1e-4", "s = s.masked_fill(~mask, -1e4) * 0.0",
        "s.masked_fill_(~mask, -1e4).mul_(3e-4)",
        "s = s.masked_fill(~mask, -1e4) * torch.tensor(1e-4)",
    ), expect="equal", makes_nan=False),
    "filled_then_negated": Application((
        "s = s.masked_fill(~mask, -1e4) * -1.0", "s = -s.masked_fill(~mask, -1e4)",
        "s = s.masked_fill(~mask, -1e4) / -2", "s = s.masked_fill(~mask, -1e4).neg()",
    ), expect="equal", makes_nan=False),
    "filled_then_added": Application((
        "s = s.masked_fill(~mask, -1e4) + 1e4", "s = s.masked_fill(~mask, -1e4).clamp(min=-2)",
        "s = s.masked_fill(~mask, -1e4) + (~mask) * 1e4", "s = s.masked_fill(~mask, -1e4) - -1e4",
    ), expect="equal", makes_nan=False),
    "twice": Application((
        "s = s.masked_fill(~mask, -1e4)\ns = s.masked_fill(POS((j < 2)), -1e4)",
        "s = s + (~mask).to(s.dtype) * -1e4\ns = s + POS((j < 2)).to(s.dtype) * -1e4",
        "s = s.masked_fill(~mask, -1e4).masked_fill(~mask, -1e4)",
    ), expect="reason", makes_nan=False),
    "minimum": Application((
        "s = torch.minimum(s, torch.where(mask, 1e4, -1e4).to(s.dtype))",
    ), expect="reason", makes_nan=False),
}  # fmt: skip
"""Ways to put a mask on scores that are written out."""

ARGUMENTS: dict[str, Application] = {
    "bool": Application(("",), weight=3),
    "bool_expression": Application((
        "mask = mask.logical_or(torch.zeros_like(mask))", "mask = torch.logical_not(~mask)",
    )),
    "float": Application(tuple(b.replace("torch.zeros_like(s)",
        "torch.zeros(mask.shape, dtype=q.dtype)").replace(
        "s.new", "q.new").replace("s.dtype", "q.dtype") + "\nmask = bias" for b in _BIASES),
        expect="reason"),
    "float_finite": Application(tuple(b.replace("torch.zeros_like(s)",
        "torch.zeros(mask.shape, dtype=q.dtype)").replace(
        "s.dtype", "q.dtype") + "\nmask = bias.to(q.dtype)" for b in _FINITE), makes_nan=False),
    "small_float": Application((
        "mask = (~mask).to(q.dtype) * -3.0", "mask = mask.to(q.dtype)",
    ), expect="equal", makes_nan=False),
    "written_float": Application((
        "t = torch.full(mask.shape, -math.inf, dtype=q.dtype)\nt.masked_fill_(mask, 0.0)\nmask = t",
        "t = torch.full(mask.shape, -1e4, dtype=q.dtype)\nt[mask] = 0.0\nmask = t",
        "t = q.new_full((n, m), -math.inf)\nt.triu_(1)\nmask = t",
        "t = torch.zeros(mask.shape, dtype=q.dtype)\nt[..., :5] = -math.inf\nmask = t",
    ), expect="reason"),
}  # fmt: skip
"""Ways to hand a mask to PyTorch's attention."""

BIASES: dict[str, tuple[str, ...]] = {
    "learned": ("bias = POS(self.bias[:n, :m])", "bias = POS(self.bias[:n, :m].clone())"),
    "slopes": ("bias = POS((-0.1 * (i - j).abs()))", "bias = POS(((j - i).to(DTYPE) * 0.05))"),
    "of_keys": ("bias = POS(torch.linspace(-2, 2, m)[None])",),
    "of_tokens": ("bias = POS((x[0, :, :1] * x[0, :, 1:2].T))",),
    "causal_full": (
        "bias = torch.full((n, m), -math.inf)\nbias.triu_(1)\nbias = POS(bias)",
        "bias = torch.full((n, m), -math.inf).triu(1)\nbias = POS(bias)",
        "bias = torch.full((n, m), -math.inf)\nbias = POS(torch.triu(bias, diagonal=1))",
        "bias = torch.empty(n, m).fill_(-math.inf).triu_(1)\nbias = POS(bias)",
        "bias = torch.full((n, m), -math.inf)\nbias[i >= j] = 0\nbias = POS(bias)",
        "bias = x.new_full((n, m), -math.inf)\nbias.masked_fill_(i >= j, 0.0)\nbias = POS(bias)",
        "bias = torch.full((n, m), -math.inf)\nbias[:, : m // 2] = 0\nbias = POS(bias)",
        "bias = torch.full((n, m), -1e4)\nbias.diagonal().zero_()\nbias = POS(bias)",
        "bias = torch.full((n, m), -math.inf)\ntorch.triu(bias, 1, out=bias)\nbias = POS(bias)",
        "bias = torch.full((n, m), 0.0)\nbias[:, ::3] = -math.inf\nbias = POS(bias)",
    ),
}  # fmt: skip
"""Statements that make `bias`, added to the scores; none is padding."""
