"""Which calls are found, with which arguments, in which layer, and why a call is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from traced_graphs import Rewriting, graphs_of, run_rewritten, sites_of

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.site import Reason, Role

HEADS, TOKENS, DIM = 2, 48, 32
sdpa = F.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def qkv(
    tokens: int = TOKENS,
    dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = HEADS,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, dim, dtype=dtype) for _ in range(3))
    return q, k, v


MASKS = {
    "none": None,
    "key_padding": torch.ones(1, 1, 1, TOKENS, dtype=torch.bool),
    "key_padding_of_heads": torch.ones(1, HEADS, 1, TOKENS, dtype=torch.bool),
    "square": torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool),
    "square_2d": torch.ones(TOKENS, TOKENS, dtype=torch.bool),
    "additive": torch.zeros(1, 1, 1, TOKENS),
}
KEY_PADDING = {"none", "key_padding", "key_padding_of_heads"}


@given(
    positional=st.integers(0, 6),
    written=st.sets(st.sampled_from(["attn_mask", "dropout_p", "is_causal", "scale"])),
    mask_kind=st.sampled_from(sorted(MASKS)),
    bshd=st.booleans(),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.5, 1]),
)
def test_every_argument_form_says_the_same(
    positional: int,
    written: set[str],
    mask_kind: str,
    bshd: bool,
    causal: bool,
    scale: float | None,
) -> None:
    mask = MASKS[mask_kind]
    causal = causal and mask is None
    q, k, v = qkv()
    if bshd:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    given_values: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": 0.0,
        "is_causal": causal,
        "scale": scale,
    }
    needed = {"attn_mask"} if mask is not None else set()
    needed |= {"is_causal"} if causal else set()
    needed |= {"scale"} if scale is not None else set()

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        values = {**given_values, "query": q, "key": k, "value": v, "attn_mask": mask}
        args = [values[name] for name in NAMES[:positional]]
        rest = [name for name in (*NAMES, "scale") if name not in NAMES[:positional]]
        kwargs = {n: values[n] for n in rest if n in NAMES[:3] or n in written or n in needed}
        return sdpa(*args, **kwargs)

    (graph,) = graphs_of(call, q, k, v, mask)
    (site,) = find_sites(graph)
    call_read = site.call
    assert [x.node.name for x in (call_read.q, call_read.k, call_read.v)] == [
        "l_q_", "l_k_", "l_v_",
    ]  # fmt: skip
    found_mask = call_read.mask and call_read.mask.tensor.node.name
    assert found_mask == (None if mask is None else "l_mask_")
    assert call_read.scale == scale
    assert site.q_shape == (1, HEADS, TOKENS, DIM)
    assert site.k_shape == (1, HEADS, TOKENS, DIM)
    assert site.dtype is torch.float32
    assert site.device == torch.device("cpu")
    assert site.reason is (Reason.CAUSAL if causal else None)
    assert site.prove_mask == (mask_kind not in KEY_PADDING and not causal)


class Attention(nn.Module):
    """Self or cross attention with the knobs that decide whether it may be sparse."""

    def __init__(self, dim: int = DIM, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.dim, self.dropout, self.causal = dim, dropout, causal
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, HEADS * dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (HEADS, self.dim)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        dropout = self.dropout if self.training else 0.0
        return sdpa(q, k, v, dropout_p=dropout, is_causal=self.causal)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Attention(causal=True), Reason.CAUSAL),
        (Attention(dropout=0.1).train(), Reason.DROPOUT),
        (Attention(dropout=0.1).eval(), None),
        (Attention(dim=24), Reason.HEAD_DIM),
        (Attention().double(), Reason.DTYPE),
        (Attention().bfloat16(), None),
    ],
    ids=["causal", "dropout", "eval", "head_dim", "float64", "bfloat16"],
)
def test_a_module_is_left_for_its_own_reason(module: Attention, reason: Reason | None) -> None:
    x = torch.randn(1, TOKENS, 16, dtype=module.to_q.weight.dtype)
    (site,) = sites_of(module, x)
    assert site.reason is reason
    assert site.role is Role.SELF


def test_cross_attention_is_left_even_at_equal_lengths() -> None:
    (site,) = sites_of(Attention(), torch.randn(1, TOKENS, 16), torch.randn(1, TOKENS, 16))
    assert (site.role, site.reason) == (Role.CROSS, Reason.CROSS_ATTENTION)


def _shape_case(**sizes: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    plain = {"batch": 1, "heads": HEADS, "tokens": TOKENS, "dim": DIM}
    made = (qkv(**{**plain, **sizes.get(name, {})})[0] for name in "qkv")
    q, k, v = made
    return q, k, v


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (_shape_case(v={"dim": 64}), Reason.HEAD_DIM),
        (tuple(t[0] for t in qkv()), None),
        (tuple(t[None] for t in qkv()), Reason.LAYOUT),
        (_shape_case(k={"tokens": 32}, v={"tokens": 32}), Reason.LENGTHS),
        (_shape_case(q={"batch": 2}), Reason.LAYOUT),
        (_shape_case(q={"batch": 2}, k={"batch": 2}), Reason.LAYOUT),
        (_shape_case(q={"heads": 1}), Reason.LAYOUT),
        (_shape_case(v={"heads": 1}), Reason.LAYOUT),
        (_shape_case(k={"heads": 1}, v={"heads": 1}), None),
    ],
    ids=[
        "value_dim",
        "three_dims",
        "five_dims",
        "fewer_keys",
        "one_batch_of_keys",
        "one_batch_of_values",
        "one_query_head_for_all_keys",
        "one_value_head",
        "one_key_head_for_all_queries",
    ],
)
def test_a_bare_call_is_left_for_its_shapes(
    tensors: tuple[Tensor, Tensor, Tensor], reason: Reason | None
) -> None:
    (site,) = sites_of(lambda q, k, v: sdpa(q, k, v), *tensors)
    assert site.reason is reason
    assert (site.role, site.layer, site.layer_parameter) == (Role.UNKNOWN, "", None)


def test_mixed_dtypes_are_left() -> None:
    q, k, v = qkv()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k, v)

    (site,) = sites_of(call, q, k.bfloat16(), v.bfloat16())
    assert site.reason is Reason.DTYPE


def test_flex_attention_without_a_mask_is_attention() -> None:
    def scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score * 2)

    q, k, v = qkv(tokens=512)
    backend = Rewriting()
    plain = run_rewritten(lambda q, k, v: flex_attention(q, k, v), q, k, v, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(plain, sdpa(q, k, v), atol=1e-5, rtol=1e-4)
    (site,) = sites_of(scored, q, k, v)
    assert site.reason is Reason.FLEX


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_log_sum_exp_of_flex_attention_is_natural(dynamic: bool) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, return_lse=True)
        return torch.cat([out, lse[..., None]], -1)

    q, k, v = qkv()
    backend = Rewriting(aot=False)
    found = run_rewritten(call, q, k, v, backend=backend, dynamic=dynamic)
    assert (backend.rewritten, backend.reasons) == (1, [])
    lse = (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1, keepdim=True)
    wanted = torch.cat([sdpa(q, k, v), lse], -1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_attention_inside_a_leaf_is_named() -> None:
    x = torch.randn(1, TOKENS, 64)
    layer = nn.TransformerEncoderLayer(64, 2, batch_first=True).eval()
    attention = nn.MultiheadAttention(64, 2, batch_first=True).eval()
    for call in (layer, lambda x: attention(x, x, x, need_weights=False)[0]):
        (site,) = sites_of(call, x)
        assert (site.reason, site.q_shape) == (Reason.LEAF, ())


def test_an_exported_model_is_read_like_any_other() -> None:
    exported = torch.export.export(Stack().eval(), (torch.randn(1, TOKENS, 16),)).module()
    sites = sites_of(exported, torch.randn(1, TOKENS, 16))
    assert [s.layer for s in sites] == ["blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn1"]
    assert [(s.role, s.reason) for s in sites] == [(Role.SELF, None)] * 3


class ByHand(nn.Module):
    """Attention in float32, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 3 * HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        return (q.float() @ k.float().mT * 0.2).softmax(-1).type_as(v) @ v


