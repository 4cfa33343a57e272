"""Sessions: layers, denoising steps and memory, in graphs of a whole model and of shared blocks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_budgets import budget_for
from session_models import (
    BUILD,
    DIM,
    HEADS,
    TOKENS,
    Attention,
    Model,
    densities,
    latents,
    paths,
    run,
    shared,
    whole,
)
from torch import Tensor, nn

from svg_ear_compile.cost_model.budget import Choice
from svg_ear_compile.guidance import MAX_BRANCHES
from svg_ear_compile.kernels.call import UNBOUND, active_source
from svg_ear_compile.session import bind

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@BUILD
def test_layers_are_told_by_their_parameters(build: Callable[[], Any], calls: list[Any]) -> None:
    model = build()
    with bind(model) as session:
        run(model, 900, 800)
        report = session.report()
    assert [layer.path for layer in report] == [f"blocks.{i}.attn1" for i in range(3)]
    assert {layer.identity for layer in report} == {"parameter"}
    assert [layer.index for layer in report] == [0, 1, 2]
    assert {layer.branches for layer in report} == {1}
    last = [call.memory.density for call in calls[-3:]]
    assert [layer.density for layer in report] == last
    assert all(0 < density < 1 for density in last if density is not None)


def test_inductor_passes_the_parameter_itself() -> None:
    model = torch.compile(Model(True, blocks=2), fullgraph=True)
    with bind(model) as session:
        run(model, 900)
        assert {layer.identity for layer in session.report()} == {"parameter"}


def test_two_models_never_mix() -> None:
    first, second = shared(2, seed=0), shared(2, seed=1)
    alone = [run(first, 900, 800), run(second, 900, 800)]
    expected = []
    for model in (first, second):
        with bind(model):
            expected.append(run(model, 900, 800))
    assert not torch.equal(alone[0], expected[0])
    with bind(first, second) as session:
        x = [latents(), latents()]
        for timestep in (900, 800):
            for i, model in enumerate((first, second)):
                x[i] = model(x[i], timestep) * 0.5
        assert [(layer.model, layer.path) for layer in session.report()] == [
            (m, f"blocks.{i}.attn1") for m in (0, 1) for i in (0, 1)
        ]
    assert all(torch.equal(a, b) for a, b in zip(x, expected, strict=True))


@BUILD
def test_leading_steps_are_dense(build: Callable[[], Any], calls: list[Any]) -> None:
    model = build()
    with bind(model, dense_steps=2) as session:
        for timestep, density in ((900, 1.0), (800, 1.0), (700, 0.3), (600, 0.3), (950, 1.0)):
            model(latents(), torch.tensor([timestep]))
            assert densities(calls) == [density] * 3
        assert session.step == 0


def test_dense_above_a_timestep_survives_skipped_steps(calls: list[Any]) -> None:
    model = shared(1)
    with bind(model, dense_above_timestep=500.0):
        run(model, 900, 500, 100)
        assert densities(calls) == [1.0, 0.3, 0.3]
        run(model, 900, 800, 501, 499)
        assert densities(calls) == [1.0, 1.0, 1.0, 0.3]


@BUILD
def test_leading_layers_are_dense_from_the_first_forward(
    build: Callable[[], Any], calls: list[Any]
) -> None:
    model = build()
    with bind(model, dense_layers=2) as session:
        run(model, 900, 800)
        assert densities(calls) == [1.0, 1.0, 0.3] * 2
        assert [layer.density is None for layer in session.report()] == [True, True, False]


def test_branches_are_the_forwards_of_one_timestep(calls: list[Any]) -> None:
    model = shared(1)
    with bind(model, dense_steps=1) as session:
        for timestep in (900, 800, 700):
            for text in (7, 9):  # the texts of two branches may differ in length
                model(latents(text), timestep, text=torch.zeros(1, text, 4))
        assert densities(calls) == [1.0] * 2 + [0.3] * 4
        assert session.step == 2
        assert session.report()[0].branches == 2


def test_each_branch_and_layer_has_its_own_memory(calls: list[Any]) -> None:
    model = shared(2)
    with bind(model):
        for timestep in (900, 800):
            for branch in (0, 1):
                model(latents(branch), timestep)
    memories = [id(call.memory) for call in calls]
    assert len(set(memories)) == 4
    assert memories[:4] == memories[4:]


class Windows(nn.Module):
    """A block that is compiled by itself and called for each of some windows of the tokens."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows, self.block = windows, shared(1).blocks[0]

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        return torch.cat([self.block(part) for part in hidden_states.chunk(self.windows, 1)], 1)


