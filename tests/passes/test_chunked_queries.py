"""Several query chunks in one call: masks by chunk in every style, proven by their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from traced_graphs import Rewriting, run_rewritten, sites_of

from svg_ear_compile import policy
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.passes.site import Reason, Role
from svg_ear_compile.planning import GraphReport, rewrite_graph
from svg_ear_compile.settings import Settings

WIDTH, HEADS, CHUNK, TOKENS = 64, 2, 23, 23 * 5 + 9


def by_loop(x: Tensor) -> Tensor:
    n = x.shape[1]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, n, CHUNK):
        mask[start : start + CHUNK, : start + CHUNK] = True
    return mask


def by_ends(x: Tensor) -> Tensor:
    """The end of the keys of every query, or the token itself."""
    n = x.shape[1]
    ends = torch.zeros(n, dtype=torch.long)
    for start in range(0, n, CHUNK):
        ends[start : start + CHUNK] = start + CHUNK
    place = torch.arange(n)
    return (place[None] < ends[:, None]) | (place[None] == place[:, None] // CHUNK * CHUNK)


def by_repeating(x: Tensor) -> Tensor:
    chunks = math.ceil(x.shape[1] / CHUNK)
    place = torch.arange(chunks)
    seen = place[:, None] >= place[None]
    whole = seen.repeat_interleave(CHUNK, 0).repeat_interleave(CHUNK, 1)
    return whole[: x.shape[1], : x.shape[1]]


def by_kron(x: Tensor) -> Tensor:
    chunks = math.ceil(x.shape[1] / CHUNK)
    whole = torch.kron(torch.ones(chunks, chunks).tril(), torch.ones(CHUNK, CHUNK))
    return whole[: x.shape[1], : x.shape[1]] > 0


def numbers(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) // CHUNK


def by_rounding(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1])
    return place[None] < (torch.div(place, CHUNK, rounding_mode="floor")[:, None] + 1) * CHUNK


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunks before": lambda x: numbers(x)[:, None] >= numbers(x)[None],
    "a window of chunks": lambda x: (
        (numbers(x)[:, None] >= numbers(x)[None]) & (numbers(x)[:, None] - numbers(x)[None] < 3)
    ),
    "a window and a first chunk": lambda x: (
        (numbers(x)[:, None] >= numbers(x)[None])
        & ((numbers(x)[None] > numbers(x)[:, None] - 2) | (numbers(x)[None] == 0))
    ),
    "a loop": by_loop,
    "ends": by_ends,
    "repeated": by_repeating,
    "kron": by_kron,
    "rounded": by_rounding,
    "a bias": lambda x: torch.where(numbers(x)[:, None] >= numbers(x)[None], 0.0, -math.inf),
}


class Chunked(nn.Module):
    """Self-attention under a mask that is made in the forward, by SDPA or written out."""

    def __init__(self, mask: Callable[[Tensor], Tensor], written: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.written = mask, written
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        mask = self.mask(x)
        if not self.written:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
        by_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if by_bool else scores + mask
        return scores.softmax(-1) @ v


def tokens(count: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(1))


class Asked:
    """Answers every request as compiled, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[CallRequest] = []

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        self.requests.append(request)
        yield AttentionCall(request.plan)

    def finished(self, call: AttentionCall, result: object) -> None: ...

    @property
    def chunks(self) -> int:
        return sum(request.part is not None for request in self.requests)


