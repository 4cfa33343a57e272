"""Every attention of a model: what was found, what was decided, and why."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from svg_ear_compile.planning import GraphReport, SiteReport, rewrite_graph
from svg_ear_compile.settings import Settings


@dataclass(frozen=True)
class Explanation:
    """Reports of every graph that a model was traced into, in the order of compilation."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteReport]:
        """All attention calls of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps([graph.to_dict() for graph in self.graphs], indent=1)

    def table(self) -> Table:
        """One row for each attention call."""
        sparse = sum(graph.sparse for graph in self.graphs)
        table = Table(
            title=f"{len(self.sites)} attention calls in {len(self.graphs)} graphs, {sparse} sparse"
        )
        for column in ("layer", "role", "B × H × N_q × N_k × D", "text", "plan", "why"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            shape = " × ".join("?" if size is None else str(size) for size in site.shape) or "?"
            text = "" if site.text == (0, 0) else f"{site.text[0]} + {site.text[1]}"
            table.add_row(
                site.site or "(function)", site.role, shape, text, _plan(site), _why(site)
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]


def _plan(site: SiteReport) -> str:
    if site.plan is None or site.clusters is None:
        return "dense"
    how = {
        "density": f"density {site.plan.density:g}",
        "top_p": f"top-p {site.plan.top_p:g}",
        "threshold": f"threshold {site.plan.threshold:g}",
    }[site.plan.routing]
    return f"{how}, {site.clusters[0]} × {site.clusters[1]} clusters, {site.plan.compensation}"


def _why(site: SiteReport) -> str:
    return site.sentence if site.reason is None else f"{site.reason}: {site.sentence}"


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What `torch.compile(model, backend="svg_ear", options=options)` would do, without Inductor.

    Runs the model once on the given inputs, eagerly, without gradients.

    Args:
        model: an `nn.Module`, compiled or not, or a function.
        args, kwargs: its inputs.
        options: see `Settings.parse`.
    """
    settings = Settings.parse(options)
    graphs: list[GraphReport] = []

    def record(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        graphs.append(rewrite_graph(gm, settings))
        return gm.forward

    target = getattr(model, "_orig_mod", model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # Dynamo keeps what it compiled on the code object: one of its own leaves the user's alone.
    fresh = types.FunctionType(
        call.__code__.replace(), globals(), "explained", None, call.__closure__
    )
    # Frames after a graph break are the model's own code objects: at its limit Dynamo runs them
    # eagerly, and their attention would be missing from the report.
    unlimited = torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
    )
    with torch.no_grad(), unlimited:
        torch.compile(fresh, backend=record)(*args, **kwargs)
    return Explanation(graphs)
