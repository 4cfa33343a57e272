"""Finds attention calls and describes each as an `AttentionSite`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node

from svg_ear_compile.kernels.op import DTYPES
from svg_ear_compile.kernels.plan import HEAD_DIMS
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.exact import exact_tokens
from svg_ear_compile.passes.exact_places import NOTHING_EXACT
from svg_ear_compile.passes.folding import Axes, folds, role_in_clip
from svg_ear_compile.passes.handwritten import read_handwritten
from svg_ear_compile.passes.layer_parameters import LayerParameters
from svg_ear_compile.passes.mask import judge_mask
from svg_ear_compile.passes.media import carries_media
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.module_path import layer_path
from svg_ear_compile.passes.operators import is_kernel, may_be_kernel, read_kernel
from svg_ear_compile.passes.role import TokenSources, projected
from svg_ear_compile.passes.sdpa import (
    FLEX,
    LEAF_TARGETS,
    SDPA_TARGETS,
    read_flex,
    read_leaf,
    read_sdpa,
)
from svg_ear_compile.passes.site import AttentionSite, Call, Padding, Reason, Role, Size
from svg_ear_compile.passes.steps import is_softmax
from svg_ear_compile.passes.streams import Streams
from svg_ear_compile.passes.symbolic import expression, hint, is_same
from svg_ear_compile.passes.unread import may_be_softmax, unread


def find_sites(gm: GraphModule) -> list[AttentionSite]:
    """Every attention call of the graph and of its child graphs, in the order of execution."""
    if not any(_may_be_attention(node) for node in _nodes(gm)):
        return []
    flow = Dataflow(gm)
    calls = _calls(gm, flow)
    describe = _Describer(
        flow,
        Streams(flow),
        LayerParameters(flow),
        folds(flow),
        carries_media(flow),
        _is_transformed(gm),
    )
    seen: Counter[str] = Counter()
    sites = []
    for call in calls:
        layer = layer_path(call.node)
        seen[layer] += 1
        name = layer if seen[layer] == 1 else f"{layer}#{seen[layer]}"
        sites.append(describe(call, layer, name))
    return sites


def _calls(gm: GraphModule, flow: Dataflow) -> list[Call]:
    """Every attention call once, in the order of execution.

    Some have several nodes that it can be told by, which may stand between those of another call.
    """
    found: dict[Node, Call] = {}
    for node in _nodes(gm):
        call = _read(node, flow)
        if call is None or any(node in known.steps for known in found.values()):
            continue
        if may_be_softmax(node):
            found.setdefault(call.node, call)
        else:  # what is read beside it says more than what is not
            found[call.node] = call
    return sorted(found.values(), key=lambda call: flow.position[call.node])


def _nodes(gm: GraphModule) -> Iterator[Node]:
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def _is_transformed(gm: GraphModule) -> bool:
    """True if torch.func or forward-mode AD follows the tensors around the graph, or AD within it.

    Within the graph, tensors of torch.func show what they are; dual tensors do not.
    """
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(getattr(node.target, "__name__", "") == "_enter_dual_level" for node in _nodes(gm))


def _may_be_attention(node: Node) -> bool:
    if node.op == "call_function" and (is_attention(node.target) or may_be_kernel(node)):
        return True
    return is_softmax(node) or may_be_softmax(node)


def is_attention(target: object) -> bool:
    """True for a function or operator that computes attention by itself."""
    known = target in SDPA_TARGETS or target in LEAF_TARGETS or target is FLEX
    return known or is_kernel(target)


def _read(node: Node, flow: Dataflow) -> Call | None:
    if not _may_be_attention(node):
        return None
    found = read_sdpa(node) or read_flex(node, flow) or read_leaf(node) or read_kernel(node, flow)
    if found is None and may_be_softmax(node):
        return unread(node, flow)
    return found or read_handwritten(node, flow)


@dataclass(frozen=True)
class _Describer:
    """Describes the calls of one graph module; see the modules of the same names."""

    flow: Dataflow
    streams: Streams
    parameters: LayerParameters
    axes: dict[Node, Axes]
    media: dict[Node, bool]
    transformed: bool

    def __call__(self, call: Call, layer: str, name: str) -> AttentionSite:
        flow = self.flow
        first, last = call.steps[0], call.steps[-1]  # q and k are read by the one, v by the other
        q_shape, k_shape = call.q.sizes() or (), call.k.sizes() or ()
        of_q, of_k, of_v = (
            projected(flow, operand.node, reader)
            for operand, reader in ((call.q, first), (call.k, first), (call.v, last))
        )
        sources = TokenSources(flow, of_q, of_k, of_v)
        role = sources.role
        if role in (Role.SELF, Role.JOINT) and q_shape:
            tokens = hint(q_shape[2])
            within = (role_in_clip(source, tokens, self.axes) for source in of_q)
            role = next((found for found in within if found is not None), role)
            if role in (Role.SELF, Role.JOINT) and k_shape:
                # Keys of a cache are projected in no graph. In the traced call there may be none.
                # Sizes that are counted at run time have many expressions.
                counted = hint(q_shape[2]) is None and hint(k_shape[2]) is None
                as_long = expression(q_shape[2]) == expression(k_shape[2])
                role = role if as_long or counted else Role.PREFIX
        dtype = _computed_in(call)
        padding = None
        reason = call.reason or _reason_to_leave(call, role, dtype)
        if any(
            operand.node in first.all_input_nodes
            and flow.is_written_between(operand.node, first, last)
            for operand in (call.q, call.k, call.v)
        ):  # the rewritten call reads its operands where the last step does
            reason = reason or Reason.WRITTEN
        operands = [x.node for x in (call.q, call.k, call.v)]
        if flow.is_viewed_anew_between(operands, call.node) or (
            call.lse is not None and flow.is_viewed_anew(call.lse.node)
        ):
            reason = Reason.WRITTEN
        if reason is None and call.symbols and dtype is torch.float16:
            reason = Reason.SCALE  # the symbol multiplies the queries, which may overflow
        if self.transformed:
            reason = Reason.TENSOR_TYPE
        if reason is None and not sources.values_are_of_the_keys:
            reason = Reason.VALUES
        if reason is None and of_q and not any(self._carries_media(s, first) for s in of_q):
            reason = Reason.TEXT
        if reason is None and call.mask is not None:
            judged = judge_mask(flow, call, q_shape, k_shape)
            reason = judged if isinstance(judged, Reason) else None
            padding = judged if isinstance(judged, Padding) else None
            masks = (call.mask.tensor, *(padding.keys + padding.rows if padding else ()))
            if flow.is_viewed_anew_between([mask.node for mask in masks], call.node):
                reason = Reason.WRITTEN
        exact = exact_tokens(self.streams, call) if reason is None else NOTHING_EXACT
        q = call.q.node.meta.get("example_value")
        return AttentionSite(
            name=name,
            call=call,
            layer=layer,
            layer_parameter=self.parameters.of(call.q.node, first, call.node),
            role=Role.JOINT if role is Role.SELF and exact.queries is not None else role,
            exact=exact,
            q_shape=q_shape,
            k_shape=k_shape,
            dtype=dtype,
            device=q.device if isinstance(q, torch.Tensor) else None,
            padding=padding,
            reason=reason,
        )

    def _carries_media(self, source: Node, reader: Node) -> bool:
        """True if a picture or a video reaches what `reader` reads, maybe written into memory."""
        written = self.flow.writes_before(source, reader)
        return any(self.media[node] for node in (source, *written))


def _computed_in(call: Call) -> torch.dtype | None:
    """The output's dtype; not that of q under autocast, nor where q and k were cast up."""
    out = call.node.meta.get("example_value")
    return out.dtype if isinstance(out, torch.Tensor) else None


