"""Real model classes: what is found in each, and that the rewritten model is still the model.

`sites.json` says for every family how many graphs Dynamo makes of it and, for each kind of
attention, how often it occurs, its layers, role, places of the tokens that stay exact, and the
reason why it is left or "sparse". The table of models in docs/models.md is made of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, Family, output_of
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from svg_ear_compile import explain
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.reference import Result
from svg_ear_compile.planning import GraphReport, rewrite_graph
from svg_ear_compile.settings import Settings

SITES: dict[str, Any] = json.loads((Path(__file__).parent / "sites.json").read_text())
# The others run the rewritten graph as it is: C++ for all would take an hour.
THROUGH_INDUCTOR, THROUGH_AOT = "wan-t2v", "cogvideox"


def options(family: Family, **more: float) -> dict[str, Any]:
    """Videos of these sizes count as long; pictures and words have to be told by the rules."""
    return {**({"min_tokens": 64} if family.kind == "video" else {}), **more}


def rows_of(graphs: list[GraphReport]) -> dict[str, Any]:
    rows = Counter(
        (
            re.sub(r"(?<=\.)\d+(?=\.|#|$)", "*", site.site),
            site.role,
            json.dumps(site.places),
            site.reason or " ".join(["sparse", ", ".join(site.conditions)]).strip(),
        )
        for graph in graphs
        for site in graph.sites
    )
    return {
        "graphs": len(graphs),
        "sites": [
            [n, layer, role, json.loads(t), what] for (layer, role, t, what), n in rows.items()
        ],
    }


@pytest.mark.parametrize("name", ["wan-t2v", "mochi"])
def test_explain_says_what_the_backend_does(name: str) -> None:
    family = FAMILIES[name]
    model, args, kwargs = family.build()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(**family.dynamo):
        found = explain(model, *args, options=options(family), **kwargs)
    assert rows_of(found.graphs) == SITES[name]


def test_the_table_has_no_other_families() -> None:
    assert list(SITES) == list(FAMILIES)


class Rewriting:
    """A backend that keeps its reports."""

    def __init__(self, family: Family) -> None:
        self.name = family.name
        self.settings = Settings.parse(options(family))
        self.graphs: list[GraphReport] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(rewrite_graph(gm, self.settings))
        if self.name == THROUGH_INDUCTOR:
            return compile_fx(gm, example_inputs)
        return aot_eager(gm, example_inputs) if self.name == THROUGH_AOT else gm.forward


def eager(family: Family) -> Tensor:
    model, args, kwargs = family.build()
    with torch.no_grad():
        return output_of(model(*args, **kwargs))


def compiled(family: Family, backend: Rewriting, breaks: bool = False) -> Callable[[], Tensor]:
    """The model, called on its inputs; with the graph breaks that it has by default, or without."""
    model, args, kwargs = family.build()
    torch._dynamo.reset()
    made = torch.compile(model, backend=backend, fullgraph=family.fullgraph and not breaks)

    def call() -> Tensor:
        patch = torch._dynamo.config.patch(**({} if breaks else family.dynamo))
        with torch.no_grad(), patch:
            return output_of(made(*args, **kwargs))

    return call


class AtDensity:
    """Gives every call another density than it was compiled with."""

    def __init__(self, density: float) -> None:
        self.density = density

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        yield AttentionCall(replace(request.plan, density=self.density))

    def finished(self, call: AttentionCall, result: Result) -> None: ...


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_sites_are_the_recorded_ones_and_the_rewritten_model_is_the_model(family: Family) -> None:
    backend = Rewriting(family)
    found = compiled(family, backend)
    outputs = {}
    for density in (1.0, 0.999999, 0.3):
        with calls_from(AtDensity(density)):
            outputs[density] = found()
    assert rows_of(backend.graphs) == SITES[family.name]
    wanted = eager(family)
    distances = [((out - wanted).norm() / wanted.norm()).item() for out in outputs.values()]
    dense, every_block, some_blocks = distances
    assert dense <= 1e-5
    assert every_block <= 1e-4
    assert some_blocks <= 0.2
    # Computing a third of the attention leaves a trace, where there is any to leave out.
    sparse = any(what.startswith("sparse") for *_, what in SITES[family.name]["sites"])
    assert (some_blocks > 1e-5) == sparse


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.breaks])
def test_a_model_that_breaks_is_rewritten_graph_by_graph(name: str) -> None:
    family = FAMILIES[name]
    backend = Rewriting(family)
    found = compiled(family, backend, breaks=True)
    with calls_from(AtDensity(0.999999)):
        torch.testing.assert_close(found(), eager(family), rtol=1e-4, atol=1e-4)
    assert len(backend.graphs) <= family.breaks + 1
