"""Which layer attends, where projections are no linear layers: quantised and custom models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from svg_ear_compile import bind
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

WIDTH, HEADS, TOKENS = 64, 2, 96


@torch.library.custom_op("svg_ear_tests::dequantised_linear", mutates_args=())
def dequantised_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """A projection by an operator that nothing is known of."""
    return x @ (packed.to(x.dtype) * scale).t()


@dequantised_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


class Matmul(nn.Module):
    """A linear layer that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.b = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t() + self.b


class Einsum(Matmul):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,ed->bne", x, self.w)


class Int8(nn.Module):
    """Weights in buffers, dequantised before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(-99, 99, (WIDTH, WIDTH), dtype=torch.int8))
        self.register_buffer("scale", torch.full((WIDTH, 1), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale)


class Float8(Int8):
    """A parameter in float8, as scaled checkpoints have them."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        weight = (torch.randn(WIDTH, WIDTH) / 8).to(torch.float8_e4m3fn)
        self.packed = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(WIDTH, 1), requires_grad=False)


class Custom(Int8):
    """Weights that only a custom operator understands."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.svg_ear_tests.dequantised_linear(x, self.packed, self.scale)


class Plain(nn.Module):
    """Weights that are neither parameters nor buffers, as loaders of foreign files leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = torch.randn(WIDTH, WIDTH) / 8

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.packed


class Attention(nn.Module):
    def __init__(self, projection: type[nn.Module]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (projection() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out(out)


class Block(nn.Module):
    def __init__(self, projection: type[nn.Module]) -> None:
        super().__init__()
        self.attn1 = Attention(projection)
        self.ffn = nn.ModuleDict({"net": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(F.layer_norm(x, (WIDTH,)))
        return x + self.ffn["net"](x)


class Model(nn.Module):
    def __init__(self, projection: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(projection) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x)
        return x


OPTIONS = {"density": 0.3, "min_tokens": 1, "q_clusters": 4, "k_clusters": 8}


def rewritten(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
    """A backend that rewrites and leaves it at that."""
    assert rewrite_graph(gm, Settings.parse(OPTIONS)).rewritten
    return gm.forward


def session_of(
    model: Model, regional: bool, budget: Any = None, inductor: bool = False
) -> tuple[Any, Any]:
    """The model as it is called, and its session."""
    torch.compiler.reset()
    how: dict[str, Any] = {"backend": rewritten, "fullgraph": True}
    if inductor:
        how |= {"backend": "svg_ear", "options": OPTIONS}
    if not regional:
        compiled: Any = torch.compile(model, **how)
        return compiled, bind(compiled, budget=budget)
    for block in model.blocks:
        block.compile(**how)
    return model, bind(model, budget=budget)


def run(model: Any) -> Tensor:
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.tensor([900.0]))


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("projection", [nn.Linear, Matmul, Einsum, Int8, Float8, Custom])
def test_a_layer_is_told_by_what_is_inside_of_it(projection: Any, regional: bool) -> None:
    made = (lambda: nn.Linear(WIDTH, WIDTH)) if projection is nn.Linear else projection
    inductor = (projection, regional) in ((Int8, True), (Float8, False))
    model, session = session_of(Model(made), regional, {"blocks.1.attn1": 1.0}, inductor)
    with session:
        run(model)
        report = session.report()
    assert [layer.path for layer in report] == [f"blocks.{i}.attn1" for i in range(3)]
    assert {layer.identity for layer in report} == {"parameter"}
    assert [layer.density is None for layer in report] == [False, True, False]


@pytest.mark.parametrize("regional", [False, True])
def test_a_parameter_outside_of_a_layer_is_no_proof(regional: bool) -> None:
    """The nearest linear layer is another layer's: of the block before, or of the embedding."""
    model, session = session_of(Model(Plain), regional)
    with session:
        run(model)
        report = session.report()
    assert {layer.identity for layer in report} == {"order"}
    paths = [layer.path for layer in report]
    if regional:
        assert paths == ["attn1@0", "attn1@1", "attn1@2"]
    else:
        assert paths == [f"blocks.{i}.attn1" for i in range(3)]
