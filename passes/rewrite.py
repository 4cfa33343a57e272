"""Rewrites planned sites into the operator, in place."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

# Importing them registers the operators, torch.ops.svg_ear.attention and those of masks.
import svg_ear_compile.kernels.op
import svg_ear_compile.kernels.padding
import svg_ear_compile.kernels.query_chunks  # noqa: F401
from svg_ear_compile.kernels.call import quoted
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.block_proof import BlockProofs, left_to_flex
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.effects import Effects
from svg_ear_compile.passes.exact_nodes import ExactNodes
from svg_ear_compile.passes.fake_runs import run_on_fakes
from svg_ear_compile.passes.module_path import owner_path
from svg_ear_compile.passes.site import AttentionSite, EmptyRow, Mask, Operand, Role
from svg_ear_compile.passes.symbolic import estimate, hint, is_same
from svg_ear_compile.passes.vectors import Stream, Vector

_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "example_value")


def rewrite(gm: GraphModule, planned: Sequence[tuple[AttentionSite, AttentionPlan]]) -> list[Node]:
    """Replace every planned site's call by `torch.ops.svg_ear.attention` at the same position.

    Position matters: what q, k and v hold may be written in place by earlier nodes that are no
    ancestors of theirs. Every other node stays as it was; nodes that only the replaced calls read
    are removed. The new output has shape, dtype and strides of the old one: later views of it were
    traced against them. Checks and recompiles every graph.

    Returns:
        The nodes that now hold the outputs.

    Raises:
        RuntimeError: an output would be another than the traced one; the graph is left in between.
    """
    rewriter = _Rewriter(Dataflow(gm) if any(s.prove_mask for s, _ in planned) else None)
    made = [rewriter.rewrite(site, plan) for site, plan in planned]
    for module in list(gm.modules()):
        if isinstance(module, GraphModule):
            _delete_unread_children(module)
            module.graph.lint()
            module.recompile()
    return made


def _delete_unread_children(gm: GraphModule) -> None:
    named = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, child in list(gm.named_children()):
        if isinstance(child, GraphModule) and name not in named:
            delattr(gm, name)


@dataclass(frozen=True)
class _Proof:
    """What the values of a mask prove.

    Attributes:
        at: the call for which it was made.
        arguments: the mask (B|1, H|1, N_q|1, N_k), then the results of `key_padding`.
        chunks: results of `query_chunks`; none of a mask that is the same for all queries.
        heard: rows (B|1, H|1, N_q|1, 1) whose logits count beside the mask; None for all.
    """

    at: Node
    arguments: tuple[Node, ...]
    chunks: tuple[Node, ...]
    heard: Node | None


class _Rewriter:
    """Rewrites the sites of one graph module; layers that share a mask share its proof.

    Sites name nodes of the graph as it was found. `replaced` says which node holds the output of a
    call that was rewritten since: every node of a site is looked up there before it is used.
    """

    def __init__(self, flow: Dataflow | None) -> None:
        self.flow = flow
        self.effects = Effects()
        self.replaced: dict[Node, Node] = {}
        self.proofs: dict[tuple[Mask, Graph], _Proof] = {}
        self.listed = None if flow is None else BlockProofs(flow, self._now)
        self.exact: dict[
            tuple[Graph, Vector, frozenset[Stream], torch.device | None],
            tuple[Node, int | Node | None],
        ] = {}

    def rewrite(self, site: AttentionSite, plan: AttentionPlan) -> Node:
        call, old = site.call, site.call.node
        graph, last = old.graph, old.prev
        with graph.inserting_before(old):
            # Autocast knows PyTorch's attention, not ours: the casts it would make are made here.
            q, k, v = (
                self._tensor(graph, operand, site.dtype) for operand in (call.q, call.k, call.v)
            )
            mask: tuple[Node | None, ...] = (None,)
            chunks: tuple[Node, ...] = ()
            otherwise: tuple[Node | None, ...] = (None, None)
            listed = None
            if call.block_mask is not None:
                assert self.listed is not None
                listed = self.listed.of(call, q, k)
                mask = (None, listed.keys, listed.rows, listed.proven)
                otherwise = left_to_flex(call, listed)
            if call.mask is not None and site.padding is not None:
                mask = (
                    self._conjunction(graph, site.padding.keys, call.mask.inverted), None,
                    self._conjunction(graph, site.padding.rows, False),
                )  # fmt: skip
            elif call.mask is not None:
                proof = self._proven(site, call.mask)
                mask, chunks = proof.arguments, proof.chunks
                if proof.heard is not None:  # a product, since NaN must stay
                    q = graph.call_function(operator.mul, (q, proof.heard))
            exact = [
                self._exact(graph, x, vector, site)
                for x, vector in ((q, site.exact.queries), (k, site.exact.keys))
            ]
            padding = (*mask[1:], None, None, None)[:3]
            tokens = (exact[0][0], exact[1][0])
            scale = self._now(call.scale) if isinstance(call.scale, Node) else call.scale
            for symbol, divides in call.symbols:  # an operator's number would be one for the graph
                of = operator.truediv if divides else operator.mul
                q = graph.call_function(of, (q, self._now(symbol)))
            owner = site.layer_parameter
            done = graph.call_function(
                torch.ops.svg_ear.attention.default,
                (q, k, v, mask[0], owner, *padding, *tokens, *chunks),
                {
                    "plan": plan.encode(),
                    "site": quoted(site.name),
                    "layer_owner": quoted(owner_path(owner)) if owner else "",
                    "scale": scale,
                    "clustered_queries": exact[0][1],
                    "clustered_keys": exact[1][1],
                    "averages_empty_rows": (
                        call.mask is not None and call.mask.empty_row is EmptyRow.MEAN
                    ),
                    "return_lse": call.lse is not None,
                    "otherwise": otherwise[0],
                    "otherwise_lse": otherwise[1],
                    "cached_keys": site.role is Role.PREFIX,
                },
            )
            out = graph.call_function(operator.getitem, (done, 0))
            rows = mask[2] if site.padding and call.mask else None
            leaves_out = mask[0] is not None or rows is not None
            if leaves_out and call.mask and call.mask.empty_row is EmptyRow.NAN:
                out = _without_empty_rows(graph, out, mask[0], rows, call.mask.added)
            if listed is not None and listed.own is not None:
                heads, of_values = (hint(shape[1]) or 1 for shape in (site.q_shape, site.k_shape))
                if heads != of_values:
                    v = graph.call_method("repeat_interleave", (v, heads // of_values, 1))
                out = graph.call_function(torch.where, (listed.own, v, out))
            out = self._take_place(site, _in_dims(graph, out, "bhnd", call.out_dims), old, last)
            if call.lse is not None:
                last = old.prev
                lse = graph.call_function(operator.getitem, (done, 1))
                lse = _in_dims(graph, lse, "bhn", call.lse.dims)
                self._take_place(site, lse, call.lse.node, last)
        for key in _KEPT_META:
            if key in old.meta and key != "example_value":
                done.meta[key] = old.meta[key]
        self._remove(list(call.steps))
        return out

    def _take_place(self, site: AttentionSite, made: Node, old: Node, after: Node) -> Node:
        """Give the users of `old` a new result instead, in memory that looks as the old one did.

        Args:
            made: the result, the last of the nodes that were inserted behind `after`.
        """
        graph, end = old.graph, made.next
        run_on_fakes(after, end)
        with graph.inserting_before(end):
            out = _in_strides_of(graph, made, old)
        run_on_fakes(made, end)
        _check(site, out, old)
        for key in _KEPT_META:
            if key in old.meta:
                out.meta[key] = old.meta[key]
        old.replace_all_uses_with(out)
        self.replaced[old] = out
        return out

    def _now(self, node: Node) -> Node:
        """The node that holds what `node` held when the sites were found."""
        return self.replaced.get(node, node)

    def _proven(self, site: AttentionSite, mask: Mask) -> _Proof:
        graph, old = site.call.node.graph, site.call.node
        assert self.flow is not None
        known = self.proofs.get((mask, graph))
        if known is not None and not self.flow.is_written_between(mask.tensor.node, known.at, old):
            return known
        heard = None
        if mask.added:
            kept = self._bias(graph, mask, site)
            if mask.absorbing is not None:
                kept, heard = _without_offset(graph, kept, mask.absorbing)
        else:
            conjunction = self._conjunction(graph, (mask.tensor,), mask.inverted)
            assert conjunction is not None
            kept = conjunction
        proof = graph.call_function(torch.ops.svg_ear.key_padding.default, (kept,))
        parts = [graph.call_function(operator.getitem, (proof, i)) for i in range(3)]
        chunks: list[Node] = []
        rows = mask.tensor.sizes("bhqk")
        if rows is not None and hint(rows[2]) != 1:
            found = graph.call_function(torch.ops.svg_ear.query_chunks.default, (kept, parts[2]))
            chunks = [graph.call_function(operator.getitem, (found, i)) for i in range(2)]
        self.proofs[mask, graph] = _Proof(old, (kept, *parts), tuple(chunks), heard)
        return self.proofs[mask, graph]

    def _bias(self, graph: Graph, mask: Mask, site: AttentionSite) -> Node:
        """What a mask adds to the logits, as a float."""
        node = self._in_order(graph, mask.tensor, "bhqk")
        held = mask.tensor.node.meta["example_value"].dtype
        is_kept = held.is_floating_point and not _is_autocast(site)
        wanted = mask.rounded or (held if is_kept else site.dtype)
        if held != wanted:
            node = graph.call_method("to", (node, wanted))
        if mask.factor != 1.0:
            node = graph.call_function(operator.mul, (node, mask.factor))
        return node

    def _conjunction(self, graph: Graph, masks: tuple[Operand, ...], inverted: bool) -> Node | None:
        """The masks in order, with True for what all of them let take part; None for no mask."""
        found: Node | None = None
        for mask in masks:
            node = self._in_order(graph, mask, "bhqk")
            if inverted:
                node = graph.call_function(torch.logical_not, (node,))
            elif mask.node.meta["example_value"].dtype in _INTEGERS:
                node = graph.call_method("bool", (node,))
            found = node if found is None else graph.call_function(torch.logical_and, (found, node))
        return found

    def _in_order(self, graph: Graph, operand: Operand, order: str) -> Node:
        """A view of the operand with these dimensions."""
        node, dims = self._now(operand.node), operand.dims
        while "1" in dims:
            node = graph.call_method("squeeze", (node, dims.index("1")))
            dims = dims.replace("1", "", 1)
        for letter, apart, extents in (
            ("f", "bh", (-1, operand.heads)), ("p", "bn", (operand.batch, -1)),
        ):  # fmt: skip
            if letter in dims:
                parts = (node, dims.index(letter), extents)
                node, dims = graph.call_method("unflatten", parts), dims.replace(letter, apart)
        for letter in order:
            if letter not in dims:
                node, dims = graph.call_method("unsqueeze", (node, 0)), letter + dims
        if dims != order:
            node = graph.call_method("permute", (node, [dims.index(letter) for letter in order]))
        return node

    def _tensor(self, graph: Graph, operand: Operand, dtype: torch.dtype | None) -> Node:
        node = self._in_order(graph, operand, "bhnd")
        same = operand.node.meta["example_value"].dtype == dtype
        return node if same else graph.call_method("to", (node, dtype))

    def _exact(
        self, graph: Graph, x: Node, vector: Vector | None, site: AttentionSite
    ) -> tuple[Node | None, int | Node | None]:
        """Which tokens of x (B, H, N, D) are exact, (1, N) bool, and how many are not."""
        if vector is None:
            return None, None
        key = (graph, vector, site.exact.streams, site.device)
        if key not in self.exact:
            made = ExactNodes(graph, x, self._now, site.exact)
            tokens = graph.call_function(torch.ops.aten.sym_size.int, (x, 2))
            self.exact[key] = made.places(vector), made.clustered(vector, tokens)
        return self.exact[key]

    def _remove(self, steps: list[Node]) -> None:
        """Erase the steps, and whatever made their inputs and is read by nothing else."""
        replaced, erased, waiting = set(steps), set(), steps
        while waiting:
            node = waiting.pop()
            dead = node.op in ("call_function", "call_method", "get_attr") and not node.users
            if node in erased or not dead or not (node in replaced or self._is_pure(node)):
                continue
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)
            waiting = [n for n in inputs if n not in waiting] + waiting

    def _is_pure(self, node: Node) -> bool:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        return not self.effects.written(node) and not node.is_impure()


def _is_autocast(site: AttentionSite) -> bool:
    """True where PyTorch casts all operands of an attention, its mask too."""
    assert site.device is not None
    operands = [operand.node.meta["example_value"].dtype for operand in (site.call.q, site.call.k)]
    return torch.is_autocast_enabled(site.device.type) or site.dtype not in operands


def _in_dims(graph: Graph, out: Node, held: str, dims: str) -> Node:
    """A view of a result, of dimensions `held` (B, H, N, D), with those that the call had."""
    apart = dims.replace("f", "bh").replace("p", "bn").replace("1", "")
    order = "".join(letter for letter in held if letter not in apart) + apart
    if order != held:
        out = graph.call_method("permute", (out, [held.index(letter) for letter in order]))
    for _ in range(len(held) - len(apart)):
        out = graph.call_method("squeeze", (out, 0))
    for letter in "fp":
        if letter in dims:
            place = dims.replace("1", "").index(letter)
            out = graph.call_method("flatten", (out, place, place + 1))
    for place in (place for place, letter in enumerate(dims) if letter == "1"):
        out = graph.call_method("unsqueeze", (out, place))
    return out


def _without_offset(graph: Graph, bias: Node, absorbing: float) -> tuple[Node, Node]:
    """A bias less the largest of its row, and the rows of which a sum keeps more than the bias.

    A softmax does not see what a whole row has in common, but a sum rounds by it, and a narrower
    dtype may not hold it. Rows whose largest bias reaches `absorbing` are queries of padding: their
    softmax sees the bias alone.

    Returns:
        Two nodes: bias (B|1, H|1, N_q|1, N_k), and bool (B|1, H|1, N_q|1, 1).
    """
    largest = graph.call_function(torch.amax, (bias, -1), {"keepdim": True})
    infinite = graph.call_function(torch.isinf, (largest,))
    offset = graph.call_method("masked_fill", (largest, infinite, 0.0))
    size = graph.call_function(torch.abs, (largest,))
    heard = graph.call_function(operator.lt, (size, absorbing))
    return graph.call_function(operator.sub, (bias, offset)), heard


def _without_empty_rows(
    graph: Graph, out: Node, kept: Node | None, rows: Node | None, added: bool
) -> Node:
    """The output with NaN in rows that have no key, as a softmax of nothing but -inf gives."""
    if kept is not None:
        if added:
            kept = graph.call_function(torch.ne, (kept, -math.inf))
        some = graph.call_function(torch.any, (kept, -1), {"keepdim": True})
        rows = some if rows is None else graph.call_function(torch.logical_and, (some, rows))
    empty = graph.call_function(torch.logical_not, (rows,))
    return graph.call_method("masked_fill", (out, empty, float("nan")))


def _in_strides_of(graph: Graph, out: Node, old: Node) -> Node:
    """The output in the memory order that the old one had; itself if it has that already."""
    wanted = old.meta["example_value"]
    if _same_strides(out.meta["example_value"], wanted):
        return out
    order = sorted(range(wanted.dim()), key=lambda d: -estimate(wanted.stride(d)))
    if order == sorted(order):
        return graph.call_method("contiguous", (out,))
    moved = graph.call_method("permute", (out, order))
    moved = graph.call_method("contiguous", (moved,))
    return graph.call_method("permute", (moved, [order.index(d) for d in range(wanted.dim())]))


def _same_strides(one: Tensor, other: Tensor) -> bool:
    """True if the strides agree; one of extent 1 steps nowhere."""
    rows = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(hint(size) == 1 or is_same(first, second) for size, first, second in rows)


def _check(site: AttentionSite, out: Node, old: Node) -> None:
    """Raise a RuntimeError unless the new output looks as the old one did."""
    made, wanted = out.meta["example_value"], old.meta["example_value"]
    same = (
        made.dim() == wanted.dim()
        and all(map(is_same, made.shape, wanted.shape))
        and made.dtype == wanted.dtype
        and made.device == wanted.device
        and _same_strides(made, wanted)
    )
    if not same:
        raise RuntimeError(
            f"attention {site.name!r} would return {_look(made)} instead of {_look(wanted)}"
        )


def _look(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tuple(tensor.stride())} {tensor.dtype} {tensor.device}"
