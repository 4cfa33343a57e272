"""Attention that is called by another name: what is plain becomes a site, the rest is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foreign_attention
import pytest
import torch
from torch import Tensor, nn
from traced_graphs import Rewriting, graphs_of, run_rewritten, sites_of

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.site import Reason, Role
from svg_ear_compile.passes.workload import non_attention_cost

foreign_attention.register_operators()
HEADS, TOKENS, DIM = 3, 47, 32
aten, flash, flash_3 = torch.ops.aten, torch.ops.flash_attn, torch.ops.flash_attn_3
Attend = Callable[[Tensor, Tensor, Tensor], Any]


def qkv(*, heads_last: bool, batch: int = 2, kv_heads: int = HEADS) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sizes = [(batch, heads, TOKENS, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    made = [torch.randn(*size) for size in sizes]
    return tuple(t.transpose(1, 2).contiguous() if heads_last else t for t in made)


def bias(q: Tensor) -> Tensor:
    return torch.zeros(1, 1, 1, TOKENS).masked_fill(torch.arange(TOKENS) > 40, -torch.inf)


HEADS_FIRST: dict[str, Attend] = {
    "flash_for_cpu": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "flash_for_cpu, lse": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, scale=0.2
    ),
    "flash_for_cpu, mask": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, attn_mask=bias(q)
    )[0],
    "math": lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v)[0],
    "math, keywords": lambda q, k, v: aten._scaled_dot_product_attention_math.default(
        query=q, key=k, value=v, scale=0.3
    )[0],
    "sdpa overload": lambda q, k, v: aten.scaled_dot_product_attention.default(q, k, v),
}
HEADS_LAST: dict[str, Attend] = {
    "FA2": lambda q, k, v: flash._flash_attn_forward(
        q, k, v, 0.0, 0.2, False, -1, -1, 0.0, None, False
    )[0],
    "FA2, lse": lambda q, k, v: flash._flash_attn_forward.default(
        q, k, v, 0.0, 0.2, False, -1, -1, 0.0, None, False
    )[:2],
    "FA3": lambda q, k, v: flash_3._flash_attn_forward(q, k, v, softmax_scale=0.2)[0],
    "FA3, lse": lambda q, k, v: flash_3._flash_attn_forward(q, k, v)[:2],
    "xformers": lambda q, k, v: torch.ops.xformers_flash.flash_fwd(
        q, k, v, None, None, None, TOKENS, TOKENS, 0.0, 0.2, False, -1, -1, False, None
    )[0],
}


def packed(by: str) -> Attend:
    """Two samples in one dimension, with boundaries that are made as libraries make them."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        match by:
            case "arange":
                starts = torch.arange(0, 3 * TOKENS, TOKENS, dtype=torch.int32)
            case "cumsum":
                starts = torch.zeros(3, dtype=torch.int32)
                starts[1:] = torch.cumsum(torch.full((2,), TOKENS, dtype=torch.int32), 0)
            case "cat":
                lengths = torch.tensor([TOKENS] * 2, dtype=torch.int32)
                starts = torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32)
            case "unequal":
                starts = torch.tensor([0, TOKENS - 5, 2 * TOKENS], dtype=torch.int32)
            case "too short":
                starts = torch.tensor([0, TOKENS, 2 * TOKENS - 1], dtype=torch.int32)
            case "written":
                starts = torch.arange(0, 3 * TOKENS, TOKENS, dtype=torch.int32)
                starts[1] += 3
            case _:
                starts = (q[:3, 0, 0] * 0).int() + torch.arange(0, 3 * TOKENS, TOKENS).int()
        out, lse, *_ = flash._flash_attn_varlen_forward(
            q, k, v, starts, starts, TOKENS, TOKENS, 0.0, 0.2, False
        )
        return out.unflatten(0, (2, -1)), lse

    return attend


PACKED = {f"packed, {by}": packed(by) for by in ("arange", "cumsum", "cat")}


@pytest.mark.parametrize("name", [*HEADS_FIRST, *HEADS_LAST, *PACKED])
def test_a_plain_call_is_rewritten_to_the_same_numbers(name: str) -> None:
    heads_last = name not in HEADS_FIRST
    attend = {**HEADS_FIRST, **HEADS_LAST, **PACKED}[name]
    given, backend = qkv(heads_last=heads_last), Rewriting()
    out = run_rewritten(attend, *given, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, attend(*given), atol=2e-5, rtol=1e-4)


def test_one_packed_sequence_is_a_sequence() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        starts = torch.tensor([0, TOKENS], dtype=torch.int32)
        return flash_3._flash_attn_forward(
            q[0], k[0], v[0], cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=TOKENS,
            max_seqlen_k=TOKENS, softmax_scale=0.2,
        )[:2]  # fmt: skip

    given, backend = qkv(heads_last=True, batch=1), Rewriting()
    out = run_rewritten(attend, *given, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, attend(*given), atol=2e-5, rtol=1e-4)
    (site,) = sites_of(attend, *given)
    assert site.q_shape == (1, HEADS, TOKENS, DIM)


def test_grouped_heads_of_a_kernel() -> None:
    given, backend = qkv(heads_last=True, kv_heads=1), Rewriting()
    attend = HEADS_LAST["FA2, lse"]
    out = run_rewritten(attend, *given, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, attend(*given), atol=2e-5, rtol=1e-4)


def left(operator: Any, *args: Any, **named: Any) -> Attend:
    return lambda q, k, v: operator(q, k, v, *args, **named)[0]


