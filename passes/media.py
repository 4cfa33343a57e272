"""Which activations carry a picture or a video, and which only text.

Latents enter a model as floats, text as token ids that an embedding looks up. What no float reaches
but parameters is text.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import Dataflow, projected_input
from svg_ear_compile.passes.symbolic import hints_of


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
        # Tables of frequencies are buffers, which look like inputs here.
        and (value.dim() > 2 or (value.dim() == 2 and _is_projected(node)))
    )


def _is_projected(tokens: Node) -> bool:
    """True for packed latents (N, C): a linear layer reads them, as it reads no table."""
    rows = hints_of(tokens)[0]
    return rows != 1 and any(projected_input(user) is tokens for user in tokens.users)
