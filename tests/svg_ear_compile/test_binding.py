"""Binding: layers, denoising steps and memory, in graphs of a whole model and of shared blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import svg_ear_compile.kernels.op  # noqa: F401
from svg_ear_compile.binding import MAX_BRANCHES, Binding, _layer_path, bind
from svg_ear_compile.kernels import state
from svg_ear_compile.kernels.state import Call

HEADS, DIM, TOKENS = 2, 32, 160
# More clusters than these few tokens would get, so that warm and cold starts differ.
PLAN = '{"density": 0.3, "q_clusters": 4, "k_clusters": 16}'


class Attention(nn.Module):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.to_q = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.to_k = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (self.to_q(x), self.to_k(x), x)
        )
        out = torch.ops.svg_ear.attention(
            q, k, v, None, self.to_q.weight, plan=PLAN, site=self.site
        )
        return out[0].transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.attn1 = Attention(site)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x)


class Model(nn.Module):
    """Blocks whose sites are named as in the graph of the whole model, or as in a shared one."""

    def __init__(self, whole: bool, blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        names = [f"blocks.{i}.attn1" if whole else "attn1" for i in range(blocks)]
        self.blocks = nn.ModuleList(Block(name) for name in names)
        self.requires_grad_(False)
        self.fail: BaseException | None = None

    def forward(self, hidden_states: Tensor, timestep: Any, text: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        if self.fail is not None:
            raise self.fail
        return hidden_states


def shared(blocks: int = 3, seed: int = 0) -> Model:
    """A model whose blocks share one graph, the model itself eager."""
    model = Model(whole=False, blocks=blocks, seed=seed)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def whole(blocks: int = 3, seed: int = 0) -> Any:
    return torch.compile(Model(True, blocks, seed), backend="aot_eager", fullgraph=True)


BUILD = pytest.mark.parametrize("build", [shared, whole])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    # Whatever a test does, no binding outlives its forward.
    assert not state._ACTIVE.stack


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call as the operator carries it out."""
    seen: list[Call] = []
    resolve = state.resolve

    def record(*args: Any) -> Call:
        seen.append(resolve(*args))
        return seen[-1]

    monkeypatch.setattr(state, "resolve", record)
    return seen


def latents(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(1, tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed))


def densities(calls: list[Call]) -> list[float]:
    found = [call.plan.density for call in calls]
    calls.clear()
    return found


def run(model: Callable[..., Tensor], *timesteps: float, seed: int = 0) -> Tensor:
    """A generation without a scheduler: each step's input is the last one's output."""
    x = latents(seed)
    for timestep in timesteps:
        x = model(x, torch.tensor([timestep])) * 0.5
    return x


def paths(binding: Binding, model: int = 0) -> list[str]:
    return [layer.path for layer in binding.report() if layer.model == model]


@BUILD
def test_layers_are_told_by_their_parameters(build: Callable[[], Any], calls: list[Call]) -> None:
    model = build()
    with bind(model) as binding:
        run(model, 900, 800)
        report = binding.report()
    assert [layer.path for layer in report] == [f"blocks.{i}.attn1" for i in range(3)]
    assert {layer.identity for layer in report} == {"parameter"}
    assert [layer.index for layer in report] == [0, 1, 2]
    assert {layer.branches for layer in report} == {1}
    last = [call.memory.density for call in calls[-3:] if call.memory is not None]
    assert [layer.density for layer in report] == last
    assert all(0 < density < 1 for density in last if density is not None)


def test_inductor_passes_the_parameter_itself() -> None:
    model = torch.compile(Model(True, blocks=2), fullgraph=True)
    with bind(model) as binding:
        run(model, 900)
        assert {layer.identity for layer in binding.report()} == {"parameter"}


@pytest.mark.parametrize("build", [shared, whole, lambda: in_place()])
def test_binding_and_unbinding_recompile_nothing(build: Callable[[], Any]) -> None:
    model = build()
    expected = run(model, 900)
    with torch.compiler.set_stance("fail_on_recompile"):
        with bind(model, dense_steps=1) as binding:
            run(model, 900, 800, 700)
            assert len(paths(binding)) == 3
        assert torch.equal(run(model, 900), expected)


