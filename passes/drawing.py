"""Draws one attention site before and after the rewrite, from its projections to its readers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node

from svg_ear_compile.kernels.call import unquoted
from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.operation import REARRANGEMENTS, operation
from svg_ear_compile.passes.site import AttentionSite
from svg_ear_compile.passes.symbolic import hints_of

Kind = Literal["input", "projection", "view", "attention", "operator", "other"]

# What is further away says nothing about the site.
_MAX_NODES = 60
_COLORS: dict[Kind, str] = {
    "input": "#d9d9d9",
    "projection": "#a6cee3",
    "view": "#ffffff",
    "attention": "#fb9a99",
    "operator": "#b2df8a",
    "other": "#fdf3d0",
}
_OURS = frozenset({torch.ops.svg_ear.attention.default, torch.ops.svg_ear.key_padding.default})


@dataclass(frozen=True)
class Surroundings:
    """The nodes around one attention call as plain data, detached from their graph.

    Attributes:
        nodes: label and kind of each node.
        edges: from and to, by place in `nodes`.
    """

    nodes: tuple[tuple[str, Kind], ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def outline(self) -> object:
        """Equal for layers that differ in the names of their parameters alone."""
        labels = tuple((label if kind != "input" else "", kind) for label, kind in self.nodes)
        return labels, self.edges


def surroundings_before(gm: GraphModule, sites: Iterable[AttentionSite]) -> dict[str, Surroundings]:
    """By site name, what is around each call as it is written."""
    flow = Dataflow(gm)
    return {site.name: _around(flow, site.call.node, set(site.call.steps)) for site in sites}


def surroundings_after(gm: GraphModule) -> dict[str, Surroundings]:
    """By site name, what is around each call of the operator in a rewritten graph."""
    flow = Dataflow(gm)
    graphs: list[Graph] = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
    calls = [n for graph in graphs for n in graph.nodes if n.target in _OURS and "site" in n.kwargs]
    return {unquoted(str(call.kwargs["site"])): _around(flow, call, set()) for call in calls}


def _around(flow: Dataflow, call: Node, steps: set[Node]) -> Surroundings:
    # What made the input of a projection is the layer before.
    near = flow.backward(call, lambda n: projected_input(n) is not None)
    found = list(itertools.islice(near, _MAX_NODES))
    for node in [call, *call.users]:
        found += [user for user in node.users if user not in found]
    found.sort(key=lambda n: flow.position[n])
    place = {node: i for i, node in enumerate(found)}
    edges = [
        (place[source], place[node])
        for node in found
        for source in flow.sources(node)
        if source in place
    ]
    return Surroundings(tuple((_label(n), _kind(n, steps)) for n in found), tuple(edges))


def _label(node: Node) -> str:
    name = operation(node) or str(node.target).rpartition(".")[0] or node.name
    shape = " × ".join("?" if size is None else str(size) for size in hints_of(node))
    if node.op in ("placeholder", "get_attr"):
        name = node.name if len(node.name) < 20 else f"…{node.name[-18:]}"
    return f"{name}\n{shape}" if shape else name


def _kind(node: Node, steps: set[Node]) -> Kind:
    if node in steps:
        return "attention"
    if node.target in _OURS:
        return "operator"
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if projected_input(node) is not None:
        return "projection"
    return "view" if operation(node) in REARRANGEMENTS else "other"


def draw(path: Path, title: str, before: Surroundings, after: Surroundings) -> None:
    """Write both as one picture, data flowing downwards; the ending of `path` says the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the extra "plot" brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'drawing needs matplotlib: pip install "svg-ear-compile[plot]"'
        ) from error
    placed = [_place(part) for part in (before, after)]
    widest = [max(x for x, _ in at.values()) + 1 for at in placed]
    rows = 1 + max(y for at in placed for _, y in at.values())
    figure = Figure(figsize=(1.5 * sum(widest) + 1, 0.62 * rows + 0.8), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=widest, squeeze=False)[0]
    figure.suptitle(title)
    parts = (("before", before), ("after", after))
    for axis, (name, part), at in zip(axes, parts, placed, strict=True):
        axis.set(title=name, xlim=(-0.6, max(x for x, _ in at.values()) + 0.6))
        axis.set_ylim(rows - 0.5, -0.6)
        axis.axis("off")
        for source, target in part.edges:
            axis.annotate(
                "", xy=at[target], xytext=at[source],
                arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 11, "shrinkB": 11},
            )  # fmt: skip
        for i, (label, kind) in enumerate(part.nodes):
            axis.text(
                *at[i], label, ha="center", va="center", fontsize=6.5,
                bbox={"boxstyle": "round", "fc": _COLORS[kind], "ec": "#555555", "lw": 0.6},
            )  # fmt: skip
    figure.savefig(path, dpi=150)


def _place(part: Surroundings) -> dict[int, tuple[float, float]]:
    """Column and row of every node: a row for each step of the longest way to it."""
    graph = nx.DiGraph(part.edges)
    graph.add_nodes_from(range(len(part.nodes)))
    at: dict[int, tuple[float, float]] = {}
    for row, layer in enumerate(nx.topological_generations(graph)):
        # Under the middle of what it comes from, in the order of the graph where that leaves a tie.
        wanted = sorted(layer, key=lambda n: (_mean(at[p][0] for p in graph.predecessors(n)), n))
        for column, node in enumerate(wanted):
            at[node] = (float(column), float(row))
    widest = max(x for x, _ in at.values())
    for height in {y for _, y in at.values()}:
        nodes = [n for n in at if at[n][1] == height]
        shift = (widest - max(at[n][0] for n in nodes)) / 2
        for node in nodes:
            at[node] = (at[node][0] + shift, height)
    return at


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
