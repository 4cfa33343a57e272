"""Attention that is called by another name: ATen's kernels and the operators of other libraries.

An operator or function is told by its identity and its arguments by their names, which these
libraries have in common. A call becomes attention that can be read if its layout is known and every
argument that changes the result has the value that changes nothing; any other call of these, and
any unknown operator that takes three tensors of attention's shapes, is named and left.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.arguments import Arguments, arguments
from svg_ear_compile.passes.dataflow import Dataflow
from svg_ear_compile.passes.operation import is_foreign, operation
from svg_ear_compile.passes.packed import equal_sequences
from svg_ear_compile.passes.site import Call, Mask, Operand, Reason, Size
from svg_ear_compile.passes.symbolic import hint, is_same, rank_of, shape_of


@dataclass(frozen=True)
class _Kernel:
    """What one operator computes.

    Attributes:
        dims: letters of q, k, v and the output, as in `Operand`; "phd" where lengths of sequences
            are given.
        lse: letters of the log-sum-exp, the second of its results; "" where that is something else
            or padded.
        returns_tuple: the output is the first of several results.
    """

    dims: str = "bnhd"
    lse: str = "bhn"
    returns_tuple: bool = True


_ATEN = _Kernel("bhnd")
_KERNELS = {
    "aten::_scaled_dot_product_flash_attention": _ATEN,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _ATEN,
    "aten::_scaled_dot_product_fused_attention_overrideable": _ATEN,
    "aten::_scaled_dot_product_efficient_attention": _Kernel("bhnd", lse=""),
    "aten::_scaled_dot_product_cudnn_attention": _Kernel("bhnd", lse="bhn1"),
    "aten::_scaled_dot_product_attention_math": _Kernel("bhnd", lse=""),
    "aten::_scaled_dot_product_attention_math_for_mps": _Kernel("bhnd", lse=""),
    "aten::_flash_attention_forward": _Kernel(),
    "aten::_efficient_attention_forward": _Kernel(lse=""),
    "aten::_cudnn_attention_forward": _Kernel("bhnd", lse="bhn1"),
    "torch_attn::_varlen_attn": _Kernel(),
    "flash_attn::_flash_attn_forward": _Kernel(),
    "flash_attn::_flash_attn_varlen_forward": _Kernel(),
    "flash_attn_3::_flash_attn_forward": _Kernel(),
    "flash_attn_3::fwd": _Kernel(),
    "_diffusers_flash_attn_3::_flash_attn_forward": _Kernel(lse="bnh"),
    "xformers_flash::flash_fwd": _Kernel(),
    "xformers_flash3::flash_fwd": _Kernel(),
    "xformers::efficient_attention_forward_cutlass": _Kernel(lse=""),
}
_XFORMERS = _Kernel(returns_tuple=False)
# Functions that a model, or its library, asks Dynamo not to open.
_FUNCTIONS = {
    ("flash_attn", "flash_attn_func"): _Kernel(returns_tuple=False),
    ("flash_attn", "flash_attn_varlen_func"): _Kernel(returns_tuple=False),
    ("flash_attn_interface", "flash_attn_func"): _Kernel(returns_tuple=False),
    ("flash_attn_interface", "flash_attn_varlen_func"): _Kernel(returns_tuple=False),
    ("xformers.ops", "memory_efficient_attention"): _XFORMERS,
    ("sageattention", "sageattn"): _Kernel("bhnd", returns_tuple=False),
}
_LAYOUTS = {"HND": "bhnd", "NHD": "bnhd"}  # as sageattn calls them
_LENGTHS_OF_QUERIES = ("cu_seqlens_q", "cum_seq_q", "cu_seq_q")
_LENGTHS_OF_KEYS = ("cu_seqlens_k", "cum_seq_k", "cu_seq_k")
_WINDOWS = (
    "window_size_left", "window_size_right", "window_left", "window_right", "window_size",
)  # fmt: skip
# Arguments that have no default everywhere, and the value that changes nothing.
_NEUTRAL = {"softcap": 0, "attention_chunk": 0, "custom_mask_type": 0}
# How it is computed, or what is returned besides the output.
_OF_NO_EFFECT = frozenset({
    "compute_log_sumexp", "compute_logsumexp", "return_debug_mask", "return_softmax", "enable_gqa",
    "deterministic", "num_splits", "pack_gqa", "sm_margin", "zero_tensors", "scheduler_metadata",
    "max_seqlen_q", "max_seqlen_k", "max_q", "max_k", "max_seqlen_batch_k",
})  # fmt: skip


def is_kernel(target: object) -> bool:
    """True for an operator or function that is known to compute attention."""
    return _kernel(target) is not None


def may_be_kernel(node: Node) -> bool:
    """True for a call that `read_kernel` reads."""
    return node.op == "call_function" and (
        _kernel(node.target) is not None or _looks_like_attention(node)
    )


@functools.lru_cache(maxsize=4096)
def _kernel(target: object) -> _Kernel | None:
    if isinstance(target, torch._ops.OpOverload):
        # "quantized" takes q, k and v in units of their own
        return None if "quantized" in target._overloadname else _KERNELS.get(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _KERNELS.get(target._qualified_op_name)
    return _kernel_of_function(target)


def _kernel_of_function(target: object) -> _Kernel | None:
    """By identity, so that a function that is merely called so is none."""
    found = (
        kernel
        for (module, name), kernel in _FUNCTIONS.items()
        if callable(target) and getattr(sys.modules.get(module), name, None) is target
    )
    return next(found, None)


def read_kernel(node: Node, flow: Dataflow) -> Call | None:
    """The attention that an operator of another name computes, or None for another node.

    Its reason is KERNEL where what it computes is not known to be plain attention.
    """
    if not may_be_kernel(node):
        return None
    kernel, args = _kernel(node.target), arguments(node)
    if kernel is None or args is None:
        return _left(node, _tensors(node))
    q, k, v = (args.take(*names) for names in (("query", "q"), ("key", "k"), ("value", "v")))
    if not all(isinstance(tensor, Node) for tensor in (q, k, v)):
        return _left(node, _tensors(node))
    is_packed, (dims, batch) = _layout(node, kernel, args, (q, k), flow)
    is_causal, dropout = args.take("is_causal", "causal"), args.take("dropout_p", "p")
    mask = args.take("attn_mask", "attn_bias", "bias")
    scale = args.take("scale", "softmax_scale", "sm_scale")
    windows = [args.take(name) for name in _WINDOWS]
    is_causal = any(map(_is_window, windows)) or (False if is_causal is None else is_causal)
    is_plain = _changes_nothing_else(args)
    if is_plain and is_packed and not dims:
        return _left(node, [q, k, v], Reason.PACKED if is_causal is False else Reason.CAUSAL)
    is_plain = is_plain and len(dims) == rank_of(q) == rank_of(k) == rank_of(v)
    if not is_plain or not isinstance(mask, (Node, type(None))):
        return _left(node, [q, k, v])
    of_q, of_k, of_v = (Operand(tensor, dims, batch=batch) for tensor in (q, k, v))
    mask_dims = "" if mask is None else "bhqk"[max(0, 4 - rank_of(mask)) :]
    call = Call(
        node, (node,), of_q, of_k, of_v, out_dims=dims,
        mask=None if mask is None else Mask(Operand(mask, mask_dims), added=True),
        scale=scale, dropout_p=0.0 if dropout is None else dropout,
        is_causal=is_causal,
    )  # fmt: skip
    return _with_results(call, kernel) if kernel.returns_tuple else call


def _layout(
    node: Node, kernel: _Kernel, args: Arguments, tensors: tuple[Node, Node], flow: Dataflow
) -> tuple[bool, tuple[str, int]]:
    """Whether lengths of sequences are given, letters of q, k and v, and the samples in "p".

    No letters where the layout is not known.
    """
    packed = [args.take(*names) for names in (_LENGTHS_OF_QUERIES, _LENGTHS_OF_KEYS)]
    if any(lengths is not None for lengths in packed):
        pairs = zip(packed, tensors, strict=True)
        of_q, of_k = (equal_sequences(lengths, tensor, node, flow) for lengths, tensor in pairs)
        if of_q is None or of_q != of_k:
            return True, ("", 1)
        return True, ("phd", of_q) if of_q > 1 else ("nhd", 1)
    layout = args.take("tensor_layout")
    if layout is not None:
        return False, (_LAYOUTS.get(str(layout), ""), 1)
    # xformers takes tensors without heads, too.
    bare = kernel is _XFORMERS and rank_of(tensors[0]) == 3
    return False, ("bnd" if bare else kernel.dims, 1)


def _changes_nothing_else(args: Arguments) -> bool:
    """True if every argument that has not been taken leaves the result as it is."""
    for name in _OF_NO_EFFECT:
        args.take(name)
    given = {name: args.take(name) for name in _NEUTRAL}
    return args.rest_has_defaults and all(
        value is None or (isinstance(value, (int, float)) and value == _NEUTRAL[name])
        for name, value in given.items()
    )


def _is_window(value: object) -> bool:
    """True if this argument bounds how far apart queries and keys may be."""
    sides = value if isinstance(value, (list, tuple)) else [value]
    return any(side not in (None, -1) for side in sides)


def _with_results(call: Call, kernel: _Kernel) -> Call:
    """The call of an operator that returns its output together with other things."""
    node = call.node
    users = {user: user.args[1] for user in node.users if operation(user) == "getitem"}
    outs = [user for user, place in users.items() if place == 0]
    others = [user for user in node.users if user.users and user not in outs]
    lses = [user for user in others if users.get(user) == 1]
    if len(outs) != 1 or len(lses) > 1 or others != lses:
        return replace(call, reason=Reason.WEIGHTS)
    (out,) = outs
    call = replace(call, node=out, steps=(node, *(u for u in node.users if u is not out), out))
    if not lses:
        return call
    (lse,) = lses
    packed = {"phd": "hp", "nhd": "hn"}
    letters = packed.get(call.out_dims) or kernel.lse[: max(rank_of(lse), 3)]
    held = Operand(lse, letters, batch=call.q.batch)
    before = any(user < out for user in lse.users)  # would read it before it is there
    if call.mask is not None or before or not is_lse(held, call):
        return replace(call, reason=Reason.WEIGHTS)
    return replace(call, lse=held)


def is_lse(lse: Operand, call: Call) -> bool:
    """True if a tensor has the extents and the dtype of the log-sum-exp of every query."""
    value, sizes = lse.node.meta.get("example_value"), lse.sizes("bhn")
    wanted = call.q.sizes("bhn")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    return sizes is not None and wanted is not None and all(map(is_same, sizes, wanted))


def _left(node: Node, tensors: list[Node], reason: Reason = Reason.KERNEL) -> Call:
    """The call as one that is not read; tokens are taken to be more than heads.

    Args:
        tensors: queries, keys, values, and maybe others.
    """
    q, k, v = tensors[:3]
    dims = ""
    if rank_of(q) == rank_of(k) == rank_of(v) == 3:
        dims = "nhd"
    elif rank_of(q) == rank_of(k) == rank_of(v) == 4:
        _, heads, tokens, _ = (hint(size) or 0 for size in shape_of(q) or ())
        dims = "bhnd" if heads <= tokens else "bnhd"
    of_q, of_k, of_v = (Operand(tensor, dims) for tensor in (q, k, v))
    return Call(node, (node,), of_q, of_k, of_v, reason=reason)


def _looks_like_attention(node: Node) -> bool:
    """True for an operator of no known meaning on tensors that queries, keys and values could be.

    Three tensors that differ in numbers of tokens and heads at most, and a result as large as the
    queries. Without a dimension for heads, lengths of sequences have to come along.
    """
    if not is_foreign(node.target):
        return False
    tensors = _tensors(node)
    shapes = [shape_of(tensor) or () for tensor in tensors]
    if len(tensors) < 3 or not all(_is_float(tensor) for tensor in tensors[:3]):
        return False
    q, k, v = shapes[:3]
    packed = any(len(shape) == 1 for shape in shapes[3:])
    if len(q) != len(k) or len(k) != len(v) or len(q) != (3 if packed else 4):
        return False
    alike = [(q[-1], k[-1]), *zip(k[:-1], v[:-1], strict=True)]
    if not packed:
        alike.append((q[0], k[0]))
    return all(is_same(one, other) for one, other in alike) and _returns_as_much(node, q)


def _returns_as_much(node: Node, shape: tuple[Size, ...]) -> bool:
    """True if the first tensor that a node returns, or is told to write, is as large as `shape`."""
    first = [u for u in node.users if operation(u) == "getitem" and u.args[1] == 0]
    values = [n.meta.get("example_value") for n in (node, *first)]
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    size = math.prod(hint(n) or 0 for n in shape[:-1])
    return not tensors or math.prod(hint(n) or 0 for n in tensors[0].shape) % max(size, 1) == 0


def _tensors(node: Node) -> list[Node]:
    leaves = tree_leaves((node.args, dict(node.kwargs)))
    return [n for n in leaves if isinstance(n, Node) and shape_of(n) is not None]


def _is_float(node: Node) -> bool:
    return bool(node.meta["example_value"].dtype.is_floating_point)
