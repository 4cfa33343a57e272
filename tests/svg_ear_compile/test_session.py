"""Sessions: layers, denoising steps and memory, in graphs of a whole model and of shared blocks."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from made_budgets import budget_for
from session_models import (
    DIM,
    HEADS,
    PLAN,
    TOKENS,
    Attention,
    Heard,
    Model,
    densities,
    in_place,
    latents,
    run,
    shared,
    whole,
)
from torch import Tensor, nn

from svg_ear_compile import explain
from svg_ear_compile.cost_model.budget import Choice
from svg_ear_compile.guidance import MAX_BRANCHES
from svg_ear_compile.kernels import op
from svg_ear_compile.kernels.call import UNBOUND, active_source
from svg_ear_compile.layers import BoundModel
from svg_ear_compile.session import Session, bind

BUILD = pytest.mark.parametrize("build", [shared, whole])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    # Whatever a test does, no session outlives its forward.
    assert active_source() is UNBOUND


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call as the operator carries it out."""
    seen: list[Any] = []
    monkeypatch.setattr(op, "active_source", lambda: Heard(seen))
    return seen


def paths(session: Session, model: int = 0) -> list[str]:
    return [layer.path for layer in session.report() if layer.model == model]


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


@pytest.mark.parametrize("build", [shared, whole, in_place])
def test_session_and_unsession_recompile_nothing(build: Callable[[], Any]) -> None:
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


def test_a_module_path_may_name_more_or_less_than_the_site(calls: list[Any]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.ModuleDict({"norm": nn.ModuleDict({"q": nn.Linear(DIM, DIM)})})
            self.loose = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: float) -> None:
            weight = self.deep["norm"]["q"].weight  # type: ignore[index]
            for layer, owner, site in (
                (weight, "deep.norm.q", "deep"), (weight, "norm.q", "norm#1"), (weight, "q", ""),
                (self.loose, "", ""), (weight, "x.q", "x"), (None, "", "deep.norm#2"),
                (None, "", "y"), (None, "", "y"),
            ):  # fmt: skip
                torch.ops.svg_ear.attention(
                    x, x, x, None, layer, plan=PLAN, site=site, layer_owner=owner
                )

    model = Odd().requires_grad_(False)
    with bind(model) as session:
        model(torch.randn(1, 1, 64, DIM), 900.0)
        found = {(layer.path, layer.identity) for layer in session.report()}
        assert found == {
            ("deep", "parameter"),
            ("", "parameter"),
            ("x@0", "order"),
            ("deep.norm", "order"),
            ("y@0", "order"),
            ("y@1", "order"),
        }


@pytest.mark.parametrize(
    ("owner", "inside", "site", "layer"),
    [
        ("blocks.3.attn1.to_q", "attn1.to_q", "attn1", "blocks.3.attn1"),
        ("blocks.3.attn1.to_q", "blocks.3.attn1.to_q", "blocks.3.attn1", "blocks.3.attn1"),
        ("blocks.3.attn1.to_q", "attn1.to_q", "attn1#2", "blocks.3.attn1"),
        # The block that was compiled attends itself.
        ("single.3.to_q", "to_q", "", "single.3"),
        ("single.3", "", "", "single.3"),
        # A name that occurs twice on the way.
        ("blocks.3.attn.attn.to_q", "attn.attn.to_q", "attn", "blocks.3.attn"),
        ("blocks.3.attn.attn.to_q", "attn.to_q", "attn", "blocks.3.attn.attn"),
        # A parameter that was not there when the graph was traced, in a module of another name.
        ("single.3.to_q", "attn1.to_q", "attn1", None),
        ("blocks.3.attn1.to_q", "attn1.to_q", "attn7", None),
    ],
)
def test_the_layer_of_a_parameter_is_the_one_that_the_graph_names(
    owner: str, inside: str, site: str, layer: str | None
) -> None:
    model = Model(whole=False)
    weight = model.blocks[0].attn1.to_q.weight
    bound = BoundModel(model, None, None)
    bound.paths = {"", "single.3"} | {
        f"blocks.3{below}" for below in ("", ".attn1", ".attn", ".attn.attn")
    }
    bound.owners[weight] = owner
    path, identity = bound.locate(weight, inside, site, 0)
    assert (path, identity) == (
        (layer, "parameter") if layer is not None else (f"{site}@0", "order")
    )


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


def test_a_layer_of_another_model_is_not_taken_for_ones_own() -> None:
    first, second = shared(1), shared(1)
    second.blocks[0].attn1.to_q.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    with bind(first, second) as session:
        first.blocks[0].attn1.to_q.weight = second.blocks[0].attn1.to_q.weight
        run(first, 900)
        assert [(layer.model, layer.path) for layer in session.report()] == [(0, "attn1@0")]


@BUILD
def test_moved_weights_keep_their_layers(build: Callable[[], Any]) -> None:
    model = build()
    with bind(model) as session:
        run(model, 900)
        weights = [p.data.clone() for p in model.parameters()]
        # Each layer's weight now lies where its neighbour's was.
        for parameter, data in zip(model.parameters(), weights[4:] + weights[:4], strict=True):
            parameter.data = data
        run(model, 900)
        assert paths(session) == [f"blocks.{i}.attn1" for i in range(3)]
        assert {layer.identity for layer in session.report()} == {"parameter"}


def test_replaced_parameters_are_told_by_order() -> None:
    model = Model(whole=False)
    with bind(model) as session:
        run(model, 900)
        for block in model.blocks:
            weight = block.attn1.to_q.weight
            block.attn1.to_q.weight = nn.Parameter(weight.clone(), requires_grad=False)
        run(model, 800)
        report = session.report()
    assert [layer.path for layer in report] == [f"blocks.{i}.attn1" for i in range(3)]
    assert {layer.identity for layer in report} == {"order"}


def test_parameters_never_seen_are_told_by_number(calls: list[Any]) -> None:
    model = Model(whole=False)
    with bind(model, dense_layers=1, budget={"*": 0.5}) as session:
        for block in model.blocks:
            block.attn1.to_q.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        run(model, 900)
        assert paths(session) == ["attn1@0", "attn1@1", "attn1@2"]
    assert densities(calls) == [1.0, 0.5, 0.5]


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
    with pytest.raises(TypeError, match="got NoneType"):
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


def test_binding_a_pipeline_names_what_to_bind() -> None:
    class Pipeline:
        transformer = Model(whole=False)

    with pytest.raises(TypeError, match=r"got Pipeline\. Bind its transformer"):
        bind(Pipeline())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dense_steps", "dense_layers"])
def test_counts_are_integers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 1.5"):
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


def test_layers_that_only_order_tells_are_named_to_who_gives_a_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model(whole=False, blocks=1)
    with bind(model, budget={"blocks.0.attn1": 0.5}):
        attention = model.blocks[0].attn1
        attention.to_q.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        run(model, 900, 800)
    found = [r.getMessage() for r in caplog.records if "knows nothing" in r.getMessage()]
    assert len(found) == 1
    assert "attn1@0: only the order of execution" in found[0]


def test_a_parameter_that_layers_share_tells_none_of_them() -> None:
    model = Model(whole=False, blocks=2)
    model.blocks[1].attn1.to_q.weight = model.blocks[0].attn1.to_q.weight
    with bind(model) as session:
        run(model, 900)
        assert [(layer.path, layer.identity) for layer in session.report()] == [
            ("attn1@0", "order"),
            ("attn1@1", "order"),
        ]
