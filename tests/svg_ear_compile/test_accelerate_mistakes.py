"""What `accelerate` refuses, each by one sentence, with nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from session_models import Model, run
from torch import nn

import svg_ear_compile
from svg_ear_compile import accelerate

pytestmark = pytest.mark.usefixtures("without_inductor")


def test_a_second_call_says_so() -> None:
    pipe = tiny.wan()
    handle = accelerate(pipe, options=tiny.OPTIONS)
    with pytest.raises(ValueError, match="transformer of this WanPipeline is accelerated already"):
        accelerate(pipe)
    with pytest.raises(ValueError, match="this WanTransformer3DModel is accelerated already"):
        accelerate(pipe.transformer)
    handle.detach()
    handle.detach()  # does nothing
    with accelerate(pipe, options=tiny.OPTIONS):
        tiny.generate(pipe, tiny.wan_call())


@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks", "bind"])
def test_a_model_that_is_compiled_or_bound_is_refused(how: str) -> None:
    pipe = tiny.wan()
    if how == "bind":
        svg_ear_compile.bind(pipe.transformer)
    else:
        getattr(pipe.transformer, how)(backend="eager")
    before = tiny.state_of(pipe)
    with pytest.raises(ValueError, match="transformer of this WanPipeline is compiled or bound"):
        accelerate(pipe)
    assert tiny.state_of(pipe) == before


class Unlike:
    """A pipeline without a model."""

    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("target", "given", "kind", "said"),
    [
        (Unlike, {}, TypeError, "one pipeline or module, got the class Unlike: give an object"),
        (3, {}, TypeError, "accelerate takes one pipeline or module, got 3"),
        ([Unlike()], {}, TypeError, "accelerate takes one pipeline or module, got a list"),
        ("wan", {"options": "density=0.2"}, TypeError, "options must be a dict, got 'density=0.2'"),
        ("wan", {"options": {"dense_steps": 2}}, ValueError, "dense_steps is no option .* give it"),
        (Unlike(), {}, ValueError, "this Unlike holds no denoising model"),
        (nn.Linear(2, 2), {}, ValueError, "forward of Linear has none of"),
        ("wan", {"timestep": "when"}, ValueError, "none of its modules is called with 'when'"),
        ("wan", {"density": 2.0}, ValueError, "density"),
        ("wan", {"density": 0.2, "target_speedup": 2.0}, ValueError, "give one of them"),
        ("wan", {"density": 0.2, "options": {"density": 0.3}}, ValueError, "given twice"),
        ("wan", {"options": {"budget": "b.json"}}, ValueError, "budget as an argument"),
        ("wan", {"options": {"dencity": 0.3}}, ValueError, "did you mean 'density'"),
        ("wan", {"dense_steps": 1.5}, ValueError, r"a fraction in \[0, 1\), got 1.5"),
        ("wan", {"dense_steps": -1}, ValueError, "dense_steps must not be negative"),
        ("wan", {"ascending": "yes"}, TypeError, "ascending must be bool"),
        ("wan", {"dense_steps": "2"}, TypeError, "dense_steps must be int"),
        ("wan", {"budget": "missing.json"}, ValueError, "the budget cannot be used.*missing.json"),
        ("wan", {"budget": 3}, TypeError, "budget must be a path or a Budget, got 3"),
        ("wan", {"budget": {"blocks.9.attn1": 0.2}}, ValueError, "matches no module"),
        (Model(whole=True), {"dense_steps": 0.2}, ValueError, "which a module does not know"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(
    target: Any, given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    pipe = tiny.wan() if target == "wan" else target
    before = tiny.state_of(pipe) if target == "wan" else None
    with pytest.raises(kind, match=said) as raised:
        accelerate(pipe, **given)
    assert "\n" not in str(raised.value)
    if before is not None:
        assert tiny.state_of(pipe) == before


def test_a_schedule_by_fraction_needs_the_number_of_steps() -> None:
    class Silent:
        def __init__(self) -> None:
            self.transformer = Model(whole=True)

        def __call__(self) -> torch.Tensor:
            return run(self.transformer, 900.0, 500.0)

    pipe = Silent()
    with (
        accelerate(pipe, dense_steps=0.5),
        pytest.raises(ValueError, match="this call of Silent does not tell its number of steps"),
    ):
        pipe()
    with accelerate(pipe) as handle:
        pipe()
        assert handle.report().steps == 2


def test_a_class_that_refuses_subclasses_is_answered_and_nothing_is_left() -> None:
    class Final:
        def __init__(self) -> None:
            self.transformer = Model(whole=True)

        def __init_subclass__(cls) -> None:
            raise TypeError("this class is final")

        def __call__(self) -> None: ...

    pipe = Final()
    with pytest.raises(TypeError, match=r"calls of this Final cannot be watched .*is final\)"):
        accelerate(pipe)
    with accelerate(pipe.transformer):
        pass


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min_tokens": 64}, r"it is an option: accelerate\(pipe, options={'min_tokens': ...}\)"),
        ({"denstiy": 0.2}, "did you mean density or dense_steps"),
        ({"x" * 1000: 1}, "it has target, density, "),
    ],
)
def test_an_unknown_argument_is_told_where_it_belongs(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=f"accelerate has no argument .*{said}"):
        accelerate(tiny.wan(), **given)
