"""Fake values of new nodes: what stands behind them in the graph is traced against such values."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from svg_ear_compile.passes.memory import fake_mode_of


def run_on_fakes(after: Node, end: Node) -> None:
    """Give every new node between these two the fake value that it has."""
    node = after.next
    while node is not end:
        if "example_value" in node.meta:  # of a copy
            node = node.next
            continue
        values = {n: n.meta.get("example_value") for n in node.all_input_nodes}
        args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        target: Any = node.target
        mode = fake_mode_of(*values.values(), end.meta.get("example_value"))
        shapes = None if mode is None else mode.shape_env
        # Symbols that are made here are made again, and bound, where the graph is traced.
        ignoring = shapes.ignore_fresh_unbacked_symbols() if shapes else contextlib.nullcontext()
        with mode or contextlib.nullcontext(), torch.no_grad(), ignoring:
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = target(*args, **kwargs)
        node = node.next
