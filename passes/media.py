"""Which activations carry a picture or a video, and which only text.

Latents enter a model as floats, text as token ids that an embedding looks up. What no float reaches
but parameters is text.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow


def carries_media(flow: Dataflow) -> dict[Node, bool]:
    """For every node, whether a float input of the model reaches it."""
    found: dict[Node, bool] = {}
    for node in flow.position:
        found[node] = _is_float_input(node) or any(found.get(s, False) for s in flow.sources(node))
    return found


def _is_float_input(node: Node) -> bool:
    value = node.meta.get("example_value")
    return (
        node.op in ("placeholder", "get_attr")
        and isinstance(value, torch.Tensor)
        and value.dtype.is_floating_point
        and not isinstance(value, torch.nn.Parameter)
        and value.dim() > 2  # tables of frequencies are buffers, which look like inputs here
    )
