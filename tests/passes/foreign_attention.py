"""Operators and functions of other libraries, registered with their schemas: PyTorch computes them.

The libraries need a GPU, so the tests put these in their places.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

_SCHEMAS = {
    "flash_attn::_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, "
        "bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "flash_attn::_flash_attn_varlen_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, "
        "bool causal, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
        "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
        "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "flash_attn_3::_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
        "Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
        "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
        "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
        "float? softmax_scale=None, bool causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, int num_splits=1, "
        "bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "xformers_flash::flash_fwd": (
        "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? seqused_k, int max_seqlen_q, int max_seqlen_k, float p, float softmax_scale, "
        "bool is_causal, int window_left, int window_right, bool return_softmax, "
        "Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
    ),
    "acme::attend": "(Tensor a, Tensor b, Tensor c, float factor=1.0) -> Tensor",
    "acme::attend_packed": "(Tensor a, Tensor b, Tensor c, Tensor starts) -> Tensor",
    "acme::attend_into": "(Tensor a, Tensor b, Tensor c, Tensor(a!) out) -> ()",
    "acme::gated": "(Tensor a, Tensor b, Tensor c) -> Tensor",
}
_LIBRARIES: list[torch.library.Library] = []


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of (B, N, H, D) and its log-sum-exp (B, H, N)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=True)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    lse = ((q @ k.mT).float() * scale).logsumexp(-1)
    return out.transpose(1, 2).contiguous(), lse


def _packed(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, of_keys: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of (T, H, D) within each sequence, and its log-sum-exp (H, T)."""
    outs, lses = [], []
    for place in range(len(starts) - 1):
        rows, keys = (slice(int(s[place]), int(s[place + 1])) for s in (starts, of_keys))
        out, lse = attend(q[None, rows], k[None, keys], v[None, keys], scale)
        outs.append(out[0])
        lses.append(lse[0])
    rest = q[sum(len(out) for out in outs) :] * 0.0
    return torch.cat([*outs, rest]), torch.cat([*lses, rest[:, :, 0].T.float()], 1)


def _fa2(q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, causal: bool, *rest: Any) -> Any:
    out, lse = attend(q, k, v, scale, causal)
    return out, lse, q.new_empty(0), q.new_empty(2)


def _fa2_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, p: float,
    scale: float, *rest: Any, **named: Any,
) -> Any:  # fmt: skip
    out, lse = _packed(q, k, v, cu_q, cu_k, scale)
    return out, lse, q.new_empty(0), q.new_empty(2)


def _fa3(
    q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, qv: Any = None,
    out_: Any = None, cu_q: Any = None, cu_k: Any = None, cu_new: Any = None, used_q: Any = None,
    used_k: Any = None, max_q: Any = None, max_k: Any = None, page_table: Any = None,
    scale: float | None = None, *rest: Any, **named: Any,
) -> Any:  # fmt: skip
    scale = named.get("softmax_scale", scale)
    out, lse = attend(q, k, v, scale) if cu_q is None else _packed(q, k, v, cu_q, cu_k, scale)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _xformers(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    out, lse = attend(q, k, v, rest[6])
    return out, lse, q.new_empty(0)


def _into(a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> None:
    out.copy_(attend(a, b, c, None)[0])


_IMPLEMENTATIONS: dict[str, Any] = {
    "flash_attn::_flash_attn_forward": _fa2,
    "flash_attn::_flash_attn_varlen_forward": _fa2_varlen,
    "flash_attn_3::_flash_attn_forward": _fa3,
    "xformers_flash::flash_fwd": _xformers,
    "acme::attend": lambda a, b, c, factor=1.0: attend(a, b, c, factor)[0],
    "acme::attend_packed": lambda a, b, c, starts: _packed(a, b, c, starts, starts, None)[0],
    "acme::attend_into": _into,
    "acme::gated": lambda a, b, c: a * b + c,
}
_FAKES: dict[str, Any] = {
    "flash_attn::_flash_attn_varlen_forward": lambda q, *rest, **named: (
        torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
        q.new_empty(0), q.new_empty(2),
    ),
    "flash_attn_3::_flash_attn_forward": lambda q, *rest, **named: (
        torch.empty_like(q),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32) if q.dim() == 3
        else q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32),
        q.new_empty(0), q.new_empty(0),
    ),
    "acme::attend_packed": lambda a, *rest: torch.empty_like(a),
}  # fmt: skip


def register_operators() -> None:
    """Register every operator that no installed library has registered; once in a process."""
    if _LIBRARIES:
        return
    for name, schema in _SCHEMAS.items():
        space, _, operator = name.partition("::")
        library = torch.library.Library(space, "FRAGMENT")
        library.define(operator + schema)
        library.impl(operator, _IMPLEMENTATIONS[name], "CPU")
        fake = _FAKES.get(name, _IMPLEMENTATIONS[name])
        torch.library.register_fake(name, fake, lib=library)
        _LIBRARIES.append(library)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    return attend(q, k, v, softmax_scale, causal)[0]


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0,
    scale: float | None = None, *, op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if query.dim() == 3:
        return attend(*(t[:, :, None] for t in (query, key, value)), scale)[0][:, :, 0]
    return attend(query, key, value, scale)[0]


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if tensor_layout == "HND":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = attend(q, k, v, sm_scale, is_causal)[0]
    return out.transpose(1, 2) if tensor_layout == "HND" else out


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the libraries that hold the functions above."""
    homes: dict[str, Any] = {
        "flash_attn": flash_attn_func, "xformers": None,
        "xformers.ops": memory_efficient_attention, "sageattention": sageattn,
    }  # fmt: skip
    for name, function in homes.items():
        module = types.ModuleType(name)
        if function is not None:
            setattr(module, function.__name__, function)
            torch.compiler.allow_in_graph(function)
        monkeypatch.setitem(sys.modules, name, module)