def test_a_block_that_is_called_again_in_a_forward_remembers_each_call_alone() -> None:
    """What a window gets is what it gets by itself, in each step and guidance branch."""
    inputs, timesteps = [latents(seed) for seed in (3, 4)], (900, 900, 800, 800)
    alone = []
    for x in inputs:
        model = Windows(1)
        with bind(model):
            alone.append([model(x, timestep) for timestep in timesteps])
    model = Windows(2)
    with bind(model) as session:
        together = [model(torch.cat(inputs, 1), timestep) for timestep in timesteps]
        assert len(session.report()) == 1
    for found, wanted in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(wanted, 1))


def test_a_constant_timestep_does_not_gather_memory() -> None:
    model = shared(1)
    with bind(model) as session:
        held = []
        for video in range(MAX_BRANCHES + 3):
            model(latents(video), 500)
            held.append(session.memory_bytes())
    assert held[MAX_BRANCHES - 1] == held[-1] == MAX_BRANCHES * held[0]


def test_memory_bytes_counts_what_is_held() -> None:
    model = shared(2)
    with bind(model) as session:
        assert session.memory_bytes() == 0
        run(model, 900, 800, 700)
        # float32 centroids, int16 labels, bool blocks and one float64 count
        layer = HEADS * ((4 + 16) * DIM * 4 + 2 * TOKENS * 2 + 4 * 16) + 8
        kept = TOKENS * HEADS * DIM * 4  # latents of the step, to tell its guidance branches
        assert session.memory_bytes() == 2 * layer + kept
        assert [(row.what, row.nbytes) for row in session.held()] == [
            ("centroids and block masks", 2 * layer),
            ("latents", kept),
            ("captured graphs", 0),
        ]
        session.reset()
        assert session.memory_bytes() == 0
        run(model, 900, 800)
        session.clear_cache()
        assert session.memory_bytes() == 0
        assert session.step is None


@BUILD
def test_the_same_seed_twice_gives_the_same_bits(build: Callable[[], Any]) -> None:
    model = build()
    cold = run(model, 900, 600, 300)
    with bind(model):
        first = run(model, 900, 600, 300)
        run(model, 900, 600, seed=1)
        assert torch.equal(run(model, 900, 600, 300), first)
    assert not torch.equal(first, cold)  # something was remembered


def test_a_generation_starts_anew(calls: list[Any]) -> None:
    model = shared(1)
    with bind(model) as session:

        def starts_anew(act: Callable[[], Any]) -> bool:
            session.reset()
            run(model, 900, 800)
            before = calls[-1].memory
            act()
            return calls[-1].memory is not before and session.step == 0

        assert starts_anew(lambda: model(latents(), 801))
        assert starts_anew(lambda: model(latents(tokens=96), 700))
        assert starts_anew(lambda: model(latents(tokens=96), 800))
        assert starts_anew(lambda: (session.reset(), model(latents(), 700)))
        assert not starts_anew(lambda: model(latents(), 799))
        # Guidance that is switched off or on leaves the generation what it is.
        assert not starts_anew(lambda: model(latents(), 700, text=torch.zeros(1, 7)))
        assert not starts_anew(lambda: model(latents(batch=2), 700))


