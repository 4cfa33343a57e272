"""What `bind` takes, refuses and gives back."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_models import (
    DIM,
    HEADS,
    TOKENS,
    Model,
    densities,
    in_place,
    latents,
    paths,
    run,
    shared,
    whole,
)
from torch import Tensor, nn

import svg_ear_compile
from svg_ear_compile import explain
from svg_ear_compile.session import Session, bind

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("build", [shared, whole, in_place])
def test_binding_and_unbinding_recompile_nothing(build: Callable[[], Any]) -> None:
    model = build()
    expected = run(model, 900)
    with torch.compiler.set_stance("fail_on_recompile"):
        with bind(model, dense_steps=1) as session:
            run(model, 900, 800, 700)
            assert len(paths(session)) == 3
        assert torch.equal(run(model, 900), expected)


def test_a_model_compiled_in_place_keeps_its_compiled_call() -> None:
    model = in_place()
    compiled = model._compiled_call_impl
    with bind(model) as session:
        run(model, 900)
        assert paths(session) == [f"blocks.{i}.attn1" for i in range(3)]
    assert model._compiled_call_impl is compiled


def test_blocks_wrapped_by_torch_compile_have_clean_paths() -> None:
    model = Model(whole=False)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    with bind(model, budget={"blocks.1.attn1": 0.5}) as session:
        run(model, 900)
        assert paths(session) == [f"blocks.{i}.attn1" for i in range(3)]


def test_unbound_models_are_as_before(calls: list[Any]) -> None:
    model = shared()
    session = bind(model, dense_steps=9)
    run(model, 900)
    assert densities(calls) == [1.0] * 3
    session.close()
    session.close()
    run(model, 900)
    assert densities(calls) == [0.3] * 3
    assert "_compiled_call_impl" not in model.__dict__
    assert session.report() == []
    assert session.step is None


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"block.1.attn1": 0.5}, "'block.1.attn1', which matches no module.*'blocks.1.attn1'"),
        ({"*.attn2": 0.5}, r"nearest: 'blocks\.\d\.attn1'"),
        ({"blocks.0.attn1": 1.5}, r"'blocks.0.attn1' must be in \[0, 1\], got 1.5"),
        ({"*": float("nan")}, "got nan"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(budget: dict[str, float], message: str) -> None:
    model = Model(whole=False)
    with pytest.raises(ValueError, match=message):
        bind(model, budget=budget)
    bind(model).close()  # a refused bind leaves nothing behind


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    model = Model(whole=False)
    with pytest.raises(ValueError, match="dense_steps must not be negative"):
        bind(model, dense_steps=-1)
    with pytest.raises(ValueError, match="dense_layers must not be negative"):
        bind(model, dense_layers=-1)
    with pytest.raises(ValueError, match="at least one model"):
        bind()
    with pytest.raises(TypeError, match="bind takes a module, got None"):
        bind(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same model twice"):
        bind(model, torch.compile(model))
    with bind(model), pytest.raises(ValueError, match="bound already"):
        bind(model)


def test_the_timestep_is_an_argument_of_forward() -> None:
    class Timeless(nn.Module):
        def forward(self, x: Tensor, when: float = 1.0) -> Tensor:
            return x

    class Wrapped(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return args[0]

    with pytest.raises(ValueError, match=r"forward of Timeless.*\('x', 'when'\)"):
        bind(Timeless())
    with pytest.raises(ValueError, match="no 'timestep'"):
        bind(Timeless(), timestep="timestep")
    for model in (Timeless(), Wrapped()):
        with bind(model, timestep="when") as session:
            model(torch.zeros(1), when=900.0)
            model(torch.zeros(1), when=800.0)
            assert session.step == 1
            with pytest.raises(ValueError, match="called without 'when'"):
                model(torch.zeros(1))
    with pytest.raises(ValueError, match=r"forward of Linear.*\('input',\)"):
        bind(torch.compile(nn.Linear(2, 2)))  # type: ignore[arg-type]


def test_binding_a_pipeline_names_what_to_bind() -> None:
    class Pipeline:
        transformer = Model(whole=False)

    with pytest.raises(TypeError, match=r"got the pipeline Pipeline: give its transformer$"):
        bind(Pipeline())  # type: ignore[arg-type]

    class TwoExperts(Pipeline):
        transformer_2 = Model(whole=False)

    with pytest.raises(TypeError, match="give its transformer and transformer_2"):
        bind(TwoExperts())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dense_steps", "dense_layers"])
def test_counts_are_integers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be int, got 1.5"):
        bind(Model(whole=False), **{name: 1.5})


@pytest.mark.parametrize("wrapper_first", [False, True])
def test_a_model_is_not_bound_beside_its_compiled_wrapper(wrapper_first: bool) -> None:
    model = Model(True)
    first, second = model, torch.compile(model, backend="eager")
    if wrapper_first:
        first, second = second, first
    with bind(first), pytest.raises(ValueError, match="bound already, once as the model"):
        bind(second)
    with bind(second):
        pass


def test_a_second_close_leaves_a_new_session_alone() -> None:
    model = Model(True)
    first = bind(model)
    first.close()
    with bind(model):
        first.close()
        with pytest.raises(ValueError, match="bound already"):
            bind(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_bound_before_it_is_compiled_runs_unbound_and_says_so(
    in_place: bool, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(True)
    compiled: Any = model
    with (
        bind(model, dense_steps=5) as session,
        caplog.at_level(logging.WARNING, "svg_ear_compile"),
    ):
        if in_place:
            model.compile(backend="eager", fullgraph=True)
        else:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
        run(compiled, 900, 800)
        # A backend that is not ours says nothing of models that are compiled in place.
        assert ("was compiled after it was bound" in caplog.text) == (not in_place)
        caplog.clear()
        assert session.report() == []
        assert "this Model was compiled after it was bound" in caplog.text
    assert densities(calls) == [0.3] * 6
    run(compiled, 900)


def test_looking_at_a_bound_model_is_no_compilation_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = shared(1)
    with bind(model) as session, caplog.at_level(logging.WARNING, "svg_ear_compile"):
        explain(model, latents(), torch.tensor([900.0]))
        run(model, 900)
        assert len(session.report()) == 1
    assert "bound" not in caplog.text


def test_a_copy_of_a_bound_model_is_not_bound() -> None:
    model = shared(1)
    with bind(model) as session:
        copied = copy.deepcopy(model)
        run(copied, 900)
        assert session.step is None
        with bind(copied):
            run(copied, 900)


def test_a_model_takes_its_session_along() -> None:
    model = Model(whole=False)
    session = weakref.ref(bind(model))
    gc.collect()
    assert session() is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert (gone(), session()) == (None, None)


def test_former_names_are_warned_of() -> None:
    model = shared(1)
    with pytest.warns(DeprecationWarning, match="Binding is called Session now"):
        assert svg_ear_compile.Binding is Session
    with pytest.warns(DeprecationWarning, match="unbind is called close now"):
        bind(model).unbind()
    assert "_compiled_call_impl" not in model.__dict__


@pytest.mark.parametrize("ascending", [False, True])
def test_the_noisiest_token_tells_the_step(ascending: bool) -> None:
    """The first frame of an image-to-video model is clean from the start."""
    model = whole(1)
    with bind(model, ascending=ascending) as session:
        for step, noise in enumerate((0.9, 0.7, 0.2)):
            timesteps = torch.tensor([0.0, noise])
            model(latents(step), 1 - timesteps if ascending else timesteps)
            assert session.step == step


@pytest.mark.parametrize("guidance", [None, "batched"])
@pytest.mark.parametrize("timestep", [800.0, torch.zeros(0)])
def test_a_forward_of_an_empty_batch_is_no_step(
    timestep: Any, guidance: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = whole(1)
    with bind(model, guidance=guidance) as session:
        for kept in (None, 0):
            assert model(latents()[:0], timestep).shape == (0, TOKENS, HEADS * DIM)
            assert session.step == kept
            model(latents(), 900.0)
        with pytest.raises(ValueError, match="empty batch"):
            session.timestep_of((latents(), torch.zeros(0)), {})
    assert "no sparse attention" not in caplog.text