@pytest.mark.parametrize("written", [False, True], ids=["sdpa", "written"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_by_chunk_is_a_call_for_each_chunk(name: str, written: bool) -> None:
    module, x = Chunked(MASKS[name], written), tokens()
    (site,) = sites_of(module, x)
    assert (site.role, site.reason) == (Role.SELF, None)
    assert site.may_have_chunks
    backend, source = Rewriting(), Asked()
    with calls_from(source):
        out = run_rewritten(module, x, backend=backend)
    assert source.chunks == math.ceil(TOKENS / CHUNK)
    with torch.no_grad():
        torch.testing.assert_close(out, module(x), atol=1e-5, rtol=1e-4)


def test_a_chunk_that_sees_too_little_is_seen() -> None:
    """Values are read, not names: the graph compares chunks, and one token is left out."""

    def but_one(x: Tensor) -> Tensor:
        mask = numbers(x)[:, None] >= numbers(x)[None]
        mask[CHUNK + 3, 5] = False
        return mask

    module, x, source = Chunked(but_one), tokens(), Asked()
    with calls_from(source):
        out = run_rewritten(module, x, backend=Rewriting())
    assert source.chunks == math.ceil(TOKENS / CHUNK) + 2
    with torch.no_grad():
        torch.testing.assert_close(out, module(x), atol=1e-5, rtol=1e-4)


BY_TOKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "tokens of a chunk": lambda x: (
        (numbers(x)[:, None] >= numbers(x)[None])
        & (torch.arange(x.shape[1])[:, None] >= torch.arange(x.shape[1])[None])
    ),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_causality_by_token_stays_dense(name: str) -> None:
    (site,) = sites_of(Chunked(BY_TOKEN[name]), tokens())
    assert site.reason is Reason.CAUSAL


def test_chunks_of_a_few_tokens_are_left_whole() -> None:
    module = Chunked(lambda x: torch.arange(TOKENS)[:, None] // 1 >= torch.arange(TOKENS)[None])
    source, x = Asked(), tokens()
    with calls_from(source):
        out = run_rewritten(module, x, backend=Rewriting())
    assert source.chunks == 0
    assert source.requests[0].dense_only
    with torch.no_grad():
        torch.testing.assert_close(out, module(x), atol=1e-5, rtol=1e-4)


def planned(module: nn.Module, *inputs: tuple[Any, ...], **more: Any) -> tuple[list[Any], Asked]:
    """Reports of all graphs of several calls, and their requests; the outputs are as of eager."""
    reports: list[GraphReport] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        reports.append(rewrite_graph(gm, Settings.parse({"density": 0.999999})))
        return aot_eager(gm, example_inputs)

    torch._dynamo.reset()
    compiled, source = torch.compile(module, backend=backend, **more), Asked()
    for given in inputs:
        with torch.no_grad(), calls_from(source):
            torch.testing.assert_close(compiled(*given), module(*given), atol=1e-5, rtol=1e-4)
    return reports, source


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_cost_model_says_from_which_length_a_chunk_is_sparse(
    dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for least, chunks in ((CHUNK, True), (CHUNK + 1, False)):
        monkeypatch.setattr(policy, "break_even_tokens", lambda *given, n=least: n)
        inputs = [(tokens(n),) for n in ((TOKENS, 2 * CHUNK + 1) if dynamic else (TOKENS,))]
        reports, source = planned(Chunked(MASKS["chunks before"]), *inputs, dynamic=dynamic)
        (report,) = reports
        (site,) = report.sites
        assert site.plan is not None
        assert site.plan.min_chunk_tokens == least
        assert f"padding or by chunk, in chunks of at least {least} tokens" in site.sentence
        assert (source.chunks > 0) == chunks
        long = [request.q_shape[2] for request in source.requests if not request.dense_only]
        assert long == ([CHUNK] * (source.chunks - len(inputs)) if chunks else [])


@pytest.mark.parametrize("style", ["cat", "slice", "roll", "index_copy"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_chunks_after_a_cache(style: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks and a part of a third are written into a cache and see it, as in a prefill."""
    monkeypatch.setattr(policy, "break_even_tokens", lambda *given: 5)
    from test_prefix import Cached

    class Prefill(Cached):
        def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, text: Tensor) -> Tensor:
            q, k, v = (
                layer(x).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k, self.to_v)
            )
            k, v = self.keys(k_cache, k), self.keys(v_cache, v)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            past = k.shape[2] - q.shape[2]
            mine = (torch.arange(q.shape[2]) + past) // CHUNK
            mask = mine[:, None] >= torch.arange(k.shape[2])[None] // CHUNK
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    lengths = ((2 * CHUNK + 5, 7 * CHUNK), (2 * CHUNK + 5, 9 * CHUNK))[: 1 + dynamic]
    generator = torch.Generator().manual_seed(1)

    def inputs(new: int, old: int) -> tuple[Tensor, ...]:
        if style == "cat":
            old -= new
        k, v = torch.randn(2, 1, old, HEADS, WIDTH // HEADS, generator=generator)
        x = torch.randn(1, new, WIDTH, generator=generator)
        return x, k, v, x[:, :5]

    # Caches are written in place, with the same values twice.
    _, source = planned(Prefill(style), *(inputs(*pair) for pair in lengths), dynamic=dynamic)
    assert all(request.part is not None for request in source.requests)
    assert source.chunks == 3 * len(lengths)
