"""One reader of permutations, however they are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from traced_graphs import graphs_of

from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.permutations import PERMUTATIONS, permutation

PERMUTING = {
    "permute": lambda x: x.permute(2, 0, -1, 1),
    "permute by name": lambda x: torch.permute(input=x, dims=(0, 2, 1, 3)),
    "transpose": lambda x: x.transpose(-1, 0),
    "swapaxes": lambda x: torch.swapaxes(x, axis0=2, axis1=-1),
    "swapdims": lambda x: x.swapdims(1, 2),
    "movedim": lambda x: x.movedim(0, -1),
    "movedim of several": lambda x: torch.movedim(x, (0, 1), (-1, 0)),
    "moveaxis": lambda x: torch.moveaxis(x, source=-1, destination=1),
    "mT": lambda x: x.mT,
    "t": lambda x: x[0, 0].t(),
    "T": lambda x: x[0, 0].T,
    "t of one dimension": lambda x: x[0, 0, 0].t(),
}


@pytest.mark.parametrize("size", [1, 3])  # of equal extents: nothing is told by them
@pytest.mark.parametrize("fn", PERMUTING.values(), ids=PERMUTING)
def test_a_permutation_is_read_in_every_spelling(fn: Callable[[Tensor], Tensor], size: int) -> None:
    x = torch.arange(size**4).view(4 * (size,))
    (graph,) = graphs_of(lambda x: fn(x + 1), x)
    (node,) = (node for node in graph.graph.nodes if operation(node) in PERMUTATIONS)
    order = permutation(node)
    assert order is not None
    held = {4: x + 1, 2: x[0, 0] + 1, 1: x[0, 0, 0] + 1}[len(order)]
    torch.testing.assert_close(held.permute(order), fn(x + 1), rtol=0, atol=0)


def test_it_is_read_off_aten_and_nothing_else_is_one() -> None:
    graph = make_fx(lambda x: x.permute(1, 2, 0).mT.exp())(torch.zeros(2, 2, 2)).graph
    for node in graph.nodes:
        node.meta["example_value"] = node.meta.get("val")
    found = [permutation(node) for node in graph.nodes]
    assert [order for order in found if order is not None] == [(1, 2, 0), (0, 2, 1)]


def test_numbers_that_are_known_at_run_time_only_are_not_read() -> None:
    graph = Graph()
    x, dim = graph.placeholder("x"), graph.placeholder("dim")
    x.meta["example_value"] = torch.zeros(2, 2)
    assert permutation(graph.call_method("transpose", (x, dim, 0))) is None
    assert permutation(graph.call_method("transpose", (dim, 1, 0))) is None
    assert permutation(graph.call_method("transpose", (x, -1, 0))) == (1, 0)
