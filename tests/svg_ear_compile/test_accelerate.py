"""`accelerate` on diffusers' pipelines: what runs, what is given back, what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from made_budgets import budget_for
from session_models import run, whole
from torch._inductor.compile_fx import compile_fx
from transformer_models import stack

from svg_ear_compile import accelerate
from svg_ear_compile.cost_model.budget import Choice

FAMILIES = pytest.mark.parametrize(
    ("make", "call"),
    [
        (tiny.wan, tiny.wan_call),
        (tiny.wan_two_experts, tiny.wan_call),
        (tiny.ltx, tiny.ltx_call),
        (tiny.cogvideox, tiny.cogvideox_call),
    ],
    ids=["wan", "wan_two_experts", "ltx", "cogvideox"],
)


pytestmark = pytest.mark.usefixtures("without_inductor")


@FAMILIES
def test_a_pipeline_runs_sparse_and_is_given_back(
    make: Callable[[], Any], call: Callable[..., Any]
) -> None:
    pipe = make()
    dense = tiny.generate(pipe, call())
    before = tiny.state_of(pipe)
    handle = accelerate(pipe, density=0.3, options=tiny.OPTIONS)
    first, second = tiny.generate(pipe, call()), tiny.generate(pipe, call())
    report = handle.report()
    handle.detach()

    assert torch.equal(first, second)
    assert not torch.equal(first, dense)
    assert (first - dense).norm() < 0.05 * dense.norm()
    assert isinstance(pipe, before["class"])
    assert tiny.state_of(pipe) == before
    assert torch.equal(tiny.generate(pipe, call()), dense)

    assert (report.calls, report.steps, report.dense_steps) == (2, 4, 0)
    assert not report.compiled
    assert report.seconds > 0
    assert report.memory_bytes > 0
    names = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None)]
    assert [model.name for model in report.models] == names
    for model in report.models:
        assert model.sparse == len(model.layers) == 2
        assert {layer.identity for layer in model.layers} == {"parameter"}
        assert {layer.branches for layer in model.layers} == {2}  # guidance
        assert 0.25 < model.density < 0.45
        assert model.reused_fraction >= 0.5
    assert sum(layer.cold for model in report.models for layer in model.layers) == 2 * len(names)


def test_density_1_is_the_pipeline_itself() -> None:
    pipe = tiny.wan()
    dense = tiny.generate(pipe, tiny.wan_call())
    with accelerate(pipe, density=1.0, options=tiny.OPTIONS) as handle:
        torch.testing.assert_close(tiny.generate(pipe, tiny.wan_call()), dense)
        assert [model.sparse for model in handle.report().models] == [0]
        assert "every call of 2 layers was dense" in str(handle.report())


def test_nothing_is_held_between_calls() -> None:
    pipe = tiny.wan()
    with accelerate(pipe, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, tiny.wan_call())
        assert handle.report().memory_bytes > 0
        assert handle.session.memory_bytes() == 0


def test_an_error_in_a_call_ends_it() -> None:
    pipe = tiny.wan()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with accelerate(pipe, options=tiny.OPTIONS) as handle:
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, tiny.wan_call(callback_on_step_end=stop))
        assert handle.report().calls == 0
        assert handle.session.memory_bytes() == 0
        found = tiny.generate(pipe, tiny.wan_call())
        assert torch.equal(tiny.generate(pipe, tiny.wan_call()), found)


@pytest.mark.parametrize(("asked", "dense"), [(1, 1), (0.25, 1), (0.5, 2), (0.0, 0), (0.1, 0)])
def test_leading_steps_are_dense_by_number_or_fraction(asked: float, dense: int) -> None:
    pipe = tiny.wan()
    with accelerate(pipe, dense_steps=asked, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, tiny.wan_call())
        assert (handle.report().steps, handle.report().dense_steps) == (4, dense)
        if asked == 0.5:
            tiny.generate(pipe, tiny.wan_call(num_inference_steps=2))
            assert (handle.report().steps, handle.report().dense_steps) == (2, 1)


def test_a_call_that_would_be_all_dense_warns() -> None:
    pipe = tiny.wan()
    with (
        accelerate(pipe, dense_steps=9, options=tiny.OPTIONS) as handle,
        pytest.warns(UserWarning, match="dense_steps=9 leaves none of the 4 steps of this call"),
    ):
        tiny.generate(pipe, tiny.wan_call())
    assert handle.report().dense_steps == 4
    first, second, _ = str(handle.report()).splitlines()
    assert first.startswith("call 1: 4 steps, all dense, ")
    assert second.endswith("every call of 2 layers was dense")


def test_a_call_without_steps_is_no_schedule_that_is_all_dense(
    recwarn: pytest.WarningsRecorder,
) -> None:
    pipe = tiny.wan()
    with accelerate(pipe, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, tiny.wan_call(num_inference_steps=0))
        assert str(handle.report()).startswith("call 1: no step of its denoising models ran, ")
    assert not [told for told in recwarn if "dense_steps" in str(told.message)]


def test_a_call_that_ends_by_an_error_has_no_report_and_keeps_nothing() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    pipe = tiny.wan()
    with accelerate(pipe, options=tiny.OPTIONS) as handle:
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, tiny.wan_call(callback_on_step_end=interrupt))
        assert str(handle.report()) == "no call has ended yet"
        assert handle.session.memory_bytes() == 0
        tiny.generate(pipe, tiny.wan_call())
        assert handle.report().calls == 1
        assert repr(handle) == "<Accelerated WanPipeline: transformer>"
    assert repr(handle) == "<Accelerated WanPipeline: detached>"


def test_a_pipeline_that_shares_the_transformer_runs_sparse_and_is_pickled() -> None:
    pipe = tiny.wan()
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        other = WanPipeline(**pipe.components)
        with pytest.raises(ValueError, match="Another pipeline that holds it runs sparse as it is"):
            accelerate(other, density=0.3)
        with handle.session.generation("other") as generation:
            tiny.generate(other, tiny.wan_call())
            assert all(layer.density for layer in generation.report())
            assert len(generation.report()) == 2
        alone = pickle.loads(pickle.dumps(pipe))
    assert type(alone) is type(pipe) is WanPipeline
    assert torch.equal(tiny.generate(alone, tiny.wan_call()), tiny.generate(pipe, tiny.wan_call()))


def test_equal_latents_of_several_prompts_are_no_guidance_branches() -> None:
    pipe = tiny.wan()
    same = tiny.noise((1, 4, 3, 12, 16), seed=5).expand(2, -1, -1, -1, -1).contiguous()
    call = tiny.wan_call(prompts=2, latents=same, guidance_scale=1.0, num_inference_steps=1)
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, call)
        assert [(layer.cold, layer.branches) for layer in handle.report().models[0].layers] == [
            (1, 1),
            (1, 1),
        ]


def test_calls_that_run_at_the_same_time_have_generations_of_their_own() -> None:
    pipe = tiny.wan()
    found = []

    def interleave(pipe: Any, step: int, timestep: Any, given: Any) -> Any:
        if step == 1:
            pipe.scheduler = copy.deepcopy(scheduler)  # what diffusers does not share, either
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            pipe.scheduler = scheduler
        return given

    def work() -> None:
        found.append(tiny.generate(pipe, tiny.wan_call()))

    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        work()
        scheduler = pipe.scheduler
        found.append(tiny.generate(pipe, tiny.wan_call(callback_on_step_end=interleave)))
        assert handle.session.generations == ("default", "call 2")
        assert handle.report().calls == 3
    assert len(found) == 3
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_generation_that_is_entered_is_used() -> None:
    pipe = tiny.wan()
    with accelerate(pipe, options=tiny.OPTIONS) as handle:
        with handle.session.generation("mine"):
            tiny.generate(pipe, tiny.wan_call())
        assert handle.session.generations == ("mine",)
        assert handle.report().calls == 1


def test_a_module_is_accelerated_without_a_pipeline() -> None:
    model, inputs = stack()
    with torch.no_grad():
        dense = model(*inputs)
        with accelerate(model, density=0.3, options=tiny.OPTIONS) as handle:
            assert str(handle.report()) == "no call has ended yet"
            found = model(*inputs)
            report = handle.report()
        assert not torch.equal(found, dense)
        assert torch.equal(model(*inputs), dense)
    assert (report.calls, report.seconds, report.steps) == (0, None, 1)
    assert [(model.name, model.regional, model.sparse) for model in report.models] == [
        ("Stack", False, 2)
    ]
    assert str(report).startswith(
        "current generation: 1 step, 0 of them dense\nStack (Stack): 2 of"
    )


def test_the_report_is_plain_data_too() -> None:
    pipe = tiny.wan()
    with accelerate(pipe, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, tiny.wan_call())
        found = handle.report().to_dict()
    assert found["models"][0]["layers"][0]["path"] == "blocks.0.attn1"
    assert found["steps"] == 4


def test_each_expert_follows_its_budget(tmp_path: Path) -> None:
    pipe = tiny.wan_two_experts()
    layers = [f"blocks.{index}.attn1" for index in range(2)]
    models = (pipe.transformer, pipe.transformer_2)
    made = [
        budget_for(model, dict.fromkeys(layers, (Choice(density),)), 144)
        for model, density in zip(models, (0.6, 0.2), strict=True)
    ]
    made[1].save(tmp_path / "low_noise.json")
    with accelerate(pipe, budget=[made[0], tmp_path / "low_noise.json"]) as handle:
        tiny.generate(pipe, tiny.wan_call())
        high, low = handle.report().models
        assert high.density > 0.55
        assert low.density < 0.45
    with pytest.raises(ValueError, match="2 denoising models need as many budgets, got 1"):
        accelerate(pipe, budget=made[0])


def test_densities_of_layers_are_a_budget_too() -> None:
    pipe = tiny.wan()
    with accelerate(pipe, budget={"blocks.1.*": 1.0}, options=tiny.OPTIONS) as handle:
        tiny.generate(pipe, tiny.wan_call())
        assert [layer.density is None for layer in handle.report().models[0].layers] == [
            False,
            True,
        ]


def test_the_schedule_of_a_call_that_does_not_tell_its_steps_is_checked_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Silent:
        def __init__(self) -> None:
            self.transformer = whole()._orig_mod

        def __call__(self) -> torch.Tensor:
            return run(self.transformer, 900.0, 500.0)

    pipe = Silent()
    with accelerate(pipe, dense_steps=9):
        pipe()
    assert "no step of a generation of 2 steps was sparse: dense_steps is 9" in caplog.text


def test_an_interrupted_call_says_nothing_about_its_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = tiny.wan()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with (
        accelerate(pipe, dense_steps=2, options=tiny.OPTIONS),
        pytest.raises(KeyboardInterrupt),
    ):
        tiny.generate(pipe, tiny.wan_call(callback_on_step_end=stop))
    assert "was sparse" not in caplog.text


class Rising:
    """A pipeline whose scheduler has timesteps from noise to video, set in the call as usual."""

    def __init__(self) -> None:
        self.transformer = whole()._orig_mod
        self.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)

    def __call__(self, num_inference_steps: int = 4) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        return run(self.transformer, *self.scheduler.timesteps.tolist())


@pytest.mark.parametrize(("ascending", "steps"), [(None, 4), (True, 4), (False, 1)])
def test_the_scheduler_says_whether_timesteps_rise(ascending: bool | None, steps: int) -> None:
    pipe = Rising()
    with accelerate(pipe, ascending=ascending, dense_above_timestep=300.0) as handle:
        pipe()
        assert handle.report().steps == steps
        if steps == 4:
            timesteps = pipe.scheduler.timesteps
            assert handle.report().dense_steps == int((timesteps < 300).sum()) > 0


@pytest.mark.slow
def test_inductor_compiles_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.wan()
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS):
        wanted = tiny.generate(pipe, tiny.wan_call())
    monkeypatch.setattr("svg_ear_compile.backend.compile_fx", compile_fx)
    torch.compiler.reset()
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS):
        torch.testing.assert_close(
            tiny.generate(pipe, tiny.wan_call()), wanted, rtol=1e-3, atol=1e-3
        )
