"""Rewrites one planned site into the operator, in place."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

import svg_ear_compile.kernels.op  # noqa: F401  registers torch.ops.svg_ear.attention
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.site import AttentionSite, TokenCount

_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "example_value")


def rewrite_site(site: AttentionSite, plan: AttentionPlan) -> Node:
    """Replace the site's call by `torch.ops.svg_ear.attention` at the same position.

    Position matters: what q, k and v hold may be written in place by earlier nodes that are no
    ancestors of theirs. Every other node stays as it was.

    Returns:
        The node that now holds the output.
    """
    graph, old = site.node.graph, site.node
    with graph.inserting_before(old):
        prefix, suffix = (_count(graph, parts) for parts in (site.text.prefix, site.text.suffix))
        # Autocast knows PyTorch's attention and not ours: the casts it would make are made here.
        q, k, v = (_cast(graph, tensor, site.dtype) for tensor in (site.q, site.k, site.v))
        call = graph.call_function(
            torch.ops.svg_ear.attention.default,
            (q, k, v, site.mask, site.layer_parameter),
            {
                "plan": plan.encode(),
                "site": site.name,
                "scale": site.scale,
                "text_prefix": prefix,
                "text_suffix": suffix,
            },
        )
        out = graph.call_function(operator.getitem, (call, 0))
    for key in _KEPT_META:
        if key in old.meta:
            out.meta[key] = old.meta[key]
            if key != "example_value":
                call.meta[key] = old.meta[key]
    old.replace_all_uses_with(out)
    graph.erase_node(old)
    return out


def _count(graph: Graph, parts: tuple[int | TokenCount, ...]) -> int | Node:
    total: int | Node = sum(part for part in parts if isinstance(part, int))
    for part in parts:
        if isinstance(part, TokenCount):
            size = graph.call_function(torch.ops.aten.sym_size.int, (part.node, part.dim))
            total = graph.call_function(operator.add, (total, size)) if total else size
    return total


def _cast(graph: Graph, tensor: Node, dtype: torch.dtype | None) -> Node:
    if tensor.meta["example_value"].dtype == dtype:
        return tensor
    return graph.call_method("to", (tensor, dtype))


def finish(gm: GraphModule) -> None:
    """Check and recompile every graph after its sites were rewritten."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            module.graph.lint()
            module.recompile()
