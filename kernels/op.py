"""`torch.ops.svg_ear.attention`: the one operator on the hot path.

Importing this module registers the operator. It imports no Triton, so a graph can be traced and
compiled on a machine without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile.kernels import state
from svg_ear_compile.kernels.plan import HEAD_DIMS, AttentionPlan

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
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """SVG-EAR attention of every head, or dense attention where the plan or the moment says so.

    Args:
        q: (B, H, N_q, D) float16, bfloat16 or float32, any strides.
        k, v: (B, H_kv, N_k, D), same dtype and device; H_kv divides H.
        attn_mask: (B|1, H_kv|1, 1, N_k) bool key-padding mask, True takes part. With the three
            results of `key_padding` for it, any mask that PyTorch's attention takes: what is no
            padding makes the call dense.
        layer: any parameter of the layer that makes q; its identity tells layers apart.
        padding_keys, padding_rows, padding_proven: see `kernels.padding.key_padding`.
        plan: `AttentionPlan.encode` of the plan.
        site: name of the call in its graph.
        scale: logit scale, 1/sqrt(D) by default.
        text_prefix, text_suffix: tokens at the start and the end of both sequences that are text:
            their keys are exact for every query, their queries attend to every key.
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
        return dense_attention(q, k, v, attn_mask, scale, return_lse)
    if q.is_cuda:
        from svg_ear_compile.kernels.gpu.attention import sparse_attention
    else:
        from svg_ear_compile.kernels.cpu import sparse_attention
    memory = call.memory
    q_clusters, k_clusters = call.plan.clusters(video_q, video_k)
    warm = memory and memory.warm_start(
        (*q.shape[:2], q_clusters, q.shape[3]), (*k.shape[:2], k_clusters, k.shape[3]), q.device
    )
    result = sparse_attention(
        q,
        k,
        v,
        call.plan,
        attn_mask=key_mask,
        scale=scale,
        text=text,
        centroids=warm or None,
        return_lse=return_lse,
    )
    if padding_rows is not None:
        result.out.masked_fill_(~padding_rows, 0.0)
        if return_lse:
            result.lse.masked_fill_(~padding_rows[..., 0], float("-inf"))
    if memory is not None:
        memory.q_centroids = result.queries.centroids
        memory.k_centroids = result.keys.centroids
        memory.exact_pairs = result.exact_pairs
        memory.pairs = q.shape[0] * q.shape[1] * video_q * video_k
    return result.out, result.lse


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
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), _empty_lse(q, return_lse)


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
    if text_prefix + text_suffix > min(q.shape[2], k.shape[2]):
        raise ValueError(
            f"text_prefix + text_suffix is {text_prefix + text_suffix}, more than the shorter "
            f"sequence of {min(q.shape[2], k.shape[2])} tokens"
        )
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
    given = [t is not None for t in (padding_keys, padding_rows, padding_proven)]
    if any(given) and not (all(given) and attn_mask is not None):
        raise ValueError(
            "padding_keys, padding_rows and padding_proven are the results of key_padding for "
            "attn_mask: give all four or attn_mask alone"
        )
