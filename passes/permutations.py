"""Operations that permute the dimensions of a tensor, read by doing the same to another tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from svg_ear_compile.passes.arguments import arguments
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.symbolic import known, rank_of

PERMUTATIONS = frozenset({
    "transpose", "permute", "movedim", "moveaxis", "mT", "T", "numpy_T", "t",
})  # fmt: skip


def permutation(node: Node) -> tuple[int, ...] | None:
    """Which dimension of its input each one of a permuted tensor was.

    None for another operation, and for numbers that are known at run time only.
    """
    args = arguments(node) if operation(node) in PERMUTATIONS else None
    source = None if args is None else args.take("self")
    if not isinstance(source, Node) or (rank := rank_of(source)) < 0:
        return None
    # Its strides number the dimensions, whatever the sizes are.
    marker = torch.empty_strided((1,) * rank, tuple(range(rank)), device="meta")

    def plain(given: Node) -> Any:
        return marker if given is source else known(given)

    positional, named = map_arg(node.args, plain), map_arg(dict(node.kwargs), plain)
    unknown: list[Node] = []
    map_arg((positional, named), unknown.append)
    if unknown:
        return None
    target: Any = node.target
    if node.op == "call_method":
        moved = getattr(positional[0], target)(*positional[1:], **named)
    else:
        moved = target(*positional, **named)
    order: tuple[int, ...] = moved.stride()
    return order