LEFT: dict[str, tuple[Attend, Reason]] = {
    "causal": (
        left(flash._flash_attn_forward, 0.0, 0.2, True, -1, -1, 0.0, None, False), Reason.CAUSAL,
    ),
    "window": (
        left(flash._flash_attn_forward, 0.0, 0.2, False, 9, 9, 0.0, None, False), Reason.CAUSAL,
    ),
    "dropout": (
        left(flash._flash_attn_forward, 0.1, 0.2, False, -1, -1, 0.0, None, False), Reason.DROPOUT,
    ),
    "capped": (
        left(flash._flash_attn_forward, 0.0, 0.2, False, -1, -1, 30.0, None, False), Reason.KERNEL,
    ),
    "slopes": (
        lambda q, k, v: flash._flash_attn_forward(
            q, k, v, 0.0, 0.2, False, -1, -1, 0.0, q[0, 0, :, 0], False
        )[0],
        Reason.KERNEL,
    ),
    "chunked": (left(flash_3._flash_attn_forward, attention_chunk=8), Reason.KERNEL),
    "weights read": (
        lambda q, k, v: torch.ops.xformers_flash.flash_fwd(
            q, k, v, None, None, None, TOKENS, TOKENS, 0.0, 0.2, False, -1, -1, False, None
        )[::2],
        Reason.WEIGHTS,
    ),
    **{
        by: (packed(by), Reason.PACKED) for by in ("unequal", "too short", "written", "of the data")
    },
    "unknown": (torch.ops.acme.attend, Reason.KERNEL),
    "unknown, packed": (
        lambda q, k, v: torch.ops.acme.attend_packed(
            *(t.flatten(0, 1) for t in (q, k, v)), torch.tensor([0, 9, 2 * TOKENS])
        ),
        Reason.KERNEL,
    ),
    "unknown, written": (
        lambda q, k, v: (out := torch.empty_like(q), torch.ops.acme.attend_into(q, k, v, out))[0],
        Reason.KERNEL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_a_call_that_is_not_plain_is_named_and_left(name: str) -> None:
    attend, reason = LEFT[name]
    given, backend = qkv(heads_last=True), Rewriting(aot=False)
    torch.testing.assert_close(run_rewritten(attend, *given, backend=backend), attend(*given))
    assert (backend.rewritten, backend.reasons) == (0, [reason])


@pytest.mark.parametrize("name", ["unknown", "unequal", "capped"])
def test_a_call_that_is_left_shows_its_length(name: str) -> None:
    (site,) = sites_of(LEFT[name][0], *qkv(heads_last=True))
    assert site.q_shape in ((2, HEADS, TOKENS, DIM), (1, HEADS, 2 * TOKENS, DIM))


def test_a_bool_that_a_kernel_adds_is_no_padding() -> None:
    keep = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    (site,) = sites_of(
        lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v, keep)[0],
        *qkv(heads_last=False),
    )
    assert site.reason is Reason.MASK


def test_weights_that_a_kernel_returns_are_kept() -> None:
    (site,) = sites_of(
        lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v), *qkv(heads_last=False)
    )
    assert site.reason is Reason.WEIGHTS


def test_elementwise_operators_of_three_tensors_are_no_attention() -> None:
    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.acme.gated(*(t.flatten(2) for t in (q, k, v)))

    assert not sites_of(gated, *qkv(heads_last=True))


class Layer(nn.Module):
    """One layer that attends by a function that Dynamo does not open."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.to_qkv, self.attend = nn.Linear(24, 3 * HEADS * DIM), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        return self.attend(q, k, v).flatten(2)


def test_functions_that_dynamo_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_attention.put_in_place(monkeypatch)
    module = foreign_attention
    plain: list[Attend] = [
        module.flash_attn_func,
        module.memory_efficient_attention,
        lambda q, k, v: module.sageattn(q, k, v, tensor_layout="NHD"),
        lambda q, k, v: module.sageattn(
            *(t.transpose(1, 2) for t in (q, k, v)), "HND", sm_scale=0.2
        ).transpose(1, 2),
        lambda q, k, v: module.memory_efficient_attention(
            *(t[:, :, 0] for t in (q, k, v)), scale=0.2
        ),
    ]
    for attend in plain:
        layer, x = Layer(attend).eval(), torch.randn(2, TOKENS, 24)
        backend = Rewriting(aot=False)
        out = run_rewritten(layer, x, backend=backend)
        assert backend.rewritten == 1
        torch.testing.assert_close(out, layer(x), atol=2e-5, rtol=1e-4)
    others: list[tuple[Attend, Reason]] = [
        (lambda q, k, v: module.sageattn(q, k, v, "NHD", is_causal=True), Reason.CAUSAL),
        (lambda q, k, v: module.sageattn(q, k, v, "NHD", smooth_k=False), Reason.KERNEL),
        (lambda q, k, v: module.flash_attn_func(q, k, v, 0.2), Reason.DROPOUT),
        (lambda q, k, v: module.flash_attn_func(q, k, v, window_size=(4, 0)), Reason.CAUSAL),
    ]
    for attend, reason in others:
        (site,) = sites_of(Layer(attend).eval(), torch.randn(2, TOKENS, 24))
        assert (site.role, site.reason) in [(Role.SELF, reason)]


def test_a_kernel_is_no_other_cost() -> None:
    (graph,) = graphs_of(HEADS_LAST["FA2"], *qkv(heads_last=True))
    assert non_attention_cost(graph).bytes == 4 * 4 * 2 * HEADS * TOKENS * DIM
    assert len(find_sites(graph)) == 1
