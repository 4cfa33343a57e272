"""Dynamo's graphs of small functions and modules, and what is read off or rewritten in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import AttentionSite, Reason

ALL_BLOCKS = AttentionPlan(density=0.999999)
"""Takes the sparse path and computes every block exactly."""


def graphs_of(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> list[GraphModule]:
    """Every graph that Dynamo makes of one call, without gradients."""
    graphs: list[GraphModule] = []

    def record(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=record, dynamic=dynamic)(*args)
    return graphs


def sites_of(fn: Callable[..., Any], *args: Any) -> list[AttentionSite]:
    """The sites of the one graph that `fn` makes."""
    (graph,) = graphs_of(fn, *args)
    return find_sites(graph)


class Rewriting:
    """A backend that rewrites every site that has no reason to stay dense, then runs AOT eager,
    or the graph itself, which `graph` keeps."""

    def __init__(self, plan: AttentionPlan = ALL_BLOCKS, aot: bool = True) -> None:
        self.plan = plan
        self.aot = aot
        self.graph: GraphModule | None = None
        self.sites: list[AttentionSite] = []
        self.calls = 0
        self.rewritten = 0
        self.reasons: list[Reason] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.calls += 1
        self.graph, sites = gm, find_sites(gm)
        self.sites += sites
        self.reasons += [site.reason for site in sites if site.reason is not None]
        planned = [(site, self.plan) for site in sites if site.reason is None]
        self.rewritten += len(rewrite(gm, planned))
        return aot_eager(gm, example_inputs) if self.aot else gm.forward


def run_rewritten(
    fn: Callable[..., Any], *args: Any, backend: Rewriting, dynamic: bool | None = None
) -> Tensor:
    """Output of `fn` compiled by `backend`, without gradients and without graph breaks."""
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
