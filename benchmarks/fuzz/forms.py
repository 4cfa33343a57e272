"""The forms in which people write attention, as statements of Python.

Every text works on variables of fixed names: x (b, n, c) tokens, q, k, v operands, s scores, w
weights, o output, keep (b, m) the keys that take part; b, n, m, h, g, d are batch, queries, keys,
heads, heads of keys, head dim. `%(h)d` and its like are replaced by numbers.

Longer than other files: it is one list of spellings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Expect = Literal["rewrite", "reason", "equal", "untouched"]
"""What the pass has to do: rewrite; rewrite or leave with a reason; anything that keeps the values;
leave every call as it is."""


@dataclass(frozen=True)
class Form:
    """One way to write the products of an attention.

    Attributes:
        q_dims: letters of q's dimensions, f for batch and heads folded; k and v alike.
        score_dims: letters of the scores, "" where there are none (PyTorch's own attention).
        scores: spellings of the first product; for PyTorch's attention, of the whole call, where
            %(rest)s stands for mask and scale.
        outs: spellings of the second product.
        heads: "many", "one" or "grouped" heads of keys, or "none": no dimension for heads.
        out_dims: letters of the output, those of q by default.
        expect: what the pass has to do with a plain attention of this form.
        keys: "self", or "cross", "prefix", "joint": where the tokens of the keys come from.
    """

    q_dims: str
    score_dims: str
    scores: tuple[str, ...]
    outs: tuple[str, ...] = ()
    heads: str = "many"
    out_dims: str = ""
    expect: Expect = "rewrite"
    keys: str = "self"
    weight: float = 1.0


_TRANSPOSED = ("k.transpose(-2, -1)", "k.mT", "k.transpose(-1, -2)", "k.permute(0, 1, 3, 2)",
               "k.swapaxes(2, 3)", "torch.transpose(k, 2, 3)", "k.transpose(dim0=-2, dim1=-1)",
               "k.mH", "torch.permute(k, dims=(0, 1, 3, 2))", "k.movedim(-1, 2)",
               "k.contiguous().transpose(2, 3)", "torch.swapdims(k, -1, -2)",
               "k.adjoint()")  # fmt: skip
_MATMULS = ("q @ {}", "torch.matmul(q, {})", "q.matmul({})", "torch.matmul(input=q, other={})",
            "q.matmul(other={})", "q.__matmul__({})", "torch.Tensor.matmul(q, {})",
            "operator.matmul(q, {})", "torch.linalg.matmul(q, {})",
            "{}.__rmatmul__(q)")  # fmt: skip
_SCORES = tuple(f"s = {how.format(kt)}" for how in _MATMULS for kt in _TRANSPOSED)
_OUTS = ("o = w @ v", "o = torch.matmul(w, v)", "o = w.matmul(v)", "o = torch.matmul(w, other=v)",
         "o = torch.matmul(input=w, other=v)", "o = operator.matmul(w, v)")  # fmt: skip
_BMM = ("s = torch.bmm(q, k.mT)", "s = q.bmm(k.transpose(1, 2))", "s = q @ k.transpose(1, 2)",
        "s = torch.bmm(input=q, mat2=k.permute(0, 2, 1))")  # fmt: skip
_BMM_OUT = ("o = torch.bmm(w, v)", "o = w.bmm(v)", "o = w @ v", "o = torch.bmm(input=w, mat2=v)")
_KERNEL = "torch.ops.aten._scaled_dot_product_"
_PACKED = (
    "o = torch.ops.xformers_flash3.flash_fwd(*(t.flatten(0, 1) for t in (q, k, v)), at, at)[0]"
    ".unflatten(0, (b, n))"
)
_FLEX = (
    "blocks = flex.create_block_mask({}, {}, None, n, m, device='cpu')\n"
    "o = flex.flex_attention(q, k, v, block_mask=blocks)"
)
_FLEX_OUTSIDE = (
    "o = flex.flex_attention(q, k, v, block_mask=self.blocks, enable_gqa=True)",
    "o = flex.flex_attention(q, k, v, None, self.blocks, 0.3, True, "
    "kernel_options={'BLOCK_M': 32})",
    "o, extra = flex.flex_attention(q, k, v, block_mask=self.blocks, enable_gqa=True, "
    "return_lse=True)",
    "o, aux = flex.flex_attention(q, k, v, block_mask=self.blocks, enable_gqa=True, "
    "return_aux=flex.AuxRequest(lse=True))\nextra = aux.lse",
)
_DENSE = "q, k, v = (t.contiguous() for t in (q, k, v))\n"
_SDPA = "F.scaled_dot_product_attention"

FORMS: dict[str, Form] = {
    "sdpa_positional": Form("bhnd", "", (f"o = {_SDPA}(q, k, v%(rest)s)",), weight=2),
    "sdpa_keywords": Form("bhnd", "", (
        f"o = {_SDPA}(query=q, key=k, value=v%(rest)s)",
        f"o = {_SDPA}(value=v, query=q, key=k%(rest)s)",
        f"o = {_SDPA}(**dict(query=q, key=k, value=v%(rest)s))",
    ), weight=2),
    "sdpa_mixed": Form("bhnd", "", (
        f"o = {_SDPA}(q, k, value=v%(rest)s)", f"o = {_SDPA}(q, key=k, value=v%(rest)s)",
    )),
    "sdpa_folded": Form("fnd", "", (f"o = {_SDPA}(q, k, v%(rest)s)",)),
    "sdpa_aten": Form("bhnd", "", (
        "o = torch.ops.aten.scaled_dot_product_attention(q, k, v%(rest)s)",
        "o = torch.ops.aten.scaled_dot_product_attention.default(q, k, v%(rest)s)",
    ), weight=0.5),
    "sdpa_heads_last": Form("bnhd", "", (
        f"o = {_SDPA}(*(t.transpose(1, 2) for t in (q, k, v))%(rest)s).transpose(1, 2)",
        f"o = {_SDPA}(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, "
        f"3)%(rest)s)" ".permute(0, 2, 1, 3)",
    )),
    "sdpa_grouped": Form("bhnd", "", (
        f"o = {_SDPA}(q, k, v%(rest)s, enable_gqa=True)",
    ), heads="grouped"),
    "sdpa_grouped_repeat": Form("bhnd", "", (
        f"o = {_SDPA}(q, k.repeat_interleave(%(r)d, 1), v.repeat_interleave(%(r)d, 1)%(rest)s)",
        f"o = {_SDPA}(q, k.repeat_interleave(%(r)d, dim=-3), "
        "v[:, :, None].expand(b, %(g)d, %(r)d, m, %(d)d).reshape(b, %(h)d, m, %(d)d)%(rest)s)",
    ), heads="grouped"),
    "sdpa_cross": Form("bhnd", "", (
        f"o = {_SDPA}(q, k, v%(rest)s)",
    ), expect="reason", keys="cross"),
    "sdpa_joint": Form("bhnd", "", (f"o = {_SDPA}(q, k, v%(rest)s)",), keys="joint"),
    "sdpa_prefix": Form("bhnd", "", (
        f"o = {_SDPA}(q, k, v%(rest)s)",
    ), expect="reason", keys="prefix", weight=0.6),
    "sdpa_five_dims": Form("bhnd", "", (
        f"o = {_SDPA}(q[None], k[None], v[None]%(rest)s)[0]",
        f"o = {_SDPA}(q[:, None], k[:, None], v[:, None]).squeeze(1)",
    ), expect="reason", weight=0.5),
    # The CPU's kernel takes it for granted that channels lie side by side.
    "kernel_for_cpu": Form("bhnd", "", (
        f"{_DENSE}o = {_KERNEL}flash_attention_for_cpu(q, k, v)[0]",
        f"{_DENSE}o, extra = {_KERNEL}flash_attention_for_cpu(q, k, v, scale=0.3)",
        f"{_DENSE}o, extra = {_KERNEL}flash_attention_for_cpu.default(query=q, key=k, value=v)",
    )),
    "kernel_math": Form("bhnd", "", (
        f"{_DENSE}o, _ = {_KERNEL}attention_math(q, k, v)",
        f"{_DENSE}o = {_KERNEL}attention_math.default(q, k, v, None, 0.0, False, scale=0.2)[0]",
    ), weight=0.6),
    "kernel_weights_read": Form("bhnd", "", (
        f"o, extra = {_KERNEL}attention_math(q, k, v)",
    ), expect="reason", weight=0.4),
    "kernel_unknown": Form("bhnd", "", (
        "o = torch.ops.svg_ear_fuzz.attend(q, k, v)",
        "o = torch.ops.svg_ear_fuzz.attend.default(q, k, value=v)",
    ), expect="reason", weight=0.6),
    "kernel_packed": Form("bnhd", "", tuple(f"{at}\n{_PACKED}" for at in (
        "at = torch.arange(0, (b + 1) * n, n, dtype=torch.int32)",
        "at = torch.tensor([n * i for i in range(b + 1)], dtype=torch.int32)",
        "at = torch.zeros(b + 1, dtype=torch.int32)\nat[1:] = torch.full((b,), n).cumsum(0)",
    ))),
    "kernel_packed_unequal": Form("bnhd", "", tuple(f"{at}\n{_PACKED}" for at in (
        "at = torch.tensor([0, 5, b * n], dtype=torch.int32)",
        "at = torch.tensor([0, 3, 9, b * n])", "at = torch.tensor([0, b * n - 2])",
        "at = torch.arange(0, (b + 1) * n, n)\nat[0] += 1",
        "at = torch.arange(0, (b + 1) * n, n) + (x[0, 0, 0] * 0).int()",
    )), expect="reason", weight=0.6),
    "flex_padding": Form("bhnd", "", (
        _FLEX.format("lambda bi, hi, i, j: j < 3 * m // 4", "None"),
        _FLEX.format("lambda bi, hi, i, j: (j >= 2) & (j < m - 3)", 1),
        "seen = torch.arange(m).expand(b, m) % 7 > 0\n"
        + _FLEX.format("lambda bi, hi, i, j: seen[bi, j]", "b"),
        "ends = torch.arange(b) + m // 2\n"
        + _FLEX.format("lambda bi, hi, i, j: j < ends[bi]", "b"),
        _FLEX.format("flex.noop_mask", "b"), "o = flex.flex_attention(q, k, v)",
    ), weight=0.3),
    "flex_other": Form("bhnd", "", (
        _FLEX.format("lambda bi, hi, i, j: i >= j", "None"),
        _FLEX.format("lambda bi, hi, i, j: (i - j).abs() < 9", "None"),
        _FLEX.format("lambda bi, hi, i, j: (j < m - 3) & (i // 9 == j // 9)", "b"),
        "ends = torch.arange(b) + m // 2\n"
        "of_chunk = torch.arange(n) // 8\n"
        + _FLEX.format("lambda bi, hi, i, j: (j // 8 <= of_chunk[i]) & (j < ends[bi])", "b"),
        "o = flex.flex_attention(q, k, v, lambda s, bi, hi, i, j: s * 0.5)",
    ), expect="reason", weight=0.3),
    "flex_outside": Form("bhnd", "", _FLEX_OUTSIDE, weight=0.3),
    "flex_outside_grouped": Form("bhnd", "", _FLEX_OUTSIDE, heads="grouped", weight=0.2),
    "flex_outside_other": Form("bhnd", "", _FLEX_OUTSIDE, expect="reason", weight=0.3),
    "matmul": Form("bhnd", "bhqk", _SCORES, _OUTS, weight=6),
    "matmul_one_key_head": Form("bhnd", "bhqk", _SCORES, _OUTS, heads="one", expect="reason"),
    "matmul_grouped_repeat": Form("bhnd", "bhqk", (
        "k, v = (t.repeat_interleave(%(r)d, 1) for t in (k, v))\ns = q @ k.mT",
        "k, v = (t.repeat_interleave(%(r)d, dim=1) for t in (k, v))\n"
        "s = torch.matmul(q, k.transpose(2, 3))",
        "k, v = (t[:, :, None].expand(b, %(g)d, %(r)d, m, %(d)d).flatten(1, 2) "
        "for t in (k, v))\ns = q @ k.transpose(2, 3)",
    ), _OUTS, heads="grouped"),
    "matmul_grouped_5d": Form("bhnd", "bgrqk", (
        "s = q.unflatten(1, (%(g)d, %(r)d)) @ k[:, :, None].mT",
        "s = q.view(b, %(g)d, %(r)d, n, %(d)d) @ k.unsqueeze(2).transpose(-1, -2)",
    ), ("o = (w @ v[:, :, None]).flatten(1, 2)", "o = (w @ v.unsqueeze(2)).reshape(q.shape)"),
        heads="grouped", expect="reason", weight=0.6),
    "matmul_channels_first": Form("bhdn", "bhqk", (
        "s = q.mT @ k", "s = torch.matmul(q.transpose(-1, -2), k)",
        "s = torch.einsum('bhdi,bhdj->bhij', q, k)",
    ), ("o = v @ w.mT", "o = torch.einsum('bhij,bhdj->bhdi', w, v)",
        "o = torch.matmul(v, w.transpose(2, 3))")),
    "matmul_keys_by_queries": Form("bhnd", "bhkq", (
        "s = k @ q.mT", "s = torch.matmul(k, q.transpose(-2, -1))",
        "s = torch.einsum('bhjd,bhid->bhji', k, q)",
    ), ("o = w.mT @ v", "o = torch.matmul(w.transpose(-1, -2), v)",
        "o = torch.einsum('bhji,bhjd->bhid', w, v)")),
    "matmul_cross": Form("bhnd", "bhqk", _SCORES, _OUTS, expect="reason", keys="cross", weight=0.8),
    "matmul_joint": Form("bhnd", "bhqk", _SCORES, _OUTS, keys="joint"),
    "matmul_no_heads": Form("bnd", "bqk", (
        "s = q @ k.mT", "s = torch.bmm(q, k.transpose(1, 2))",
        "s = torch.einsum('bid,bjd->bij', q, k)",
    ), ("o = w @ v", "o = torch.bmm(w, v)", "o = torch.einsum('bij,bjd->bid', w, v)"),
        heads="none"),
    "mm_one_matrix": Form("nd", "qk", (
        "s = q @ k.T", "s = torch.mm(q, k.t())", "s = q.mm(k.mT)", "s = F.linear(q, k)",
        "s = torch.inner(q, k)", "s = torch.einsum('id,jd->ij', q, k)",
    ), ("o = w @ v", "o = torch.mm(w, v)", "o = F.linear(w, v.T)"), heads="none",
        expect="reason", weight=0.6),
    "einsum_heads_first": Form("bhnd", "bhqk", (
        "s = torch.einsum('bhid,bhjd->bhij', q, k)", "s = torch.einsum('bhid, bhjd -> bhij', q, k)",
        "s = torch.einsum('...id,...jd->...ij', q, k)",
        "s = torch.einsum('xyqc,xykc->xyqk', [q, k])",
        "s = torch.einsum('bhid,bhdj->bhij', q, k.mT)", "s = torch.einsum('bhjd,bhid->bhij', k, q)",
        "s = torch.einsum('BHid,BHjd->BHij', q, k)",
    ), ("o = torch.einsum('bhij,bhjd->bhid', w, v)", "o = torch.einsum('...ij,...jd->...id', w, v)",
        "o = torch.einsum('bhjd,bhij->bhid', v, w)", "o = torch.einsum('bhij,bhjd->bhid', (w, v))"),
        weight=2),
    "einsum_heads_last": Form("bnhd", "bhqk", (
        "s = torch.einsum('bihd,bjhd->bhij', q, k)", "s = torch.einsum('blhe,bshe->bhls', q, k)",
        "s = torch.einsum('bqhd, bkhd -> bhqk', q, k)",
    ), ("o = torch.einsum('bhij,bjhd->bihd', w, v)", "o = torch.einsum('bhls,bshd->blhd', w, v)"),
        weight=2),
    "einsum_scores_heads_last": Form("bnhd", "bqkh", (
        "s = torch.einsum('bihd,bjhd->bijh', q, k)",
    ), ("o = torch.einsum('bijh,bjhd->bihd', w, v)",), weight=0.8),
    "einsum_one_key_head": Form("bhnd", "bhqk", (
        "s = torch.einsum('bhid,bjd->bhij', q, k[:, 0])",
    ), ("o = torch.einsum('bhij,bjd->bhid', w, v[:, 0])",), heads="one"),
    "bmm_folded": Form("fnd", "fqk", _BMM, _BMM_OUT, weight=2),
    "bmm_apart": Form("fnd", "bhqk", (
        "s = torch.bmm(q, k.mT).view(b, %(h)d, n, m)", "s = (q @ k.mT).unflatten(0, (b, %(h)d))",
        "s = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, alpha=.3).reshape(b, %(h)d, n, m)",
        "s = torch.einsum('xid,xjd->xij', q, k).view(b, -1, n, m)",
    ), ("o = torch.bmm(w.flatten(0, 1), v)", "o = w.reshape(-1, n, m) @ v",
        "o = torch.bmm(w.view(b * %(h)d, n, m), v)",
        "o = (w @ v.view(b, %(h)d, m, %(d)d)).flatten(0, 1)")),
    "matmul_folded": Form("bhnd", "fqk", (
        "s = (q @ k.mT).flatten(0, 1)", "s = torch.matmul(q, k.transpose(2, 3)).view(-1, n, m)",
        "s = torch.einsum('bhid,bhjd->bhij', q, k).reshape(b * %(h)d, n, m)",
    ), ("o = w.view(b, %(h)d, n, m) @ v", "o = w.unflatten(0, (b, %(h)d)) @ v",
        "o = torch.bmm(w, v.flatten(0, 1)).view(b, %(h)d, n, %(d)d)")),
    "matmul_float32": Form("bhnd", "bhqk", (
        "s = q.float() * 0.3 @ k.float().mT", "s = torch.matmul(q.float(), k.float().mT)",
        "s = (0.5 * q.to(torch.float32)) @ (k.float() / 2).transpose(2, 3)",
    ), ("o = w.to(v.dtype) @ v", "o = torch.matmul(w.type_as(v), v)")),
    "baddbmm": Form("fnd", "fqk", (
        "s = torch.baddbmm(torch.empty(q.shape[0], n, m, dtype=q.dtype), q, k.mT, beta=0, "
        "alpha=0.4)",
        "s = torch.baddbmm(q.new_empty(q.shape[0], n, m), q, k.mT, beta=0.0, alpha=0.3)",
        "s = torch.baddbmm(input=q.new_zeros(1, 1, 1), batch1=q, batch2=k.mT, alpha=0.3)",
        "s = q.new_zeros(1, n, m).baddbmm(q, k.mT, beta=1, alpha=0.25)",
        "s = torch.baddbmm(q.new_zeros(m), q, k.mT)",
    ), _BMM_OUT, weight=1.5),
    "baddbmm_halved": Form("fnd", "fqk", (
        "s = torch.baddbmm(torch.linspace(-3, 3, m).to(q.dtype)[None, None], q, k.mT, beta=0.5)",
        "s = torch.baddbmm(input=q[:, :, :1], batch1=q, batch2=k.mT, beta=2, alpha=0.3)",
        "s = q[:, :, :1].expand(-1, -1, m).clone().baddbmm_(q, k.mT, alpha=0.3)",
    ), _BMM_OUT, expect="equal", weight=0.8),
    # Of memory that no video allows: the pass need not know it for attention.
    "sum_of_products": Form("bhnd", "bhqk", (
        "s = (q[:, :, :, None] * k[:, :, None]).sum(-1)",
        "s = torch.sum(q.unsqueeze(3) * k.unsqueeze(2), dim=-1)",
    ), ("o = (w[..., None] * v[:, :, None]).sum(3)", "o = w @ v"), expect="equal", weight=0.6),
    "tensordot": Form("nd", "qk", ("s = torch.tensordot(q, k, dims=([1], [1]))",),
                      ("o = torch.tensordot(w, v, dims=1)",), heads="none", expect="reason",
                      weight=0.6),
    "multihead_module": Form("bnd", "", (
        "o = self.mha(x, x, x, need_weights=False)[0]", "o, w = self.mha(x, x, x)",
    ), heads="none", expect="reason", weight=0.6),
}  # fmt: skip
"""Every form by name."""

_MADE = "self.blocks = flex.create_block_mask({}, {}, None, N, N, device='cpu')"
BLOCK_MASKS: dict[str, tuple[str, ...]] = {
    "flex_outside": (
        _MADE.format("lambda bi, hi, i, j: j < 3 * N // 4", "None"),
        _MADE.format("flex.noop_mask", "B"),
        "ends = torch.full((N,), N)\n" + _MADE.format("lambda bi, hi, i, j: j < ends[i]", "None"),
        "ends = torch.arange(N).flip(0).clamp(max=1) * (N - 1)\n"
        + _MADE.format("lambda bi, hi, i, j: j < ends[i]", 1),
        "document = torch.zeros(N, dtype=torch.int32)\ndocument[N - 5 :] = -1\n"
        + _MADE.format(
            "flex.and_masks(lambda bi, hi, i, j: document[i] == document[j], "
            "lambda bi, hi, i, j: document[j] >= 0)", "None",
        ),
        "seen = torch.arange(N).expand(B, N) % 7 > 0\n"
        + _MADE.format("lambda bi, hi, i, j: seen[bi][j] & seen[bi, i]", "B"),
        "length = torch.tensor(N - 3)\n"
        + _MADE.format(
            "flex.or_masks(lambda bi, hi, i, j: j < length, lambda bi, hi, i, j: j == N - 1)", 1
        ),
        "lengths = torch.arange(B) + N // 2\n"
        + _MADE.format("lambda bi, hi, i, j: ~(j >= lengths[bi])", "B"),
    ),
    "flex_outside_other": (
        "ends = torch.full((N,), N)\nends[: N // 2] = N // 2\n"
        + _MADE.format("lambda bi, hi, i, j: (j < ends[i]) | (i == j)", "None"),
        "ends = torch.zeros(N, dtype=torch.int64)\nends[: N - 4] = N - 4\n"
        + _MADE.format("lambda bi, hi, i, j: (j < ends[i]) | (i == j)", "None"),
        "document = (torch.arange(N) > 9).int()\n"
        + _MADE.format("lambda bi, hi, i, j: document[i] == document[j]", "None"),
        "seen = torch.arange(N) % 5 > 0\n"
        + _MADE.format("lambda bi, hi, i, j: seen[i] == seen[j]", "None"),
        _MADE.format("lambda bi, hi, i, j: (i - j).abs() <= 7", "None"),
        _MADE.format("lambda bi, hi, i, j: i // 8 >= j // 8", "B"),
        "seen = torch.arange(N * N).view(N, N) % 5 > 0\n"
        + _MADE.format("lambda bi, hi, i, j: seen[i, j]", "None"),
        "self.blocks = flex.BlockMask.from_kv_blocks(torch.ones(1, 1, -(-N // 16), "
        "dtype=torch.int32), torch.arange(-(-N // 16)).int().expand(1, 1, -(-N // 16), -1)"
        ".contiguous(), BLOCK_SIZE=16, seq_lengths=(N, N), mask_mod=lambda bi, hi, i, j: j < 16)",
    ),
}  # fmt: skip
"""Block masks that a module makes beforehand, by the form that reads them: statements of its
`__init__` for N tokens and batches of B."""

SDPA_NAMES = tuple(name for name, form in FORMS.items() if not form.score_dims)
WITHOUT_MASKS = (
    "multihead_module", *(name for name in FORMS if name.startswith(("kernel_", "flex_")))
)  # fmt: skip
"""Forms that take no mask."""

HAND_NAMES = tuple(name for name, form in FORMS.items() if form.score_dims)

SOURCES = ("three_linears", "chunk", "split", "unbind", "permuted_qkv", "kv_together", "sliced",
           "functional", "no_bias", "tensor_split", "select", "parameters")  # fmt: skip
"""How q, k and v are projected from the tokens."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    "view": (
        "{}.view(b, {n}, {h}, {d}).transpose(1, 2)", "{}.unflatten(-1, ({h}, {d})).transpose(1, 2)",
    ),
    "contiguous": (
        "{}.view(b, {n}, {h}, {d}).transpose(1, 2).contiguous()",
        "{}.reshape(b, {n}, {h}, {d}).permute(0, 2, 1, 3).clone("
        "memory_format=torch.contiguous_format)",
    ),
    "permuted": (
        "{}.reshape(b, {n}, {h}, {d}).permute(0, 2, 1, 3)",
        "{}.unflatten(2, ({h}, -1)).movedim(2, 1)",
        "torch.permute({}.view(b, {n}, {h}, {d}), dims=(0, 2, 1, 3))",
    ),
    "channels_apart": ("{}.reshape(b, {n}, {d}, {h}).permute(0, 3, 1, 2)",),
    "stacked": ("torch.stack({}.chunk({h}, -1), 1)", "torch.stack({}.split({d}, dim=-1), dim=1)"),
    "transposed_memory": ("{}.view(b, {n}, {h}, {d}).permute(0, 2, 3, 1).contiguous().mT",),
    "multiplied": ("({} * 1.0).view(b, {n}, {h}, {d}).transpose(1, 2)",),
    "one_by_one": ("torch.cat([t.view(1, {n}, {h}, {d}).transpose(1, 2) for t in {}])",),
}  # fmt: skip
"""Spellings of (b, h, n, d) of a projection (b, n, h * d), by what its memory looks like."""

