"""Generations side by side: names, threads, coroutines, generator functions."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from session_models import Model, latents, run, shared
from torch import Tensor

from svg_ear_compile import Session, bind
from svg_ear_compile.session import MAX_GENERATIONS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

STEPS = {"left": (900.0, 800.0, 700.0), "right": (950.0, 640.0, 320.0)}


def alone(model: Model) -> dict[str, Tensor]:
    """What each generation gives when it runs by itself."""
    found = {}
    for seed, (name, steps) in enumerate(STEPS.items()):
        with bind(model, dense_steps=1):
            found[name] = run(model, *steps, seed=seed)
    return found


def in_turns(session: Session, model: Model) -> dict[str, Tensor]:
    """The generations take turns, step by step, each under its name."""
    x = {name: latents(seed) for seed, name in enumerate(STEPS)}
    for steps in zip(*STEPS.values(), strict=True):
        for name, timestep in zip(STEPS, steps, strict=True):
            with session.generation(name):
                x[name] = model(x[name], torch.tensor([timestep])) * 0.5
    return x


def assert_the_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, out in wanted.items():
        assert torch.equal(found[name], out), name


def test_named_generations_that_take_turns_are_what_they_are_alone() -> None:
    model = shared()
    wanted = alone(model)
    with bind(model, dense_steps=1) as session:
        assert_the_same(in_turns(session, model), wanted)
        assert session.generations == ("left", "right")
        for name in STEPS:
            with session.generation(name) as generation:
                assert (session.step, generation.step) == (2, 2)
                assert len(session.report()) == 3
                assert session.report() == generation.report()
        held = {row.generation for row in session.held() if row.nbytes}
        assert held == {"left", "right"}
        before = session.memory_bytes()
        session.end("left")
        assert session.memory_bytes() == before // 2
        session.end("left")
        session.clear_cache()
        assert session.memory_bytes() == 0
        assert session.generation("right").step is None


def test_generations_without_names_that_take_turns_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = shared(1)
    with bind(model), caplog.at_level(logging.WARNING, "svg_ear_compile"):
        # One is a step behind the other, so that each ends what the other began.
        for step in range(5):
            model(latents(0), 900.0 - 100 * step)
            model(latents(1), 950.0 - 100 * step)
        found = [r for r in caplog.records if "session.generation(name)" in r.getMessage()]
        assert len(found) == 1
    caplog.clear()
    with bind(model), caplog.at_level(logging.WARNING, "svg_ear_compile"):
        for _ in range(6):  # a few-step model starts at one timestep, again and again
            run(model, 1000.0, 500.0)
    assert not caplog.records


def in_thread(act: Callable[[], Any]) -> BaseException | None:
    """What an action raises in a thread of its own."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            with torch.no_grad():
                act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_another_thread_in_mid_generation_is_refused_in_a_sentence() -> None:
    model = shared(1)
    with bind(model) as session:
        run(model, 900, 800)
        for timestep in (800.0, 700.0):  # as another branch, as the next step
            error = in_thread(lambda timestep=timestep: run(model, timestep))
            assert isinstance(error, RuntimeError)
            assert "generation 'default' was started by another thread" in str(error)
        # Nor by a video of another shape: what it would end is another thread's.
        error = in_thread(lambda: model(latents(tokens=96), 700.0))
        assert isinstance(error, RuntimeError)
        # The generation goes on as if nothing had happened.
        run(model, 700)
        assert session.step == 2


def test_a_new_generation_may_come_from_another_thread() -> None:
    """Servers run every request in a thread of a pool."""
    model = shared(1)
    with bind(model) as session:
        wanted = run(model, 900, 800)
        found: list[Tensor] = []
        assert in_thread(lambda: found.append(run(model, 900, 800))) is None
        assert torch.equal(found[0], wanted)
        with pytest.raises(RuntimeError, match="started by another thread"):
            run(model, 700)
        session.reset()
        run(model, 700)
        assert session.step == 0


def test_threads_at_the_same_time_are_refused_or_have_generations_of_their_own() -> None:
    model = shared(1)
    run(model, 900)  # compiled
    inside, go_on = threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
            inside.set()
            assert go_on.wait(60)
            return model(hidden_states, timestep)

    slow = Slow()
    slow.model = model
    with bind(slow, dense_steps=1) as session:
        waiting = threading.Thread(target=lambda: slow(latents(), 900.0))
        waiting.start()
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="runs a forward in another thread"):
            slow(latents(), 950.0)
        go_on.set()
        with session.generation("mine"):
            slow(latents(), 950.0)
            assert session.step == 0
        waiting.join()
        assert session.step == 0


