"""Exact own tokens on a GPU, see `kernels.own_tokens`: one pass over the finished output.

Runs between the attend stage and the value correction, so that the weight of the proxy tokens,
which multiplies that correction, is the one without the own keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.gpu.attend import LN2, LOG2E
from svg_ear_compile.kernels.gpu.kmeans import SortedClusters
from svg_ear_compile.kernels.gpu.launch import OWN_TOKENS, LaunchConfig, ceil_div, token_strides


@triton.jit
def own_rows(row_ptr, row, stride, d, mask):
    """Rows [BN, BD] float32 of a (N, D) matrix."""
    return tl.load(row_ptr + row[:, None] * stride + d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["heads", "kv_heads", "tokens", "q_clusters", "k_clusters"])
def own_token_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H_kv, N, D)
    v_ptr,  # (B, H_kv, N, D)
    out_ptr,  # (B, H, N, D), in and out
    lse_ptr,  # (G, N) float32, in and out
    weight_ptr,  # (G, N) float32, weight of a query's proxy tokens, in and out
    correction_ptr,  # (G, N) float32 log2, added to the logits of a query's proxy tokens
    q_label_ptr,  # (G, N) int32
    k_label_ptr,  # (G_kv, N) int32
    k_start_ptr,  # (G_kv, Kc + 3) int32
    mask_ptr,  # (G, Qc, Kc) bool, True where the block is exact
    proxy_key_ptr,  # (G_kv, Kc, D)
    proxy_value_ptr,  # (G_kv, Kc, D)
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    heads,
    kv_heads,
    tokens,
    q_clusters,
    k_clusters,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N tokens of one head."""
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    kv_head = h // (heads // kv_heads)
    g_kv = b * kv_heads + kv_head
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    there = at < tokens
    row = g * tokens + at
    i = tl.load(q_label_ptr + row, mask=there, other=q_clusters)
    j = tl.load(k_label_ptr + g_kv * tokens + at, mask=there, other=k_clusters)
    there &= (i < q_clusters) & (j < k_clusters)
    block = mask_ptr + (g * q_clusters + i) * k_clusters + j
    there &= tl.load(block, mask=there, other=1) == 0  # own keys in skipped blocks
    start = k_start_ptr + g_kv * (k_clusters + 3) + j
    count = tl.load(start + 1, mask=there, other=1) - tl.load(start, mask=there, other=0)
    count = count.to(tl.float32)
    others = tl.maximum(count - 1.0, 1.0)  # a cluster of one key leaves no proxy token

    token = at.to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BD]
    mask = there[:, None] & (d < D)[None, :]
    q = own_rows(q_ptr + b * stride_qb + h * stride_qh, token, stride_qn, d, mask)
    k = own_rows(k_ptr + b * stride_kb + kv_head * stride_kh, token, stride_kn, d, mask)
    proxies = g_kv * k_clusters * D
    proxy_key = own_rows(proxy_key_ptr + proxies, j, D, d, mask)
    to_log2 = scale * LOG2E
    own = tl.sum(q * k, 1) * to_log2
    centroid = tl.sum(q * proxy_key, 1) * to_log2
    correction = tl.load(correction_ptr + row, mask=there, other=0.0)
    before = centroid + tl.log2(count) + correction
    after = (count * centroid - own) / others + tl.log2(others) + correction
    after = tl.where(count > 1.0, after, float("-inf"))
    kept = tl.load(lse_ptr + row, mask=there, other=0.0) * LOG2E
    largest = tl.maximum(kept, tl.maximum(own, after))
    own_weight = tl.exp2(own - largest)
    kept_weight = tl.exp2(kept - largest)
    before_weight = tl.exp2(before - largest)
    after_weight = tl.exp2(after - largest)
    total = kept_weight - before_weight + after_weight + own_weight

    v = own_rows(v_ptr + b * stride_vb + kv_head * stride_vh, token, stride_vn, d, mask)
    proxy_value = own_rows(proxy_value_ptr + proxies, j, D, d, mask)
    out_row = out_ptr + b * stride_ob + h * stride_oh
    out = own_rows(out_row, token, stride_on, d, mask)
    of_proxy = after_weight * count / others - before_weight
    of_own = own_weight - after_weight / others
    out = kept_weight[:, None] * out + of_proxy[:, None] * proxy_value + of_own[:, None] * v
    out = out / total[:, None]
    to = out_row + token[:, None] * stride_on + d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask)
    weight = tl.load(weight_ptr + row, mask=there, other=0.0)
    weight = (kept_weight * weight - before_weight + after_weight) / total
    tl.store(weight_ptr + row, weight, mask=there)
    tl.store(lse_ptr + row, (largest + tl.log2(total)) * LN2, mask=there)


def make_own_tokens_exact(
    out: Tensor, lse: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor,
    queries: SortedClusters, keys: SortedClusters, value_means: Tensor, block_mask: Tensor,
    correction: Tensor, scale: float, config: LaunchConfig,
) -> None:  # fmt: skip
    """`own_tokens.with_own_tokens`, before the value correction.

    Args:
        out: (B, H, N, D), modified in place.
        lse, weight: (B, H, N) and (G, N) float32, log-sum-exp and weight of the proxy tokens of
            each query, modified in place.
        q: (B, H, N, D). k, v: (B, H_kv, N, D).
        queries, keys: query and key clusters.
        value_means: (G_kv, Kc, D) in the dtype of v.
        block_mask: (G, Qc, Kc) bool.
        correction: (G, N) float32, see `correction.logit_corrections`.
        scale: s, not below 0.
        config: see `launch_config`.
    """
    batch, heads, tokens, dim = q.shape
    own_token_kernel[(ceil_div(tokens, OWN_TOKENS), batch * heads)](
        q, k, v, out, lse, weight, correction, queries.labels, keys.labels, keys.starts,
        block_mask, keys.rounded, value_means,
        *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(out),
        heads, k.shape[1], tokens, block_mask.shape[1], block_mask.shape[2], scale,
        D=dim, BLOCK_D=config.block_dim, BLOCK_N=OWN_TOKENS, num_warps=4,
    )  # fmt: skip
