"""How layers are named: by their paths in the model, however Python reaches the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surroundings import TOKENS, WIDTH, Layer, attend, scores
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from svg_ear_compile import explain
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.module_path import layer_path, owner_path, source_of
from svg_ear_compile.tracing import traced_module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Layer(lambda q, k, v, valid: attend(scores(q, k), v)) for _ in range(2)
        )
        self.back = nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.back(block(x, x).transpose(1, 2).flatten(2))
        return x


def gathering(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Model):
    forward = gathering(Model.forward)


X = torch.randn(1, TOKENS, WIDTH)


class Reading:
    """A backend that reads the paths of the layers, and the model, while Dynamo traces it."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.parameters: list[str] = []
        self.models: list[nn.Module | None] = []

    def __call__(self, gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        for site in find_sites(gm):
            assert site.layer_parameter is not None
            assert owner_path(site.layer_parameter).startswith(f"{site.layer}.")
            self.layers.append(site.layer)
            self.parameters.append(source_of(site.layer_parameter))
            self.models.append(traced_module(site.call.node))
        return gm.forward


def read(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Reading:
    reading = Reading()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=reading, fullgraph=True)(*args, **kwargs)
    return reading


PATHS = ["blocks.0", "blocks.1"]


NAMES = ['a"b', "c'd", "e\\f", "g h", "two\nlines", "[0]", "L['self']", "(x, y)", "層", "é—"]


def test_a_layer_of_any_name_has_its_path() -> None:
    model = Model()
    for name in NAMES:
        model.blocks.add_module(name, copy.deepcopy(model.blocks[0]))
    found = read(model, X)
    assert found.layers == [*PATHS, *(f"blocks.{name}" for name in NAMES)]
    assert {*found.layers} <= {name for name, _ in model.named_modules()}
    assert all(made is model for made in found.models)


MODEL = Model()


@pytest.mark.parametrize(
    "made",
    [Model, Decorated, lambda: torch.no_grad()(MODEL.forward), lambda: gathering(MODEL.forward)],
    ids=["plain", "forward", "method without gradients", "method"],
)
def test_a_decorator_changes_no_path_and_hides_no_model(made: Callable[[], Any]) -> None:
    model = made()
    found = read(model, X)
    assert found.layers == PATHS
    assert found.models == 2 * [model if isinstance(model, Model) else MODEL]
    assert [site.layer for site in explain(model, X).sites] == PATHS


def test_a_model_among_gathered_arguments_is_the_model() -> None:
    model = Model()
    by_place = read(lambda *args: args[0](args[1]), model, X)
    by_name = read(lambda **named: named["model"](named["x"]), model=model, x=X)
    assert by_place.layers == by_name.layers == PATHS
    assert by_place.models == by_name.models == [model, model]
    assert explain(lambda model, x: model(x), model, X).sites[1].layer == "blocks.1"


def test_layers_of_two_gathered_models_keep_their_own_parameters() -> None:
    first, second = Model(), Model()
    found = read(lambda *args: args[1](args[0](args[2])), first, second, X)
    assert found.layers == 2 * PATHS
    assert len(set(found.parameters)) == 4
    assert found.models == [first, first, second, second]


def test_places_in_a_list_of_models_tell_them_apart() -> None:
    found = read(lambda models, x: models[1](models[0](x)), [Model(), Model()], X)
    assert found.layers == [f"{place}.{path}" for place in (0, 1) for path in PATHS]


def test_a_model_reached_as_a_global_has_the_same_paths() -> None:
    assert read(lambda x: MODEL(x), X).layers == PATHS


def _node_in(path: str) -> Node:
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", Model), "inner": (path, Layer)}
    return node


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("L['self'].blocks.0.attn1", "blocks.0.attn1"),
        ("L['self'].blocks[0].attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0'].attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0']._modules['attn1']", "blocks.0.attn1"),
        ("L['self']._orig_mod.blocks.0.attn1", "blocks.0.attn1"),
        ("L['model'].blocks.11.attn", "blocks.11.attn"),
        ("G['model'].blocks.11.attn", "blocks.11.attn"),
        ("L['self'].forward.__self__.blocks.1.attn", "blocks.1.attn"),
        (
            "L['self'].forward.__self__.blocks[0].forward.func.__closure__[0].cell_contents"
            ".forward.__self__.attn1",
            "blocks.0.attn1",
        ),
        ("L['self']", ""),
    ],
)
def test_layer_path_is_the_same_however_the_source_is_written(path: str, layer: str) -> None:
    assert layer_path(_node_in(path)) == layer


def test_a_function_has_no_layer() -> None:
    assert layer_path(Graph().placeholder("x")) == ""
