"""Mistakes around `bind` that used to pass in silence, and arguments of the wrong type."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_models
from session_models import Model, run, shared
from transformer_models import TOKENS, stack, wan

from svg_ear_compile import ModelCall, bind, capture_calls, explain, tune
from svg_ear_compile.bound_call import _IS_DENSE
from svg_ear_compile.kernels.checked import InvalidTypeError, InvalidValueError

OPTIONS = {"density": 0.4, "min_tokens": TOKENS}
Warned = Callable[[], list[str]]


pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    """Warnings of this package so far, which are forgotten."""

    def taken() -> list[str]:
        ours = [r for r in caplog.records if r.name.startswith("svg_ear_compile")]
        caplog.clear()
        return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]

    return taken


def test_a_model_compiled_in_place_after_it_was_bound_is_named_at_once(warned: Warned) -> None:
    model, (x, _) = stack()
    with bind(model), torch.no_grad():
        model.compile(backend="svg_ear", options=OPTIONS)
        for timestep in (900.0, 800.0):
            model(x, torch.tensor([timestep]))
        (said,) = warned()
        assert said.startswith("this Stack was compiled after it was bound: it bypasses")


def test_a_model_that_was_never_compiled_is_named(warned: Warned) -> None:
    model, (x, _) = stack()
    with bind(model), torch.no_grad():
        for timestep in (900.0, 800.0):
            model(x, torch.tensor([timestep]))
        (said,) = warned()
    assert said.startswith("no sparse attention ran in the first forward of this Stack: it was not")
    compiled = torch.compile(model, backend="svg_ear", options={"density": 0.4})  # too short
    with bind(compiled), torch.no_grad():
        compiled(x, torch.tensor([900.0]))
        (said,) = warned()
    assert said.endswith("Stack: " + _IS_DENSE)
    for attention in model.children():  # what is inside of it may be compiled, too
        attention.compile(backend="eager")
    with bind(model), torch.no_grad():
        model(x, torch.tensor([900.0]))
        (said,) = warned()
    assert said.endswith("Stack: " + _IS_DENSE)
    model, (x, _) = stack()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="svg_ear", options=OPTIONS)
    with bind(compiled, dense_steps=1), torch.no_grad():
        for timestep in (900.0, 800.0):
            compiled(x, torch.tensor([timestep]))
        assert warned() == []


@pytest.mark.parametrize(
    ("schedule", "why"),
    [({"dense_steps": 99}, "dense_steps is 99"), ({"dense_steps": 3}, "dense_steps is 3"),
     ({"dense_above_timestep": 0.9}, "dense_above_timestep is 0.9")],
)  # fmt: skip
def test_a_schedule_without_a_sparse_step_is_named(
    schedule: dict[str, Any], why: str, warned: Warned
) -> None:
    with bind(shared(), **schedule) as session:
        (model,) = (call.module for call in session._calls)
        run(model, 900, 500, 100)
        assert warned() == []
        run(model, 900, 500, 100)
        said = f"no step of a generation of 3 steps was sparse: {why}"
        assert warned() == [said]
    assert warned() == []  # once


def test_a_schedule_is_not_judged_by_half_a_generation(warned: Warned) -> None:
    model = shared()
    with bind(model, dense_steps=2):
        run(model, 900, 500, 100)
    with bind(model, dense_steps=2):
        model.fail = RuntimeError("in the middle")
        with pytest.raises(RuntimeError, match="in the middle"):
            run(model, 900)
        model.fail = None

    def interrupted() -> None:
        with bind(model, dense_steps=2):
            run(model, 900)
            raise RuntimeError("between two steps")

    with pytest.raises(RuntimeError, match="between"):
        interrupted()
    assert warned() == []


def test_a_pattern_for_cross_attention_alone_is_named(warned: Warned) -> None:
    model, inputs, kwargs = wan()
    compiled = torch.compile(model, backend="svg_ear", options={"density": 0.3, "min_tokens": 64})
    budget = {"*.attn2": 0.5, "blocks.0.attn1": 0.5, "blocks.?.*1": 0.5}
    with bind(compiled, budget=budget), torch.no_grad():
        compiled(*inputs, **kwargs)
        compiled(*inputs, **kwargs)
        (said,) = warned()
    assert said.startswith(
        "the budget's '*.attn2' matches no attention that can be sparse; nearest: 'blocks."
    )


def test_a_pattern_for_another_expert_is_awaited(warned: Warned) -> None:
    first, second = shared(1), shared(2, seed=1)
    with bind(first, second, budget={"blocks.1.attn1": 0.5}):
        run(first, 900)
        assert warned() == []
        run(second, 400)
    assert warned() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_steps": "3"}, "dense_steps must be int, got '3'"),
        ({"dense_steps": True}, "dense_steps must be int, got True"),
        ({"dense_above_timestep": "900"}, "dense_above_timestep must be float or None, got '900'"),
        ({"dense_above_timestep": float("nan")}, "dense_above_timestep must be finite"),
        ({"ascending": "yes"}, "ascending must be bool, got 'yes'"),
        ({"timestep": 3}, "timestep must be str or None, got 3"),
        ({"latents": 3}, "latents must be str or None, got 3"),
        ({"guidance": "batch"}, "guidance must be one of .*'batched', 'sequential'.*, got 'batch'"),
        ({"guidance": "batched", "branches": "2"}, "branches must be int or None, got '2'"),
        ({"budget": {"*": "0.2"}}, "the budget of '\\*' must be float, got '0.2'"),
        ({"budget": {"*": True}}, "the budget of '\\*' must be float, got True"),
        ({"budget": {3: 0.2}}, "names layers by strings, got 3"),
        ({"budget": 0.2}, "got 0.2; one density for all layers is an option of torch.compile"),
        ({"budget": [0.2]}, "budget must be a path or a Budget, got 0.2"),
        ({"budget": "nowhere.json"}, "the budget cannot be used: .*nowhere.json"),
        ({"budget": Path("/")}, "the budget cannot be used: .*it is a folder"),
        ({"budget": ["broken.json"]}, "the budget cannot be used: broken.json: it is not JSON"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{density: 0.2")
    model = Model(whole=False)
    with pytest.raises((InvalidTypeError, InvalidValueError), match=message) as caught:
        bind(model, **arguments)
    assert str(caught.value).isprintable()
    bind(model).close()  # a refused bind leaves nothing behind


def test_pipelines_and_lists_are_no_modules(tmp_path: Path) -> None:
    pipe: Any = transformer_models.Pipeline()
    wanted = "got the pipeline Pipeline: give its transformer$"
    with pytest.raises(TypeError, match=f"explain takes a module or a function, {wanted}"):
        explain(pipe, "a prompt")
    with pytest.raises(TypeError, match=f"capture_calls takes a module, {wanted}"):
        capture_calls(pipe, lambda: None)
    with pytest.raises(TypeError, match=f"tune takes a module, {wanted}"):
        tune(pipe, [ModelCall(())], density=0.3)
    with pytest.raises(TypeError, match=r"got a list: give the models one after the other"):
        bind([Model(whole=False)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="explain takes a module or a function, got None"):
        explain(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("calls", "objective", "message"),
    [
        (3, {"density": 0.3}, "calls must be a list of ModelCall, got 3"),
        ([(1,)], {"density": 0.3}, r"list of ModelCall\(args, kwargs\), got a tuple in it"),
        ([], {"density": 0.3}, "at least one call"),
        ([ModelCall(())], {"density": "0.3"}, "density must be float, got '0.3'"),
        ([ModelCall(())], {"max_error": float("nan")}, "max_error must be finite"),
    ],
)
def test_what_tune_cannot_use_is_named(calls: Any, objective: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tune(stack()[0], calls, **objective)


def test_a_checkpoint_that_cannot_be_written_is_named_first(tmp_path: Path) -> None:
    model, inputs = stack()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        tune(model, [ModelCall(inputs)], density=0.3, checkpoint=str(tmp_path))
    wrong: Any = {"phases": 3}
    with pytest.raises(InvalidTypeError, match="settings must be TuningSettings, got a dict"):
        tune(model, [ModelCall(inputs)], density=0.3, settings=wrong)
    with pytest.raises(InvalidTypeError, match="a function that runs the model, got a list"):
        capture_calls(model, [])  # type: ignore[arg-type]


def test_an_option_of_the_backend_is_told_where_it_belongs() -> None:
    model: Any = stack()[0]
    with pytest.raises(TypeError, match=r"bind has no argument 'density', it is an option: torch"):
        bind(model, density=0.2)  # type: ignore[call-arg]  # the mistake
