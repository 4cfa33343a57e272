"""Rewrites planned sites into the operator, in place."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

# Importing them registers torch.ops.svg_ear.attention and torch.ops.svg_ear.key_padding.
import svg_ear_compile.kernels.op
import svg_ear_compile.kernels.padding  # noqa: F401
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.dataflow import Dataflow, written
from svg_ear_compile.passes.find import owner_path
from svg_ear_compile.passes.site import AttentionSite, Mask, Operand, TokenCount

_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "example_value")


def rewrite(gm: GraphModule, planned: Sequence[tuple[AttentionSite, AttentionPlan]]) -> list[Node]:
    """Replace every planned site's call by `torch.ops.svg_ear.attention` at the same position.

    Position matters: what q, k and v hold may be written in place by earlier nodes that are no
    ancestors of theirs. Every other node stays as it was; nodes that only the replaced calls read
    are removed. Checks and recompiles every graph.

    Returns:
        The nodes that now hold the outputs.
    """
    rewriter = _Rewriter(Dataflow(gm) if any(s.prove_mask for s, _ in planned) else None)
    made = [rewriter.rewrite(site, plan) for site, plan in planned]
    for module in gm.modules():
        if isinstance(module, GraphModule):
            module.graph.lint()
            module.recompile()
    gm.delete_all_unused_submodules()
    return made


class _Rewriter:
    """Rewrites the sites of one graph module; layers that share a mask share its proof."""

    def __init__(self, flow: Dataflow | None) -> None:
        self.flow = flow
        self.proofs: dict[tuple[Mask, Graph], tuple[Node, tuple[Node, ...]]] = {}

    def rewrite(self, site: AttentionSite, plan: AttentionPlan) -> Node:
        call, old = site.call, site.call.node
        graph = old.graph
        with graph.inserting_before(old):
            prefix, suffix = (
                _count(graph, parts) for parts in (site.text.prefix, site.text.suffix)
            )
            # Autocast knows PyTorch's attention, not ours: the casts it would make are made here.
            q, k, v = (_tensor(graph, operand, site.dtype) for operand in (call.q, call.k, call.v))
            mask: tuple[Node | None, ...] = (None,)
            if call.mask is not None:
                padding = site.padding
                mask = self._proven(site, call.mask) if padding is None else (
                    _conjunction(graph, padding.keys, call.mask.inverted), None,
                    _conjunction(graph, padding.rows, False),
                )  # fmt: skip
            done = graph.call_function(
                torch.ops.svg_ear.attention.default,
                (q, k, v, mask[0], site.layer_parameter, *mask[1:]),
                {
                    "plan": plan.encode(),
                    "site": site.name,
                    "layer_owner": owner_path(site.layer_parameter) if site.layer_parameter else "",
                    "scale": call.scale,
                    "text_prefix": prefix,
                    "text_suffix": suffix,
                    "averages_empty_rows": call.mask is not None and call.mask.finite_fill,
                },
            )
            out = graph.call_function(operator.getitem, (done, 0))
            out = _as_written(graph, out, call.out_dims)
        for key in _KEPT_META:
            if key in old.meta:
                out.meta[key] = old.meta[key]
                if key != "example_value":
                    done.meta[key] = old.meta[key]
        old.replace_all_uses_with(out)
        _remove(list(call.steps))
        return out

    def _proven(self, site: AttentionSite, mask: Mask) -> tuple[Node, ...]:
        """The mask as (B|1, H|1, N_q|1, N_k) and what its values prove."""
        graph, old = site.call.node.graph, site.call.node
        assert self.flow is not None
        known = self.proofs.get((mask, graph))
        if known is not None and not self.flow.is_written_between(mask.tensor.node, known[0], old):
            return known[1]
        kept = _conjunction(graph, (mask.tensor,), mask.inverted)
        assert kept is not None
        proof = graph.call_function(torch.ops.svg_ear.key_padding.default, (kept,))
        found = (kept, *(graph.call_function(operator.getitem, (proof, i)) for i in range(3)))
        self.proofs[mask, graph] = (old, found)
        return found


def _conjunction(graph: Graph, masks: tuple[Operand, ...], inverted: bool) -> Node | None:
    """The masks in order, with True for what all of them let take part; None for no mask."""
    found: Node | None = None
    for mask in masks:
        node = _in_order(graph, mask, "bhqk")
        if inverted:
            node = graph.call_function(torch.logical_not, (node,))
        elif mask.node.meta["example_value"].dtype in _INTEGERS:
            node = graph.call_method("bool", (node,))
        found = node if found is None else graph.call_function(torch.logical_and, (found, node))
    return found


def _in_order(graph: Graph, operand: Operand, order: str) -> Node:
    """A view of the operand with these dimensions."""
    node, dims = operand.node, operand.dims
    for letter in order:
        if letter not in dims:
            node, dims = graph.call_method("unsqueeze", (node, 0)), letter + dims
    if dims != order:
        node = graph.call_method("permute", (node, [dims.index(letter) for letter in order]))
    return node


def _as_written(graph: Graph, out: Node, dims: str) -> Node:
    """A view of the operator's output (B, H, N, D) with the dimensions that the call had."""
    order = "".join(letter for letter in "bhnd" if letter not in dims) + dims
    if order != "bhnd":
        out = graph.call_method("permute", (out, ["bhnd".index(letter) for letter in order]))
    for _ in range(4 - len(dims)):
        out = graph.call_method("squeeze", (out, 0))
    return out


def _count(graph: Graph, parts: tuple[int | TokenCount, ...]) -> int | Node:
    total: int | Node = sum(part for part in parts if isinstance(part, int))
    for part in parts:
        if isinstance(part, TokenCount):
            size = graph.call_function(torch.ops.aten.sym_size.int, (part.node, part.dim))
            total = graph.call_function(operator.add, (total, size)) if total else size
    return total


def _tensor(graph: Graph, operand: Operand, dtype: torch.dtype | None) -> Node:
    node = _in_order(graph, operand, "bhnd")
    same = operand.node.meta["example_value"].dtype == dtype
    return node if same else graph.call_method("to", (node, dtype))


def _remove(steps: list[Node]) -> None:
    """Erase the steps, and whatever made their inputs and is read by nothing else."""
    replaced, erased, waiting = set(steps), set(), steps
    while waiting:
        node = waiting.pop()
        dead = node.op in ("call_function", "call_method", "get_attr") and not node.users
        if node in erased or not dead or not (node in replaced or _is_pure(node)):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
        waiting = [n for n in inputs if n not in waiting] + waiting


def _is_pure(node: Node) -> bool:
    return not written(node) and not node.is_impure()
