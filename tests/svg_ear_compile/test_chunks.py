"""Chunks of a video in a session: two clocks, every style of cache, memory that ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chunked_models import CHUNK, STYLES, TIMESTEPS, Chunked, empty_cache, generate, video
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from svg_ear_compile import bind, policy
from svg_ear_compile.chunks import goes_on
from svg_ear_compile.generation import Generation
from svg_ear_compile.generation_state import Announced
from svg_ear_compile.kernels.call import CallRequest
from svg_ear_compile.kernels.kept_clusters import identities_of
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.memory import Memory

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
        generation._start_again()
        left = [held for held in session.held() if held.nbytes]
        assert [held.what for held in left] == ["centroids and block masks"]
        assert 0 < left[0].nbytes < before
        session.clear_cache()
        assert session.memory_bytes() == 0


@pytest.mark.parametrize(
    ("new", "rewritten", "dropped", "found"),
    [
        (20, 0, 0, (True, True)),
        (20, 20, 0, (True, False)),  # the last chunk was written again when it was finished
        (21, 0, 0, (False, False)),
        (20, 21, 0, (False, False)),
        (20, 0, 20, (False, True)),
        (20, 0, 5, (True, True)),
        (0, 20, 0, (False, True)),  # a later step of the chunk, were the timestep another
        (0, 0, 0, (False, False)),
        (40, 0, 60, (False, False)),
    ],
)
def test_what_proves_that_a_forward_goes_on_with_a_video(
    new: int, rewritten: int, dropped: int, found: tuple[bool, bool]
) -> None:
    """Of a cache of 60 keys and chunks of 20, without and with the word that it may roll."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 1, 60 + new, 32, generator=generator)
    memory = Memory(identities=identities_of(v[:, :, :60]))
    later = v.clone()
    later[:, :, 60 - rewritten : 60] += 1.0
    later = later[:, :, dropped:].flip(2)
    device = torch.device("cpu")
    shapes = ((2, 1, 20, 32), tuple(later.shape))
    request = CallRequest(
        None, "", "", AttentionPlan(), *shapes, (20, 60), device, cached_keys=True, values=later
    )
    rows = slice(0, 2)
    assert (goes_on(memory, request, rows), goes_on(memory, request, rows, True)) == found
    half = Memory(identities=identities_of(v[1:, :, :60]))
    assert goes_on(half, request, slice(1, 2)) == found[0]
    assert not goes_on(half, request, slice(0, 1))
    assert not goes_on(Memory(), request, rows)
    assert memory.identities is not None
    elsewhere = Memory(identities=memory.identities.to("meta"))
    assert not goes_on(elsewhere, request, rows)


ONE_STEP, CLEANED = (600.0,), (600.0, 0.0)


@pytest.mark.parametrize("timesteps", [ONE_STEP, CLEANED], ids=["one step", "and a clean one"])
@pytest.mark.parametrize("style", STYLES)
def test_chunks_of_one_step_keep_their_clusters(style: str, timesteps: tuple[float, ...]) -> None:
    model = Chunked(style)
    sparse, seeds = compiled(model), (0, 1)
    wanted = [run(model, style, timesteps=timesteps, seed=seed) for seed in seeds]
    unbound = [run(sparse, style, timesteps=timesteps, seed=seed) for seed in seeds]
    anew = sum(map(error, unbound, wanted))
    with bind(sparse, chunked=style in ("roll", "index_copy")) as session:
        other = run(sparse, style, timesteps=timesteps, seed=1)
        session.reset()
        out = run(sparse, style, timesteps=timesteps)
        (layer,) = session.report()
        first = 1 + (style == "cat")  # chunks before the first that has a cache to keep
        assert layer.kept + layer.reused >= (CHUNKS - first) * len(timesteps)
        assert session.chunk == CHUNKS - first
        assert session.step == len(timesteps) - 1
        assert 0.01 < sum(map(error, (out, other), wanted)) < 1.1 * anew
        session.reset()
        for mine, same in zip(run(sparse, style, timesteps=timesteps), out, strict=True):
            assert torch.equal(mine, same)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["the same video", "another video"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_video_of_one_step_sees_nothing_of_the_last(
    seeds: tuple[int, int], chunked: bool
) -> None:
    """It starts with the timestep that all chunks have, and a cache that is shorter again."""
    sparse = compiled(Chunked("slice"))
    alone = []
    for seed in seeds:
        with bind(sparse) as session:
            alone.append(run(sparse, "slice", timesteps=ONE_STEP, seed=seed))
    with bind(sparse, chunked=chunked) as session:
        for seed, wanted in zip(seeds, alone, strict=True):
            out = run(sparse, "slice", timesteps=ONE_STEP, seed=seed)
            for mine, other in zip(out, wanted, strict=True):
                assert torch.equal(mine, other)
        (layer,) = session.report()
        assert layer.cold <= 1


def test_videos_of_one_step_that_take_turns_go_on_each_by_itself() -> None:
    sparse, model = compiled(Chunked("slice")), Chunked("slice")
    wanted = [run(model, "slice", timesteps=ONE_STEP, seed=seed) for seed in (0, 1)]
    anew = [error(run(sparse, "slice", timesteps=ONE_STEP, seed=s), wanted[s]) for s in (0, 1)]
    with bind(sparse) as session:
        streams = [generate(sparse, "slice", CHUNKS, ONE_STEP, seed) for seed in (0, 1)]
        outs = list(zip(*streams, strict=True))
        (layer,) = session.report()
        assert layer.kept >= 2 * (CHUNKS - 1)
    for place in (0, 1):
        assert error([out[place] for out in outs], wanted[place]) < 1.1 * anew[place]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("layout", ["batched", "sequential"])
def test_guidance_branches_of_one_step_are_no_chunks(layout: str, shared: bool) -> None:
    """Equal latents, in one forward or in two; the caches of both are written."""
    sparse = compiled(Chunked("slice"), shared_branches=shared)
    with bind(sparse) as session:
        tokens = video(CHUNKS)
        caches = [empty_cache("slice", CHUNKS) for _ in range(2)]
        for chunk in range(CHUNKS):
            x = tokens[:, chunk * CHUNK : (chunk + 1) * CHUNK]
            if layout == "batched":
                k, v = (torch.cat(pair) for pair in zip(*caches, strict=True))
                sparse(x.repeat(2, 1, 1), torch.tensor([600.0]), k, v, chunk * CHUNK)
                caches = [(k[:1], v[:1]), (k[1:], v[1:])]
            else:
                for k, v in caches:
                    sparse(x, torch.tensor([600.0]), k, v, chunk * CHUNK)
            assert session.chunk == chunk
        (layer,) = session.report()
        assert layer.kept > 0
        assert layer.branches == 2


@pytest.mark.parametrize("timesteps", [ONE_STEP, CLEANED], ids=["one step", "and a clean one"])
def test_a_static_cache_is_filled_up_chunk_by_chunk(timesteps: tuple[float, ...]) -> None:
    """Of constant length, with zeros behind a mask: its values say that it has grown."""
    style = "static"
    model = Chunked(style)
    sparse, wanted = compiled(model), run(model, style, timesteps=timesteps)
    anew = error(run(sparse, style, timesteps=timesteps), wanted)
    with bind(sparse) as session:
        out = run(sparse, style, timesteps=timesteps)
        assert session.chunk == CHUNKS - 1
        (layer,) = session.report()
        assert (layer.cold, layer.recomputed) == (1, 0)
        assert 0.01 < error(out, wanted) < 1.1 * anew
        for mine, same in zip(run(sparse, style, timesteps=timesteps), out, strict=True):
            assert torch.equal(mine, same)
