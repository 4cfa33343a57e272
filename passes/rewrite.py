"""Rewrites one planned site into the operator, in place."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

import svg_ear_compile.kernels.op  # noqa: F401  registers torch.ops.svg_ear.attention
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.site import AttentionSite

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
        prefix, suffix = _length(site, site.text.prefix), _length(site, site.text.suffix)
        call = graph.call_function(
            torch.ops.svg_ear.attention.default,
            (site.q, site.k, site.v, site.mask, site.layer_parameter),
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


def _length(site: AttentionSite, length: int | tuple[Node, int]) -> int | Node:
    if isinstance(length, int):
        return length
    part, dim = length
    return site.node.graph.call_function(torch.ops.aten.sym_size.int, (part, dim))


def finish(gm: GraphModule) -> None:
    """Check and recompile every graph after its sites were rewritten."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            module.graph.lint()
            module.recompile()
