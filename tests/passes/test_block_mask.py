"""flex_attention whose block mask is padding, and block masks that are not."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from traced_graphs import Rewriting, run_rewritten

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.sdpa import FLEX
from svg_ear_compile.passes.site import Reason

TOKENS = 300


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 4, TOKENS, 32) for _ in range(3))


def two_calls(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """Padding by lengths, and by a mask that is expanded over heads and queries."""
    square = keep[:, None, None].expand(-1, 4, TOKENS, -1)
    masks = (
        create_block_mask(
            lambda b, h, i, j: (j < lengths[b]) & (j >= 5), 2, None, TOKENS, TOKENS, device="cpu"
        ),
        create_block_mask(
            lambda b, h, i, j: square[b, h, i, j], 2, 1, TOKENS, TOKENS, "cpu", BLOCK_SIZE=64
        ),
    )
    return tuple(flex_attention(q, k, v, block_mask=mask) for mask in masks)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.tensor([260, 17]), torch.rand(2, TOKENS) < 0.6


class Kept(Rewriting):
    """Keeps the graph as it was, too."""

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graph = GraphModule(gm, copy.deepcopy(gm.graph))
        return super().__call__(gm, example_inputs)


@pytest.fixture(scope="module")
def traced() -> tuple[Kept, Any, tuple[Tensor, ...]]:
    """Traced once, which is slow: the backend, the outputs, the inputs of the masks."""
    backend, given = Kept(aot=False), inputs()
    return backend, run_rewritten(two_calls, *qkv(), *given, backend=backend), given


@pytest.fixture
def graph(traced: tuple[Kept, Any, tuple[Tensor, ...]]) -> GraphModule:
    return traced[0].graph


def test_padding_in_a_block_mask_is_padding(traced: tuple[Kept, Any, tuple[Tensor, ...]]) -> None:
    backend, outs, (lengths, keep) = traced
    place = torch.arange(TOKENS)
    assert backend.rewritten == 2
    for out, mask in zip(outs, ((place < lengths[:, None]) & (place >= 5), keep), strict=True):
        wanted = F.scaled_dot_product_attention(*qkv(), mask[:, None, None])
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)


Change = Callable[[GraphModule], Iterator[tuple[Node, dict[str, Any]]]]
"""Nodes of the graph and what they are to be instead, as attributes."""


@contextmanager
def changed(graph: GraphModule, change: Change) -> Iterator[None]:
    edits = list(change(graph))
    assert edits
    before = [(node, {name: getattr(node, name) for name in new}) for node, new in edits]
    for which in (edits, before):
        for node, new in which:
            for name, value in new.items():
                setattr(node, name, value)
        if which is edits:
            yield


def nodes(graph: GraphModule, name: str) -> list[Node]:
    return [node for node in graph.graph.nodes if operation(node) == name]


def flex(graph: GraphModule) -> Node:
    return next(node for node in graph.graph.nodes if node.target is FLEX)


def of_flex(place: int, value: Callable[[tuple[Any, ...]], Any]) -> Change:
    """Another entry in the block mask of the first call."""

    def change(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
        node = flex(graph)
        mask: Any = node.args[4]
        entries = [*mask[:place], value(mask), *mask[place + 1 :]]
        yield node, {"args": (*node.args[:4], tuple(entries), *node.args[5:])}

    return change


def with_args(name: str, *args: Any, at: int = 1) -> Change:
    """Other arguments of every node of this name, from the place `at` on."""

    def change(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
        for node in nodes(graph, name):
            yield node, {"args": (*node.args[:at], *args, *node.args[at + len(args) :])}

    return change


def with_kwargs(name: str, **kwargs: Any) -> Change:
    def change(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
        for node in nodes(graph, name):
            yield node, {"kwargs": {**node.kwargs, **kwargs}}

    return change


def other_function(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
    """Another function inside of blocks than the one that the lists are made of."""
    yield nodes(graph.mask_fn_0, "lt")[0], {"target": operator.le}


def of_queries(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
    """The same function in both, of the query instead of the key."""
    inside: Any = graph.mask_fn_0
    inputs = list(inside.graph.nodes)
    yield nodes(inside, "lt")[0], {"args": (inputs[2], nodes(inside, "lt")[0].args[1])}
    levels = [n for n in graph.graph.nodes if "_add_batch_dim" in str(n.target)]
    less = next(n for n in nodes(graph, "lt") if n.args[0] is levels[3])
    yield less, {"args": (levels[2], less.args[1])}


def levels_swapped(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
    first, second = [n for n in graph.graph.nodes if "_remove_batch_dim" in str(n.target)][:2]
    yield first, {"args": (first.args[0], *second.args[1:])}
    yield second, {"args": (second.args[0], *first.args[1:])}


def other_captured(graph: GraphModule) -> Iterator[tuple[Node, dict[str, Any]]]:
    node = flex(graph)
    other = next(n for n in graph.graph.nodes if n.op == "placeholder")
    yield node, {"args": (*node.args[:8], (other,))}


@pytest.mark.parametrize(
    "change",
    [
        other_function,
        of_queries,
        levels_swapped,
        other_captured,
        of_flex(0, lambda mask: mask[0] - 1),
        of_flex(2, lambda mask: mask[4]),
        of_flex(3, lambda mask: mask[5]),
        of_flex(4, lambda mask: None),
        of_flex(-3, lambda mask: 64),
        with_args("eq", 99),
        with_args("gt", 1),
        with_args("permute", 0, 1, 2, 4, 5, 3),
        with_args("pad", (1, 83, 0, 84)),
        with_args("pad", (0, 84, 0, 84), "constant", True),
        with_args("pad", (0, 84, 0, 84), "reflect"),
        with_args("arange", 1, at=0),
        with_kwargs("sum", dim=-2),
        with_kwargs("argsort", descending=False),
        with_kwargs("argsort", stable=False),
        with_kwargs("to", dtype=torch.bool),
    ],
)
def test_lists_of_other_blocks_are_left(graph: GraphModule, change: Change) -> None:
    with changed(graph, change):
        assert find_sites(graph)[0].reason is Reason.FLEX
    assert find_sites(graph)[0].reason is None


def test_a_function_of_a_tensor_that_changes_is_left(graph: GraphModule) -> None:
    node = flex(graph)
    (lengths,) = node.args[8]
    with graph.graph.inserting_before(node):
        write = graph.graph.call_method("sub_", (lengths, 1))
    write.meta["example_value"] = lengths.meta["example_value"]
    try:
        assert find_sites(graph)[0].reason is Reason.FLEX
    finally:
        graph.graph.erase_node(write)
