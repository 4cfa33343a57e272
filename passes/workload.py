"""What the rest of the model costs, as plain data for whoever weighs attention against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.dataflow import projected_input
from svg_ear_compile.passes.find import SDPA_TARGETS
from svg_ear_compile.passes.role import hint


@dataclass(frozen=True)
class RestOfModel:
    """Everything in a graph that is not an attention call.

    Attributes:
        flops: multiply-adds of linear layers and convolutions, times two.
        bytes: output bytes of every node and bytes of every parameter, each once; what fusion
            keeps out of memory is counted too, so this is an upper bound.
    """

    flops: int
    bytes: int


def rest_of_model(gm: GraphModule) -> RestOfModel:
    """FLOPs and bytes of a Dynamo graph without its attention calls, at the traced sizes."""
    flops = moved = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in SDPA_TARGETS:
            continue
        for value in tree_leaves(node.meta.get("example_value")):
            if isinstance(value, torch.Tensor):
                moved += _numel(value) * value.element_size()
        flops += _projection_flops(node)
    return RestOfModel(flops, moved)


def _projection_flops(node: Node) -> int:
    """2 * output elements * (weight elements / output channels)."""
    if projected_input(node) is None:
        return 0
    out = node.meta.get("example_value")
    weights = [
        value
        for source in node.all_input_nodes
        if isinstance(value := source.meta.get("example_value"), torch.nn.Parameter)
        and value.dim() > 1
    ]
    if not isinstance(out, torch.Tensor) or not weights:
        return 0
    return 2 * _numel(out) * (_numel(weights[0]) // (hint(weights[0].shape[0]) or 1))


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(hint(size) or 0 for size in tensor.shape)