def in_place() -> Model:
    model = Model(True)
    model.compile(backend="eager", fullgraph=True)
    return model


def test_a_model_compiled_in_place_keeps_its_compiled_call() -> None:
    model = in_place()
    compiled = model._compiled_call_impl
    with bind(model) as binding:
        run(model, 900)
        assert paths(binding) == [f"blocks.{i}.attn1" for i in range(3)]
    assert model._compiled_call_impl is compiled


def test_blocks_wrapped_by_torch_compile_have_clean_paths() -> None:
    model = Model(whole=False)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    with bind(model, budget={"blocks.1.attn1": 0.5}) as binding:
        run(model, 900)
        assert paths(binding) == [f"blocks.{i}.attn1" for i in range(3)]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_bound_before_it_is_compiled_runs_unbound(
    in_place: bool, calls: list[Call]
) -> None:
    model = Model(True)
    compiled: Any = model
    with bind(model, dense_steps=5) as binding:
        if in_place:
            model.compile(backend="eager", fullgraph=True)
        else:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
        run(compiled, 900, 800)
        assert binding.report() == []
    assert densities(calls) == [0.3] * 6
    run(compiled, 900)


def test_unbound_models_are_as_before(calls: list[Call]) -> None:
    model = shared()
    binding = bind(model, dense_steps=9)
    run(model, 900)
    assert densities(calls) == [1.0] * 3
    binding.unbind()
    binding.unbind()
    run(model, 900)
    assert densities(calls) == [0.3] * 3
    assert "_compiled_call_impl" not in model.__dict__
    assert binding.report() == []
    assert binding.step is None


def test_a_module_path_may_name_more_or_less_than_the_site(calls: list[Call]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.ModuleDict({"norm": nn.ModuleDict({"q": nn.Linear(DIM, DIM)})})
            self.loose = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: float) -> None:
            weight = self.deep["norm"]["q"].weight  # type: ignore[index]
            for layer, site in (
                (weight, "deep"), (weight, "norm#1"), (weight, ""), (self.loose, ""), (weight, "x"),
                (None, "deep.norm#2"), (None, "y"), (None, "y"),
            ):  # fmt: skip
                torch.ops.svg_ear.attention(x, x, x, None, layer, plan=PLAN, site=site)

    model = Odd().requires_grad_(False)
    with bind(model) as binding:
        model(torch.randn(1, 1, 64, DIM), 900.0)
        found = {(layer.path, layer.identity) for layer in binding.report()}
        assert found == {
            ("deep", "parameter"),
            ("deep.norm", "order"),
            ("", "parameter"),
            ("y@0", "order"),
            ("y@1", "order"),
        }


@pytest.mark.parametrize(
    ("owner", "site", "layer"),
    [
        ("blocks.3.attn1.to_q", "attn1", "blocks.3.attn1"),
        ("blocks.3.attn1.to_q", "blocks.3.attn1", "blocks.3.attn1"),
        # In a module of its own beside the projection, or beside the streams that have them.
        ("single.3.to_q", "single.3.attn", "single.3.attn"),
        ("single.3.to_q", "attn", "single.3.attn"),
        ("dual.3.video.to_q", "dual.3.attn", "dual.3.attn"),
        ("dual.3.video.to_q", "attn", "dual.3.attn"),
        # A graph that was traced in another layer.
        ("single.3.to_q", "single.0.attn", "single.3"),
        # The block that was compiled attends itself.
        ("single.3.to_q", "", "single.3"),
    ],
)
def test_the_layer_of_a_parameter_is_the_one_that_the_graph_names(
    owner: str, site: str, layer: str
) -> None:
    paths = [""] + [
        f"{kind}.{i}{inside}"
        for kind, insides in (
            ("blocks", ("", ".attn1")), ("single", ("", ".attn")), ("dual", ("", ".attn", ".video"))
        )
        for i in range(4)
        for inside in insides
    ]  # fmt: skip
    assert _layer_path(owner, site, paths) == layer


