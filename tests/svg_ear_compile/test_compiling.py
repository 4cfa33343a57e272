"""What the rewrite costs a user while compiling: nothing that Inductor alone would not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from transformer_models import TOKENS, WIDTH, Stack, wan

import svg_ear_compile
from svg_ear_compile import Explanation, explain
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings


class Counting:
    """A backend that counts its calls and runs the graph as it is, or rewritten."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        self.settings = None if options is None else Settings.parse(options)
        self.calls = 0

    def __call__(self, gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        self.calls += 1
        if self.settings is not None:
            assert rewrite_graph(gm, self.settings).sites
        return gm.forward


def calls_for(lengths: Sequence[int], options: dict[str, Any] | None, marked: bool) -> int:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend = Stack(), Counting(options)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in lengths:
        x = torch.randn(1, tokens, WIDTH)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            out = compiled(x, torch.tensor([500.0]))
            if options is None or tokens < options["min_tokens"]:
                torch.testing.assert_close(out, model(x, torch.tensor([500.0])))
    return backend.calls


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("lengths", [(96, 160, 128, 40, 300), (40, 300, 299), (300, 40, 300)])
def test_no_more_compilations_than_without(lengths: Sequence[int], marked: bool) -> None:
    """Lengths on both sides of the shortest that goes sparse."""
    wanted = calls_for(lengths, None, marked)
    assert wanted == (1 if marked else 2)
    assert calls_for(lengths, {"min_tokens": 120, "density": 0.3}, marked) == wanted


def test_one_graph_decides_by_the_length_of_each_call() -> None:
    torch._dynamo.reset()
    model = Stack()
    options = {"min_tokens": 120, "density": 0.3, "q_clusters": 4, "k_clusters": 8}
    compiled = torch.compile(model, backend="svg_ear", dynamic=True, options=options)
    with torch.no_grad(), svg_ear_compile.bind(compiled) as session:
        for tokens, sparse in ((96, False), (160, True), (119, False), (120, True)):
            x, timestep = torch.randn(1, tokens, WIDTH), torch.tensor([500.0])
            with torch.compiler.set_stance("default" if tokens == 96 else "fail_on_recompile"):
                found = compiled(x, timestep)
            assert all((layer.density is not None) == sparse for layer in session.report())
            assert torch.allclose(found, model(x, timestep), rtol=1e-4, atol=1e-4) == (not sparse)


@pytest.mark.parametrize(
    "option",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        pytest.param({"cpp_wrapper": True}, marks=pytest.mark.slow),
    ],
)
def test_modes_and_options_of_inductor_go_through(option: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, x = Stack(), torch.randn(1, TOKENS, WIDTH)
    options = {"min_tokens": TOKENS, "density": 0.999999, **option}
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=options)
        found = compiled(x, torch.tensor([500.0]))
        torch.testing.assert_close(found, model(x, torch.tensor([500.0])), rtol=1e-4, atol=1e-4)


class Named(nn.Module):
    """Layers whose names hold what stands for itself in no C++ string."""

    def __init__(self) -> None:
        super().__init__()
        for name in ('a"b', "c\\d", "two\nlines", "100%s", "what??/", "層"):
            self.add_module(name, MaskedBlock())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.children():
            x = block(x, None)
        return x * timestep


@pytest.mark.parametrize(
    "wrapper", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["python", "C++"]
)
def test_layers_may_have_any_name(wrapper: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(1, TOKENS, WIDTH)
    options = {"min_tokens": TOKENS, "density": 0.999999, "cpp_wrapper": wrapper}
    compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=options)
    with torch.no_grad(), svg_ear_compile.bind(compiled) as session:
        given = x, torch.tensor([0.5])
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-4)
        assert [layer.path for layer in session.report()] == [n for n, _ in model.named_children()]


class Masked(nn.Module):
    """Blocks that are compiled one by one and share a square mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x * timestep


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + out.transpose(1, 2).flatten(2)


def test_blocks_compiled_one_by_one_never_trust_an_old_proof() -> None:
    torch._dynamo.reset()
    model, x = Masked(), torch.randn(2, TOKENS, WIDTH)
    mask = (torch.arange(TOKENS) < torch.tensor([[100], [TOKENS]]))[:, None, None]
    mask = mask.expand(2, 1, TOKENS, TOKENS).clone()
    options = {"min_tokens": TOKENS, "density": 0.999999, "q_clusters": 3, "k_clusters": 5}
    with torch.no_grad():
        wanted = model(x, mask, torch.tensor(1.0))
        for block in model.blocks:
            block.compile(backend="svg_ear", fullgraph=True, options=options)
        with svg_ear_compile.bind(model) as session:
            found = model(x, mask, torch.tensor(1.0))
            layers = [(layer.path, layer.density is not None) for layer in session.report()]
        mask.data[:, :, 5, 8:40] = False  # no padding any more, and no counter has moved
        other = model(x, mask, torch.tensor(1.0))
        with torch.compiler.set_stance("force_eager"):
            other_wanted = model(x, mask, torch.tensor(1.0))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, other_wanted, rtol=1e-4, atol=1e-4)
    assert layers == [(f"blocks.{i}", True) for i in range(3)]


def told(found: Explanation) -> list[tuple[str, str, str | None]]:
    return [(site.site, site.role, site.reason) for site in found.sites]


def assert_the_same_compiled(model: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
    torch._dynamo.reset()
    options = {"min_tokens": 64, "density": 0.999999}
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=options)
        found, wanted = compiled(*inputs, **kwargs)[0], model(*inputs, **kwargs)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fused_projections_are_read_like_separate_ones(through_aot: None) -> None:
    model, inputs, kwargs = wan()
    apart = explain(model, *inputs, options={"min_tokens": 64}, **kwargs)
    model.fuse_qkv_projections()
    fused = explain(model, *inputs, options={"min_tokens": 64}, **kwargs)
    assert told(fused) == told(apart)
    assert_the_same_compiled(model, inputs, kwargs)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_seen_through(merged: bool, through_aot: None) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    model, inputs, kwargs = wan()
    plain = explain(model, *inputs, options={"min_tokens": 64}, **kwargs)
    targets = ["to_q", "to_k", "to_v"]
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    if merged:
        model.fuse_lora()
    model.eval()
    adapted = explain(model, *inputs, options={"min_tokens": 64}, **kwargs)
    assert told(adapted) == told(plain)
    assert_the_same_compiled(model, inputs, kwargs)


def test_an_exported_model_goes_sparse() -> None:
    torch._dynamo.reset()
    model = Stack().eval()
    given = (torch.randn(1, TOKENS, WIDTH), torch.tensor([500.0]))
    exported = torch.export.export(model, given).module()
    options = {"min_tokens": TOKENS, "density": 0.999999, "q_clusters": 3, "k_clusters": 5}
    with torch.no_grad():
        assert all(s.plan for s in explain(exported, *given, options=options).sites)
        compiled = torch.compile(exported, backend="svg_ear", options=options)
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-4, atol=1e-4)
