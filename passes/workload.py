"""Non-attention cost: FLOPs and bytes of a graph without its attention calls, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.dataflow import projected_input
from svg_ear_compile.passes.operation import CONVOLUTIONS, operation
from svg_ear_compile.passes.operators import is_kernel
from svg_ear_compile.passes.sdpa import SDPA_TARGETS
from svg_ear_compile.passes.symbolic import hint


@dataclass(frozen=True)
class NonAttentionCost:
    """FLOPs and bytes of every node of a graph that is not an attention call.

    Attributes:
        flops: multiply-adds of linear layers and convolutions, times two.
        bytes: output bytes of every node and bytes of every parameter, each once; what fusion
            keeps out of memory is counted too, so this is an upper bound.
    """

    flops: int
    bytes: int


def non_attention_cost(gm: GraphModule) -> NonAttentionCost:
    """FLOPs and bytes of a Dynamo graph without its attention calls, at the traced sizes."""
    flops = moved = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and (node.target in SDPA_TARGETS or is_kernel(node.target)):
            continue
        for value in tree_leaves(node.meta.get("example_value")):
            if isinstance(value, torch.Tensor):
                moved += _numel(value) * value.element_size()
        flops += _projection_flops(node)
    return NonAttentionCost(flops, moved)


def _projection_flops(node: Node) -> int:
    """2 * output elements * length of the sum behind each of them."""
    source = projected_input(node)
    if source is None:
        return 0
    out, data = (n.meta.get("example_value") for n in (node, source))
    weight = _weight(node, source)
    if not (isinstance(out, torch.Tensor) and isinstance(data, torch.Tensor)):
        return 0
    if not isinstance(weight, torch.Tensor):
        return 0
    if operation(node) in CONVOLUTIONS:  # (out, in, ...)
        return 2 * _numel(out) * (_numel(weight) // (hint(weight.shape[0]) or 1))
    # (M, K) by (K, P) is (M, P), in whatever order they come.
    return 2 * _numel(out) * math.isqrt(_numel(data) * _numel(weight) // max(_numel(out), 1))


def _weight(node: Node, source: Node) -> Any:
    if node.op == "call_module":
        owner = node.graph.owning_module
        return None if owner is None else owner.get_submodule(str(node.target)).weight
    others = (n.meta.get("example_value") for n in node.all_input_nodes if n is not source)
    return next((n for n in others if isinstance(n, torch.Tensor) and n.dim() > 1), None)


def _numel(tensor: torch.Tensor) -> int:
    return math.prod(hint(size) or 0 for size in tensor.shape)