def test_two_models_never_mix() -> None:
    first, second = shared(2, seed=0), shared(2, seed=1)
    alone = [run(first, 900, 800), run(second, 900, 800)]
    expected = []
    for model in (first, second):
        with bind(model):
            expected.append(run(model, 900, 800))
    assert not torch.equal(alone[0], expected[0])
    with bind(first, second) as binding:
        x = [latents(), latents()]
        for timestep in (900, 800):
            for i, model in enumerate((first, second)):
                x[i] = model(x[i], timestep) * 0.5
        assert [(layer.model, layer.path) for layer in binding.report()] == [
            (m, f"blocks.{i}.attn1") for m in (0, 1) for i in (0, 1)
        ]
    assert all(torch.equal(a, b) for a, b in zip(x, expected, strict=True))


def test_a_layer_of_another_model_is_not_taken_for_ones_own() -> None:
    first, second = shared(1), shared(1)
    second.blocks[0].attn1.to_q.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    with bind(first, second) as binding:
        first.blocks[0].attn1.to_q.weight = second.blocks[0].attn1.to_q.weight
        run(first, 900)
        assert [(layer.model, layer.path) for layer in binding.report()] == [(0, "attn1@0")]


@BUILD
def test_moved_weights_keep_their_layers(build: Callable[[], Any]) -> None:
    model = build()
    with bind(model) as binding:
        run(model, 900)
        weights = [p.data.clone() for p in model.parameters()]
        # Each layer's weight now lies where its neighbour's was.
        for parameter, data in zip(model.parameters(), weights[4:] + weights[:4], strict=True):
            parameter.data = data
        run(model, 900)
        assert paths(binding) == [f"blocks.{i}.attn1" for i in range(3)]
        assert {layer.identity for layer in binding.report()} == {"parameter"}


def test_replaced_parameters_are_told_by_order() -> None:
    model = Model(whole=False)
    with bind(model) as binding:
        run(model, 900)
        for block in model.blocks:
            weight = block.attn1.to_q.weight
            block.attn1.to_q.weight = nn.Parameter(weight.clone(), requires_grad=False)
        run(model, 800)
        report = binding.report()
    assert [layer.path for layer in report] == [f"blocks.{i}.attn1" for i in range(3)]
    assert {layer.identity for layer in report} == {"order"}


def test_parameters_never_seen_are_told_by_number(calls: list[Call]) -> None:
    model = Model(whole=False)
    with bind(model, dense_layers=1, budget={"*": 0.5}) as binding:
        for block in model.blocks:
            block.attn1.to_q.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        run(model, 900)
        assert paths(binding) == ["attn1@0", "attn1@1", "attn1@2"]
    assert densities(calls) == [1.0, 0.5, 0.5]


@BUILD
def test_leading_steps_are_dense(build: Callable[[], Any], calls: list[Call]) -> None:
    model = build()
    with bind(model, dense_steps=2) as binding:
        for timestep, density in ((900, 1.0), (800, 1.0), (700, 0.3), (600, 0.3), (950, 1.0)):
            model(latents(), torch.tensor([timestep]))
            assert densities(calls) == [density] * 3
        assert binding.step == 0


def test_dense_above_a_timestep_survives_skipped_steps(calls: list[Call]) -> None:
    model = shared(1)
    with bind(model, dense_above_timestep=500.0):
        run(model, 900, 500, 100)
        assert densities(calls) == [1.0, 0.3, 0.3]
        run(model, 900, 800, 501, 499)
        assert densities(calls) == [1.0, 1.0, 1.0, 0.3]


