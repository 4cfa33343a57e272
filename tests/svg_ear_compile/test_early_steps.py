"""Early steps get more density than later ones; the mean is what was asked for."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import session_models
import tiny_pipelines as tiny
from hypothesis import given
from hypothesis import strategies as st
from made_budgets import budget_for
from session_models import TOKENS, densities, run, shared

from benchmarks.fidelity.schedules import SHIPPED
from svg_ear_compile import accelerate, bind
from svg_ear_compile.cost_model.budget import Choice
from svg_ear_compile.early_steps import EARLY_FACTOR, EARLY_MOST, EarlySteps
from svg_ear_compile.kernels.plan import AttentionPlan


@given(steps=st.integers(1, 100), factor=st.floats(1.0, 50.0), mean=st.floats(0.0, 1.0))
def test_the_mean_is_what_was_asked_for(steps: int, factor: float, mean: float) -> None:
    early = EarlySteps(steps, factor)
    found = [early.density(mean, step) for step in range(steps)]
    assert statistics.fmean(found) == pytest.approx(mean, abs=1e-9)
    assert all(0.0 <= density <= 1.0 for density in found)
    assert found == sorted(found, reverse=True)
    for density, wanted in zip(found, early.factors(), strict=True):
        assert density == pytest.approx(min(max(mean, EARLY_MOST), wanted * found[-1]))
    assert early.density(mean, steps + 3) == found[-1]


@pytest.mark.parametrize(("steps", "early"), [(1, 0), (4, 1), (8, 2), (24, 6), (30, 8), (50, 12)])
def test_a_quarter_of_the_steps_is_early(steps: int, early: int) -> None:
    assert EarlySteps(steps, 2.0).count == early
    assert EarlySteps(steps, 1.0).count == 0


def test_density_falls_in_two_halves() -> None:
    assert EarlySteps(8, 3.0).factors() == [3.0, 2.0, 1, 1, 1, 1, 1, 1]
    assert EarlySteps(4, 3.0).factors() == [2.0, 1, 1, 1]
    assert EarlySteps(8, 1.0).factors() == [1.0] * 8


def test_a_bound_model_that_knows_its_steps_spends_more_in_the_first(calls: list[Any]) -> None:
    model, times = shared(1), range(800, 0, -100)
    early = [0.5, 0.38, *[0.76 / 3] * 6]
    for given_, wanted in (
        ({"steps": 8}, early),
        ({}, [0.3] * 8),
        ({"steps": 8, "early_factor": 1.0}, [0.3] * 8),
        ({"steps": 8, "early_factor": 3.0}, [0.5, 0.475, *[0.2375] * 6]),
        ({"steps": 8, "dense_steps": 1}, [1.0, *[0.3] * 7]),
        ({"steps": 8, "dense_above_timestep": 750.0}, [1.0, *[0.3] * 7]),
        ({"steps": 8, "dense_layers": 1}, [1.0] * 8),
        (
            {"steps": 8, "budget": {"*": 0.1}},
            [0.1 * f * 8 / 9.5 for f in (2, 1.5, 1, 1, 1, 1, 1, 1)],
        ),
    ):
        with bind(model, **given_):
            run(model, *times)
            assert densities(calls) == pytest.approx(wanted), given_


def test_a_tuned_budget_is_followed_as_it_is(calls: list[Any]) -> None:
    model = shared(1)
    budget = budget_for(model, {"blocks.0.attn1": (Choice(0.4),)}, TOKENS)
    with bind(model, steps=8, budget=budget) as session:
        run(model, 800, 700)
        assert densities(calls) == [0.4, 0.4]
        assert session.generation("default").early_steps is None


def test_so_is_one_in_the_options_of_torch_compile(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Choice(0.4).plan(AttentionPlan.decode(session_models.PLAN))
    monkeypatch.setattr(session_models, "PLAN", tuned.encode())
    model = shared(1)
    with bind(model, steps=8):
        run(model, 800, 700)
    assert densities(calls) == [0.4, 0.4]


def test_two_experts_share_the_steps(calls: list[Any]) -> None:
    early, late = shared(1), shared(1, seed=1)
    wanted = [0.5, 0.38, *[0.76 / 3] * 6]
    with bind(early, late, steps=8):
        run(early, 800, 700, 600, 500)
        run(late, 400, 300, 200, 100)
    assert densities(calls) == pytest.approx(wanted)


def test_the_default_is_one_of_the_schedules_that_were_compared() -> None:
    for steps in (1, 4, 8, 24, 30, 50):
        factors = EarlySteps(steps, EARLY_FACTOR).factors()
        assert SHIPPED.densities(0.125, steps) == tuple(0.125 * factor for factor in factors)


@pytest.mark.usefixtures("without_inductor")
def test_a_pipeline_says_its_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.wan()
    taken: list[float] = []
    inner = EarlySteps.density

    def density(self: EarlySteps, mean: float, step: int) -> float:
        taken.append(inner(self, mean, step))
        return taken[-1]

    monkeypatch.setattr(EarlySteps, "density", density)
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, tiny.wan_call(num_inference_steps=8))
        assert "the first 2 at up to 2 times the density of the others" in str(handle.report())
        # A forward that no call of the pipeline makes has no number of steps.
        assert handle.session.generation("default").early_steps is None
    assert statistics.fmean(taken) == pytest.approx(0.3)
    assert max(taken) == 0.5


@pytest.mark.parametrize(
    ("given_", "error"),
    [
        ({"steps": 0}, ValueError),
        ({"steps": 2.5}, TypeError),
        ({"early_factor": 0.5}, ValueError),
        ({"early_factor": float("nan")}, ValueError),
        ({"early_factor": "2"}, TypeError),
    ],
)
def test_nonsense_is_answered(given_: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(given_))):
        bind(shared(1), **given_)
