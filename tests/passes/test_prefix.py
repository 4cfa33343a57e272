"""Queries that are a part of the keys: caches written in every style, lengths of every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from traced_graphs import Rewriting, run_rewritten, sites_of

from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.site import Reason, Role
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

WIDTH, HEADS, NEW, OLD = 64, 2, 24, 60
STYLES = ("cat", "slice", "roll", "index_copy")


class Cached(nn.Module):
    """New tokens that attend to cached keys and to their own, with text keys before them or not."""

    def __init__(self, style: str, text: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style, self.text = style, text
        self.to_q, self.to_k, self.to_v, self.words = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def keys(self, cache: Tensor, new: Tensor) -> Tensor:
        """(B, N, H, D) of the cache and the new tokens; the cache is written in place."""
        count = new.shape[1]
        if self.style == "cat":
            return torch.cat([cache, new], 1)
        if self.style == "roll":
            rolled = cache.roll(-count, 1)
            rolled[:, -count:] = new
            return rolled
        if self.style == "index_copy":
            at = torch.arange(cache.shape[1] - count, cache.shape[1])
            cache.index_copy_(1, at, new)
        else:
            cache[:, -count:] = new
        return cache[:, : cache.shape[1]]

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k, self.to_v)
        )
        k, v = self.keys(k_cache, k), self.keys(v_cache, v)
        if self.text:
            words = self.words(text).unflatten(-1, (HEADS, -1))
            k, v = torch.cat([words, k], 1), torch.cat([words, v], 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def inputs(new: int = NEW, old: int = OLD) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(2, 1, old, HEADS, WIDTH // HEADS, generator=generator)
    x, text = (torch.randn(1, n, WIDTH, generator=generator) for n in (new, 5))
    return x, cache[0], cache[1], text


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_cached_keys_are_clustered_and_text_keys_are_exact(style: str, text: bool) -> None:
    (site,) = sites_of(Cached(style, text), *inputs())
    assert (site.role, site.reason) == (Role.PREFIX, None)
    assert site.exact.spans == ("", "0:5" if text else "")


@pytest.mark.parametrize("style", STYLES)
def test_with_every_block_it_is_dense_attention(style: str) -> None:
    module, backend = Cached(style, text=True), Rewriting()
    out = run_rewritten(module, *inputs(), backend=backend)
    assert backend.rewritten == 1
    with torch.no_grad():
        torch.testing.assert_close(out, module(*inputs()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", [False, True])
def test_text_that_attends_to_the_video_is_not_clustered(text: bool) -> None:
    """The queries are a part of the keys, and are not the video."""

    class Words(Cached):
        def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, text: Tensor) -> Tensor:
            streams = (x, text)
            q = self.to_q(text)
            k, v = (torch.cat([layer(s) for s in streams], 1) for layer in (self.to_k, self.to_v))
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v)

    (site,) = sites_of(Words("cat"), *inputs())
    assert site.role is Role.PREFIX
    assert site.exact.counts == (5, 5)


def test_causality_inside_a_chunk_stays_dense() -> None:
    def call(x: Tensor, cache: Tensor) -> Tensor:
        k = torch.cat([cache, x], 2)
        mask = torch.arange(k.shape[2]) <= torch.arange(x.shape[2])[:, None] + cache.shape[2]
        return F.scaled_dot_product_attention(x, k, k, attn_mask=mask)

    x, cache = torch.randn(1, 2, NEW, 32), torch.randn(1, 2, OLD, 32)
    (site,) = sites_of(call, x, cache)
    assert site.reason in (Reason.CAUSAL, Reason.LENGTHS)


class Asked:
    """Answers every request as compiled, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[CallRequest] = []

    def calls(self, request: CallRequest) -> Any:
        self.requests.append(request)
        yield AttentionCall(request.plan)

    def finished(self, call: AttentionCall, result: object) -> None: ...


@pytest.mark.parametrize(
    "lengths", [((24, 0), (24, 60), (24, 400)), ((24, 400), (24, 60), (30, 9))]
)
def test_every_call_of_one_graph_decides_by_its_own_lengths(
    lengths: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from svg_ear_compile import policy

    monkeypatch.setattr(policy, "break_even_tokens", lambda *given: 20)
    monkeypatch.setattr(policy, "most_keys_per_query", lambda *given: 8.0)
    module, compiled_graphs = Cached("cat"), []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled_graphs.append(rewrite_graph(gm, Settings.parse({"density": 0.3})))
        return aot_eager(gm, example_inputs)

    torch._dynamo.reset()
    compiled, source = torch.compile(module, backend=backend, dynamic=True), Asked()
    for new, old in lengths:
        with torch.no_grad(), calls_from(source):
            compiled(*inputs(new, old))
    found = [request.many_keys for request in source.requests]
    assert found == [(new + old) > 8 * new for new, old in lengths[-len(found) :]]
    assert len(found) >= 2


def test_a_plan_says_which_lengths_are_dense() -> None:
    plan = AttentionPlan(min_tokens=100, max_key_ratio=8.0)
    assert not plan.has_many_keys(100, 800)
    assert plan.has_many_keys(100, 801)
    assert not plan.is_short(100, 800)
    assert plan.is_short(99, 800)
    assert plan.is_short(800, 99)
    assert not AttentionPlan().has_many_keys(1, 10**6)
    assert not AttentionPlan().is_short(1, 10**6)
    assert AttentionPlan().is_short(0, 10)
