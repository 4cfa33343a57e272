"""What a tuning says of its result, and of how long it takes."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_models import tuned_stack

from svg_ear_compile import ModelCall, TuningSettings, trial_runs, tune, tuning
from svg_ear_compile.trial_runs import TrialRuns
from svg_ear_compile.tuning_remarks import on_error, on_time

QUICK = TuningSettings(densities=(0.1, 0.3), compiler="eager", cluster_sizes=((32, 16),))


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch._dynamo.reset()


def test_dense_is_named_where_it_is_faster() -> None:
    (said,) = on_time(12.0, 10.0, 0.0)
    assert said.startswith("dense attention is faster: a forward takes 12 ms, compiled by Inductor")
    assert on_time(10.0, 10.0, 0.0)


@pytest.mark.parametrize(("variation", "noisy"), [(0.0, False), (0.19, False), (0.21, True)])
def test_a_speedup_within_the_variation_of_times_is_noise(variation: float, noisy: bool) -> None:
    said = on_time(8.0, 10.0, variation)
    assert bool(said) == noisy
    assert all("the speed-up is within noise" in each and "21%" in each for each in said)


@pytest.mark.parametrize(
    ("tuned", "uniform", "noisy"),
    [
        ([0.9, 1.8, 2.7], [1.0, 2.0, 3.0], False),  # a tenth less in every call
        ([0.9, 2.2, 2.7], [1.0, 2.0, 3.0], True),  # once more, twice less
        ([1.1, 2.3, 3.2], [1.0, 2.0, 3.0], False),  # worse in every call is no noise
        ([1.0, 2.0], [1.0, 2.0], True),
    ],
)
def test_a_difference_that_changes_its_sign_is_noise(
    tuned: list[float], uniform: list[float], noisy: bool
) -> None:
    said = on_error(tuned, uniform)
    assert bool(said) == noisy
    assert all("is within noise: over" in each for each in said)


def test_one_call_cannot_tell() -> None:
    assert "give calls of several clips" in on_error([0.1], [0.2])[0]
    assert on_error([0.0], [0.0]) == []  # dense, both of them


class Counted:
    """A clock that goes a second with every forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = 0
        clock = types.SimpleNamespace(perf_counter=lambda: float(self.forwards))
        monkeypatch.setattr(trial_runs, "time", clock)
        made = trial_runs._compiled
        monkeypatch.setattr(trial_runs, "_compiled", lambda *a: tuple(map(self.counted, made(*a))))

    def counted(self, model: Any) -> Any:
        def forward(module: Any, args: Any, kwargs: Any) -> None:
            self.forwards += 1

        model.register_forward_pre_hook(forward, with_kwargs=True)
        return model


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        pytest.param(
            {"density": 0.3},
            dataclasses.replace(QUICK, thresholds=True, phases=2),
            marks=pytest.mark.slow,
        ),
        ({"max_error": 0.05}, QUICK),
    ],
)
def test_the_time_that_is_announced_is_the_time_that_it_takes(
    objective: dict[str, float], settings: TuningSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_runs, "PATIENCE_S", 40.0)
    model, calls = tuned_stack()
    counted = Counted(monkeypatch)
    said: list[tuple[tuning.Cost, int]] = []
    tune(
        model,
        [ModelCall(args) for args in calls],
        settings=settings,
        on_cost=lambda cost: said.append((cost, counted.forwards)),
        **objective,  # type: ignore[arg-type]
    )
    ((cost, before),) = said
    assert cost.seconds == cost.forwards == 24
    settled = counted.forwards - before - 24
    assert settled <= cost.settling <= 2.5 * settled


def test_the_turns_of_a_timing_end_with_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrialRuns.times_seconds(2, 1, 0.01) == pytest.approx(trial_runs.REPEATS * 0.06)
    assert TrialRuns.times_seconds(2, 1, 100.0) == 2 * 600.0
    assert TrialRuns.times_seconds(1, 1, 10.0) == 3 * 30.0  # the third begins before 60 s are over
