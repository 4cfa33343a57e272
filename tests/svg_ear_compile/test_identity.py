"""Layers are told apart by their parameters, otherwise by order, and the report says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_models import (
    BUILD,
    DIM,
    PLAN,
    Model,
    densities,
    paths,
    run,
    shared,
)
from torch import Tensor, nn

from svg_ear_compile.layers import BoundModel
from svg_ear_compile.session import bind

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def test_layers_that_only_order_tells_are_named_to_who_gives_a_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model(whole=False, blocks=1)
    with bind(model, budget={"blocks.0.attn1": 0.5}):
        attention = model.blocks[0].attn1
        attention.to_q.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        run(model, 900, 800)
    found = [r.getMessage() for r in caplog.records if "has no entry" in r.getMessage()]
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
