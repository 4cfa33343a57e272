"""FLOPs and bytes of modules whose cost is known by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_graphs import graphs_of

from svg_ear_compile.passes.workload import NonAttentionCost, non_attention_cost


def cost(fn: Callable[..., Tensor], *args: Tensor) -> NonAttentionCost:
    (graph,) = graphs_of(fn, *args)
    return non_attention_cost(graph)


def test_a_linear_layer() -> None:
    found = cost(nn.Linear(16, 24), torch.randn(2, 10, 16))
    assert found.flops == 2 * (2 * 10 * 24) * 16
    assert found.bytes == 4 * (2 * 10 * 16 + 16 * 24 + 24 + 2 * 10 * 24)


def test_a_convolution_with_groups() -> None:
    found = cost(nn.Conv2d(8, 12, 3, groups=4, padding=1), torch.randn(1, 8, 5, 7))
    assert found.flops == 2 * (12 * 5 * 7) * (2 * 3 * 3)


def test_addmm_holds_its_weight_the_other_way_round() -> None:
    tensors = (torch.randn(24), torch.randn(10, 16), torch.randn(16, 24))
    assert cost(lambda b, x, w: torch.addmm(b, x, w), *tensors).flops == 2 * (10 * 24) * 16


def test_a_projected_parameter_is_not_taken_for_the_weight() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(5, 16))
            self.project = nn.Linear(16, 24)

        def forward(self) -> Tensor:
            return self.project(self.tokens)

    assert cost(Learned()).flops == 2 * (5 * 24) * 16


@pytest.mark.parametrize("tokens", [32, 64])
def test_attention_is_not_part_of_the_rest(tokens: int) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    found = cost(call, *(torch.randn(1, 2, tokens, 32) for _ in range(3)))
    assert found == NonAttentionCost(flops=0, bytes=3 * 4 * 2 * tokens * 32)