REORDERED = {
    "bhnd": "{}", "bnhd": "{}.transpose(1, 2)", "fnd": "{}.flatten(0, 1)", "bnd": "{}.squeeze(1)",
    "bhdn": "{}.mT", "nd": "{}[0, 0]",
}  # fmt: skip
"""Operands of other dimensions, made of (b, h, n, d)."""

SCALES: dict[str, tuple[str, ...]] = {
    "none": ("",),
    "multiplied": (
        "s = s * 0.3", "s = 0.3 * s", "s = s.mul(0.3)", "s = torch.mul(s, 0.3)",
        "s = s * %(d)d ** -0.5", "s = torch.mul(input=s, other=0.25)", "s = torch.multiply(s, .35)",
        "s = s.mul(other=0.4)",
    ),
    "divided": (
        "s = s / math.sqrt(%(d)d)", "s = s.div(4)", "s = torch.div(s, 5.0)",
        "s = torch.true_divide(s, 3)", "s = torch.div(input=s, other=4.0)",
        "s = s / (q.shape[-1] ** 0.5)", "s = torch.div(s, 4.0, rounding_mode=None)",
    ),
    "query_before": ("",),
    "key_before": ("",),
    "both_before": ("",),
    "in_place": (
        "s *= 0.3", "s.mul_(0.3)", "s /= 4", "s.div_(3.5)", "s = s.mul_(0.25)",
        "torch.Tensor.mul_(s, 0.3)", "s = operator.imul(s, 0.3)",
    ),
    "negative": ("s = s * -0.3", "s = -s * 0.3", "s = s.neg() * 0.3"),
    "several": ("s = s * 0.5\ns = s / 2\ns = 1.5 * s", "s = s * 2 / 5", "s = (s + s) / 7.0"),
    "constant_tensor": (
        "s = s * torch.tensor(0.3)", "s = s / torch.full((), 3.0)", "s = s * s.new_full((), 0.3)",
        "s = s * torch.full((1,), 0.3)", "s = s * torch.ones(()) * 0.3",
        "s = s / torch.sqrt(torch.tensor(9.0))",
    ),
    "constant_of_dtype": (
        "s = s * torch.full((), 2.7, dtype=torch.int64)",
        "s = s / torch.tensor(3.9, dtype=torch.int32)", "s = s * torch.full((), 1.9).long()",
        "s = s * torch.full((1, 1), 0.3, dtype=torch.bool)",
        "s = s * torch.full_like(s, 0.2999, dtype=torch.bfloat16)",
        "s = s * torch.full((1,), 2, dtype=torch.int32).view(torch.float32)",
        "s = s * torch.ones(1, dtype=torch.int16).view(torch.float16)",
    ),
    "of_length": (
        "s = s * n ** -0.25", "s = s / math.sqrt(n)", "s = s * (math.log(n) / 5)", "s = s / n",
        "s = s * (1 + 1 / m)", "s *= n ** -0.5", "s = torch.div(s, m ** 0.5)",
        "s = s * float(n) / 50",
    ),
    "parameter": (
        "s = s * self.temperature", "s = s / self.temperature.exp()", "s = s * self.temperature[0]",
    ),
    "constant_written": (
        "c = torch.full((), 0.3)\nc.mul_(3)\ns = s * c",
        "c = torch.full((1,), 0.3)\nc[0] = 0.9\ns = s * c",
        "c = s.new_full((), 0.3)\nc.fill_(0.7)\ns = s / c",
        "c = torch.full_like(s, 0.3)\nc[..., :9] = 1.5\ns = s * c",
        "c = torch.tensor(0.3)\nc += 0.4\ns = c * s",
        "c = torch.full((), 0.3)\ntorch.add(c, 0.5, out=c)\ns = s * c",
        "c = torch.full((1,), 0.3)\ntorch._foreach_mul_([c], 2.5)\ns = s * c",
        "c = torch.full((1,), 0.3)\nc.view(()).zero_()\ns = s * c",
    ),
}  # fmt: skip
"""Spellings of the scale of scores, by kind. "..._before" is written into q and k instead."""

