"""Real model classes in tiny random configurations, compiled fullgraph through the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_models import hunyuan, wan

from svg_ear_compile import explain

Made = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]
# Model, sparse layers, layers left dense with the reason.
FAMILIES = {
    "wan-t2v": (
        wan,
        {"blocks.0.attn1": "self", "blocks.1.attn1": "self"},
        {"blocks.0.attn2": "cross_attention", "blocks.1.attn2": "cross_attention"},
    ),
    "wan-i2v": (
        lambda: wan(image=True),
        {"blocks.0.attn1": "self", "blocks.1.attn1": "self"},
        {
            "blocks.0.attn2": "cross_attention",
            "blocks.0.attn2#2": "cross_attention",
            "blocks.1.attn2": "cross_attention",
            "blocks.1.attn2#2": "cross_attention",
        },
    ),
    "hunyuan-video": (
        hunyuan,
        {"transformer_blocks.0.attn": "joint", "single_transformer_blocks.0.attn": "joint"},
        {"context_embedder.token_refiner.refiner_blocks.0.attn": "short"},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Made, dict[str, str], dict[str, str]]:
    make, sparse, dense = FAMILIES[request.param]
    build: Callable[[], Made] = make
    torch._dynamo.reset()
    return build(), sparse, dense


def test_sites_roles_and_reasons(family: Any) -> None:
    (model, inputs, kwargs), sparse, dense = family
    sites = explain(model, *inputs, options={"min_tokens": 64}, **kwargs).sites
    assert {s.site: s.role for s in sites if s.plan is not None} == sparse
    assert {s.site: s.reason for s in sites if s.plan is None} == dense
    if "transformer_blocks.0.attn" in sparse:
        assert all(s.text == (0, 12) for s in sites if s.plan is not None)


def test_backend_equals_inductor_at_density_one_and_is_close_below(family: Any) -> None:
    (model, inputs, kwargs), _, _ = family

    def run(backend: str, **options: float) -> torch.Tensor:
        torch._dynamo.reset()
        arguments = {"options": {"min_tokens": 64, **options}} if options else {}
        compiled = torch.compile(model, backend=backend, fullgraph=True, **arguments)
        with torch.no_grad():
            return compiled(*inputs, **kwargs)[0]

    inductor = run("inductor")
    torch.testing.assert_close(run("svg_ear", density=1.0), inductor, rtol=1e-5, atol=1e-5)
    # Every block is exact just below 1, and the sparse path computes it.
    torch.testing.assert_close(run("svg_ear", density=0.999999), inductor, rtol=1e-4, atol=1e-4)
    sparse = run("svg_ear", density=0.3)
    assert sparse.isfinite().all()
    distance = (sparse - inductor).norm() / inductor.norm()
    assert 0 < distance < 0.1


def test_a_language_model_is_left_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 96))
    sites = explain(model, ids, options={"min_tokens": 16}, use_cache=False).sites
    assert len(sites) == 2
    assert all(site.plan is None for site in sites)
    with torch.no_grad():
        compiled = torch.compile(model, backend="svg_ear", options={"min_tokens": 16})
        out = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(out, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
