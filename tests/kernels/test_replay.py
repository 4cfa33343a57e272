"""Replayed calls on a GPU are the calls themselves, bit by bit, whatever ran in between."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import random_mask, random_qkv
from torch import Tensor

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Result

PLAN = AttentionPlan(density=0.2, q_clusters=7, k_clusters=19)


def tensors_of(result: Result) -> list[Tensor]:
    rows = result.row_area.masked_fill(result.queries.sizes == 0, 0)
    return [result.out, result.lse, *result.queries, *result.keys, result.block_mask, rows]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhsd", "fused", "strided"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_replayed_call_is_the_call(layout: str, masked: bool, dim: int) -> None:
    from svg_ear_compile.kernels.gpu import replay

    replay.forget()
    settings: dict[str, Any] = {"text": (0, 5), "return_lse": True}
    calls = []
    for seed in range(5):
        q, k, v = random_qkv(seed, 1, (4, 2), (701, 701), dim, torch.bfloat16, "cuda", layout)
        if masked:
            settings["attn_mask"] = random_mask(seed, (True, False), (1, 2), 701, "cuda")
        cold = registry.sparse_attention(q, k, v, PLAN, **settings)
        warm = (cold.queries.centroids, cold.keys.centroids)
        for centroids in (None, warm):
            wanted = registry.sparse_attention(q, k, v, PLAN, centroids=centroids, **settings)
            got = replay.sparse_attention(q, k, v, PLAN, centroids=centroids, **settings)
            calls.append((got, wanted))
    assert len(replay._RECORDINGS) == 2
    for got, wanted in calls:  # later calls left the results of earlier ones alone
        assert got.out.stride() == wanted.out.stride()
        for mine, other in zip(tensors_of(got), tensors_of(wanted), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.gpu
def test_what_is_recorded_in_inference_mode_serves_outside_of_it() -> None:
    from svg_ear_compile.kernels.gpu import replay

    replay.forget()
    outs = []
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 64, torch.bfloat16, "cuda")
            outs.append(replay.sparse_attention(q, k, v, PLAN).out)
    assert len(replay._RECORDINGS) == 1
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.gpu
def test_large_calls_are_not_recorded_nor_those_without_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from svg_ear_compile.kernels.gpu import replay

    replay.forget()
    q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 64, torch.bfloat16, "cuda")
    monkeypatch.setattr(replay, "MOST_HELD", 5 * q.numel() * q.element_size())
    for _ in range(3):
        result = replay.sparse_attention(q, k, v, PLAN)
    assert result.out.isfinite().all()
    assert not replay._RECORDINGS
    replay.forget()
    q, k, v = (torch.zeros(1, 80, 6600, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert q.numel() * q.element_size() > replay.MOST_BYTES
    for _ in range(3):
        replay.sparse_attention(q, k, v, PLAN)
    assert not replay._RECORDINGS


@pytest.mark.gpu
def test_kinds_share_their_memory_and_not_their_results() -> None:
    from svg_ear_compile.kernels.gpu import replay

    replay.forget()
    q, k, v = random_qkv(0, 1, (4, 4), (2048, 2048), 64, torch.bfloat16, "cuda")
    held, found = [], []
    for turn in range(4):
        for density in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            plan = replace(PLAN, density=density)
            cold = replay.sparse_attention(q, k, v, plan)
            warm = (cold.queries.centroids, cold.keys.centroids)
            later = replay.sparse_attention(q, k, v, plan, centroids=warm, blocks=cold.blocks)
            if turn == 3:
                found += [(plan, None, None, cold), (plan, warm, cold.blocks, later)]
            held.append(replay.held_bytes())
    assert len(replay._RECORDINGS) == 12
    first = next(bytes_ for bytes_ in held if bytes_)
    assert held[-1] < 2 * first
    for plan, warm, blocks, got in found:
        wanted = registry.sparse_attention(q, k, v, plan, centroids=warm, blocks=blocks)
        for mine, other in zip(tensors_of(got), tensors_of(wanted), strict=True):
            assert torch.equal(mine, other)
    replay.forget()
    assert not replay._TENSORS
    assert not replay._WORKSPACES


def test_only_what_is_stale_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg_ear_compile.kernels.gpu import replay

    nothing: Any = None
    shared = torch.empty(3, dtype=torch.uint8)
    kept = OrderedDict(
        (name, replay._Recording(nothing, [shared], [shared], workspace, used))
        for name, workspace, used in (
            ("a", replay._Workspace(nothing, nothing, 40), 10),
            ("b", replay._Workspace(nothing, nothing, 47), 900),
            ("c", replay._Workspace(nothing, nothing, 10), 1000),
        )
    )
    monkeypatch.setattr(replay, "_RECORDINGS", kept)
    monkeypatch.setattr(replay, "MOST_HELD", 100)
    monkeypatch.setattr(replay, "STALE_CALLS", 500)
    assert not replay.has_room(1, 509)
    assert list(kept) == ["a", "b", "c"]
    assert replay.has_room(40, 1001)
    assert list(kept) == ["b", "c"]
    assert replay.held_bytes() == 60
    assert not replay.has_room(41, 1001)
    assert not replay.has_room(101, 5000)  # more than there can ever be


def test_a_cpu_records_nothing() -> None:
    from svg_ear_compile.kernels.gpu import replay

    assert not replay._is_worth_while(torch.zeros(1, 1, 8, 64))
