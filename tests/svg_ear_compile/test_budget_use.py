"""A bound model follows a tuned budget: by layer, by timestep, by model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from made_budgets import budget_for
from transformer_models import TOKENS, stack

from svg_ear_compile import bind
from svg_ear_compile.cost_model.budget import Choice, Schedule

LAYERS = {
    "blocks.0": (Choice(0.5, 4, 8), Choice(0.2, 3, 6, "centroid")),
    "blocks.1": (Choice(1.0), Choice(0.3, threshold=1e-3)),
}
SCHEDULE = Schedule(dense_steps=1, phase_starts=(500.0,), dense_from=100.0)


def compiled() -> tuple[Any, Any, torch.Tensor]:
    model, (x, _) = stack()
    options = {"density": 0.4, "min_tokens": TOKENS}

    def backend(gm: Any, inputs: Any) -> Any:
        from svg_ear_compile.planning import rewrite_graph
        from svg_ear_compile.settings import Settings

        rewrite_graph(gm, Settings.parse(options))
        return gm.forward

    return model, torch.compile(model, backend=backend), x


def run(model: Any, x: torch.Tensor, timestep: float) -> torch.Tensor:
    with torch.no_grad():
        return model(x, torch.tensor([timestep]))


def taken(calls: list[Any]) -> list[float]:
    found = [call.plan.density for call in calls]
    calls.clear()
    return found


def test_layers_follow_their_choices_from_noise_to_video(calls: list[Any], tmp_path: Path) -> None:
    inner, model, x = compiled()
    path = tmp_path / "budget.json"
    budget_for(inner, LAYERS, TOKENS, SCHEDULE).save(path)
    with bind(model, budget=path) as session:
        for timestep, wanted in (
            (1000.0, [1.0, 1.0]),  # the leading dense step
            (900.0, [0.5, 1.0]),
            (400.0, [0.2, 0.3]),
            (90.0, [1.0, 1.0]),  # dense again
        ):
            run(model, x, timestep)
            plans = [call.plan for call in calls]
            assert taken(calls) == wanted
            if timestep == 400.0:
                assert (plans[0].q_clusters, plans[0].compensation) == (3, "centroid")
                assert (plans[1].routing, plans[1].threshold) == ("threshold", 1e-3)
        assert [layer.path for layer in session.report()] == ["blocks.0", "blocks.1"]


def test_a_budget_for_another_model_is_refused_when_it_is_bound() -> None:
    inner, model, _ = compiled()
    right = budget_for(inner, LAYERS, TOKENS, SCHEDULE)
    wrong = dataclasses.replace(
        right, fingerprint=dataclasses.replace(right.fingerprint, parameters="other")
    )
    with pytest.raises(ValueError, match="parameters of other shapes"):
        bind(model, budget=wrong)
    with bind(model, budget=right), pytest.raises(ValueError, match="bound already"):
        bind(model, budget=right)


def test_one_budget_for_each_model() -> None:
    (inner, model, _), (_, other, _) = compiled(), compiled()
    budget = budget_for(inner, LAYERS, TOKENS, SCHEDULE)
    with pytest.raises(ValueError, match="2 models are bound, but 1 budgets given"):
        bind(model, other, budget=budget)
    with bind(model, other, budget=[budget, budget]):
        pass


def test_layers_that_the_budget_does_not_know_keep_the_compiled_plan(
    calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    inner, model, x = compiled()
    with bind(model, budget=budget_for(inner, {"blocks.1": (Choice(0.2),)}, TOKENS)):
        run(model, x, 900.0)
        run(model, x, 800.0)
    assert taken(calls) == [0.4, 0.2] * 2
    assert [r.getMessage() for r in caplog.records if "has no entry" in r.getMessage()] == [
        "the budget has no entry for blocks.0: it keeps the plan of the options of torch.compile"
    ]


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize(
    "timestep",
    [
        0.0, torch.tensor(0.0), torch.tensor([0.0, 1.0]), 0, 0.5, torch.tensor([0.5]),
        torch.zeros(1, dtype=torch.bfloat16),
    ],
)  # fmt: skip
def test_later_steps_have_timesteps_of_their_own(timestep: Any, ascending: bool) -> None:
    _, model, x = compiled()
    with bind(model, ascending=ascending) as session:
        found = [
            session.timestep_of(*session.later((x,), {"timestep": timestep}, 0.01 * turn))
            for turn in range(3)
        ]
    assert found == sorted(set(found), reverse=not ascending)


@pytest.mark.parametrize("timestep", [torch.tensor([800.0]), torch.tensor([800]), 800])
def test_a_later_step_continues_the_generation(timestep: Any) -> None:
    _, model, x = compiled()
    with bind(model) as session:
        args, kwargs = session.later((x,), {"timestep": timestep}, 0.01)
        assert session.timestep_of(args, kwargs) < 800
        run(model, x, 800.0)
        with torch.no_grad():
            later = args[1] if len(args) > 1 else kwargs["timestep"]
            model(x, torch.as_tensor(later).float().reshape(1))
        assert session.step == 1
