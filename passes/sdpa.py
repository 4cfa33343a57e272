"""Reads the attention calls that PyTorch has: SDPA, flex_attention, and leaves that hold one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from svg_ear_compile.passes.block_mask import (
    BlockMask,
    graph_of,
    read_block_mask,
    result_of,
    takes_every_pair,
)
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.operators import is_lse
from svg_ear_compile.passes.site import Call, Mask, Operand, Reason
from svg_ear_compile.passes.symbolic import is_same, known, rank_of

SDPA_TARGETS = frozenset(
    {
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
# Attention together with its projections, in one call that Dynamo does not open.
LEAF_TARGETS = frozenset(
    {
        F.multi_head_attention_forward,
        torch._transformer_encoder_layer_fwd,
        torch._native_multi_head_attention,
        torch.ops.aten._transformer_encoder_layer_fwd.default,
        torch.ops.aten._native_multi_head_attention.default,
    }
)
FLEX = torch.ops.higher_order.flex_attention
# The builtin has no Python signature; these are its parameters in order.
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_WHOLE_SEQUENCE = 1 << 30
_BY_RANK = {2: "nd", 3: "hnd", 4: "bhnd"}


def read_sdpa(node: Node) -> Call | None:
    """An SDPA call in whatever argument form, or None for another node.

    Of a 3-D call (B, N, D), which has no heads, the batch counts as heads.
    """
    if node.op != "call_function" or node.target not in SDPA_TARGETS:
        return None
    given: dict[str, Any] = {**dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs}
    tensors = [given[name] for name in ("query", "key", "value")]
    q, k, v = (Operand(tensor, _BY_RANK.get(rank_of(tensor), "")) for tensor in tensors)
    mask = given.get("attn_mask")
    return Call(
        node,
        (node,),
        q,
        k,
        v,
        out_dims=q.dims,
        mask=None if mask is None else _mask(mask, q.dims),
        scale=given.get("scale"),
        dropout_p=known(given.get("dropout_p", 0.0)),
        is_causal=given.get("is_causal", False),
        reason=None if q.dims and q.dims == k.dims == v.dims else Reason.LAYOUT,
    )


def _mask(node: Node, dims: str) -> Mask:
    pairs = dims.replace("nd", "qk")
    value = node.meta.get("example_value")
    added = not isinstance(value, torch.Tensor) or value.dtype != torch.bool
    return Mask(Operand(node, pairs[max(0, len(pairs) - rank_of(node)) :]), added=added)


def read_flex(node: Node, flow: Dataflow) -> Call | None:
    """A flex_attention call, or None for another node. Its output is the first of its results."""
    if node.op != "call_function" or node.target is not FLEX:
        return None
    arguments: tuple[Any, ...] = node.args
    q, k, v = (Operand(tensor) for tensor in arguments[:3])
    score_mod, block_mask, scale = arguments[3:6]
    *_, key_block, mask_mod = block_mask
    # A mask that takes every pair may still come with lists that leave blocks out, except where one
    # block holds all keys: what flex_attention makes where it is given no mask.
    everything = key_block == _WHOLE_SEQUENCE and takes_every_pair(mask_mod)
    read = None if everything else _readable(read_block_mask(node), q, k)
    if isinstance(read, Reason) or not _returns_its_score(graph_of(score_mod)):
        reason = read if isinstance(read, Reason) else Reason.FLEX
        return Call(node, (node,), q, k, v, reason=reason)
    unread = [u for u in node.users if operation(u) == "getitem" and not u.users]
    readers = [u for u in node.users if u not in unread]
    taken = {u.args[1]: u for u in readers if operation(u) == "getitem"}
    out, lse = taken.get(0), taken.get(1)
    if out is None or len(readers) > len(taken) or not taken.keys() <= {0, 1}:
        return Call(node, (node,), q, k, v, reason=Reason.WEIGHTS)
    if read is not None and any(
        flow.is_written_between(t, node, out) or flow.is_viewed_anew(t) for t in read.tensors
    ):
        return Call(node, (node,), q, k, v, reason=Reason.WRITTEN)
    call = Call(out, (node, *unread, out), q, k, v, scale=scale, block_mask=read)
    return call if lse is None else _with_natural_lse(call, lse)


def _readable(mask: BlockMask | None, q: Operand, k: Operand) -> BlockMask | Reason:
    """The block mask if its values may prove that it is padding, else why they cannot."""
    if mask is None:
        return Reason.FLEX
    q_shape, k_shape = q.sizes(), k.sizes()
    if q_shape is None or k_shape is None:
        return Reason.LAYOUT
    as_long = is_same(q_shape[2], k_shape[2])
    if mask.compares_positions(by_chunk=not as_long):
        return Reason.CAUSAL if as_long else Reason.CAUSAL_CHUNK
    return mask if mask.is_judged and (as_long or not mask.has_own) else Reason.FLEX


def _with_natural_lse(call: Call, lse: Node) -> Call:
    """The call with its log-sum-exp, of base 2 as flex_attention makes it, in the natural base."""
    (scaled, *more) = lse.users or (lse,)
    is_natural = operation(scaled) == "mul" and scaled.args == (lse, math.log(2)) and not more
    held = Operand(scaled, "bhn")
    has_own = call.block_mask is not None and call.block_mask.has_own
    before = any(user < call.node for user in scaled.users)  # would read it before it is there
    if not is_natural or has_own or before or not is_lse(held, call):
        return replace(call, reason=Reason.FLEX if has_own else Reason.WEIGHTS)
    return replace(call, steps=(*call.steps[:-1], lse, scaled, call.node), lse=held)


def _returns_its_score(graph: GraphModule | None) -> bool:
    return graph is not None and result_of(graph) is next(iter(graph.graph.nodes))


def read_leaf(node: Node) -> Call | None:
    """Attention inside one call together with its projections, or None for another node."""
    if node.op != "call_function" or node.target not in LEAF_TARGETS:
        return None
    first, *_ = node.all_input_nodes
    activation = Operand(first, "")
    return Call(node, (node,), activation, activation, activation, reason=Reason.LEAF)
