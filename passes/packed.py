"""Sequences of a batch packed one after the other into one dimension, with their boundaries.

The boundaries are a tensor. They count where the graph makes them of nothing but constants: then
they are computed here and now.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import CASTS, REARRANGEMENTS, operation
from svg_ear_compile.passes.symbolic import hint, shape_of

# What makes a tensor of numbers and of other tensors, the same one every time.
_COMPUTED = (
    CASTS
    | REARRANGEMENTS
    | {
        "tensor", "as_tensor", "full", "zeros", "ones", "arange", "full_like", "zeros_like",
        "ones_like", "new_full", "new_zeros", "new_ones", "new_tensor", "cumsum", "cat", "stack",
        "pad", "repeat", "repeat_interleave", "add", "sub", "mul", "sum", "int", "long", "setitem",
        "cumsum_", "add_", "mul_", "fill_", "copy_", "cuda", "cpu", "floordiv", "floor_divide",
        "mod", "remainder", "clamp", "neg",
    }
)  # fmt: skip
_LARGEST = 4096


def equal_sequences(boundaries: object, packed: Node, reader: Node, flow: Dataflow) -> int | None:
    """How many sequences of one length the tensor `packed` (T, ...) is made of.

    Args:
        boundaries: the tensor (sequences + 1,) of where each begins and the last ends.
        reader: the node that reads it.

    Returns:
        None where that is not known, where lengths differ, or where tokens belong to none.
    """
    shape = shape_of(packed)
    tokens = hint(shape[0]) if shape else None
    if not isinstance(boundaries, Node) or not tokens:
        return None
    found = constant(boundaries, reader, flow)
    if found is None or found.dim() != 1 or found.numel() < 2:
        return None
    count = found.numel() - 1
    if tokens % count:
        return None
    wanted = range(0, tokens + 1, tokens // count)
    return count if found.tolist() == list(wanted) else None


def constant(node: Node, reader: Node, flow: Dataflow, largest: int = _LARGEST) -> Tensor | None:
    """What a tensor holds when `reader` reads it, if constants alone decide that; else None.

    Args:
        largest: most elements of a tensor that is computed for it.
    """
    nodes: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in nodes:
            if not _is_computed(each, largest):
                return None
            nodes[each] = None
            waiting += [*each.all_input_nodes, *flow.writes_before(each, reader)]
    values: dict[Node, Any] = {}
    with unset_fake_temporarily(), torch.no_grad():
        for each in sorted(nodes, key=flow.position.__getitem__):
            args, kwargs = map_arg((each.args, dict(each.kwargs)), values.__getitem__)
            target: Any = each.target
            if each.op == "call_method":
                values[each] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                values[each] = target(*args, **kwargs)
    found = values[node]
    return found if isinstance(found, Tensor) else None


def _is_computed(node: Node, largest: int) -> bool:
    if node.op not in ("call_function", "call_method") or operation(node) not in _COMPUTED:
        return False
    sizes = shape_of(node)
    return sizes is None or math.prod(hint(size) or 0 for size in sizes) <= largest
