"""`torch.ops.svg_ear.attention`: the one operator on the hot path.

Importing this module registers the operator. It imports no Triton, so a graph can be traced and
compiled on a machine without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile.kernels import state
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.form import sparse_form
from svg_ear_compile.kernels.plan import HEAD_DIMS, AttentionPlan
from svg_ear_compile.kernels.state import Call, Memory

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROWS_AT_A_TIME = 1024


@torch.library.custom_op("svg_ear::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    layer: Tensor | None = None,
    padding_keys: Tensor | None = None,
    padding_rows: Tensor | None = None,
    padding_proven: Tensor | None = None,
    *,
    plan: str = "{}",
    site: str = "",
    scale: float | None = None,
    text_prefix: int = 0,
    text_suffix: int = 0,
    averages_empty_rows: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """SVG-EAR attention of every head, or dense attention where the plan or the moment says so.

    Args:
        q: (B, H, N_q, D) float16, bfloat16 or float32, any strides.
        k, v: (B, H_kv, N_k, D), same dtype and device; H_kv divides H.
        attn_mask: (B|1, H_kv|1, 1, N_k) bool key-padding mask, True takes part. With the three
            results of `key_padding` for it, any mask that PyTorch's attention takes: what is no
            padding makes the call dense.
        padding_rows: (B|1, H_kv|1, N_q|1, 1) bool, queries that take part; the others give 0.
        layer: any parameter of the layer that makes q; its identity tells layers apart.
        padding_keys, padding_proven: see `kernels.padding.key_padding`.
        plan: `AttentionPlan.encode` of the plan.
        site: name of the call in its graph.
        scale: logit scale, 1/sqrt(D) by default.
        text_prefix, text_suffix: tokens at the start and the end of both sequences that are text:
            their keys are exact for every query, their queries attend to every key. A sequence of
            no more tokens makes the call dense.
        averages_empty_rows: a row whose keys are all masked gives the mean of all values, as a mask
            that fills in a large negative number does, instead of 0.
        return_lse: also return the log-sum-exp.

    Returns:
        out (B, H, N_q, D) with the layout of q, and lse (B, H, N_q) float32, natural log, or an
        empty tensor unless `return_lse`. A row whose keys are all masked gives 0 and -inf.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device; the message names it.
    """
    proof = (padding_keys, padding_rows, padding_proven)
    key_mask = attn_mask if padding_proven is None else padding_keys
    check_arguments(q, k, v, key_mask, text_prefix, text_suffix)
    check_proof(attn_mask, *proof)
    call = state.resolve(layer, site, AttentionPlan.decode(plan))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    text = (text_prefix, text_suffix)
    video_q, video_k = q.shape[2] - sum(text), k.shape[2] - sum(text)
    is_padding = padding_proven is None or bool(padding_proven)
    short = min(video_q, video_k) < max(1, call.plan.min_tokens)
    if call.plan.is_dense or short or q.numel() == 0 or not is_padding:
        if call.memory is not None:
            call.memory.skip()
        out, lse = dense_attention(q, k, v, attn_mask, scale, return_lse)
        if padding_rows is not None and padding_proven is None:
            _leave_out(out, lse, padding_rows)
        if averages_empty_rows and attn_mask is not None:
            _average_empty_rows(out, v, attn_mask, padding_rows)
        return out, lse
    terms = _Terms(scale, text, return_lse)
    if call.stacked and q.shape[0] == call.batch:
        out, lse = _by_branch(q, k, v, key_mask, call, terms)
    else:
        result = _remembering(q, k, v, key_mask, call.plan, call.memory, call.leader, terms)
        out, lse = result.out, result.lse
    if padding_rows is not None:
        _leave_out(out, lse, padding_rows)
    if averages_empty_rows and key_mask is not None:
        _average_empty_rows(out, v, key_mask, padding_rows)
    return out, lse


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    layer: Tensor | None = None,
    padding_keys: Tensor | None = None,
    padding_rows: Tensor | None = None,
    padding_proven: Tensor | None = None,
    *,
    plan: str = "{}",
    site: str = "",
    scale: float | None = None,
    text_prefix: int = 0,
    text_suffix: int = 0,
    averages_empty_rows: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), _empty_lse(q, return_lse)


class _Terms(NamedTuple):
    """What all branches of a call have in common; see `attention`."""

    scale: float
    text: tuple[int, int]
    return_lse: bool


def _by_branch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, terms: _Terms
) -> tuple[Tensor, Tensor]:
    """The branches stacked along the batch one after the other, led by the first."""
    memories = (call.memory, *call.stacked)
    out, lse = torch.empty_like(q), _empty_lse(q, terms.return_lse)
    count = len(memories)
    masks = (mask,) * count if mask is None or mask.shape[0] == 1 else mask.chunk(count)
    leader = call.leader
    for place, memory in enumerate(memories):
        its_q, its_k, its_v = (x.chunk(count)[place] for x in (q, k, v))
        result = _remembering(its_q, its_k, its_v, masks[place], call.plan, memory, leader, terms)
        leader = leader or memory
        out.chunk(count)[place].copy_(result.out)
        if terms.return_lse:
            lse.chunk(count)[place].copy_(result.lse)
    return out, lse


def _remembering(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    plan: AttentionPlan,
    memory: Memory | None,
    leader: Memory | None,
    terms: _Terms,
) -> Result:
    """Sparse attention of one branch with what it, or the branch that leads it, remembers."""
    video_q, video_k = (x.shape[2] - sum(terms.text) for x in (q, k))
    q_clusters, k_clusters = plan.clusters(video_q, video_k)
    shapes = (*q.shape[:2], q_clusters, q.shape[3]), (*k.shape[:2], k_clusters, k.shape[3])
    warm, blocks = None, None
    if leader is not None:
        warm = leader.warm_start(*shapes, q.device)
        blocks = leader.blocks_of(plan, q.shape[2], k.shape[2]) if warm else None
    led = blocks is not None
    if memory is not None and not led:
        warm = memory.warm_start(*shapes, q.device)
        blocks = memory.lasting_blocks(plan, q.shape[2], k.shape[2]) if warm else None
    result = sparse_form(q.is_cuda)(
        q,
        k,
        v,
        plan,
        attn_mask=mask,
        scale=terms.scale,
        text=terms.text,
        centroids=warm,
        blocks=blocks,
        return_lse=terms.return_lse,
    )
    if memory is not None:
        pairs = q.shape[0] * q.shape[1] * video_q * video_k
        if led:
            memory.count(result, pairs, taken_over=True)
        else:
            taken_over = blocks is not None
            memory.remember(result, plan, pairs, warm=warm is not None, taken_over=taken_over)
    return result


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention in the layout that the operator promises; see `attention`."""
    grouped = q.shape[1] != k.shape[1]
    mask = attn_mask
    if mask is not None and mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    lse = _empty_lse(q, return_lse)
    if return_lse:
        lse.copy_(dense_lse(q, k, mask, scale))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    promised = torch.empty_like(q, device="meta").stride()
    if out.stride() != promised or any(out is t for t in (q, k, v)):
        out = torch.empty_like(q).copy_(out)
    return out, lse


