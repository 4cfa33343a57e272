"""Queries that are a part of the keys: caches written in every style, lengths of every order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from traced_graphs import Rewriting, graphs_of, run_rewritten, sites_of

from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.mask import is_always
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


class InBuffers(Cached):
    """The caches are buffers of the module."""

    def __init__(self, style: str) -> None:
        super().__init__(style)
        self.register_buffer("k_cache", inputs()[1])
        self.register_buffer("v_cache", inputs()[2])

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, text: Tensor) -> Tensor:
        return Cached.forward(self, x, self.k_cache, self.v_cache, text)


@pytest.mark.parametrize("style", STYLES)
def test_keys_that_are_cached_in_buffers_are_clustered(style: str) -> None:
    (site,) = sites_of(InBuffers(style), *inputs())
    assert (site.role, site.reason) == (Role.PREFIX, None)
    assert site.exact.keys is None


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


CHUNK = 24


def block_causal(new: int, past: Tensor | int, keys: int) -> Tensor:
    """(N_q, N_k): tokens of a chunk see all tokens of their chunk and of earlier ones."""
    queries = torch.arange(new) + past
    return (torch.arange(keys) // CHUNK)[None] <= (queries // CHUNK)[:, None]


@pytest.mark.parametrize(
    ("new", "by_input", "shown"),
    [(CHUNK, False, True), (CHUNK, True, False), (2 * CHUNK, False, False)],
    ids=["one chunk", "its place is an input", "two chunks"],
)
def test_a_mask_over_whole_chunks_leaves_out_nothing_or_proves_it(
    new: int, by_input: bool, shown: bool
) -> None:
    class Masked(Cached):
        def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, text: Tensor) -> Tensor:
            q, k, v = (
                layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k, self.to_v)
            )
            k, v = torch.cat([k_cache, k], 1), torch.cat([v_cache, v], 1)
            mask = block_causal(x.shape[1], past if by_input else 2 * CHUNK, k.shape[1])
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])

    module, given = Masked("cat"), inputs(new, 2 * CHUNK)
    past = torch.tensor(2 * CHUNK)
    (site,) = sites_of(module, *given)
    assert (site.role, site.reason) == (Role.PREFIX, None)
    assert site.prove_mask is not shown
    backend = Rewriting()
    out = run_rewritten(module, *given, backend=backend)
    assert backend.rewritten == 1
    with torch.no_grad():
        torch.testing.assert_close(out, module(*given), atol=1e-5, rtol=1e-4)


def cut(q: Tensor, k: Tensor) -> Tensor:
    mask = k[None] >= 0
    mask[:, 3] = False
    return mask


FULL = {
    "made of ones": lambda q, k: torch.ones(1, len(k), dtype=torch.bool),
    "ones": lambda q, k: torch.ones(NEW, OLD, dtype=torch.bool)[3:, 1:].all() | (k >= 0),
    "a place": lambda q, k: k[None] <= q[:, None] + 200,
    "both": lambda q, k: (k[None] < q[:, None] + 200) & (k >= 0),
    "of a larger one": lambda q, k: (torch.arange(300)[None] < 400)[:, 7 : 7 + len(k)],
}
NOT_FULL = {
    "one key": lambda q, k: k[None] < len(k) - 1 + 0 * q[:, None],
    "one query": lambda q, k: k[None] <= q[:, None] + len(k) - 2,
    "rounded": lambda q, k: k[None] < (q[:, None] + 4096).half(),
    "equal": lambda q, k: k[None] != q[:, None] + 200,
    "written into": cut,
}

EMPTY = {
    "made of zeros": lambda q, k: torch.zeros(1, len(k), dtype=torch.bool),
    "turned": lambda q, k: ~(k[None] <= q[:, None] + 200),
    "one side": lambda q, k: (k[None] > q[:, None] + 200) & (k > 3),
    "both sides": lambda q, k: (k[None] > q[:, None] + 200) | (k < 0),
}


@pytest.mark.parametrize("name", [*FULL, *NOT_FULL, *EMPTY])
def test_what_is_full_for_every_input(name: str) -> None:
    def call(x: Tensor, keys: Tensor) -> Tensor:
        q, k = torch.arange(x.shape[2]), torch.arange(keys.shape[2])
        mask = (FULL | NOT_FULL | EMPTY)[name](q, k).expand(x.shape[2], -1)
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)

    (graph,) = graphs_of(call, torch.randn(1, 2, NEW, 32), torch.randn(1, 2, OLD, 32))
    (node,) = [n for n in graph.graph.nodes if n.target is F.scaled_dot_product_attention]
    flow, mask = Dataflow(graph), node.kwargs["attn_mask"]
    assert is_always(True, flow, mask, node) is (name in FULL)
    assert is_always(False, flow, mask, node) is (name in EMPTY)


@pytest.mark.parametrize("by_mask", [True, False])
def test_causality_inside_a_chunk_stays_dense(by_mask: bool) -> None:
    class Causal(Cached):
        def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, text: Tensor) -> Tensor:
            q, k = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k))
            k = torch.cat([k_cache, k], 1)
            places = torch.arange(x.shape[1])[:, None] + k_cache.shape[1]
            mask = torch.arange(k.shape[1]) <= places
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            if by_mask:
                return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    (site,) = sites_of(Causal("cat"), *inputs())
    assert site.reason is Reason.CAUSAL_CHUNK


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
    found = [request.only_kept for request in source.requests]
    assert found == [(new + old) > 8 * new for new, old in lengths[-len(found) :]]
    assert len(found) >= 2


def test_a_plan_says_which_lengths_are_dense() -> None:
    plan = AttentionPlan(min_tokens=100, max_key_ratio=8.0)
    assert not plan.is_dense_for(100, 800)
    assert plan.is_dense_for(100, 801)
    assert plan.is_dense_for(99, 800)
    assert plan.is_dense_for(800, 99)
    assert not AttentionPlan().is_dense_for(1, 10**6)
    assert AttentionPlan().is_dense_for(0, 10)
    # With kept clusters many keys are no matter, and with a bound of their own few queries neither.
    assert not plan.is_dense_for(100, 801, keeps_clusters=True)
    assert plan.is_dense_for(99, 800, keeps_clusters=True)
    plan = replace(plan, min_cached_keys=500)
    assert not plan.is_dense_for(1, 500, keeps_clusters=True)
    assert plan.is_dense_for(100, 499, keeps_clusters=True)
    assert plan.is_dense_for(0, 500, keeps_clusters=True)
    assert not plan.is_dense_for(100, 499)