@BUILD
def test_leading_layers_are_dense_from_the_first_forward(
    build: Callable[[], Any], calls: list[Call]
) -> None:
    model = build()
    with bind(model, dense_layers=2) as binding:
        run(model, 900, 800)
        assert densities(calls) == [1.0, 1.0, 0.3] * 2
        assert [layer.density is None for layer in binding.report()] == [True, True, False]


def test_branches_are_the_forwards_of_one_timestep(calls: list[Call]) -> None:
    model = shared(1)
    with bind(model, dense_steps=1) as binding:
        for timestep in (900, 800, 700):
            for text in (7, 9):  # the texts of two branches may differ in length
                model(latents(text), timestep, text=torch.zeros(1, text, 4))
        assert densities(calls) == [1.0] * 2 + [0.3] * 4
        assert binding.step == 2
        assert binding.report()[0].branches == 2


def test_each_branch_and_layer_has_its_own_memory(calls: list[Call]) -> None:
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
    with bind(model) as binding:
        held = []
        for video in range(MAX_BRANCHES + 3):
            model(latents(video), 500)
            held.append(binding.memory_bytes())
    assert held[MAX_BRANCHES - 1] == held[-1] == MAX_BRANCHES * held[0]


def test_memory_bytes_counts_what_is_held() -> None:
    model = shared(2)
    with bind(model) as binding:
        assert binding.memory_bytes() == 0
        run(model, 900, 800, 700)
        # float32 centroids, int16 labels, bool blocks and one float64 count
        layer = HEADS * ((4 + 16) * DIM * 4 + 2 * TOKENS * 2 + 4 * 16) + 8
        assert binding.memory_bytes() == 2 * layer
        binding.reset()
        assert binding.memory_bytes() == 0


@BUILD
def test_the_same_seed_twice_gives_the_same_bits(build: Callable[[], Any]) -> None:
    model = build()
    cold = run(model, 900, 600, 300)
    with bind(model):
        first = run(model, 900, 600, 300)
        run(model, 900, 600, seed=1)
        assert torch.equal(run(model, 900, 600, 300), first)
    assert not torch.equal(first, cold)  # something was remembered


def test_a_generation_starts_anew(calls: list[Call]) -> None:
    model = shared(1)
    with bind(model) as binding:

        def starts_anew(act: Callable[[], Any]) -> bool:
            binding.reset()
            run(model, 900, 800)
            before = calls[-1].memory
            act()
            return calls[-1].memory is not before and binding.step == 0

        assert starts_anew(lambda: model(latents(), 801))
        assert starts_anew(lambda: model(latents(tokens=96), 700))
        assert starts_anew(lambda: model(latents(tokens=96), 800))
        assert starts_anew(lambda: model(latents(), 700, text=torch.zeros(1, 7)))
        assert starts_anew(lambda: (binding.reset(), model(latents(), 700)))
        assert not starts_anew(lambda: model(latents(), 799))


def test_two_experts_share_one_clock(calls: list[Call]) -> None:
    high, low = shared(1), shared(1, seed=1)
    with bind(high, low, dense_steps=3) as binding:
        for model, timestep in ((high, 900), (high, 800), (low, 400), (low, 300)):
            for _branch in range(2):
                model(latents(), torch.tensor(timestep))
        assert densities(calls) == [1.0] * 6 + [0.3] * 2
        assert binding.step == 3
        assert [layer.branches for layer in binding.report()] == [2, 2]
        high(latents(), 900)
        assert binding.step == 0
        assert paths(binding, 1) == []


def test_time_may_run_upwards(calls: list[Call], caplog: pytest.LogCaptureFixture) -> None:
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
    with bind(model) as binding:
        model(latents(), torch.tensor([[0.0, 900.0]]))
        model(latents(), torch.tensor([[0.0, 800.0]]))
        assert binding.step == 1


@BUILD
def test_a_budget_reaches_layers_by_path_and_pattern(
    build: Callable[[], Any], calls: list[Call]
) -> None:
    model = build()
    budget = {"blocks.[01].*": 0.5, "*": 0.7, "blocks.1.attn1": 1.0}
    with torch.no_grad(), bind(model, budget=budget) as binding:
        run(model, 900)
        assert densities(calls) == [0.5, 1.0, 0.7]
        reached = [layer.density for layer in binding.report()]
        assert [density is None for density in reached] == [False, True, False]


