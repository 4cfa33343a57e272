"""A call of the GPU path launches few kernels and operations, and a change does not add to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CUDA, INTERPRETER, needs_interpreter, random_qkv
from counted_launches import counted_launches

from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan

# Launches without and with text tokens.
MOST = {"cold": (65, 81), "recomputed": (25, 25), "reused": (16, 16)}


@needs_interpreter
@pytest.mark.parametrize("with_text", [False, True])
def test_launches_of_a_call_are_bounded(with_text: bool) -> None:
    q, k, v = random_qkv(0, 1, (1, 1), (90, 90), 32, torch.float16, "cpu")
    kinds = exact_at_ends(q, k, 0, 5 if with_text else 0)
    more: dict[str, Any] = {}
    INTERPRETER(q, k, v, AttentionPlan(), kinds=kinds)  # a first call also draws the strata
    for start, most in MOST.items():
        with counted_launches() as launches:
            made = INTERPRETER(q, k, v, AttentionPlan(), kinds=kinds, **more)
        assert launches.total <= most[with_text], f"{start}: {launches}"
        more["centroids"] = (made.queries.centroids, made.keys.centroids)
        if start == "recomputed":
            more["blocks"] = made.blocks


@pytest.mark.gpu
def test_launches_on_the_device_are_those_counted_here() -> None:
    q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 128, torch.bfloat16, "cuda")
    cold = CUDA(q, k, v, AttentionPlan())
    more: dict[str, Any] = {"centroids": (cold.queries.centroids, cold.keys.centroids)}
    for start in ("recomputed", "reused"):
        CUDA(q, k, v, AttentionPlan(), **more)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            CUDA(q, k, v, AttentionPlan(), **more)
            torch.cuda.synchronize()
        ran = {
            e.key: e.count for e in profile.key_averages()
            if e.self_device_time_total > 0 and "FillFunctor" not in e.key  # of poisoned memory
        }  # fmt: skip
        assert sum(ran.values()) <= MOST[start][False], ran
        more["blocks"] = cold.blocks
