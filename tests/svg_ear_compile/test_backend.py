"""The backend: what reaches Inductor, the compile caches, gradients, regional compilation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import in_process
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformer_models import TOKENS, stack

import svg_ear_compile
from svg_ear_compile import backend
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

OPTIONS = {"density": 0.4, "min_tokens": TOKENS, "q_clusters": 4, "k_clusters": 8}


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Graphs that reach Inductor, which is replaced by eager execution."""
    graphs: list[GraphModule] = []

    def record(gm: GraphModule, inputs: object, config_patches: dict[str, Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", record)
    torch._dynamo.reset()
    return graphs


def operators(gm: GraphModule) -> int:
    target = torch.ops.svg_ear.attention.default
    return len(gm.graph.find_nodes(op="call_function", target=target))


def print_cache_hits(density: float) -> None:
    model, inputs = stack()
    options = {**OPTIONS, "density": density}
    with torch.no_grad():
        torch.compile(model, backend="svg_ear", fullgraph=True, options=options)(*inputs)
    of_graphs, of_autograd = counters["inductor"], counters["aot_autograd"]
    print(of_graphs["fxgraph_cache_hit"] + of_autograd["autograd_cache_hit"])


@pytest.mark.slow
def test_compile_caches_hit_in_a_second_process_and_miss_for_another_density(
    tmp_path: Path,
) -> None:
    def hits(density: float) -> int:
        cache = str(tmp_path / "cache")
        said = in_process(print_cache_hits, tmp_path, density, TORCHINDUCTOR_CACHE_DIR=cache)
        return int(said.splitlines()[-1])

    assert hits(0.4) == 0
    assert hits(0.4) > 0
    assert hits(0.3) == 0


def test_other_sources_have_another_cache_key(
    monkeypatch: pytest.MonkeyPatch, compiled_graphs: list[GraphModule]
) -> None:
    tags = []

    def record(gm: GraphModule, inputs: object, config_patches: dict[str, Any]) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", record)
    model, inputs = stack()
    for digest in ("one", "two"):
        monkeypatch.setattr(backend, "sources_digest", lambda digest=digest: digest)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=backend.svg_ear, options=OPTIONS)(*inputs)
    assert tags[0] != tags[1]
    assert torch.compiler.config.cache_key_tag not in tags


def test_sites_are_rewritten_and_nothing_else(compiled_graphs: list[GraphModule]) -> None:
    model, inputs = stack()
    before: list[str] = []

    def keep(gm: GraphModule, example: object) -> Any:
        before.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(*inputs)
        torch._dynamo.reset()
        torch.compile(model, backend="svg_ear", options=OPTIONS)(*inputs)
    (gm,) = compiled_graphs
    assert operators(gm) == 2
    after = [str(n.target) for n in gm.graph.nodes]
    ours = {"svg_ear.attention.default"}
    others = [name for name in after if name not in ours]
    removed = [n for n in before if "scaled_dot_product" in n]
    assert len(removed) == 2
    # Each call became the operator and one getitem.
    assert len(others) - 2 == len(before) - len(removed)


def test_a_graph_without_a_site_reaches_inductor_untouched(
    compiled_graphs: list[GraphModule],
) -> None:
    model, inputs = stack()
    with torch.no_grad():
        out = torch.compile(model, backend="svg_ear")(*inputs)  # too few tokens by default
        assert torch.equal(out, model(*inputs))
    (gm,) = compiled_graphs
    assert operators(gm) == 0


def test_gradients_leave_the_graph_unchanged_with_one_warning(
    compiled_graphs: list[GraphModule],
) -> None:
    backend._warn_of_gradients.cache_clear()
    model, inputs = stack()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch._dynamo.reset()
            out = torch.compile(model, backend="svg_ear", options=OPTIONS)(*inputs)
    assert [operators(gm) for gm in compiled_graphs] == [0, 0]
    assert sum("svg_ear is for inference" in str(w.message) for w in caught) == 1
    out.sum().backward()
    assert model.blocks[0].to_q.weight.grad is not None


def test_steady_state_does_not_recompile(compiled_graphs: list[GraphModule]) -> None:
    model, (x, _) = stack()
    compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=OPTIONS)
    with torch.no_grad(), svg_ear_compile.bind(compiled, dense_steps=1) as session:
        compiled(x, torch.tensor([900.0]))
        with torch.compiler.set_stance("fail_on_recompile"):
            for timestep in (900.0, 700.0, 400.0, 1000.0):
                compiled(x, torch.tensor([timestep]))
        assert [layer.path for layer in session.report()] == ["blocks.0", "blocks.1"]
    assert len(compiled_graphs) == 1


def test_identical_blocks_share_one_backend_call(compiled_graphs: list[GraphModule]) -> None:
    model, inputs = stack()
    for block in model.blocks:
        block.compile(backend="svg_ear", fullgraph=True, options=OPTIONS)
    with torch.no_grad(), svg_ear_compile.bind(model, budget={"blocks.1": 1.0}) as session:
        model(*inputs)
        densities = {layer.path: layer.density for layer in session.report()}
    assert len(compiled_graphs) == 1
    assert densities["blocks.0"] is not None
    assert densities["blocks.1"] is None  # its budget says dense


def test_one_graph_serves_several_lengths_when_they_are_dynamic() -> None:
    graphs: list[GraphModule] = []
    settings = Settings.parse({**OPTIONS, "min_tokens": 64})

    def record(gm: GraphModule, example: object) -> Any:
        graphs.append(gm)
        assert rewrite_graph(gm, settings).rewritten == 2
        return gm.forward

    torch._dynamo.reset()
    model, (x, timestep) = stack()
    torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(model, backend=record, fullgraph=True)
    with torch.no_grad():
        compiled(x, timestep)
        for tokens in (96, 200):
            out = compiled(torch.randn(1, tokens, x.shape[2]), timestep)
            assert out.shape[1] == tokens
            assert out.isfinite().all()
    assert len(graphs) == 1


def test_a_wrong_option_reaches_the_user(compiled_graphs: list[GraphModule]) -> None:
    model, inputs = stack()
    compiled = torch.compile(model, backend="svg_ear", options={"densty": 0.1})
    with torch.no_grad(), pytest.raises(Exception, match="did you mean 'density'"):
        compiled(*inputs)


@pytest.mark.gpu
def test_cuda_graphs_leave_the_operator_out_and_the_results_alone() -> None:
    torch._dynamo.reset()
    model, (x, _) = stack("cuda", torch.bfloat16)
    outs = {}
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        options = {**OPTIONS, "mode": mode}
        compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=options)
        with torch.no_grad(), svg_ear_compile.bind(compiled) as session:
            steps = [
                compiled(x, torch.tensor([t], device="cuda", dtype=x.dtype)).clone()
                for t in (1000.0, 800.0, 600.0, 400.0, 200.0)
            ]
            assert all(layer.density is not None for layer in session.report())
        outs[mode] = torch.stack(steps)
    assert outs["default"].isfinite().all()
    torch.testing.assert_close(outs["reduce-overhead"], outs["default"], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_no_host_synchronisation_once_warm() -> None:
    q, k, v = (torch.randn(1, 2, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    call = torch.ops.svg_ear.attention.default
    call(q, k, v, plan='{"density": 0.3}')
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = call(q, k, v, plan='{"density": 0.3}')
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
