"""The explain report and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer_models import TOKENS, stack, wan

from svg_ear_compile import explain
from svg_ear_compile.cli import main

MODEL = ["explain", "--model", "transformer_models:explained_stack"]


def test_every_attention_has_a_row_with_its_reason() -> None:
    model, inputs, kwargs = wan()
    found = explain(model, *inputs, options={"density": 0.3, "min_tokens": 64}, **kwargs)
    rows = [(s.layer, s.role, s.plan is not None, s.reason) for s in found.sites]
    assert rows == [
        ("blocks.0.attn1", "self", True, None),
        ("blocks.0.attn2", "cross", False, "cross_attention"),
        ("blocks.1.attn1", "self", True, None),
        ("blocks.1.attn2", "cross", False, "cross_attention"),
    ]
    assert found.graphs[0].non_attention.flops > 0
    text = str(found)
    assert "density 0.3" in text
    assert "cross_attention: Queries and keys" in text


def test_all_graphs_of_a_model_that_breaks_are_listed() -> None:
    model, (x, _) = stack()

    def broken(x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        torch._dynamo.graph_break()
        return model.blocks[1](x)

    found = explain(broken, x, options={"min_tokens": TOKENS})
    assert len(found.graphs) == 2
    assert [site.layer for site in found.sites] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("breaks", "options", "warned"),
    [(True, {}, True), (False, {}, False), (True, {"exact_tokens": "-9:"}, False)],
)
def test_text_that_was_joined_before_a_graph_break_is_told_of(
    breaks: bool, options: dict[str, Any], warned: bool
) -> None:
    model, (x, _) = stack()

    def joining(x: Tensor, text: Tensor) -> Tensor:
        tokens = torch.cat([x, text], 1)
        if breaks:
            torch._dynamo.graph_break()
        return model.blocks[0](tokens)

    found = explain(
        joining, x, torch.randn(1, 9, x.shape[2]), options={"min_tokens": 64, **options}
    )
    assert found.sparse == 1
    assert ("in one piece" in str(found)) is warned
    assert [site.places for site in found.sites] == ["" if warned else f"{TOKENS}:{TOKENS + 9}"]


@pytest.mark.parametrize("projected", [False, True])
def test_text_that_was_joined_before_the_attention_is_compiled_is_told_of(projected: bool) -> None:
    weight = torch.nn.Parameter(torch.eye(32))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if projected:
            q, k, v = q @ weight, q @ weight, q @ weight
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    found = explain(attend, *torch.randn(3, 1, 2, 73, 32), options={"min_tokens": 64})
    assert found.sparse == 1
    assert ("in one piece" in str(found)) is not projected


def test_text_that_was_joined_before_a_break_behind_the_projections_is_told_of() -> None:
    qkv = torch.nn.Linear(32, 96)

    def attend(x: Tensor, text: Tensor) -> Tensor:
        q, k, v = qkv(torch.cat([x, text], 1))[:, None].chunk(3, -1)
        torch._dynamo.graph_break()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    x, text = torch.randn(1, 73, 32), torch.randn(1, 9, 32)
    found = explain(attend, x, text, options={"min_tokens": 64})
    assert found.sparse == 1
    assert "in one piece" in str(found)


def test_text_in_places_that_are_not_known_has_a_sentence() -> None:
    model, (x, _) = stack()

    def mixing(x: Tensor, text: Tensor) -> Tensor:
        return model.blocks[0](x * (text[..., :1] == 0) + text * (text[..., :1] != 0))

    (site,) = explain(mixing, x, torch.zeros_like(x), options={"min_tokens": 64}).sites
    assert site.is_sparse
    assert "It holds tokens of text, x in places that the graph does not show" in site.sentence


def test_attention_that_no_graph_holds_is_counted_and_the_break_named() -> None:
    model, (x, _) = stack()

    def broken(x: Tensor) -> Tensor:
        x = model.blocks[0](x)
        return torch.compiler.disable(model.blocks[1])(x)

    found = explain(broken, x, options={"min_tokens": TOKENS})
    assert ([site.layer for site in found.sites], found.unseen) == (["blocks.0"], 1)
    assert found.breaks
    text = " ".join(str(found).split())
    assert "1 attention calls ran outside of all graphs" in text
    assert all(f"Graph break, {b.count} times: {b.reason}" in text for b in found.breaks)


@torch.compiler.disable
def by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.compiler.disable
def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", (0.2 * (q @ k.mT)).float().softmax(-1).to(v), v)


@torch.compiler.disable
def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


@torch.compiler.disable
def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).relu() @ v


def in_a_skipped_frame(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        torch._dynamo.graph_break()
        return (0.2 * (q @ k.mT)).softmax(-1) @ v
    except ValueError:
        return q


@pytest.mark.parametrize(
    ("attend", "calls", "named"),
    [
        (by_pytorch, 1, "<function by_pytorch>"),
        (by_hand, 1, "<function by_hand>"),
        (by_kernel, 1, "<function by_kernel>"),
        (no_attention, 0, "<function no_attention>"),
        (in_a_skipped_frame, 1, "graph_break"),
    ],
)
def test_attention_is_counted_wherever_dynamo_leaves_it(
    attend: Callable[..., Tensor], calls: int, named: str
) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(q, k, v) + (q @ k.mT).softmax(-1) @ v
        return seen + attend(q, k, v)

    found = explain(model, *torch.randn(3, 1, 2, TOKENS, 32))
    assert (found.unseen, len(found.sites)) == (calls, 2)
    assert any(named in b.reason for b in found.breaks)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.2, -1)
        out = F.scaled_dot_product_attention(q, k, v) + weights @ v
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_attention_inside_of_torch_script_is_counted_and_stays_as_it_is(how: str) -> None:
    x = torch.randn(1, 63, 64)
    script = torch.jit.script if how == "script" else lambda m: torch.jit.trace(m, x)
    model = nn.Sequential(Attention(), script(Attention())).eval()
    torch._dynamo.reset()
    found = explain(model, x)
    assert found.unseen + len(found.sites) == 4
    assert found.unseen >= 2
    assert found.breaks
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg_ear", options={"density": 1.0})
        torch.testing.assert_close(compiled(x), model(x))


def test_what_dynamo_traces_in_another_way_is_no_break() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    found = explain(model, *torch.randn(3, 1, 2, TOKENS, 32))
    assert (len(found.sites), found.breaks, found.unseen) == (1, [], 0)


def test_explaining_leaves_what_is_compiled_alone() -> None:
    model, inputs = stack()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(*inputs)
        explain(model, *inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(*inputs)


def test_command_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*MODEL, "--option", "density=0.3", "--option", f"min_tokens={TOKENS}"]) == 0
    assert "density 0.3" in capsys.readouterr().out
    assert main([*MODEL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["model"], report["sparse"]) == (1, "Stack", 0)
    (graph,) = report["graphs"]
    assert [site["reason"] for site in graph["sites"]] == ["short", "short"]
    assert [site["sparse"] for site in graph["sites"]] == [False, False]
    assert graph["profile"]["improved_by"] == "svg-ear calibrate --device cpu"


def test_dense_by_request_is_counted_as_dense() -> None:
    model, inputs = stack()
    found = explain(model, *inputs, options={"density": 1.0})
    assert (found.graphs[0].rewritten, found.sparse) == (2, 0)
    assert "2 attention calls in 1 graph, 0 sparse" in str(found)
    assert "dense, as asked for" in str(found)


def test_what_was_explained_before_makes_no_size_dynamic() -> None:
    model, (x, timestep) = stack()
    explain(model, x, timestep)
    found = explain(model, x[:, :96], timestep, options={"min_tokens": 64})
    assert [site.conditions for site in found.sites] == [(), ()]


def test_each_kind_of_site_is_drawn_once(tmp_path: Path) -> None:
    folder = tmp_path / "drawings"
    arguments = [*MODEL, "--option", f"min_tokens={TOKENS}", "--draw", str(folder)]
    assert main(arguments) == 0
    (drawing,) = folder.iterdir()  # both blocks look alike
    assert drawing.name == "01-blocks.0.svg"
    picture = drawing.read_text()
    assert "<svg" in picture
    # Text is drawn as shapes, each after a comment that says it.
    assert "<!-- scaled_dot_product_attention" in picture
    assert "<!-- svg_ear.attention" in picture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--option", "densty=0.3"], "did you mean 'density'"),
        ([*MODEL, "--option", "density"], "KEY=VALUE"),
        (["explain", "--model", "nowhere"], "MODULE:CALLABLE"),
        (["explain", "--model", "no_such_module:f"], "no_such_module"),
        (["explain", "--model", "transformer_models:nothing"], "nothing"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
