"""A graph on which the pass fails stays as it was; gradients count where they pass."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from svg_ear_compile import backend, explain, planning
from svg_ear_compile.planning import GraphReport, rewrite_graph
from svg_ear_compile.settings import Settings

OPTIONS = {"density": 0.999999, "min_tokens": 16}
TOKENS, WIDTH = 45, 64


class Block(nn.Module):
    """Self-attention, twice: the second reads what the first returns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = (
                t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
            )
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


class Rewriting:
    """A backend that keeps the report of its graph and runs the graph itself."""

    report: GraphReport

    def __call__(self, gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        before = str(gm.graph)
        self.report = rewrite_graph(gm, Settings.parse(OPTIONS))
        self.changed = str(gm.graph) != before
        gm.graph.lint()
        return gm.forward


def broken(*args: object) -> None:
    raise KeyError("a fault")


def broken_half_way(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    def both(gm: GraphModule, planned: Any) -> None:
        rewrite(gm, planned[:1])
        broken()

    return both


@pytest.mark.faults
@pytest.mark.parametrize("place", ["find_sites", "decide_sites", "rewrite", "half way"])
def test_a_fault_leaves_the_graph_to_inductor_with_one_warning(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if place == "half way":
        monkeypatch.setattr(planning, "rewrite", broken_half_way(planning.rewrite))
    else:
        monkeypatch.setattr(planning, place, broken)
    model, x, rewriting = Block(), torch.randn(1, TOKENS, WIDTH), Rewriting()
    torch._dynamo.reset()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "svg_ear_compile"):
        found = torch.compile(model, backend=rewriting)(x)
        assert torch.equal(found, model(x))
    (record,) = caplog.records
    assert "KeyError: 'a fault'" in record.getMessage()
    assert not rewriting.changed
    assert rewriting.report.rewritten == 0
    assert {site.reason for site in rewriting.report.sites} <= {"fault"}


@pytest.mark.faults
@pytest.mark.parametrize("place", ["non_attention_cost", "half way"])
def test_a_graph_with_a_fault_still_compiles(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead-of-time autograd asks the graph's inputs for what Dynamo has set on them."""
    if place == "half way":
        monkeypatch.setattr(planning, "rewrite", broken_half_way(planning.rewrite))
    else:
        monkeypatch.setattr(planning, place, broken)

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewrite_graph(gm, Settings.parse(OPTIONS))
        return aot_eager(gm, example_inputs)  # type: ignore[no-any-return]

    model, x = Block(), torch.randn(1, TOKENS, WIDTH)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))


@pytest.mark.faults
def test_mistakes_in_options_are_still_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise ValueError("budget names a layer that is not here")

    monkeypatch.setattr(planning, "decide_sites", refuse)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="names a layer"):
        torch.compile(Block(), backend=Rewriting())(torch.randn(1, TOKENS, WIDTH))


@torch.no_grad()
def decorated(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def within(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def switched(model: nn.Module, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    out = model(x)
    torch.set_grad_enabled(True)
    return out


def detached(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).detach()


@pytest.mark.parametrize("call", [decorated, within, switched])
def test_gradients_that_the_model_switches_off_are_not_missed(
    call: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GraphModule] = []

    def keep(gm: GraphModule, *args: object) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", keep)
    backend._warn_of_gradients.cache_clear()
    model, x = Block(), torch.randn(1, TOKENS, WIDTH)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.compile(lambda x: call(model, x), backend="svg_ear", options=OPTIONS)(x)
    torch.testing.assert_close(found, call(model, x), atol=1e-5, rtol=1e-4)
    operator = torch.ops.svg_ear.attention.default
    sparse = sum(len(g.graph.find_nodes(op="call_function", target=operator)) for g in seen)
    assert sparse == 2
    reported = explain(lambda x: call(model, x), x, options=OPTIONS).graphs
    assert sum(graph.rewritten for graph in reported) == sparse


def test_attention_whose_gradient_is_cut_off_later_is_left() -> None:
    model, x, rewriting = Block(), torch.randn(1, TOKENS, WIDTH), Rewriting()
    torch._dynamo.reset()
    torch.compile(lambda x: detached(model, x), backend=rewriting)(x)
    assert [site.reason for site in rewriting.report.sites] == ["gradients"] * 2
