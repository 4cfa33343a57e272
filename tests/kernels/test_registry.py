"""The choice of an implementation for a call, and the answers to a request for one."""

from __future__ import annotations

import logging

import pytest
import torch
from attention_cases import needs_interpreter, random_qkv

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan

PLAN = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7)


def test_a_cpu_call_is_served_by_the_cpus_and_the_choice_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    q, k, v = random_qkv(0, 1, (2, 2), (61, 61), 96, torch.float32, "cpu")
    registry._say.cache_clear()
    with caplog.at_level(logging.INFO, "svg_ear_compile.kernels.registry"):
        assert registry.choose(q, k, v).name == "cpu"
        assert registry.choose(q, k, v).name == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "cpu, torch.float32, head dim 96: served by 'cpu'"
    ]


def test_a_call_that_nobody_serves_names_what_each_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(0, 1, (2, 2), (61, 61), 64, torch.float16, "cpu")
    monkeypatch.setitem(registry._PREFERRED, "cpu", ("hopper",))
    with pytest.raises(ValueError, match=r"serves this call \(hopper: needs sm_90"):
        registry.choose(q, k, v)
    with pytest.raises(ValueError, match="no implementation 'blackwell'; there are cpu, hopper"):
        registry.get("blackwell")


@needs_interpreter
def test_hopper_says_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg_ear_compile.kernels.gpu import attention

    monkeypatch.setattr(attention, "architecture", lambda device: attention.HOPPER)
    monkeypatch.setattr(attention.triton.knobs.runtime, "interpret", False)
    why = attention.HOPPER_GLUON.unsupported

    def of(dim: int, dtype: torch.dtype, tokens: int = 61, offset: int = 0) -> str | None:
        wide = torch.empty(1, 2, tokens, dim + 16, dtype=dtype)
        part = wide[..., offset : offset + dim]
        return why(part, part, part)

    assert of(128, torch.bfloat16) is None
    assert "no tile for head dim 96" in str(of(96, torch.bfloat16))
    assert "no tile for head dim 128 in torch.float32" in str(of(128, torch.float32))
    assert "multiples of 16 bytes" in str(of(64, torch.float16, offset=3))
    rows_apart = (0, 0, 2**30, 1)
    far = torch.empty_strided((1, 1, 3, 128), rows_apart, device="meta", dtype=torch.bfloat16)
    assert "2^31 elements" in str(why(far, far, far))


def test_attend_is_pure() -> None:
    """The second stage gives the same bits for the same arguments, and modifies none of them."""
    q, k, v = random_qkv(3, 2, (4, 2), (61, 45), 32, torch.float32, "cpu")
    used = registry.choose(q, k, v)
    routed = used.cluster_and_route(
        q, k, v, PLAN, kinds=exact_at_ends(q, k, 2, 1), scale=0.2, centroids=None, blocks=None
    )
    before = [
        t.clone() for t in (*routed.queries, *routed.keys, routed.block_mask, routed.row_area)
    ]
    outs = [used.attend(q, k, v, routed, "gaussian", scale=0.2, return_lse=True) for _ in "ab"]
    assert all(torch.equal(x, y) for x, y in zip(*outs, strict=True))
    after = (*routed.queries, *routed.keys, routed.block_mask, routed.row_area)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_block_lists_are_the_block_mask() -> None:
    q, k, v = random_qkv(3, 2, (4, 2), (61, 45), 32, torch.float32, "cpu")
    routed = registry.choose(q, k, v).cluster_and_route(
        q, k, v, PLAN, kinds=ALL_CLUSTERED, scale=0.2, centroids=None, blocks=None
    )
    kv_indptr, kv_indices = routed.block_lists()
    rows = routed.block_mask.flatten(0, 2)
    assert kv_indptr.shape == (2 * 4 * 3 + 1,)
    assert kv_indptr.dtype == kv_indices.dtype == torch.int32
    for r, row in enumerate(rows):
        row_indices = kv_indices[kv_indptr[r] : kv_indptr[r + 1]].tolist()
        assert row_indices == row.nonzero().squeeze(1).tolist()
