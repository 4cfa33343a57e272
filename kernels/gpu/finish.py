"""The last pass over the output of the Gaussian form: exact own tokens and the value correction.

The value correction is the same for all proxy tokens of a query, so it is added to the finished
output, multiplied by the weight of the proxy tokens. Own tokens come first, because that weight is
the one without the own keys. See `kernels.own_tokens` and `compensation.corrections`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.gpu.attend import LN2, LOG2E
from svg_ear_compile.kernels.gpu.correction import clustered_rows
from svg_ear_compile.kernels.gpu.kmeans import SortedClusters
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, ceil_div, token_strides


@triton.jit(do_not_specialize=["heads", "kv_heads", "tokens", "q_clusters", "k_clusters"])
def finish_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H_kv, N, D)
    v_ptr,  # (B, H_kv, N, D)
    out_ptr,  # (B, H, N, D), in and out
    lse_ptr,  # (G, N) float32, in and out where there are own tokens
    weight_ptr,  # (G, N) float32, weight of a query's proxy tokens
    logit_ptr,  # (G, N) float32 log2, the logit correction
    clip_ptr,  # (G, N) float32, the clip factor
    slope_ptr,  # (G_kv, D, D) in the dtype of q, see `curvature_and_slope`
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
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN_TOKENS: tl.constexpr,  # key t is the own token of query t
):
    """BLOCK_N queries of one head; those in no cluster stay as they are.

    Rows are read a few columns at a time, which leaves registers, and so programs that wait for
    memory together.
    """
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    kv_head = h // (heads // kv_heads)
    g_kv = b * kv_heads + kv_head
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    there = at < tokens
    token, row = at.to(tl.int64), g * tokens + at
    i = tl.load(q_label_ptr + row, mask=there, other=q_clusters)
    clustered = i < q_clusters
    q_row = q_ptr + b * stride_qb + h * stride_qh
    weight = tl.load(weight_ptr + row, mask=clustered, other=0.0)  # [BN]
    clip = tl.load(clip_ptr + row, mask=clustered, other=0.0)

    if OWN_TOKENS:
        j = tl.load(k_label_ptr + g_kv * tokens + at, mask=there, other=k_clusters)
        block = mask_ptr + (g * q_clusters + i) * k_clusters + j
        skipped = clustered & (j < k_clusters)
        skipped &= tl.load(block, mask=skipped, other=1) == 0  # own keys in skipped blocks
        start = k_start_ptr + g_kv * (k_clusters + 3) + j
        count = tl.load(start + 1, mask=skipped, other=1) - tl.load(start, mask=skipped, other=0)
        count = count.to(tl.float32)
        others = tl.maximum(count - 1.0, 1.0)  # a cluster of one key leaves no proxy token
        correction = tl.load(logit_ptr + row, mask=skipped, other=0.0)
        kept = tl.load(lse_ptr + row, mask=skipped, other=0.0) * LOG2E
        k_row = k_ptr + b * stride_kb + kv_head * stride_kh
        v_row = v_ptr + b * stride_vb + kv_head * stride_vh
        proxy_key = proxy_key_ptr + g_kv * k_clusters * D
        proxy_value = proxy_value_ptr + g_kv * k_clusters * D
        own = tl.zeros([BLOCK_N], tl.float32)
        centroid = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, D, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)  # [BC], dims of the key
            query = clustered_rows(q_row, i, token, stride_qn, q_clusters, c, skipped, D)
            key = clustered_rows(k_row, j, token, stride_kn, k_clusters, c, skipped, D)
            own += tl.sum(query * key, 1)
            key = clustered_rows(proxy_key, j, j, D, k_clusters, c, skipped, D)
            centroid += tl.sum(query * key, 1)
        own *= scale * LOG2E
        centroid *= scale * LOG2E
        before = centroid + tl.log2(count) + correction
        after = (count * centroid - own) / others + tl.log2(others) + correction
        after = tl.where(count > 1.0, after, float("-inf"))
        largest = tl.maximum(kept, tl.maximum(own, after))
        kept = tl.exp2(kept - largest)
        before = tl.exp2(before - largest)
        after = tl.exp2(after - largest)
        own = tl.exp2(own - largest)
        total = kept - before + after + own
        tl.store(lse_ptr + row, (largest + tl.log2(total)) * LN2, mask=skipped)
        weight = tl.where(skipped, (kept * weight - before + after) / total, weight)
        of_out = tl.where(skipped, kept / total, 1.0)
        of_proxy = (after * count / others - before) / total
        of_own = (own - after / others) / total

    weight *= clip
    d = tl.arange(0, BLOCK_D)  # [BD]
    in_q = there[:, None] & (d < D)[None, :]
    q = tl.load(q_row + token[:, None] * stride_qn + d[None, :], mask=in_q, other=0.0)  # [BN, BD]
    out_row = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_on
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BC], dims of the value
        mask = (d < D)[:, None] & (c < D)[None, :]
        column = tl.load(slope_ptr + (g_kv * D + c[None, :]) * D + d[:, None], mask=mask, other=0.0)
        to = out_row + c[None, :]
        mine = clustered[:, None] & (c < D)[None, :]
        out = tl.load(to, mask=mine, other=0.0).to(tl.float32)  # [BN, BC]
        if OWN_TOKENS:
            value = clustered_rows(v_row, j, token, stride_vn, k_clusters, c, skipped, D)
            out = of_out[:, None] * out + of_own[:, None] * value
            value = clustered_rows(proxy_value, j, j, D, k_clusters, c, skipped, D)
            out += of_proxy[:, None] * value
        out += weight[:, None] * tl.dot(q, column, input_precision="ieee")
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mine)


def finish(
    out: Tensor, lse: Tensor, weight: Tensor, q: Tensor, k: Tensor, v: Tensor,
    queries: SortedClusters, keys: SortedClusters, value_means: Tensor, block_mask: Tensor,
    slope: Tensor, logit: Tensor, clip: Tensor, scale: float, own_tokens: bool,
    config: LaunchConfig,
) -> None:  # fmt: skip
    """Make own tokens exact where there are any, and add the value corrections.

    Args:
        out: (B, H, N, D), modified in place.
        lse: (B, H, N) float32, modified in place; not read without own tokens.
        weight: (G, N) float32, weight of the proxy tokens in the output of each query.
        q: (B, H, N, D). k, v: (B, H_kv, N_k, D).
        queries, keys: query and key clusters.
        value_means: (G_kv, Kc, D) in the dtype of v.
        block_mask: (G, Qc, Kc) bool.
        slope: see `correction.curvature_and_slope`.
        logit, clip: (G, N) float32, see `correction.logit_corrections`.
        scale: s, not below 0.
        own_tokens: see `own_tokens.has_own_tokens`.
        config: see `launch_config`.
    """
    batch, heads, tokens, dim = q.shape
    tiles = config.finish
    finish_kernel[(ceil_div(tokens, tiles.rows), batch * heads)](
        q, k, v, out, lse, weight, logit, clip, slope, queries.labels, keys.labels, keys.starts,
        block_mask, keys.rounded, value_means,
        *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(out),
        heads, k.shape[1], tokens, block_mask.shape[1], block_mask.shape[2], scale,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        OWN_TOKENS=own_tokens, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