def test_a_name_for_each_thread() -> None:
    model = shared(1)
    wanted = alone(model)
    found: dict[str, Tensor] = {}
    with bind(model, dense_steps=1) as session:
        barrier = threading.Barrier(2, timeout=60)

        def work(seed: int, name: str) -> None:
            x = latents(seed)
            with torch.no_grad(), session.generation(name):
                for timestep in STEPS[name]:
                    barrier.wait()
                    x = model(x, torch.tensor([timestep])) * 0.5
            found[name] = x

        threads = [threading.Thread(target=work, args=item) for item in enumerate(STEPS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_the_same(found, wanted)


def test_a_name_for_each_coroutine() -> None:
    model = shared(1)
    wanted = alone(model)
    found: dict[str, Tensor] = {}
    with bind(model, dense_steps=1) as session:

        async def work(seed: int, name: str) -> None:
            x = latents(seed)
            with session.generation(name):
                for timestep in STEPS[name]:
                    await asyncio.sleep(0)
                    x = model(x, torch.tensor([timestep])) * 0.5
            found[name] = x

        async def both() -> None:
            await asyncio.gather(*(work(*item) for item in enumerate(STEPS)))

        asyncio.run(both())
    assert_the_same(found, wanted)


def test_a_generator_function_enters_its_generation_around_each_forward() -> None:
    model = shared(1)
    wanted = alone(model)
    with bind(model, dense_steps=1) as session:

        def work(seed: int, name: str) -> Iterator[Tensor]:
            x = latents(seed)
            for timestep in STEPS[name]:
                with session.generation(name):
                    x = model(x, torch.tensor([timestep])) * 0.5
                yield x

        outs = list(zip(*(work(*item) for item in enumerate(STEPS)), strict=True))
        assert_the_same(dict(zip(STEPS, outs[-1], strict=True)), wanted)

        def inside(name: str) -> Iterator[None]:
            with session.generation(name):
                yield

        left = inside("left")
        next(left)
        with pytest.raises(RuntimeError, match="'left' is entered: leave it before 'right' is"):
            next(inside("right"))
        left.close()


def test_a_generation_may_be_entered_twice_and_forgotten_by_an_error() -> None:
    model = shared(1)
    with bind(model) as session, session.generation("a") as a:
        with session.generation("a"):
            run(model, 900, 800)
        assert a.step == 1
        model.fail = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run(model, 700)
        assert a.step is None
        assert a.memory_bytes() == 0
        model.fail = None
        run(model, 900)


def test_a_forward_that_leaves_its_thread_is_refused() -> None:
    """A copied context takes the session along; what its layers remember is not for two threads."""
    inner = shared(1)

    class Elsewhere(torch.nn.Module):
        def forward(self, hidden_states: Tensor, timestep: float) -> Tensor:
            context = contextvars.copy_context()
            error = in_thread(lambda: context.run(inner, hidden_states, timestep))
            assert isinstance(error, RuntimeError)
            assert "runs in another thread than this attention call" in str(error)
            return hidden_states

    with bind(Elsewhere()) as session:
        session._models[0].module(latents(), 900.0)
        assert session.step == 0


def test_sessions_do_not_share_names() -> None:
    first, second = shared(1), shared(1)
    with bind(first) as one, bind(second) as two, one.generation("a"), two.generation("b"):
        run(first, 900, 800)
        run(second, 900)
        assert (one.step, two.step) == (1, 0)
        assert (one.generations, two.generations) == (("a",), ("b",))


def test_there_are_so_many_generations_at_a_time() -> None:
    with bind(Model(whole=False)) as session:
        for number in range(MAX_GENERATIONS):
            session.generation(str(number))
        with pytest.raises(ValueError, match=r"has 8 generations already \(0, 1, .*session\.end"):
            session.generation("one more")
        session.end("3")
        session.generation("one more")
        with pytest.raises(TypeError, match="must be a string, got 3"):
            session.generation(3)  # type: ignore[arg-type]
