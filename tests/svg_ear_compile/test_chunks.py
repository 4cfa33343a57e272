"""Chunks of a video in a session: two clocks, every style of cache, memory that ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chunked_models import CHUNK, STYLES, TIMESTEPS, Chunked, generate
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from svg_ear_compile import bind, policy
from svg_ear_compile.generation import Generation
from svg_ear_compile.generation_state import Announced

CHUNKS = 5
OPTIONS = {"density": 0.3, "min_tokens": 1}


pytestmark = pytest.mark.usefixtures("without_inductor")


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="svg_ear", dynamic=True, options={**OPTIONS, **options})


def run(model: Any, style: str, **more: Any) -> list[Tensor]:
    return list(generate(model, style, CHUNKS, **more))


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Mean relative error of the outputs of a generation."""
    pairs = zip(found, wanted, strict=True)
    return sum(((a - b).norm() / b.norm()).item() for a, b in pairs) / len(found)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_cache_keeps_its_clusters(style: str) -> None:
    model = Chunked(style)
    sparse, wanted = compiled(model), run(model, style)
    anew = error(run(sparse, style), wanted)
    is_full = style in ("roll", "index_copy")
    with bind(sparse, chunked=is_full) as session:
        out = run(sparse, style)
        (layer,) = session.report()
        assert error(out, wanted) < 1.1 * anew
        assert layer.kept + layer.reused >= (CHUNKS - 1) * len(TIMESTEPS) - 3
        assert layer.recomputed == 0
        assert session.step == len(TIMESTEPS) - 1
        # A first chunk without a cache has a graph of its own.
        assert session.chunk == CHUNKS - 1 - (style == "cat")
        assert session.memory_bytes() > 0
        session.reset()
        assert (session.chunk, session.memory_bytes()) == (0, 0)
        for mine, other in zip(run(sparse, style), out, strict=True):
            assert torch.equal(mine, other)


def test_a_cache_that_is_shorter_again_starts_a_generation() -> None:
    style = "slice"
    sparse = compiled(Chunked(style))
    with bind(sparse) as session:
        first = run(sparse, style)
        assert session.chunk == CHUNKS - 1
        for mine, other in zip(run(sparse, style), first, strict=True):
            assert torch.equal(mine, other)
        (layer,) = session.report()
        assert layer.cold + layer.kept + layer.reused == CHUNKS * len(TIMESTEPS)


def test_a_cache_that_does_not_grow_starts_generations_unless_chunks_are_declared() -> None:
    style = "roll"
    sparse = compiled(Chunked(style))
    with bind(sparse) as session:
        run(sparse, style)
        assert session.chunk == 0
    # As a pipeline's call does: no other video starts inside of it.
    with bind(sparse) as session, session.generation("default").call(Announced()):
        run(sparse, style)
        assert session.chunk == CHUNKS - 1


def test_dense_steps_are_those_of_each_chunk() -> None:
    style = "slice"
    sparse = compiled(Chunked(style))
    with bind(sparse, dense_steps=1) as session:
        run(sparse, style)
        (layer,) = session.report()
        assert (layer.cold, session.chunk) == (1, CHUNKS - 1)
        assert layer.cold + layer.kept + layer.reused == CHUNKS * (len(TIMESTEPS) - 1)


def test_keys_that_are_too_many_to_cluster_are_sparse_in_a_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a graph of one length: what a session keeps is not known when it is compiled."""
    monkeypatch.setattr(policy, "break_even_tokens", lambda *given: None)
    monkeypatch.setattr(policy, "most_keys_per_query", lambda *given: 2.0)
    monkeypatch.setattr(policy, "fewest_cached_keys", lambda *given: 3 * CHUNK)
    style, model = "roll", Chunked("roll")
    sparse = torch.compile(model, backend="svg_ear", dynamic=False, options={"density": 0.3})
    wanted = run(model, style)
    for mine, other in zip(run(sparse, style), wanted, strict=True):
        torch.testing.assert_close(mine, other)
    with bind(sparse, chunked=True) as session:
        assert error(run(sparse, style), wanted) > 0.01
        (layer,) = session.report()
        assert (layer.cold, layer.kept + layer.reused) == (1, CHUNKS * len(TIMESTEPS) - 1)


@pytest.mark.parametrize("style", ["cat", "slice"])
def test_graphs_are_as_many_as_without_the_backend(style: str) -> None:
    """Of caches that grow: one for a first chunk without a cache, one for every other."""
    counts = []
    for backend in (CompileCounter(), "svg_ear"):
        torch._dynamo.reset()
        counters.clear()
        model = torch.compile(Chunked(style), backend=backend, dynamic=True)
        list(generate(model, style, 4, timesteps=TIMESTEPS[:1]))
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] <= 2


def test_without_drift_keys_are_clustered_in_every_call() -> None:
    sparse = compiled(Chunked("slice"), max_drift=0.0)
    with bind(sparse) as session:
        run(sparse, "slice")
        (layer,) = session.report()
        assert (layer.kept, layer.reused) == (0, 0)


def test_what_a_chunk_leaves_is_listed_and_freed() -> None:
    sparse = compiled(Chunked("slice"))
    with bind(sparse) as session:
        outputs = generate(sparse, "slice", CHUNKS)
        for _ in TIMESTEPS:
            next(outputs)
        generation = session.generation("default")
        before = session.memory_bytes()
        assert isinstance(generation, Generation)
        generation._start_again(same_thread=True)
        left = [held for held in session.held() if held.nbytes]
        assert [held.what for held in left] == ["centroids and block masks"]
        assert 0 < left[0].nbytes < before
        session.clear_cache()
        assert session.memory_bytes() == 0
