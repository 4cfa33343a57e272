"""`torch.ops.svg_ear.attention`: the one operator on the hot path.

Importing this module registers the operator. It imports no Triton, so a graph can be traced and
compiled on a machine without it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svg_ear_compile.kernels.by_chunk import attention_by_chunk, request_of
from svg_ear_compile.kernels.call import CallRequest, ExactTokens, unquoted
from svg_ear_compile.kernels.dense import dense_attention, empty_lse
from svg_ear_compile.kernels.device_guard import on_device
from svg_ear_compile.kernels.plan import HEAD_DIMS, AttentionPlan
from svg_ear_compile.kernels.query_chunks import chunks_of
from svg_ear_compile.kernels.source_calls import Terms, sparse_calls

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    exact_queries: Tensor | None = None,
    exact_keys: Tensor | None = None,
    chunk_spans: Tensor | None = None,
    chunk_keys: Tensor | None = None,
    otherwise: Tensor | None = None,
    otherwise_lse: Tensor | None = None,
    *,
    plan: str = "{}",
    site: str = "",
    layer_owner: str = "",
    scale: float | None = None,
    clustered_queries: int | None = None,
    clustered_keys: int | None = None,
    averages_empty_rows: bool = False,
    return_lse: bool = False,
    cached_keys: bool = False,
) -> tuple[Tensor, Tensor]:
    """SVG-EAR attention of every head, or dense attention if the plan or the source says so.

    Args:
        q: (B, H, N_q, D) float16, bfloat16 or float32, any strides.
        k, v: (B, H_kv, N_k, D), same dtype and device; H_kv divides H.
        attn_mask: (B|1, H_kv|1, 1, N_k) bool key-padding mask, True takes part. If the three
            results of `key_padding` are given, any mask that PyTorch's attention takes; a mask that
            is not padding makes the call dense.
        layer: any parameter or buffer of the layer; its identity tells layers apart.
        padding_keys, padding_proven: results of `kernels.padding.key_padding` for `attn_mask`, or
            of another proof with `otherwise`.
        padding_rows: (B|1, H_kv|1, N_q|1, 1) bool, queries that take part; the others give 0.
        exact_queries: (B|1, N_q) bool, True for queries that attend to every key.
        exact_keys: (B|1, N_k) bool, True for keys that are exact for every query.
        chunk_spans, chunk_keys: results of `kernels.query_chunks.query_chunks` for `attn_mask`, or,
            with no `attn_mask`, such chunks of all queries as are known otherwise.
        otherwise, otherwise_lse: (B, H, N_q, D) and (B, H, N_q) float32, base 2, instead of
            `attn_mask`: output and log-sum-exp of a call whose mask is not padding.
        plan: `AttentionPlan.encode` of the plan.
        site: name of the call in its graph, see `call.quoted`.
        layer_owner: path of the module that holds `layer`, relative to the compiled module.
        scale: logit scale, 1/sqrt(D) by default.
        clustered_queries, clustered_keys: numbers of queries and keys that are not always exact, by
            default all; see `TokenKinds`. With none of either the call is dense.
        averages_empty_rows: a row whose keys are all masked gives the mean of all values instead of
            0, as softmax does with a large negative bias.
        return_lse: also return the log-sum-exp.
        cached_keys: the queries are new tokens, the keys those of a cache and of the new tokens.

    Returns:
        out (B, H, N_q, D) with the layout of q, and lse (B, H, N_q) float32, natural log, or an
        empty tensor unless `return_lse`. A row whose keys are all masked gives 0 and -inf.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device; the message names it.
    """
    key_mask = attn_mask if padding_proven is None else padding_keys
    check_arguments(q, k, v, key_mask, exact_queries, exact_keys)
    if otherwise is None:
        check_proof(attn_mask, padding_keys, padding_rows, padding_proven)
    check_chunks(q, k, chunk_spans, chunk_keys)
    compiled = AttentionPlan.decode(plan)
    clustered = (
        q.shape[2] if clustered_queries is None else min(clustered_queries, q.shape[2]),
        k.shape[2] if clustered_keys is None else min(clustered_keys, k.shape[2]),
    )
    is_padding = padding_proven is None or bool(padding_proven)
    known_rows = padding_rows if is_padding else None  # else they mean nothing
    is_costly = compiled.is_dense_for(*clustered)
    pays_kept = cached_keys and not compiled.is_dense_for(*clustered, keeps_clusters=True)
    request = CallRequest(
        layer, unquoted(layer_owner), unquoted(site), compiled, tuple(q.shape), tuple(k.shape),
        clustered, q.device,
        dense_only=(is_costly and not pays_kept) or q.numel() == 0 or not is_padding,
        only_kept=is_costly,
        cached_keys=cached_keys,
        values=v if cached_keys else None,
    )  # fmt: skip
    terms = Terms(q.shape[-1] ** -0.5 if scale is None else scale, return_lse)
    exact = ExactTokens(exact_queries, exact_keys, clustered)
    chunks = [] if chunk_spans is None else chunks_of(chunk_spans, q.shape[2])
    asked = [request_of(chunk, i, request) for i, chunk in enumerate(chunks)]
    # Masked attention is faster than a call for each of many chunks that are dense all the same.
    pays_by_chunk = attn_mask is None or any(not r.dense_only for r in asked)
    by_chunk = bool(chunks) and pays_by_chunk and q.numel() > 0
    with on_device(q.device):
        if by_chunk:
            assert chunk_keys is not None
            return attention_by_chunk(q, k, v, chunks, asked, chunk_keys, exact, terms)
        sparse = sparse_calls(q, k, v, key_mask, exact, request, terms)
        if sparse is None:
            if otherwise is not None and not is_padding:
                return _as_given(q, otherwise, otherwise_lse)
            mask = key_mask if otherwise is not None else attn_mask
            out, lse = dense_attention(q, k, v, mask, terms.scale, return_lse)
            # A square mask masks rows itself. Where a mask is known as padding, it masks keys.
            rows = known_rows if padding_proven is None or otherwise is not None else None
        else:
            (out, lse), rows, mask = sparse, known_rows, key_mask
        if rows is not None:
            _leave_out(out, lse, rows)
        if averages_empty_rows and mask is not None:
            _average_empty_rows(out, v, mask, known_rows)
    return out, lse


@attention.register_fake
def _(q: Tensor, *_: Any, return_lse: bool = False, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), empty_lse(q, return_lse)


def _as_given(q: Tensor, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Copies of an output and of a log-sum-exp of base 2, in the natural base."""
    found = empty_lse(q, lse is not None)
    return torch.empty_like(q).copy_(out), found if lse is None else torch.mul(lse, math.log(2))


