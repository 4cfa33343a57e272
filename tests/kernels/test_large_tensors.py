"""Offsets past 2^31 elements: many heads, and one head whose rows lie far apart."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from benchmarks.attention.gate import GATE, definition_rows, relative_error
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.registry import sparse_attention


def draw(*shape: int) -> Tensor:
    """Normal numbers in bfloat16, drawn in slices, since float32 would take twice the memory."""
    generator = torch.Generator("cuda").manual_seed(0)
    out = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    for part in out.flatten(0, 1):
        part.copy_(torch.randn(part.shape, generator=generator, device="cuda"))
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("compensation", get_args(Compensation))
@pytest.mark.parametrize(
    ("heads", "tokens", "row"),
    [(132, 131072, 1), (1, 70000, 32768)],
    ids=["many heads", "rows far apart"],
)
def test_the_last_head_is_the_definitions(
    heads: int, tokens: int, row: int, compensation: str
) -> None:
    dim = 128
    if row == 1:
        q, k, v = (draw(1, heads, tokens, dim) for _ in range(3))
    else:  # a slice of wider memory, as a fused projection of many heads makes it
        wide = torch.zeros(tokens, row, device="cuda", dtype=torch.bfloat16)
        q, k, v = (wide[:, i * dim : (i + 1) * dim].unflatten(1, (1, dim)) for i in range(3))
        for tensor in (q, k, v):
            tensor.copy_(torch.randn(tokens, 1, dim, device="cuda"))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    last = (tokens - 1) * q.stride(2) + (heads - 1) * q.stride(1)
    assert last > 2**31
    plan = AttentionPlan(
        density=0.03, compensation=compensation, q_clusters=60, k_clusters=120,
        first_iterations=1,
    )  # fmt: skip
    result = sparse_attention(q, k, v, plan)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 1])
    wanted = definition_rows(q, k, v, result, plan, (0, heads - 1), rows)
    assert relative_error(result.out[0, -1][rows], wanted) < GATE
