"""Stage 2 on a GPU: scores of every block, computed with its query centroid in one pass over K."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["first_head", "heads", "kv_heads", "tokens", "q_clusters", "k_clusters"]
)
def score_kernel(
    centroid_ptr,  # (G, Qc, D) query centroids in the dtype of k
    k_ptr,  # (B, H_kv, N, D)
    order_ptr,  # (G_kv, N) int32
    start_ptr,  # (G_kv, Kc + 3) int32
    key_mean_ptr,  # (G_kv, Kc, D) float32
    value_mean_ptr,  # (G_kv, Kc, D) float32
    along_ptr,  # (G_kv, N) float32, v_j.delta_t of the key at each place of the order
    square_ptr,  # (G_kv, N) float32, |delta_t|^2
    log_error_ptr,  # (L, Qc, Kc) float32, out: natural log of E_ij
    routing_table_ptr,  # (L, Qc, Kc) float32, out: what ROUTING reads beside the error, see below
    stride_kb,
    stride_kh,
    stride_kn,
    first_head,  # this launch covers heads first_head .. first_head + L - 1 of G
    heads,
    kv_heads,
    tokens,
    q_clusters,
    k_clusters,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROUTING: tl.constexpr,
):
    """`reference.score_blocks` of one key cluster and BLOCK_Q query centroids.

    With ``v_t = v_j + delta_t``, ``x = exp(a_it)`` and ``y = exp(c_ij)`` the error is
    ``E_ij = sum_t (x - y)^2 |v_j|^2 + 2 x (x - y) v_j.delta_t + x^2 |delta_t|^2``. This sum equals
    the definition's, but its terms do not cancel. "threshold" reads the natural log of the mass
    Z_ij beside the error, "top_p" the logit c_ij, and "density" nothing. What nobody reads is
    not written, because each program writes a column of a table, in pieces of four bytes.
    """
    j = tl.program_id(0)
    local = tl.program_id(2).to(tl.int64)
    g = first_head + local
    b, h = g // heads, g % heads
    kv_head = h // (heads // kv_heads)
    g_kv = b * kv_heads + kv_head
    i = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BQ]
    d = tl.arange(0, BLOCK_D)  # [BD]
    in_dim = d < D
    row = i < q_clusters
    q_row = centroid_ptr + (g * q_clusters + i)[:, None] * D
    q = tl.load(q_row + d[None, :], mask=row[:, None] & in_dim[None, :], other=0.0)  # [BQ, BD]
    at_cluster = (g_kv * k_clusters + j) * D
    value_mean = tl.load(value_mean_ptr + at_cluster + d, mask=in_dim, other=0.0)  # [BD]
    mean_square = tl.sum(value_mean * value_mean, 0)
    to_log2 = scale * LOG2E
    # The centroids are read again, BLOCK_C columns at a time: as rows of q they take registers.
    central = tl.zeros([BLOCK_Q], tl.float32)  # c_ij in log2
    for column in range(0, D, BLOCK_C):
        c = column + tl.arange(0, BLOCK_C)  # [BC]
        key_mean = tl.load(key_mean_ptr + at_cluster + c, mask=c < D, other=0.0)
        part = tl.load(q_row + c[None, :], mask=row[:, None] & (c < D)[None, :], other=0.0)
        central += tl.sum(part.to(tl.float32) * key_mean[None, :], 1)
    central *= to_log2
    first = tl.load(start_ptr + g_kv * (k_clusters + 3) + j)
    last = tl.load(start_ptr + g_kv * (k_clusters + 3) + j + 1)
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh

    # c_ij is the mean of the block's logits, so the largest is never below it: x and y are <= 1.
    largest = central
    error = tl.zeros([BLOCK_Q], tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    for place in range(first, last, BLOCK_N):
        at = place + tl.arange(0, BLOCK_N)  # [BN]
        inside = at < last
        token = tl.load(order_ptr + g_kv * tokens + at, mask=inside, other=0).to(tl.int64)
        k_mask = inside[:, None] & in_dim[None, :]
        k = tl.load(k_base + token[:, None] * stride_kn + d[None, :], mask=k_mask, other=0.0)
        along = tl.load(along_ptr + g_kv * tokens + at, mask=inside, other=0.0)  # [BN]
        square = tl.load(square_ptr + g_kv * tokens + at, mask=inside, other=0.0)  # [BN]
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2  # [BQ, BN]
        logit = tl.where(inside[None, :], logit, float("-inf"))
        now = tl.maximum(largest, tl.max(logit, 1))
        rescale = tl.exp2(largest - now)
        x = tl.exp2(logit - now[:, None])  # [BQ, BN]
        lag = tl.where(inside[None, :], x - tl.exp2(central - now)[:, None], 0.0)
        term = lag * (lag * mean_square + 2.0 * x * along[None, :]) + x * x * square[None, :]
        error = error * rescale * rescale + tl.sum(term, 1)
        if ROUTING == "threshold":
            mass = mass * rescale + tl.sum(x, 1)
        largest = now

    pair = (local * q_clusters + i) * k_clusters + j  # [BQ]
    # An empty cluster has log 0 = -inf in both; a block without any error gets a finite score.
    floored = tl.where((last > first) & (error <= 0.0), 1e-37, error)
    tl.store(log_error_ptr + pair, (tl.log2(floored) + 2.0 * largest) * LN2, mask=row)
    if ROUTING == "threshold":
        tl.store(routing_table_ptr + pair, (tl.log2(mass) + largest) * LN2, mask=row)
    elif ROUTING == "top_p":
        tl.store(routing_table_ptr + pair, central * LN2, mask=row)