BEFORE = ("%s = %s * 0.6", "%s = %s / 2", "%s = %s * (q.shape[-1] ** -0.25)", "%s = %s.mul(0.7)",
          "%s = torch.mul(%s, 0.5)", "%s = 0.5 * %s")  # fmt: skip

SOFTMAXES: dict[str, tuple[str, ...]] = {
    "method": ("w = s.softmax(DIM)", "w = s.softmax(dim=DIM)"),
    "functional": (
        "w = F.softmax(s, dim=DIM)", "w = F.softmax(s, DIM)", "w = F.softmax(input=s, dim=DIM)",
    ),
    "torch": (
        "w = torch.softmax(s, DIM)", "w = torch.softmax(s, dim=DIM)",
        "w = torch.softmax(input=s, dim=DIM)", "w = torch.special.softmax(s, DIM)",
    ),
    "module": ("w = nn.Softmax(DIM)(s)", "w = self.softmax(s)"),
    "dtype": (
        "w = F.softmax(s, dim=DIM, dtype=torch.float32).to(v.dtype)",
        "w = s.softmax(DIM, dtype=torch.float32).type_as(v)",
        "w = torch.softmax(s, DIM, torch.float32).to(DTYPE)",
        "w = s.softmax(DIM, torch.float32).to(dtype=v.dtype)",
    ),
    "upcast": (
        "w = s.float().softmax(DIM).to(v.dtype)",
        "w = F.softmax(s.to(torch.float32), DIM).type(v.dtype)",
        "w = torch.softmax(s.type(torch.float32), dim=DIM).to(v)",
        "w = s.to(dtype=torch.float32).softmax(DIM).to(dtype=DTYPE)",
    ),
    "aten": (
        "w = torch.ops.aten.softmax.int(s, DIM)", "w = torch.ops.aten._softmax(s, DIM, False)",
        "w = torch._softmax(s, DIM, False)",
    ),
    "logarithm": (
        "w = s.log_softmax(DIM).exp()", "w = torch.exp(F.log_softmax(s, dim=DIM))",
        "w = torch.ops.aten._log_softmax(s, DIM, False).exp()",
    ),
    "rows": (
        "w = s.flatten(0, -2).softmax(-1).view(s.shape)",
        "w = F.softmax(s.reshape(-1, m), 1).reshape(s.shape)",
        "w = s.flatten(0, -2).softmax(1).view_as(s)",
    ),
    "zero_without_keys": (
        "w = torch.ops.aten._safe_softmax(s, DIM)",
        "w = s.softmax(DIM)\n"
        "w = torch.where((s == -math.inf).all(DIM, keepdim=True), torch.zeros_like(w), w)",
    ),
    "written_out": (
        "w = (s - s.amax(DIM, keepdim=True)).exp()\nw = w / w.sum(DIM, keepdim=True)",
        "w = (s - s.logsumexp(DIM, keepdim=True)).exp()",
        "w = math.e ** (s - s.amax(DIM, keepdim=True))\nw = w / w.sum(DIM, keepdim=True)",
        "w = torch.expm1(s - s.amax(DIM, keepdim=True)) + 1\nw = w / w.sum(DIM, keepdim=True)",
        "w = torch.empty(s.shape, dtype=s.dtype)\ntorch.softmax(s, DIM, out=w)",
    ),
    "in_place_after": (
        "w = s.softmax(DIM)\nw = w.contiguous()", "w = s.clone().softmax(DIM)",
        "w = torch.clone(s.softmax(DIM))",
    ),
    "dropout_off": (
        "w = F.dropout(s.softmax(DIM), 0.1, False)", "w = self.dropout(s.softmax(DIM))",
        "w = F.dropout(s.softmax(DIM), p=0.0)",
        "w = torch.dropout(s.softmax(DIM), 0.2, train=False)",
        "w = F.dropout(F.softmax(s, DIM), p=0.3, training=self.training)",
    ),
}  # fmt: skip
"""Spellings of the softmax by kind; DIM is its dimension. "rows" are for keys in the last one."""

BETWEEN: dict[str, str] = {
    "none": "",
    "layer_norm": "%s = F.layer_norm(%s, (%(d)d,))",
    "rms_norm": "%s = F.rms_norm(%s, (%(d)d,))",
    "rms_by_hand"
    : "%s = %s * torch.rsqrt(%s.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(DTYPE)",
    "normalize": "%s = F.normalize(%s, dim=-1) * 3.0",
    "rope_halves": "%s = %s * cos + torch.cat([-%s[..., %(half)d:], %s[..., :%(half)d]], -1) * sin",
    "rope_pairs"
    : "%s = %s * cos + torch.stack([-%s[..., 1::2], %s[..., 0::2]], -1).flatten(-2) * sin",
    "rope_setitem": "t = torch.empty_like(%s)\nt[..., 0::2] = %s[..., 0::2] * cos[..., 0::2] - "
                    "%s[..., 1::2] * sin[..., 0::2]\n"
                    "t[..., 1::2] = %s[..., 1::2] * cos[..., 0::2]\n%s = t",
    "written_before": "%s = %s.clone()\n%s[..., :3] = 0.5\n%s.mul_(1.25)",
}  # fmt: skip
"""What happens to q and k before their product; %s stands for the operand."""
