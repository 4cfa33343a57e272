"""Stages 4 and 5 on a GPU: exact keys and the proxy tokens of skipped blocks in one online softmax.

The kernel gathers the queries of a cluster and scatters the output to their tokens, so Q, K, V and
the output are never permuted in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def key_token(at, keys, list_keys, range_start, range_keys, exact_start, list_row, order_row):
    """Key tokens at places `at` of a row of blocks; token 0 from place `keys` on.

    The keys of a row are those in its list, then those of its largest block, then the always exact
    keys. The last two are ranges of the sorted order and start there at `range_start` and
    `exact_start`.
    """
    in_list = at < list_keys
    in_range = at < list_keys + range_keys
    in_exact = exact_start + at - list_keys - range_keys
    place = tl.where(in_range, range_start + at - list_keys, in_exact)
    from_order = tl.load(order_row + place, mask=(at >= list_keys) & (at < keys), other=0)
    return tl.where(in_list, tl.load(list_row + at, mask=in_list, other=0), from_order)


@triton.jit
def load_rows(
    base, row, stride, d, D: tl.constexpr, BLOCK_D: tl.constexpr, INT64_OFFSETS: tl.constexpr
):
    """Gathered rows [BN, BD] of a (N, D) matrix; columns past D are 0."""
    if INT64_OFFSETS:
        row = row.to(tl.int64)
    at = base + (row[:, None] * stride + d[None, :])
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def fold(q, k, v, bias, acc, total, largest, to_log2, BIASED: tl.constexpr):
    """One step of the online softmax: q [BM, BD] over k, v [BN, BD].

    `bias` [1, BN] or [BM, BN] is added to the logits in log2 units; a bias of -inf removes the key.
    Without a bias every logit must be finite.
    """
    logit = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    if BIASED:
        logit = logit * to_log2 + bias
        now = tl.maximum(largest, tl.max(logit, 1))
        # Where no key was seen so far, any finite shift will do.
        shift = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp2(logit - shift[:, None])
    else:
        now = tl.maximum(largest, tl.max(logit, 1) * to_log2)
        shift = now
        weight = tl.exp2(logit * to_log2 - now[:, None])
    rescale = tl.exp2(largest - shift)
    total = total * rescale + tl.sum(weight, 1)
    if v.dtype == tl.float32:
        # Tile by tile: sums that run through all keys would lose more than float32 has to.
        acc = tl.fma(acc, rescale[:, None], tl.dot(weight, v, input_precision="ieee"))
    else:
        acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, total, now


@triton.jit(
    do_not_specialize=[
        "first_head",
        "heads",
        "kv_heads",
        "q_tokens",
        "k_tokens",
        "q_clusters",
        "k_clusters",
        "tiles",
        "pitch",
    ]
)
def attend_kernel(
    q_ptr,  # (B, H, N_q, D)
    k_ptr,  # (B, H_kv, N_k, D)
    v_ptr,  # (B, H_kv, N_k, D)
    out_ptr,  # (B, H, N_q, D)
    lse_ptr,  # (B, H, N_q) float32
    tile_cluster_ptr,  # (G, T) int32, query cluster of each tile, > Qc where there is none
    tile_place_ptr,  # (G, T) int32, place of the tile's first query in the sorted order
    q_order_ptr,  # (G, N_q) int32
    q_start_ptr,  # (G, Qc + 3) int32
    k_order_ptr,  # (G_kv, N_k) int32
    k_start_ptr,  # (G_kv, Kc + 3) int32
    kv_indices_ptr,  # (L, Qc, pitch) int32, see `kv_indices_kernel`
    row_ptr,  # (L, Qc, 3) int32, see `kv_offset_kernel`
    proxy_key_ptr,  # (G_kv, Kc, D)
    proxy_value_ptr,  # (G_kv, Kc, D)
    bias_ptr,  # (L, Qc, Kc) float32 log2, -inf where the block is exact or empty
    correction_ptr,  # (G, N_q) float32 log2, added to the logits of a query's proxy tokens
    weight_ptr,  # (G, N_q) float32, out: weight of a query's proxy tokens
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
    first_head,
    heads,
    kv_heads,
    q_tokens,
    k_tokens,
    q_clusters,
    k_clusters,
    tiles,
    pitch,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CORRECTED: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,  # offsets inside one head of K or V pass 2^31 elements
):
    """One tile of BLOCK_M queries of one cluster."""
    local = tl.program_id(1).to(tl.int64)
    g = first_head + local
    tile = tl.program_id(0)
    i = tl.load(tile_cluster_ptr + g * tiles + tile)
    if i > q_clusters:
        return
    b, h = g // heads, g % heads
    kv_head = h // (heads // kv_heads)
    g_kv = b * kv_heads + kv_head
    m = tl.load(tile_place_ptr + g * tiles + tile) + tl.arange(0, BLOCK_M)  # [BM]
    in_cluster = m < tl.load(q_start_ptr + g * (q_clusters + 3) + i + 1)
    token = tl.load(q_order_ptr + g * q_tokens + m, mask=in_cluster, other=0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BD]
    in_dim = d < D
    q_row = q_ptr + b * stride_qb + h * stride_qh + token[:, None] * stride_qn + d[None, :]
    q_mask = in_cluster[:, None] & in_dim[None, :]
    q = tl.load(q_row, mask=q_mask, other=0.0)  # [BM, BD]
    to_log2 = scale * LOG2E

    k_start = k_start_ptr + g_kv * (k_clusters + 3)
    exact_start = tl.load(k_start + k_clusters)
    exact_end = tl.load(k_start + k_clusters + 1)
    if i == q_clusters:  # text queries and such as are not finite: every key, in sorted order
        list_keys, range_start, range_keys, exact_keys = 0, 0, exact_end, 0
        row = local * q_clusters
        proxy_count = 0
    else:
        row = local * q_clusters + i
        list_keys = tl.load(row_ptr + row * 3)
        range_start = tl.load(row_ptr + row * 3 + 1)
        range_keys = tl.load(row_ptr + row * 3 + 2)
        exact_keys = exact_end - exact_start
        proxy_count = k_clusters
    keys = list_keys + range_keys + exact_keys
    list_row = kv_indices_ptr + row * pitch
    order_row = k_order_ptr + g_kv * k_tokens
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head * stride_vh

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)  # [BN]
    no_bias = tl.zeros([1, BLOCK_N], tl.float32)
    # The hot loop, over whole tiles of the list: its loads have no mask but that of the head dim.
    whole = list_keys // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        key = tl.load(list_row + first + n)
        k = load_rows(k_base, key, stride_kn, d, D, BLOCK_D, INT64_OFFSETS)
        v = load_rows(v_base, key, stride_vn, d, D, BLOCK_D, INT64_OFFSETS)
        acc, total, largest = fold(q, k, v, no_bias, acc, total, largest, to_log2, False)
    # The rest of the list, the largest block and the always exact keys.
    for first in range(whole, keys, BLOCK_N):
        at = first + n
        inside = at < keys
        key = key_token(
            at, keys, list_keys, range_start, range_keys, exact_start, list_row, order_row
        )
        k = load_rows(k_base, key, stride_kn, d, D, BLOCK_D, INT64_OFFSETS)
        v = load_rows(v_base, key, stride_vn, d, D, BLOCK_D, INT64_OFFSETS)
        # Past the end the row of key 0 is read; its value must not reach the sum as 0 * inf.
        v = tl.where(inside[:, None], v, 0.0)
        bias = tl.where(inside, 0.0, float("-inf"))[None, :]
        logit_key = tl.where(inside[:, None], k, 0.0)
        acc, total, largest = fold(q, logit_key, v, bias, acc, total, largest, to_log2, True)

    proxies = g_kv * k_clusters * D
    bias_row = bias_ptr + row * k_clusters
    of_keys = largest + tl.log2(total)  # [BM], -inf where there is no key
    for first in range(0, proxy_count, BLOCK_N):
        j = first + n
        bias = tl.load(bias_row + j, mask=j < k_clusters, other=float("-inf"))
        j = tl.minimum(j, k_clusters - 1)
        k = load_rows(proxy_key_ptr + proxies, j, D, d, D, BLOCK_D, False)
        v = load_rows(proxy_value_ptr + proxies, j, D, d, D, BLOCK_D, False)
        bias = bias[None, :]
        if CORRECTED:
            correction = tl.load(correction_ptr + g * q_tokens + token, mask=in_cluster, other=0.0)
            bias = bias + correction[:, None]
        acc, total, largest = fold(q, k, v, bias, acc, total, largest, to_log2, True)

    # A query without any key gets 0 and -inf, as with PyTorch's boolean masks; NaN stays NaN.
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_on + d[None, :]
    tl.store(out_row, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    if CORRECTED:
        weight = 1.0 - tl.where(total == 0.0, 1.0, tl.exp2(of_keys - largest - tl.log2(total)))
        tl.store(weight_ptr + g * q_tokens + token, weight, mask=in_cluster)
    if WRITE_LSE:
        lse = (largest + tl.log2(total)) * LN2
        tl.store(lse_ptr + g * q_tokens + token, lse, mask=in_cluster)