def _leave_out(out: Tensor, lse: Tensor, rows: Tensor) -> None:
    """Set rows where `rows` (B|1, H_kv|1, N_q|1, 1) is False to 0, their log-sum-exp to -inf."""
    if rows.shape[1] > 1:
        rows = rows.repeat_interleave(out.shape[1] // rows.shape[1], 1)
    out.masked_fill_(~rows, 0.0)
    if lse.numel():
        lse.masked_fill_(~rows[..., 0], float("-inf"))


def _average_empty_rows(out: Tensor, v: Tensor, mask: Tensor, rows: Tensor | None) -> None:
    """Set rows without keys to the mean of all values.

    Args:
        mask: (B|1, H|1, N_q|1, N_k) bool; a row without keys has no True.
        rows: (B|1, H_kv|1, N_q|1, 1) bool, where False the row has no keys either; or None.
    """
    taken = mask.any(-1, keepdim=True)
    rows = taken if rows is None else taken & rows
    groups = out.shape[1] // v.shape[1]
    mean = v.mean(2, keepdim=True, dtype=torch.float32).to(out.dtype)
    mean, rows = (t.repeat_interleave(groups, 1) if t.shape[1] > 1 else t for t in (mean, rows))
    out.copy_(torch.where(rows, out, mean))


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    exact_queries: Tensor | None,
    exact_keys: Tensor | None,
) -> None:
    """Raise a ValueError or TypeError that names the first invalid argument."""
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
    for name, exact, of in (("exact_queries", exact_queries, q), ("exact_keys", exact_keys, k)):
        if exact is None:
            continue
        if exact.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {exact.dtype}")
        batch, tokens = of.shape[0], of.shape[2]
        if tuple(exact.shape) not in ((1, tokens), (batch, tokens)):
            raise ValueError(
                f"{name} must be (B|1, N) = ({batch}|1, {tokens}), got {tuple(exact.shape)}"
            )
        if exact.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {exact.device}")
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
            "padding_keys and padding_proven are results of key_padding: they need its third "
            "result, padding_rows, and the attn_mask that it was called with"
        )


def check_chunks(
    q: Tensor, k: Tensor, chunk_spans: Tensor | None, chunk_keys: Tensor | None
) -> None:
    """Raise a ValueError unless the chunks of queries are those of q and k."""
    if (chunk_spans is None) != (chunk_keys is None):
        raise ValueError("chunk_spans and chunk_keys are results of query_chunks: give both")
    if chunk_spans is None or chunk_keys is None:
        return
    if chunk_spans.dim() != 2 or chunk_spans.shape[1] != 5 or chunk_spans.device.type != "cpu":
        raise ValueError(f"chunk_spans must be (R, 5) on the CPU, got {tuple(chunk_spans.shape)}")
    count, (batch, heads) = len(chunk_spans), k.shape[:2]
    wanted = ((1, batch), (1, heads), (count,), (k.shape[2],))
    fits = chunk_keys.dim() == 4 and all(
        size in allowed for size, allowed in zip(chunk_keys.shape, wanted, strict=True)
    )
    if not fits or chunk_keys.dtype != torch.bool or chunk_keys.device != q.device:
        raise ValueError(
            f"chunk_keys must be (B|1, H_kv|1, R, N_k) = ({batch}|1, {heads}|1, {count}, "
            f"{k.shape[2]}) bool on the device of q, got {tuple(chunk_keys.shape)}"
        )
