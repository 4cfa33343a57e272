"""A report does not depend on what was compiled or explained before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svg_ear_compile import explain

OPTIONS = {"min_tokens": 64, "density": 0.3}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Broken(nn.Module):
    """Two blocks in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


def test_a_model_that_breaks_is_explained_beyond_the_recompile_limit() -> None:
    torch._dynamo.reset()
    model, x = Broken(), torch.randn(1, 128, 64)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        found = explain(model, x, options=OPTIONS)
        assert [site.layer for site in found.sites] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_explained_and_not_compiled_again(in_place: bool) -> None:
    calls: list[object] = []

    def count(gm: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        calls.append(gm)
        return gm.forward

    torch._dynamo.reset()
    model: Any = Block()
    if in_place:
        model.compile(backend=count)
    else:
        model = torch.compile(model, backend=count)
    x = torch.randn(1, 128, 64)
    with torch.no_grad():
        model(x)
        assert len(explain(model, x, options=OPTIONS).sites) == 1
        model(x)
    assert len(calls) == 1