def test_two_experts_share_one_clock(calls: list[Any]) -> None:
    high, low = shared(1), shared(1, seed=1)
    with bind(high, low, dense_steps=3) as session:
        for model, timestep in ((high, 900), (high, 800), (low, 400), (low, 300)):
            for _branch in range(2):
                model(latents(), torch.tensor(timestep))
        assert densities(calls) == [1.0] * 6 + [0.3] * 2
        assert session.step == 3
        assert [layer.branches for layer in session.report()] == [2, 2]
        high(latents(), 900)
        assert session.step == 0
        assert paths(session, 1) == []


def test_time_may_run_upwards(calls: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    model = shared(1)
    with bind(model, ascending=True, dense_steps=1, dense_above_timestep=150.0):
        run(model, 0, 100, 200, 300)
        assert densities(calls) == [1.0, 1.0, 0.3, 0.3]
        run(model, 0, 200)
        assert densities(calls) == [1.0, 0.3]
    assert "ascending" not in caplog.text
    with bind(model), caplog.at_level(logging.WARNING, "svg_ear_compile"):
        run(model, 0, 100, 200, 300, 400, 500)
    warnings = [r for r in caplog.records if "ascending=True" in r.getMessage()]
    assert len(warnings) == 1


def test_a_timestep_per_token_counts_by_its_largest() -> None:
    model = shared(1)
    with bind(model) as session:
        model(latents(), torch.tensor([[0.0, 900.0]]))
        model(latents(), torch.tensor([[0.0, 800.0]]))
        assert session.step == 1


@BUILD
def test_a_budget_reaches_layers_by_path_and_pattern(
    build: Callable[[], Any], calls: list[Any]
) -> None:
    model = build()
    budget = {"blocks.[01].*": 0.5, "*": 0.7, "blocks.1.attn1": 1.0}
    with torch.no_grad(), bind(model, budget=budget) as session:
        run(model, 900)
        assert densities(calls) == [0.5, 1.0, 0.7]
        reached = [layer.density for layer in session.report()]
        assert [density is None for density in reached] == [False, True, False]


def test_a_layer_or_step_that_is_dense_heeds_no_budget(calls: list[Any]) -> None:
    model = shared(2)
    with bind(model, budget={"*": 0.5}, dense_layers=1, dense_steps=1):
        run(model, 900, 800)
    assert densities(calls) == [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failed_forward_ends_its_generation(error: BaseException) -> None:
    model = shared()
    with bind(model) as session:
        expected = run(model, 900, 800)
        model.fail = error
        with pytest.raises(type(error)):
            run(model, 900)
        assert active_source() is UNBOUND
        assert session.report() == []
        model.fail = None
        assert torch.equal(run(model, 900, 800), expected)


def test_an_error_in_a_whole_graph_leaves_nothing_active() -> None:
    model = whole()
    with bind(model) as session:
        run(model, 900)
        with pytest.raises((RuntimeError, TypeError)):
            model(latents()[..., :1], 800)  # narrower than any projection takes
        assert active_source() is UNBOUND
        assert session.report() == []


def test_a_bound_model_inside_of_another() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.attn1, self.inner = Attention("attn1"), [inner]

        def forward(self, x: Tensor, timestep: float) -> Tensor:
            return self.attn1(self.inner[0](x, timestep))

    inner = shared(1)
    outer = Outer(inner).requires_grad_(False)
    with bind(outer, inner) as session:
        run(outer, 900, 800)
        found = [(layer.model, layer.path) for layer in session.report()]
        assert found == [(0, "attn1"), (1, "blocks.0.attn1")]
        assert session.step == 1


def test_a_budget_brings_the_direction_of_its_timestep(calls: list[Any]) -> None:
    model = shared(1)
    budget = budget_for(model, {"blocks.0.attn1": (Choice(0.4),)}, TOKENS)
    rising = dataclasses.replace(
        budget, schedule=dataclasses.replace(budget.schedule, ascending=True)
    )
    with bind(model, dense_steps=1) as session:
        session.use(rising)
        run(model, 0, 100, 200)
        assert densities(calls) == [1.0, 0.4, 0.4]
        session.use(budget)
        run(model, 200, 100, 0)
        assert densities(calls) == [1.0, 0.4, 0.4]
