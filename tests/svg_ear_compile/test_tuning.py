"""Tuning: its measurements, its decisions, and how it continues after an interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformer_models import stack, tuned_stack

from svg_ear_compile import ModelCall, TuningSettings, bind, capture_calls, trial_runs, tune, tuning
from svg_ear_compile.checkpoint import Checkpoint
from svg_ear_compile.cost_model.allocation import AllocationProblem
from svg_ear_compile.cost_model.budget import Budget, Choice, check
from svg_ear_compile.cost_model.calibration import Efficiency
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.margin import unseen_error
from svg_ear_compile.cost_model.prior import prior
from svg_ear_compile.cost_model.stages import STAGES, AttentionShape
from svg_ear_compile.cost_model.threshold import routing_threshold
from svg_ear_compile.tuning_plan import Trial

QUICK = TuningSettings(densities=(0.1, 0.3), compiler="eager", cluster_sizes=((32, 16),))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_inductor: None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial_runs, "REPEATS", 2)


def model_and_calls() -> tuple[nn.Module, list[ModelCall]]:
    model, calls = tuned_stack()
    return model, [ModelCall(args) for args in calls]


def error(model: Any, budget: Budget, call: ModelCall) -> float:
    """Relative RMS error of one forward under a budget, measured without the code of tuning."""
    from svg_ear_compile.backend import svg_ear

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=svg_ear, options={"density": 0.5, "min_tokens": 1})
    flat = dataclasses.replace(budget, schedule=dataclasses.replace(budget.schedule, dense_steps=0))
    with torch.no_grad(), bind(compiled, budget=flat):
        dense = model(*call.args)
        return float((compiled(*call.args) - dense).norm() / dense.norm())


def test_the_objective_is_met_and_the_layer_that_matters_most_gets_most() -> None:
    model, calls = model_and_calls()
    heard: list[tuple[str, int, int]] = []
    costs: list[tuning.Cost] = []
    found = tune(
        model, calls, density=0.3, settings=QUICK, on_cost=costs.append,
        on_progress=lambda *what: heard.append(what),
    )  # fmt: skip
    assert check(found) is found
    assert [cost.forwards for cost in costs] == [3 * 2 * len(calls)]
    assert ("one layer sparse", 24, 24) in heard
    assert found.predicted.density is not None
    assert found.predicted.density <= 0.3 + 1e-9
    if found.outcome == "tuned":  # not worse than one density, where both were run
        assert found.measured.error is not None
        first, *_, last = [choices[0].density for choices in found.layers.values()]
        assert last >= first
    assert "one density for all" in found.note
    # The measured performance in the budget can be measured again.
    errors = [error(model, found, call) for call in calls]
    assert max(errors) == pytest.approx(found.measured.error, rel=0.05)


def test_an_error_objective_is_kept_on_the_calls_with_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On this device only operations take time, so that sparse attention of few tokens pays.
    ideal = dict.fromkeys((*STAGES["cpu"], "dense"), Efficiency(1.0, 0.0, 0.0))
    known = dataclasses.replace(prior(describe("cpu")), stages={"float32/64": ideal})
    monkeypatch.setattr(tuning, "calibration_of", lambda device: known)
    model, calls = model_and_calls()
    loose = tune(model, calls, density=0.15, settings=QUICK).measured.error
    assert loose is not None
    limit = loose / 2
    found = tune(model, calls, max_error=limit, settings=QUICK)
    assert found.measured.error is not None
    errors = [error(model, found, call) for call in calls]
    assert 0 < unseen_error([errors]) <= limit * 1.01
    assert "95% of unseen forwards" in found.note
    assert any(c.density < 1 for choices in found.layers.values() for c in choices)


def test_phases_have_choices_of_their_own() -> None:
    model, calls = model_and_calls()
    settings = dataclasses.replace(QUICK, phases=2, dense_steps=3, dense_from=50.0)
    found = tune(model, calls, density=0.3, settings=settings)
    assert found.schedule.phase_starts == (500.0,)
    assert (found.schedule.dense_steps, found.schedule.dense_from) == (3, 50.0)
    assert all(len(choices) == 2 for choices in found.layers.values())


def test_uniform_is_kept_where_tuning_is_not_better(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_and_calls()

    def misled(self: Any, objective: Any, allowed: float) -> dict[str, tuple[Choice, ...]]:
        options = {"blocks.0": 0.9, "blocks.1": 0.0, "blocks.2": 0.0}
        return {layer: (Choice(density, 8, 16),) for layer, density in options.items()}

    monkeypatch.setattr(AllocationProblem, "solve", misled)
    found = tune(model, calls, density=0.3, settings=QUICK)
    assert found.outcome == "uniform"
    assert "tuning was not better" in found.note
    assert len(set(found.layers.values())) == 1


def test_an_unreachable_objective_names_the_best() -> None:
    model, calls = model_and_calls()
    with pytest.raises(ValueError, match=r"target_speedup 100 cannot be reached .* the best is"):
        tune(model, calls, target_speedup=100.0, settings=QUICK)
    with pytest.raises(ValueError, match=r"density 0.01 cannot be reached .* the least is 0.1"):
        tune(model, calls, density=0.01, settings=QUICK)


def test_finished_measurements_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = model_and_calls()
    path = tmp_path / "notes.checkpoint"
    whole = tune(model, calls, density=0.3, settings=QUICK)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "one layer sparse" and done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, calls, density=0.3, settings=QUICK, checkpoint=path, on_progress=interrupt)
    with path.open("a") as file:
        file.write('{"key": "blocks.0 0.1')  # cut off in the middle of a line
    costs: list[tuning.Cost] = []
    resumed = tune(model, calls, density=0.3, settings=QUICK, checkpoint=path, on_cost=costs.append)
    assert (costs[0].finished, costs[0].forwards) == (10, 14)
    assert resumed.layers == whole.layers
    # The model can be bound again after an interruption.
    with bind(torch.compile(model, backend="eager")):
        pass


def test_measurements_of_other_inputs_are_not_taken_over(tmp_path: Path) -> None:
    model, calls = model_and_calls()
    path = tmp_path / "notes.checkpoint"
    tune(model, calls, density=0.3, settings=QUICK, checkpoint=path)
    other = [ModelCall((call.args[0] + 1, call.args[1])) for call in calls]
    costs: list[tuning.Cost] = []
    tune(model, other, density=0.3, settings=QUICK, checkpoint=path, on_cost=costs.append)
    assert costs[0].finished == 0


def test_trials_of_densities_that_are_close_share_no_measurement() -> None:
    close = [0.3333333, 0.3333334, math.nextafter(0.3333334, 1)]
    trials = [Trial("a", Choice(density, None, None, "gaussian"), 0) for density in close]
    assert len({trial.key for trial in trials}) == len(trials)
    # What earlier versions wrote for few digits is still read, however the number is typed.
    for density in (0.05, np.float64(0.05)):
        choice = Choice(density, None, 8, "centroid")
        assert Trial("a.b", choice, 3).key == "a.b 0.05 None/8 centroid 3"


def test_a_checkpoint_keeps_apart_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with Checkpoint(path, ["a"]) as first:
        first.add("x", 1.0)
    with Checkpoint(path, ["b"], rank=1) as second:
        assert not second.finished
        second.add("x", 2.0)
    path.write_text(path.read_text() + '[1]\n{"key": "y", "value": NaN}\nnonsense\n')
    with Checkpoint(path, ["a"], rank=3) as third:
        assert third.finished == {"x": 1.0}
    with Checkpoint(path, ["b"]) as fourth:
        assert fourth.finished == {"x": 2.0}
    assert all(
        json.loads(line) for line in (tmp_path / "checkpoint.1").read_text().split("\n") if line
    )


def test_a_checkpoint_reads_its_own_sound_lines_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a[b]*.kept"
    with Checkpoint(path, ["a"]) as first:
        first.add("x", 1.0)
        first.add("y", 2.0)
    with Checkpoint(path, ["a"], rank=2) as second:
        second.add("z", 3.0)
    lines = path.read_bytes().splitlines()
    (y,) = (line for line in lines if b'"y"' in line)
    spoiled = [y.replace(b"2.0", b"3.0"), y.replace(b'"y"', b'"w"'), b"\xff\xfe", b"[" * 10**5]
    path.write_bytes(b"\n".join([*spoiled, *lines]))
    # Other files in the folder, none of which belongs to a rank.
    for name in (b"a[b]*.kept.bak", b"a[b]*.kept\xff", b"axb.kept", b"a[b]*.kept.01"):
        (tmp_path / os.fsdecode(name)).write_bytes(y.replace(b'"y"', b'"n"'))
    (tmp_path / "a[b]*.kept.3").mkdir()
    os.mkfifo(tmp_path / "a[b]*.kept.4")
    with Checkpoint(path, ["a"]) as found:
        assert found.finished == {"x": 1.0, "y": 2.0, "z": 3.0}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_checkpoint_that_cannot_be_kept_is_refused(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "kept")
    with (
        pytest.raises((OSError, ValueError), match="kept"),
        Checkpoint(tmp_path / "kept", []),
    ):
        pass


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({}, "give one of"),
        ({"density": 0.2, "max_error": 0.1}, "give one of"),
        ({"target_speedup": 1.0}, "target_speedup must be between 1 and inf"),
        ({"density": 1.0}, "density must be between 0 and 1"),
        ({"max_error": -1.0}, "max_error must be between 0 and inf"),
    ],
)
def test_objectives_are_checked_before_anything_runs(
    objectives: dict[str, float], message: str
) -> None:
    model, calls = model_and_calls()
    with pytest.raises(ValueError, match=message):
        tune(model, calls, **objectives)  # type: ignore[arg-type]


def test_models_and_calls_that_cannot_be_tuned_are_refused() -> None:
    model, calls = model_and_calls()
    with pytest.raises(ValueError, match="at least one call"):
        tune(model, [], density=0.2)
    with pytest.raises(ValueError, match="3 phases need calls at as many timesteps"):
        tune(model, calls[:2], density=0.2, settings=dataclasses.replace(QUICK, phases=3))
    with pytest.raises(ValueError, match="no attention of the model could be sparse"):
        tune(Plain(), [ModelCall((torch.randn(1, 8), torch.tensor([1.0])))], density=0.2)
    for wrong in ({"densities": (1.0,)}, {"phases": 0}, {"forms": ()}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TuningSettings(**wrong)  # type: ignore[arg-type]


class Plain(nn.Module):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x * timestep


def test_thresholds_follow_from_the_multiplier() -> None:
    model, calls = model_and_calls()
    settings = dataclasses.replace(QUICK, thresholds=True)
    found = tune(model, calls, density=0.3, settings=settings)
    thresholds = [c.threshold for choices in found.layers.values() for c in choices]
    assert all(
        (threshold is not None) == (choice.density < 1)
        for threshold, (choice,) in zip(thresholds, found.layers.values(), strict=True)
    )
    assert all(threshold >= 0 for threshold in thresholds if threshold is not None)
    assert "routed by threshold" in found.note
    errors = [error(model, found, call) for call in calls]
    assert max(errors) == pytest.approx(found.measured.error, rel=0.05)


def test_a_threshold_is_where_time_and_error_are_worth_the_same() -> None:
    shape = AttentionShape(1, 2, 2, 1000, 1000, 64, "float32")
    multiplier, slope, sensitivity, square = 3e-4, 20.0, 0.05, 7.0
    rho = routing_threshold(multiplier, slope, sensitivity, square, shape)
    rows = 2 * 1000
    block = 40 * 25  # queries times keys
    error = sensitivity * rho * block / (rows * square)
    ms = slope * block / (rows * 1000)
    assert multiplier * ms == pytest.approx(error)


def test_calls_of_a_pipeline_are_recorded_with_their_own_tensors() -> None:
    model, (x, timestep) = stack()

    def pipeline() -> None:
        latents = x.clone()
        for step in range(6):
            model(latents, timestep=timestep - step)
            latents += 1  # in place, as schedulers do

    calls = capture_calls(model, pipeline, keep=lambda index: index % 3 == 1)
    assert [float(call.kwargs["timestep"]) for call in calls] == [499.0, 496.0]
    torch.testing.assert_close(calls[0].args[0], x + 1)
    assert not model._forward_pre_hooks
    assert statistics.fmean(float(call.args[0].mean() - x.mean()) for call in calls) == (
        pytest.approx(2.5, abs=1e-4)
    )