def dense_lse(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, N_q) float32 log-sum-exp of dense attention, a slice of queries at a time.

    Args:
        q, k, scale: see `attention`.
        mask: (B|1, H|1, N_q|1, N_k), bool or added to the logits, or None.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(groups, 1).transpose(2, 3)
    parts = []
    for first in range(0, q.shape[2], _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        logits = (q[:, :, rows] @ keys).float() * scale
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            is_bool = part.dtype == torch.bool
            logits = logits.masked_fill(~part, float("-inf")) if is_bool else logits + part
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, -1) if parts else _empty_lse(q, True)


def _leave_out(out: Tensor, lse: Tensor, rows: Tensor) -> None:
    """Make the rows (B|1, H_kv|1, N_q|1, 1) that are False what a row without keys gives."""
    if rows.shape[1] > 1:
        rows = rows.repeat_interleave(out.shape[1] // rows.shape[1], 1)
    out.masked_fill_(~rows, 0.0)
    if lse.numel():
        lse.masked_fill_(~rows[..., 0], float("-inf"))


def _average_empty_rows(out: Tensor, v: Tensor, mask: Tensor, rows: Tensor | None) -> None:
    """Write the mean of all values where a bool mask (B|1, H|1, N_q|1, N_k) leaves a row no key.

    `rows` (B|1, H_kv|1, N_q|1, 1) may leave out whole rows besides.
    """
    taken = mask.any(-1, keepdim=True)
    rows = taken if rows is None else taken & rows
    groups = out.shape[1] // v.shape[1]
    mean = v.mean(2, keepdim=True, dtype=torch.float32).to(out.dtype)
    mean, rows = (t.repeat_interleave(groups, 1) if t.shape[1] > 1 else t for t in (mean, rows))
    out.copy_(torch.where(rows, out, mean))


def _empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    return q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, text_prefix: int, text_suffix: int
) -> None:
    """Raise a ValueError or TypeError that names the first argument that cannot be right."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, N, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {tensor.device}")
        if tensor.shape[3] != q.shape[3]:
            raise ValueError(
                f"{name} must have the head dim of q ({q.shape[3]}), got {tensor.shape[3]}"
            )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q must have a head dim among {HEAD_DIMS}, got {q.shape[3]}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have the batch size of q ({q.shape[0]}), got {k.shape[0]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a divisor of q's {q.shape[1]} heads, got {k.shape[1]}")
    for name, length in (("text_prefix", text_prefix), ("text_suffix", text_suffix)):
        if length < 0:
            raise ValueError(f"{name} must not be negative, got {length}")
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            raise TypeError(f"attn_mask must be bool, got {attn_mask.dtype}")
        wanted = ((1, k.shape[0]), (1, k.shape[1]), (1,), (k.shape[2],))
        fits = attn_mask.dim() == 4 and all(
            size in allowed for size, allowed in zip(attn_mask.shape, wanted, strict=True)
        )
        if not fits:
            raise ValueError(
                f"attn_mask must be a key-padding mask (B|1, H_kv|1, 1, N_k) = "
                f"({k.shape[0]}|1, {k.shape[1]}|1, 1, {k.shape[2]}), got {tuple(attn_mask.shape)}"
            )
        if attn_mask.device != q.device:
            raise ValueError(
                f"attn_mask must be on the device of q ({q.device}), got {attn_mask.device}"
            )


def check_proof(
    attn_mask: Tensor | None,
    padding_keys: Tensor | None,
    padding_rows: Tensor | None,
    padding_proven: Tensor | None,
) -> None:
    """Raise a ValueError unless the results of `key_padding` come together and with their mask."""
    proof = [t is not None for t in (padding_keys, padding_proven)]
    whole = all(proof) and attn_mask is not None and padding_rows is not None
    if any(proof) and not whole:
        raise ValueError(
            "padding_keys and padding_proven are results of key_padding: they come with its third, "
            "padding_rows, and with the attn_mask that they are about"
        )