def _reason_to_leave(call: Call, role: Role, dtype: torch.dtype | None) -> Reason | None:
    if call.is_causal is not False:
        return Reason.CAUSAL_CHUNK if role is Role.PREFIX else Reason.CAUSAL
    if call.dropout_p != 0.0:
        return Reason.DROPOUT
    values = [operand.node.meta.get("example_value") for operand in (call.q, call.k, call.v)]
    if not all(is_plain(value) for value in (*values, call.node.meta.get("example_value"))):
        return Reason.TENSOR_TYPE
    if call.node.meta["example_value"].requires_grad:
        return Reason.GRADIENTS
    shapes = [operand.sizes() for operand in (call.q, call.k, call.v)]
    if any(shape is None for shape in shapes):
        return Reason.LAYOUT
    dtypes = {operand.node.meta["example_value"].dtype for operand in (call.q, call.k, call.v)}
    if dtype not in DTYPES or len(dtypes) > 1:
        return Reason.DTYPE
    q, k, v = (shape for shape in shapes if shape is not None)
    if q[3] not in HEAD_DIMS or v[3] != q[3]:
        return Reason.HEAD_DIM
    if role is Role.CROSS:
        return Reason.CROSS_ATTENTION
    if role is Role.UNKNOWN and not is_same(q[2], k[2]):
        return Reason.LENGTHS
    if role in (Role.SPATIAL, Role.TEMPORAL):
        return Reason.PART_OF_CLIP
    if k[3] != q[3]:
        return Reason.LAYOUT
    return None if _fit(q, k, v) else Reason.LAYOUT


def _fit(q: tuple[Size, ...], k: tuple[Size, ...], v: tuple[Size, ...]) -> bool:
    """True if the operator takes these shapes: it has grouped heads, but does not broadcast."""
    (batch, heads), (kv_batch, kv_heads, k_tokens), values = (
        [hint(size) for size in shape] for shape in (q[:2], k[:3], v[:3])
    )
    if [kv_batch, kv_heads, k_tokens] != values or kv_batch != batch:
        return False
    return heads == kv_heads or bool(heads and kv_heads and heads % kv_heads == 0)