def test_a_layer_or_step_that_is_dense_heeds_no_budget(calls: list[Call]) -> None:
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
    bind(model).unbind()  # a refused bind leaves nothing behind


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
        with bind(model, timestep="when") as binding:
            model(torch.zeros(1), when=900.0)
            model(torch.zeros(1), when=800.0)
            assert binding.step == 1
            with pytest.raises(ValueError, match="called without 'when'"):
                model(torch.zeros(1))
    with pytest.raises(ValueError, match=r"forward of Linear.*\('input',\)"):
        bind(torch.compile(nn.Linear(2, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failed_forward_ends_its_generation(error: BaseException) -> None:
    model = shared()
    with bind(model) as binding:
        expected = run(model, 900, 800)
        model.fail = error
        with pytest.raises(type(error)):
            run(model, 900)
        assert not state._ACTIVE.stack
        assert binding.report() == []
        model.fail = None
        assert torch.equal(run(model, 900, 800), expected)


def test_an_error_in_a_whole_graph_leaves_nothing_active() -> None:
    model = whole()
    with bind(model) as binding:
        run(model, 900)
        with pytest.raises((RuntimeError, TypeError)):
            model(latents()[..., :1], 800)  # narrower than any projection takes
        assert not state._ACTIVE.stack
        assert binding.report() == []


def test_a_bound_model_inside_of_another() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.attn1, self.inner = Attention("attn1"), [inner]

        def forward(self, x: Tensor, timestep: float) -> Tensor:
            return self.attn1(self.inner[0](x, timestep))

    inner = shared(1)
    outer = Outer(inner).requires_grad_(False)
    with bind(outer, inner) as binding:
        run(outer, 900, 800)
        found = [(layer.model, layer.path) for layer in binding.report()]
        assert found == [(0, "attn1"), (1, "blocks.0.attn1")]
        assert binding.step == 1


def taken_over(binding: Binding) -> list[float | None]:
    return [layer.taken_over for layer in binding.report()]


@pytest.mark.parametrize("stacked", [False, True])
@BUILD
def test_branches_with_the_same_latents_share_their_blocks(
    build: Callable[[], Any], stacked: bool
) -> None:
    model = build()
    with bind(model) as binding:
        for timestep in (900.0, 800.0):
            x = latents(int(timestep))
            if stacked:
                model(torch.cat([x, x]), timestep, torch.zeros(2, 7))
            else:
                for text in (7, 9):
                    model(x, timestep, torch.zeros(1, text))
        assert taken_over(binding) == [0.5] * 3
        assert {layer.density for layer in binding.report()} != {None}


@pytest.mark.parametrize("stacked", [False, True])
def test_other_videos_of_a_step_are_clustered_by_themselves(stacked: bool) -> None:
    model = whole()
    with bind(model) as binding:
        for timestep in (900.0, 800.0):
            videos = [latents(int(timestep) + video) for video in range(2)]
            for x in [torch.cat(videos)] if stacked else videos:
                model(x, timestep)
        assert taken_over(binding) == [0.0] * 3


def test_a_video_that_no_longer_is_the_same_is_on_its_own() -> None:
    """Two prompts start from one noise: alike at the first step, and then no more."""
    model = whole()
    with bind(model) as binding:
        x = latents()
        model(torch.cat([x, x]), 900.0)
        assert taken_over(binding) == [0.5] * 3
        out = model(torch.cat([x, latents(1)]), 800.0)
        assert taken_over(binding) == [1 / 3] * 3
        assert out.isfinite().all()


def test_three_branches_along_the_batch_are_led_by_the_first() -> None:
    model = whole()
    with bind(model) as binding:
        model(torch.cat([latents()] * 3), 900.0)
        assert taken_over(binding) == [2 / 3] * 3