class Masked(ByHand):
    """PyTorch's attention with a mask that leaves a sample no key."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        lengths = torch.tensor([[0], [TOKENS - 5]])
        return sdpa(q, k, v, (torch.arange(TOKENS) < lengths)[:, None, None])


def test_every_reason_has_a_sentence() -> None:
    assert all(reason.sentence.endswith(".") for reason in Reason)
    assert len({reason.sentence for reason in Reason}) == len(Reason)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn1": Attention()}) for _ in range(2))
        self.back = nn.Linear(DIM, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.back(block["attn1"](x).mean(1))
        return x + self.back(self.blocks[0]["attn1"](x).mean(1))


@pytest.mark.parametrize("model", [ByHand, Masked, Stack])
def test_a_model_that_was_decomposed_is_read_like_any_other(model: type[nn.Module]) -> None:
    x = torch.randn(2, TOKENS, 16)
    module, backend = model().eval(), Rewriting(aot=False)
    decomposed = torch.export.export(module, (x,)).run_decompositions().module()
    out = run_rewritten(decomposed, x, backend=backend)
    assert (backend.rewritten, backend.reasons) == (3 if model is Stack else 1, [])
    torch.testing.assert_close(out, module(x), atol=2e-5, rtol=1e-4)
    (graph,) = graphs_of(decomposed, x)
    assert {site.role for site in find_sites(graph)} == {Role.SELF}


def test_sites_are_named_by_layer_and_numbered_where_a_layer_attends_twice() -> None:
    sites = sites_of(Stack(), torch.randn(1, TOKENS, 16))
    assert [s.layer for s in sites] == ["blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn1"]
    assert [s.name for s in sites] == ["blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn1#2"]
    parameters = [s.layer_parameter for s in sites]
    assert parameters[0] is parameters[2]
    assert parameters[0] is not parameters[1]


def test_other_products_are_no_sites() -> None:
    q, k, v = qkv()
    assert sites_of(lambda q, k, v: (q @ k.mT).sigmoid() @ v, q, k, v) == []
    assert sites_of(lambda q, k, v: (q + k).softmax(-1) @ v.mT, q, k, v) == []
