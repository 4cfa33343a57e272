"""`torch.ops.svg_ear.attention`: its contract, its errors, its odd inputs and its memory.

Longer than other files: every part of the contract of the one operator has its test here.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from attention_cases import FORMS, LAYOUTS, SEEDS, Form, random_kinds, random_mask, random_qkv
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_ear_compile.kernels import op, registry
from svg_ear_compile.kernels.call import (
    UNBOUND,
    AttentionCall,
    CallRequest,
    active_source,
    calls_from,
)
from svg_ear_compile.kernels.kinds import EXACT, exact_at_ends, token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.reference import Result

attention = torch.ops.svg_ear.attention
PLAN = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7, first_iterations=2)
DENSE = AttentionPlan(density=1.0)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def qkv(
    device: str = "cpu",
    heads: tuple[int, int] = (4, 2),
    tokens: tuple[int, int] = (61, 45),
    dtype: torch.dtype = torch.float32,
    layout: str = "bhsd",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return random_qkv(seed, 2, heads, tokens, 32, dtype, device, layout)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"return_lse": True},
        {
            "exact_queries": torch.arange(61).expand(2, 61) % 7 == 0,
            "exact_keys": torch.arange(45)[None] < 3,
            "clustered_queries": 52,
            "clustered_keys": 42,
            "scale": 0.1,
        },
        {"attn_mask": torch.arange(45).expand(2, 1, 1, 45) < 40},
        {"layer": torch.zeros(3)},
    ],
    ids=["plain", "lse", "exact", "mask", "layer"],
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@DEVICES
def test_opcheck(device: str, layout: str, arguments: dict[str, Any]) -> None:
    given_here = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    torch.library.opcheck(
        attention.default, qkv(device, layout=layout), {"plan": PLAN.encode(), **given_here}
    )


def wrong(**changed: Any) -> dict[str, Any]:
    q, k, v = qkv()
    return {"q": q, "k": k, "v": v, **changed}


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (wrong(q=torch.zeros(2, 61, 32)), ValueError, "q"),
        (wrong(k=torch.zeros(2, 2, 45, 32, dtype=torch.float64)), TypeError, "k"),
        (wrong(q=torch.zeros(2, 4, 61, 32, dtype=torch.int32)), TypeError, "q"),
        (wrong(v=torch.zeros(2, 2, 45, 32, dtype=torch.float16)), TypeError, "v"),
        (wrong(k=torch.zeros(2, 2, 45, 40)), ValueError, "k"),
        (wrong(v=torch.zeros(2, 2, 44, 32)), ValueError, "v"),
        (wrong(k=torch.zeros(1, 2, 45, 32), v=torch.zeros(1, 2, 45, 32)), ValueError, "k"),
        (wrong(k=torch.zeros(2, 3, 45, 32), v=torch.zeros(2, 3, 45, 32)), ValueError, "k"),
        (wrong(k=torch.zeros(2, 2, 45, 32, device="meta")), ValueError, "k"),
        (
            {name: torch.zeros(1, 1, 9, 33) for name in "qkv"},
            ValueError,
            "q",
        ),
        (wrong(exact_queries=torch.zeros(1, 61)), TypeError, "exact_queries"),
        (wrong(exact_keys=torch.ones(1, 61, dtype=torch.bool)), ValueError, "exact_keys"),
        (wrong(exact_keys=torch.ones(45, dtype=torch.bool)), ValueError, "exact_keys"),
        (
            wrong(exact_queries=torch.ones(2, 61, dtype=torch.bool, device="meta")),
            ValueError,
            "exact_queries",
        ),
        (wrong(attn_mask=torch.zeros(2, 1, 1, 45)), TypeError, "attn_mask"),
        (wrong(attn_mask=torch.ones(2, 1, 61, 45, dtype=torch.bool)), ValueError, "attn_mask"),
        (wrong(attn_mask=torch.ones(2, 4, 1, 45, dtype=torch.bool)), ValueError, "attn_mask"),
        (wrong(attn_mask=torch.ones(45, dtype=torch.bool)), ValueError, "attn_mask"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    check = {
        **dict.fromkeys(("attn_mask", "exact_queries", "exact_keys")),
        **arguments,
    }
    with pytest.raises(error, match=rf"\b{named}\b") as caught:
        op.check_arguments(**check)
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("count", [0, -1])
def test_no_clustered_token_is_dense_and_no_error(count: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 45, 32)
    exact = torch.ones(1, 45, dtype=torch.bool)
    out, lse = op.attention(
        q, k, v, exact_keys=exact, plan="{}", clustered_keys=count, return_lse=True
    )
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert lse.isfinite().all()


def test_wrong_arguments_are_refused_by_the_operator() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="v must have the shape of k"):
        attention(q, k, v[:, :, :-1])
    with pytest.raises(ValueError, match="plan must be a JSON object"):
        attention(q, k, v, plan='{"densty": 0.1}')


@given(
    seed=SEEDS,
    heads=st.sampled_from(((2, 2), (4, 2))),
    tokens=st.tuples(st.sampled_from((1, 17, 61)), st.sampled_from((1, 17, 61))),
    layout=st.sampled_from(LAYOUTS),
    density=st.sampled_from((0.0, 0.4, 1.0)),
    exact=st.sampled_from(((0.0, 0.0), (0.3, 0.0), (0.1, 0.9))),
    masked=st.booleans(),
)
@DEVICES
def test_output_has_the_layout_that_the_fake_promises(
    device: str, seed: int, heads, tokens, layout: str, density: float, exact, masked: bool
) -> None:
    q, k, v = qkv(device, heads, tokens, torch.float16, layout, seed)
    mask = random_mask(seed, (True, True), (2, heads[1]), tokens[1], device) if masked else None
    arguments = {
        "plan": AttentionPlan(density=density).encode(),
        "return_lse": True,
    }
    kinds = random_kinds(seed, mask, 2, tokens, exact, device)
    of_tokens = [None if x is None else x[:, 0] == EXACT for x in kinds[:2]]
    given_here = (q, k, v, mask, None, None, None, None, *of_tokens)
    found = attention(*given_here, **arguments)
    on_meta = [None if t is None else t.to("meta") for t in given_here]
    on_meta[:3] = [torch.empty_strided(t.shape, t.stride(), device="meta", dtype=t.dtype)
                   for t in (q, k, v)]  # fmt: skip
    for real, promised in zip(found, attention(*on_meta, **arguments), strict=True):
        assert real.shape == promised.shape
        assert real.dtype == promised.dtype
        assert real.stride() == promised.stride()
        assert real.isfinite().all()


@given(seed=SEEDS, masked=st.booleans(), layout=st.sampled_from(LAYOUTS))
@DEVICES
def test_density_one_is_bitwise_sdpa_whatever_is_remembered(
    device: str, seed: int, masked: bool, layout: str
) -> None:
    q, k, v = qkv(device, (4, 4), (61, 45), torch.float16, layout, seed)
    mask = random_mask(seed, (True, False), (2, 4), 45, device) if masked else None
    wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=32**-0.5)
    remembered = torch.full((2, 4, 1, 32), 9.0)
    with calls_from(Always(AttentionCall(DENSE, centroids=(remembered, remembered)))):
        found, _ = attention(q, k, v, mask, plan=PLAN.encode())
    assert torch.equal(found, wanted)
    assert torch.equal(attention(q, k, v, mask, plan=DENSE.encode())[0], wanted)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@DEVICES
def test_a_float32_mask_beside_narrower_queries_is_not_rounded(
    device: str, dtype: torch.dtype, return_lse: bool
) -> None:
    q, k, v = qkv(device, (4, 4), (61, 45), dtype)
    mask = 300 + 8 * torch.randn(2, 1, 61, 45, device=device)
    mask[:, :, 5] = torch.finfo(torch.float32).min  # in float16 this would be -inf
    proof = torch.ops.svg_ear.key_padding(mask)
    found, lse = attention(q, k, v, mask, None, *proof, plan=PLAN.encode(), return_lse=return_lse)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, mask))
    logits = (q.double() @ k.double().mT) * 32**-0.5 + mask
    if return_lse:
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-2, atol=0.05)


@given(seed=SEEDS, masked=st.booleans())
@DEVICES
def test_density_one_log_sum_exp(device: str, seed: int, masked: bool) -> None:
    q, k, v = qkv(device, seed=seed)
    mask = random_mask(seed, (False, True), (2, 2), 45, device) if masked else None
    _, lse = attention(q, k, v, mask, plan=DENSE.encode(), return_lse=True)
    logits = 32**-0.5 * q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3)
    if mask is not None:
        logits = logits.masked_fill(~mask.repeat_interleave(2, 1), -math.inf)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


class Always:
    """A source that answers every request alike, and keeps what it was asked and what came out."""

    def __init__(self, *calls: AttentionCall) -> None:
        self.answer = calls
        self.requests: list[CallRequest] = []
        self.results: list[Result] = []

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        self.requests.append(request)
        yield from self.answer

    def finished(self, call: AttentionCall, result: Result) -> None:
        assert call in self.answer
        self.results.append(result)


def rows_close(found: Tensor, wanted: Tensor, form: Form, dtype: torch.dtype) -> None:
    tolerance = 2e-3 if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(
        found.float(), wanted.float(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("compensation", get_args(Compensation))
@EVERY_FORM
def test_a_row_without_keys_gives_zero_and_minus_infinity(form: Form, compensation: str) -> None:
    q, k, v = qkv(form.device, heads=(2, 1), dtype=torch.float16)
    mask = torch.ones(2, 1, 1, 45, dtype=torch.bool, device=form.device)
    mask[1] = False
    plan = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7, compensation=compensation)
    found = form(q, k, v, plan, kinds=token_kinds(mask), return_lse=True)
    assert found.out[0].isfinite().all()
    assert (found.out[1] == 0).all()
    assert (found.lse[1] == -math.inf).all()
    assert found.lse[0].isfinite().all()
    # The definition of PyTorch; its fused kernels leave such rows as they come.
    with sdpa_kernel(SDPBackend.MATH):
        dense = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert (dense[1] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@EVERY_FORM
def test_a_non_finite_query_spoils_only_its_own_row(form: Form, bad: float) -> None:
    q, k, v = qkv(form.device, heads=(2, 1), dtype=torch.float16)
    q[0, 1, 7, 3] = bad
    found = form(q, k, v, PLAN).out
    spoiled = torch.zeros(2, 2, 61, dtype=torch.bool, device=form.device)
    spoiled[0, 1, 7] = True
    assert found[~spoiled].isfinite().all()
    assert found[spoiled].isnan().any()
    # It is out of the clusters: the others are what they are without it.
    other = q.clone()
    other[0, 1, 7, 3] = math.nan
    assert torch.equal(form(other, k, v, PLAN).out[~spoiled], found[~spoiled])


@EVERY_FORM
def test_a_non_finite_key_or_value_acts_as_in_dense_attention(form: Form) -> None:
    q, k, v = qkv(form.device, heads=(2, 2), dtype=torch.float16)
    k[0, 0, 5, 2] = math.nan
    found = form(q, k, v, PLAN).out
    assert found[0, 0].isnan().all()
    assert found[0, 1].isfinite().all()
    assert found[1].isfinite().all()
    q, k, v = qkv(form.device, heads=(2, 2), dtype=torch.float16)
    v[1, 1, 9, 4] = math.nan
    found = form(q, k, v, PLAN).out
    dense = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(found.isnan(), dense.isnan())


@pytest.mark.parametrize("compensation", get_args(Compensation))
@EVERY_FORM
def test_one_token_and_more_clusters_than_tokens(form: Form, compensation: str) -> None:
    plan = AttentionPlan(density=0.0, q_clusters=9, k_clusters=9, compensation=compensation)
    for tokens in ((1, 1), (5, 3)):
        q, k, v = qkv(form.device, (2, 2), tokens, torch.float16)
        found = form(q, k, v, plan)
        # Every key has a cluster of its own or shares one with another: finite, and dense if alone.
        assert found.out.isfinite().all()
        assert found.queries.centroids.shape[2] == tokens[0]
        if tokens == (1, 1):
            torch.testing.assert_close(found.out, v, rtol=2e-3, atol=2e-3)


@EVERY_FORM
def test_density_zero_routes_nothing_and_text_keeps_its_keys(form: Form) -> None:
    q, k, v = qkv(form.device, (2, 2), (61, 61), torch.float16)
    plan = AttentionPlan(density=0.0, q_clusters=3, k_clusters=7)
    found = form(q, k, v, plan, kinds=exact_at_ends(q, k, 4, 2), return_lse=True)
    assert not found.block_mask.any()
    dense = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    for text in (slice(0, 4), slice(59, 61)):
        rows_close(found.out[:, :, text], dense[:, :, text], form, torch.float16)


@given(seed=SEEDS)
@pytest.mark.parametrize("form", [pytest.param(FORMS[0].values[0], id="cpu")])
def test_nearly_coherent_blocks_keep_their_order(form: Form, seed: int) -> None:
    check_nearly_coherent_blocks(form, seed)


@pytest.mark.parametrize("form", FORMS[1:])
def test_nearly_coherent_blocks_keep_their_order_in_kernels(form: Form) -> None:
    check_nearly_coherent_blocks(form, 11)


def check_nearly_coherent_blocks(form: Form, seed: int) -> None:
    """Errors a millionth of their terms decide the route: expanded naively they would cancel."""
    generator = torch.Generator().manual_seed(seed)
    centers = 6 * torch.randn(1, 1, 6, 32, generator=generator)
    labels = torch.arange(60) % 6
    spread = torch.tensor([1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])[labels]
    k = centers[:, :, labels]
    v = 10 + spread[:, None] * torch.randn(1, 1, 60, 32, generator=generator)
    q = 1e-3 * torch.randn(1, 1, 30, 32, generator=generator)
    q, k, v = (t.to(form.device) for t in (q, k, v))
    plan = AttentionPlan(density=0.5, q_clusters=1, k_clusters=6)
    start = (q[:, :, :1].float(), centers.to(form.device))
    found = form(q, k, v, plan, centroids=start)
    assert torch.equal(found.keys.labels[0, 0].cpu().long(), labels)
    assert found.block_mask[0, 0, 0].tolist() == [False, False, False, True, True, True]


@EVERY_FORM
def test_same_inputs_give_the_same_bits(form: Form) -> None:
    q, k, v = qkv(form.device, heads=(2, 1), dtype=torch.float16)
    first = form(q, k, v, PLAN, return_lse=True)
    second = form(q, k, v, PLAN, return_lse=True)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    assert torch.equal(first.block_mask, second.block_mask)


@pytest.mark.parametrize("compensation", get_args(Compensation))
@pytest.mark.parametrize("form", FORMS[1:])
def test_a_few_heads_at_a_time_give_the_same_bits(
    form: Form, compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = random_qkv(0, 1, (4, 2), (61, 45), 32, torch.float16, form.device)
    plan = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7, compensation=compensation)
    together = form(q, k, v, plan, return_lse=True)
    from svg_ear_compile.kernels.gpu import attention

    monkeypatch.setattr(attention, "WORKSPACE_FLOOR", 1)
    monkeypatch.setattr(attention, "WORKSPACE_FRACTION", 0.0)
    apart = form(q, k, v, plan, return_lse=True)
    for name in ("out", "lse", "block_mask", "row_area"):
        assert torch.equal(getattr(together, name), getattr(apart, name))


@DEVICES
def test_a_call_starts_from_what_its_source_gives(device: str) -> None:
    q, k, v = qkv(device)
    first = registry.sparse_attention(q, k, v, PLAN)
    centroids = (first.queries.centroids, first.keys.centroids)
    for blocks in (None, first.blocks):
        source = Always(AttentionCall(PLAN, centroids=centroids, blocks=blocks))
        with calls_from(source):
            found, _ = attention(q, k, v, plan=DENSE.encode(), site="s", layer_owner="to_q")
        wanted = registry.sparse_attention(q, k, v, PLAN, centroids=centroids, blocks=blocks)
        assert torch.equal(found, wanted.out)
        (result,) = source.results
        assert torch.equal(result.block_mask, wanted.block_mask)
        (request,) = source.requests
        assert (request.plan, request.site, request.layer_owner) == (DENSE, "s", "to_q")
        assert (request.q_shape, request.k_shape) == (tuple(q.shape), tuple(k.shape))
        assert request.device == q.device


@DEVICES
@pytest.mark.parametrize("masked", ["no", "alike", "each"])
def test_a_batch_is_carried_out_in_the_parts_that_its_source_says(device: str, masked: str) -> None:
    q, k, v = qkv(device)
    mask = None
    if masked != "no":
        mask = random_mask(0, (masked == "each", False), (2, 2), 45, device)
    parts = (slice(0, 1), slice(1, 2))
    plans = (PLAN, replace(PLAN, density=0.6))
    source = Always(*(AttentionCall(plan, rows) for plan, rows in zip(plans, parts, strict=True)))
    with calls_from(source):
        out, lse = attention(q, k, v, mask, return_lse=True)
    assert len(source.results) == 2
    for rows, plan in zip(parts, plans, strict=True):
        mine = mask if mask is None or masked == "alike" else mask[rows]
        wanted = attention(q[rows], k[rows], v[rows], mine, plan=plan.encode(), return_lse=True)
        assert torch.equal(out[rows], wanted[0])
        assert torch.equal(lse[rows], wanted[1])


def test_a_source_hears_where_a_call_can_only_be_dense() -> None:
    q, k, v = qkv()
    source = Always(AttentionCall(PLAN))
    with calls_from(source):
        found, _ = attention(q, k, v, plan=replace(PLAN, min_tokens=46).encode())
        attention(q, k, v, plan=replace(PLAN, min_tokens=45).encode())
        attention(q, k, v, clustered_keys=0)
    assert [request.dense_only for request in source.requests] == [True, False, True]
    assert len(source.results) == 1
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("plan", [PLAN, DENSE])
def test_what_is_no_padding_is_as_it_was_given(plan: AttentionPlan) -> None:
    q, k, v = qkv()
    keys, rows = random_mask(0, (True, False), (2, 2), 45, "cpu"), torch.rand(2, 1, 61, 1) < 0.7
    other, lse = torch.randn_like(q), torch.randn(q.shape[:3])
    terms = {"plan": plan.encode(), "return_lse": True}
    for proven in (False, True):
        proof = {"padding_keys": keys, "padding_rows": rows, "padding_proven": torch.tensor(proven)}
        found = attention(q, k, v, **proof, otherwise=other, otherwise_lse=lse, **terms)
        wanted = other, lse * math.log(2)
        if proven:
            wanted = attention(q, k, v, keys, padding_rows=rows, **terms)
        torch.testing.assert_close(found, wanted)
        assert not any(a is b for a, b in zip(found, (other, lse), strict=True))


def test_nothing_is_remembered_without_a_source() -> None:
    q, k, v = qkv()
    first, _ = attention(q, k, v, plan=PLAN.encode())
    second, _ = attention(q, k, v, plan=PLAN.encode())
    assert torch.equal(first, second)


def leave_early(source: Always) -> None:
    with calls_from(source):
        assert active_source() is source
        raise RuntimeError("left early")


def test_sources_nest() -> None:
    outer, inner = Always(AttentionCall(PLAN)), Always(AttentionCall(DENSE))
    with calls_from(outer):
        assert active_source() is outer
        with pytest.raises(RuntimeError, match="left early"):
            leave_early(inner)
        assert active_source() is outer
    assert active_source() is UNBOUND


def test_a_source_is_not_active_in_other_threads_and_stays_with_its_coroutine() -> None:
    source = Always(AttentionCall(PLAN))
    seen: list[object] = []
    with calls_from(source):
        thread = threading.Thread(target=lambda: seen.append(active_source()))
        thread.start()
        thread.join()
    assert seen == [UNBOUND]

    async def inside(source: Always) -> None:
        with calls_from(source):
            for _ in range(3):
                await asyncio.sleep(0)
                assert active_source() is source

    async def both() -> None:
        await asyncio.gather(inside(source), inside(Always()))

    asyncio.run(both())
    assert active_source() is UNBOUND


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_a_call_is_that_of_its_tensors() -> None:
    here = [t.to("cuda:0") for t in qkv()]
    there = [t.to("cuda:1") for t in here]
    with torch.cuda.device(0):
        wanted, _ = attention(*here, plan=PLAN.encode())
        found, _ = attention(*there, plan=PLAN.encode())
    assert found.device == there[0].device
    assert torch.equal(found.cpu(), wanted.cpu())


def test_the_device_of_a_call_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Watching(Always):
        def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
            assert current == [request.device]
            yield from super().calls(request)

    monkeypatch.setattr(op, "on_device", guard)
    source = Watching(AttentionCall(PLAN))
    with calls_from(source):
        attention(*qkv())
    assert len(source.results) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_source_sees_the_parameter_itself(backend: str) -> None:
    plan = PLAN.encode()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            q = x @ self.weight
            return attention(q, x, x, None, self.weight, plan=plan, site="s")[0] + 1

    layer = Layer()
    x = torch.randn(1, 2, 45, 32)
    source = Always(AttentionCall(PLAN))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad(), calls_from(source):
        found = compiled(x)
        layer.weight.data = torch.randn(32, 32)
        compiled(x)
        wanted = layer(x)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)
    assert len(source.requests) == 4
    assert all(request.layer is layer.weight for request in source.requests)
    assert not torch.equal(found, wanted)


def test_gradients_are_refused() -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    out, _ = attention(q, k, v, plan=PLAN.encode())
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
