"""Finds attention calls and describes each as an `AttentionSite`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from svg_ear_compile.kernels.op import DTYPES
from svg_ear_compile.kernels.plan import HEAD_DIMS
from svg_ear_compile.passes.dataflow import backward, dataflow, projected_input
from svg_ear_compile.passes.role import hint, role_of, shape_of, text_span
from svg_ear_compile.passes.site import AttentionSite, Reason, Role, TextSpan

SDPA_TARGETS = frozenset(
    {
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
# The builtin has no Python signature; these are its parameters in order.
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}


@dataclass(frozen=True)
class _Arguments:
    """Arguments of one SDPA call, whatever form it was written in."""

    query: Node
    key: Node
    value: Node
    attn_mask: Node | None
    dropout_p: object
    is_causal: object
    scale: Any


def sdpa_arguments(node: Node) -> _Arguments | None:
    """Arguments of an SDPA call by name, or None if q, k or v is not a node."""
    given = {**_DEFAULTS, **dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs}
    given.pop("enable_gqa", None)  # the operator reads it off the head counts
    if not all(isinstance(given.get(name), Node) for name in ("query", "key", "value")):
        return None
    return _Arguments(**given)  # type: ignore[arg-type]


def find_sites(gm: GraphModule) -> list[AttentionSite]:
    """Every attention call of the graph and of its child graphs, in the order of execution."""
    sites: list[AttentionSite] = []
    seen: Counter[str] = Counter()
    for module in gm.modules():
        if isinstance(module, GraphModule):
            sites += _sites_of(module, seen)
    return sites


def _sites_of(gm: GraphModule, seen: Counter[str]) -> list[AttentionSite]:
    flow: nx.DiGraph | None = None
    sites = []
    calls = {n for n in gm.graph.nodes if n.op == "call_function" and n.target in SDPA_TARGETS}
    for node in gm.graph.nodes:
        if node not in calls:
            continue
        arguments = sdpa_arguments(node)
        if arguments is None:
            continue
        if flow is None:
            flow = dataflow(gm.graph)
        layer = layer_path(node)
        seen[layer] += 1
        name = layer if seen[layer] == 1 else f"{layer}#{seen[layer]}"
        sites.append(_describe(flow, node, arguments, layer, name, calls))
    return sites


def _describe(
    flow: nx.DiGraph, node: Node, given: _Arguments, layer: str, name: str, calls: Set[Node]
) -> AttentionSite:
    q_shape, k_shape = shape_of(given.query) or (), shape_of(given.key) or ()
    value = given.query.meta.get("example_value")
    role = role_of(flow, given.query, given.key, node)
    out = node.meta.get("example_value")
    reason = _reason_to_leave(given, role, out.dtype if isinstance(out, torch.Tensor) else None)
    text = text_span(flow, given.query, q_shape[2], calls) if reason is None else TextSpan()
    return AttentionSite(
        name=name,
        node=node,
        q=given.query,
        k=given.key,
        v=given.value,
        mask=given.attn_mask,
        scale=given.scale,
        layer=layer,
        layer_parameter=_layer_parameter(flow, given.query, node),
        role=Role.JOINT if role is Role.SELF and text != TextSpan() else role,
        text=text,
        q_shape=q_shape,
        k_shape=k_shape,
        dtype=out.dtype if isinstance(out, torch.Tensor) else None,
        device=value.device if isinstance(value, torch.Tensor) else None,
        reason=reason,
    )


def _reason_to_leave(given: _Arguments, role: Role, dtype: torch.dtype | None) -> Reason | None:
    if given.is_causal is not False:
        return Reason.CAUSAL
    if given.dropout_p != 0.0:
        return Reason.DROPOUT
    values = [n.meta.get("example_value") for n in (given.query, given.key, given.value)]
    tensors = [t for t in values if isinstance(t, torch.Tensor) and t.dim() == 4]
    if len(tensors) != 3:
        return Reason.LAYOUT
    q, k, v = tensors
    if dtype not in DTYPES or any(t.dtype != q.dtype for t in (k, v)):
        return Reason.DTYPE
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        return Reason.HEAD_DIM
    if role is Role.CROSS:
        return Reason.CROSS_ATTENTION
    q_tokens, k_tokens = hint(q.shape[2]), hint(k.shape[2])
    if role is Role.PREFIX or q_tokens != k_tokens:
        return Reason.ROLE
    if not _fit(q, k, v):
        return Reason.LAYOUT
    if given.attn_mask is not None and not _is_key_padding(given.attn_mask, k):
        return Reason.MASK
    return None


def _fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """True if the operator takes these shapes: it has grouped heads, but does not broadcast."""
    (batch, heads), (kv_batch, kv_heads, k_tokens), values = (
        [hint(size) for size in shape] for shape in (q.shape[:2], k.shape[:3], v.shape[:3])
    )
    if [kv_batch, kv_heads, k_tokens] != values or kv_batch != batch:
        return False
    return heads == kv_heads or bool(heads and kv_heads and heads % kv_heads == 0)


def _is_key_padding(mask: Node, k: torch.Tensor) -> bool:
    """A bool mask of one query row is key padding by its shape, whatever it holds."""
    value = mask.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() != 4:
        return False
    batch, heads, rows, keys = (hint(size) for size in value.shape)
    fits = batch in (1, hint(k.shape[0])) and heads in (1, hint(k.shape[1]))
    return fits and rows == 1 and keys == hint(k.shape[2])


def layer_path(node: Node) -> str:
    """Path of the innermost module that made the node, e.g. "blocks.3.attn1"; "" for a function."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^[LG]\['[^']*'\]", "", path)
    names = re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.?([^.\[\]]+)", path)
    parts = [name for match in names for name in match if name]
    return ".".join(p for p in parts if p not in ("_modules", "__dict__", "_orig_mod"))


def _layer_parameter(flow: nx.DiGraph, q: Node, reader: Node) -> Node | None:
    """A parameter from which q descends: its identity tells layers of one graph apart.

    The nearest projection's is the layer's own; a norm's on the way may be shared by all layers.
    """
    for node in backward(flow, q, lambda n: projected_input(n) is not None, reader):
        if projected_input(node) is not None:
            for source in node.all_input_nodes:
                if _is_plain_parameter(source):
                    return source
    for node in backward(flow, q, _is_plain_parameter, reader):
        if _is_plain_parameter(node):
            return node
    return None


def _is_plain_parameter(node: Node) -> bool:
    """A Parameter that any operator takes: quantised subclasses refuse those unknown to them."""
    if node.op not in ("placeholder", "get_attr"):
        return False
    value = node.meta.get("example_value")
    return isinstance(value, torch.nn.Parameter) and not is_traceable_wrapper_subclass(value)
