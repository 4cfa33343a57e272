"""Stages 4 and 5 on Hopper: the loop of `attend.py`, with warps that gather and warps that compute.

The kernel is written in Gluon, because Triton's compiler waits for each product before the softmax
that needs it. Four warps gather the rows of K and V. Three groups of four warps each compute the
attention of 64 queries. The kernel is limited by the bytes that cross the L2 cache; more queries
for each gathered tile mean fewer bytes. Each group of warps issues the logits of tile t + 1 and the
weighted values of tile t together. The softmax of tile t + 1 can run while the values of tile t are
still being multiplied ("FlashAttention-3", arXiv 2407.08608, sections 3.1 and 3.2).

The work of a row of blocks is one sequence of tiles: the keys in its list, the keys of its largest
block and the always exact keys, then the proxy tokens. The copies do not stop between these parts;
only the softmax distinguishes tiles that need a bias.

Longer than 400 lines: one kernel, whose parts no other kernel can use.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from svg_ear_compile.kernels.gpu.launch import WGMMA_SUBTILE

# Gluon's names since Triton 3.7, else those of earlier versions.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
GATHER_WARPS = gl.constexpr(4)
# Registers per thread: four groups of warps have 512 together, assigned in steps of 8.
CONSUMER_REGISTERS = gl.constexpr(152)
GATHER_REGISTERS = gl.constexpr(56)
CONSUMERS = gl.constexpr(3)
SUBTILE = gl.constexpr(WGMMA_SUBTILE)  # queries of one consumer


@gluon.jit
def key_rows(
    tile,
    n,
    key_tiles,
    list_keys,
    range_start,
    range_keys,
    exact_start,
    keys,
    k_clusters,
    list_row,
    order_row,
    BLOCK_N: gl.constexpr,
):
    """Rows [BN] of tile `tile` in K and V, or past the keys in the proxy tokens; -1 for no row."""
    at = tile * BLOCK_N + n  # [BN]
    if (tile + 1) * BLOCK_N <= list_keys:
        row = gl.load(list_row + at)
    elif tile < key_tiles:
        range_end = list_keys + range_keys
        place = gl.where(at < range_end, range_start + at - list_keys, exact_start + at - range_end)
        from_list = gl.load(list_row + at, mask=at < list_keys, other=-1)
        from_order = gl.load(order_row + place, mask=(at >= list_keys) & (at < keys), other=-1)
        row = gl.maximum(from_list, from_order)
    else:
        j = at - key_tiles * BLOCK_N
        row = gl.where(j < k_clusters, j, -1)
    return row


@gluon.jit
def tile_bias(tile, n, key_tiles, keys, k_clusters, bias_row, BLOCK_N: gl.constexpr):
    """Log2 bias [BN] of a tile's logits, -inf where there is no key."""
    at = tile * BLOCK_N + n
    j = at - key_tiles * BLOCK_N
    of_keys = tile < key_tiles
    of_proxy = gl.load(
        bias_row + j, mask=(j >= 0) & (j < k_clusters) & (not of_keys), other=float("-inf")
    )
    return gl.where(of_keys & (at < keys), 0.0, of_proxy)


@gluon.jit
def softmax_step(
    logit, bias, correction, of_keys, total, proxy_total, largest, to_log2,
    BIASED: gl.constexpr, CORRECTED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax on logits [BM, BN].

    Returns weight [BM, BN], and [BM] each: the factor for sums before this step, the sum of weights
    `total`, the part `proxy_total` of that sum that belongs to proxy tokens, the largest logit.
    """
    if BIASED:
        logit = logit * to_log2 + gl.expand_dims(bias, 0)
        if CORRECTED:
            logit = logit + gl.expand_dims(gl.where(of_keys, 0.0, correction), 1)
        now = gl.maximum(largest, gl.max(logit, 1))
        # Where no key was seen so far, any finite shift will do.
        shift = gl.where(now == float("-inf"), 0.0, now)
        weight = gl.exp2(logit - gl.expand_dims(shift, 1))
    else:
        now = gl.maximum(largest, gl.max(logit, 1) * to_log2)
        shift = now
        weight = gl.exp2(logit * to_log2 - gl.expand_dims(now, 1))
    rescale = gl.exp2(largest - shift)
    mass = gl.sum(weight, 1)
    total = total * rescale + mass
    if BIASED and CORRECTED:  # tiles without a bias have no proxy tokens
        proxy_total = proxy_total * rescale + gl.where(of_keys, 0.0, mass)
    return weight, rescale, total, proxy_total, now


@gluon.jit
def gather(
    k_shared, v_shared, k_full, k_empty, v_full, v_empty,
    count, key_tiles, list_keys, range_start, range_keys, exact_start, keys, k_clusters,
    list_row, order_row, k_base, v_base, stride_kn, stride_vn, proxy_key, proxy_value,
):  # fmt: skip
    """Copy the rows of every tile into shared memory; a row of -1 is filled with 0."""
    STAGES: gl.constexpr = k_shared.shape[0]
    BLOCK_N: gl.constexpr = k_shared.shape[1]
    D: gl.constexpr = k_shared.shape[2]
    lanes: gl.constexpr = D // 8  # a thread copies 16 bytes of a row
    copied: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // lanes, lanes], [gl.num_warps(), 1], [1, 0]
    )
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, copied))  # [BN]
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, copied)), 0)  # [1, D]
    row = key_rows(
        0, n, key_tiles, list_keys, range_start, range_keys, exact_start, keys, k_clusters,
        list_row, order_row, BLOCK_N,
    )  # fmt: skip
    for t in range(count):
        of_keys = t < key_tiles
        there = gl.expand_dims(row >= 0, 1)  # [BN, 1]
        at = gl.expand_dims(gl.maximum(row, 0), 1)
        stage = t % STAGES
        free = (t // STAGES + 1) & 1
        k_from = gl.where(of_keys, k_base, proxy_key)
        k_stride = gl.multiple_of(gl.where(of_keys, stride_kn, D), 16)
        mbarrier.wait(k_empty.index(stage), free)
        copy_rows(k_shared.index(stage), k_from + (at * k_stride + d), mask=there)
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        v_from = gl.where(of_keys, v_base, proxy_value)
        v_stride = gl.multiple_of(gl.where(of_keys, stride_vn, D), 16)
        mbarrier.wait(v_empty.index(stage), free)
        copy_rows(v_shared.index(stage), v_from + (at * v_stride + d), mask=there)
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
        # The rows of the next tile are loaded while that tile waits for a free stage.
        row = key_rows(
            t + 1, n, key_tiles, list_keys, range_start, range_keys, exact_start, keys, k_clusters,
            list_row, order_row, BLOCK_N,
        )  # fmt: skip


@gluon.jit
def advance(
    t, weight, acc, total, proxy_total, largest, bias, correction, of_keys, q_subtile,
    k_shared, v_shared, k_full, k_empty, v_full, v_empty, to_log2,
    BIASED: gl.constexpr, CORRECTED: gl.constexpr,
):  # fmt: skip
    """Logits and softmax of tile t > 0 while the values of tile t - 1 are multiplied."""
    STAGES: gl.constexpr = k_shared.shape[0]
    BLOCK_N: gl.constexpr = k_shared.shape[1]
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    logit_layout: gl.constexpr = largest.type.layout.parent
    stage = t % STAGES
    before = (t - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((t - 1) // STAGES) & 1)
    mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)
    fence_async_shared()
    nothing = gl.zeros([SUBTILE, BLOCK_N], gl.float32, logit_layout)
    logit = warpgroup_mma(
        q_subtile, k_shared.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    acc = warpgroup_mma(weight, v_shared.index(before), acc, is_async=True)
    logit = warpgroup_mma_wait(1, deps=[logit])
    barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    following, rescale, total, proxy_total, largest = softmax_step(
        logit, bias, correction, of_keys, total, proxy_total, largest, to_log2, BIASED, CORRECTED
    )
    acc = warpgroup_mma_wait(0, deps=[acc])
    barrier()
    mbarrier.arrive(v_empty.index(before), count=1)
    weight = gl.convert_layout(following.to(weight.dtype), weight.type.layout)
    acc = acc * gl.expand_dims(gl.convert_layout(rescale, acc_rows), 1)
    return weight, acc, total, proxy_total, largest


@gluon.jit
def attend_subtile(
    q_subtile, first_place, k_shared, v_shared, k_full, k_empty, v_full, v_empty,
    count, whole, key_tiles, keys, k_clusters, bias_row, cluster_end, q_base, out_base,
    lse_row, correction_row, weight_row, order_row, stride_qn, stride_on, to_log2, lse_end,
    CORRECTED: gl.constexpr,
):  # fmt: skip
    """Attention of SUBTILE queries of one cluster, from place `first_place` of the sorted order."""
    STAGES: gl.constexpr = k_shared.shape[0]
    BLOCK_N: gl.constexpr = k_shared.shape[1]
    D: gl.constexpr = k_shared.shape[2]
    warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q_subtile.dtype
    lanes: gl.constexpr = D // 8
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])
    rows_copied: gl.constexpr = gl.SliceLayout(1, copied)
    logit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    logit_rows: gl.constexpr = gl.SliceLayout(1, logit_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)

    if first_place >= cluster_end:  # no queries, but the gathering warps wait for free stages
        for t in range(count):
            # One thread arrives for all: every warp must have passed the wait before.
            mbarrier.wait(k_full.index(t % STAGES), (t // STAGES) & 1)
            barrier()
            mbarrier.arrive(k_empty.index(t % STAGES), count=1)
            mbarrier.wait(v_full.index(t % STAGES), (t // STAGES) & 1)
            barrier()
            mbarrier.arrive(v_empty.index(t % STAGES), count=1)
    else:
        m = first_place + gl.arange(0, SUBTILE, rows_copied)  # [BM]
        token = gl.load(order_row + m, mask=m < cluster_end, other=0).to(gl.int64)
        d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, copied)), 0)  # [1, D]
        there = gl.expand_dims(m < cluster_end, 1)
        copy_rows(q_subtile, q_base + (gl.expand_dims(token * stride_qn, 1) + d), mask=there)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()

        n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, logit_layout))  # [BN]
        acc = gl.zeros([SUBTILE, D], gl.float32, acc_layout)
        largest = gl.full([SUBTILE], float("-inf"), gl.float32, logit_rows)
        total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        proxy_total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        correction = gl.zeros([SUBTILE], gl.float32, logit_rows)
        if CORRECTED:
            of_row = gl.convert_layout(token, logit_rows)
            correction = gl.load(correction_row + of_row)
        if count > 0:
            bias = tile_bias(0, n, key_tiles, keys, k_clusters, bias_row, BLOCK_N)
            mbarrier.wait(k_full.index(0), 0)
            fence_async_shared()
            nothing = gl.zeros([SUBTILE, BLOCK_N], gl.float32, logit_layout)
            logit = warpgroup_mma(
                q_subtile, k_shared.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            logit = warpgroup_mma_wait(0, deps=[logit])
            barrier()
            mbarrier.arrive(k_empty.index(0), count=1)
            weight, _, total, proxy_total, largest = softmax_step(
                logit, bias, correction, key_tiles > 0, total, proxy_total, largest, to_log2, True,
                CORRECTED,
            )  # fmt: skip
            weight = gl.convert_layout(weight.to(dtype), weight_layout)
            for t in range(1, whole):
                weight, acc, total, proxy_total, largest = advance(
                    t, weight, acc, total, proxy_total, largest, bias, correction, True, q_subtile,
                    k_shared, v_shared, k_full, k_empty, v_full, v_empty, to_log2, False, CORRECTED,
                )  # fmt: skip
            for t in range(gl.maximum(whole, 1), count):
                bias = tile_bias(t, n, key_tiles, keys, k_clusters, bias_row, BLOCK_N)
                weight, acc, total, proxy_total, largest = advance(
                    t, weight, acc, total, proxy_total, largest, bias, correction, t < key_tiles,
                    q_subtile, k_shared, v_shared, k_full, k_empty, v_full, v_empty, to_log2, True,
                    CORRECTED,
                )  # fmt: skip
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            fence_async_shared()
            acc = warpgroup_mma(weight, v_shared.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])

        # A query without any key gets 0 and -inf, as with PyTorch's boolean masks; NaN stays NaN.
        inverse = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), acc_rows)
        out = acc * gl.expand_dims(inverse, 1)
        barrier()
        q_subtile.store(out.to(dtype))
        barrier()
        # The tokens are read again: kept through the loops they would take 16 registers.
        token = gl.load(order_row + m, mask=m < cluster_end, other=0).to(gl.int64)
        out_row = out_base + (gl.expand_dims(token * stride_on, 1) + d)
        gl.store(out_row, q_subtile.load(copied), mask=there)
        lse = gl.convert_layout((largest + gl.log2(total)) * LN2, rows_copied)
        gl.store(lse_row + token, lse, mask=m < lse_end)
        if CORRECTED:
            proxy_weight = proxy_total / gl.where(total == 0.0, 1.0, total)
            proxy_weight = gl.convert_layout(proxy_weight, rows_copied)
            gl.store(weight_row + token, proxy_weight, mask=m < cluster_end)


@gluon.jit(
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
def attend_wgmma_kernel(
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
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,  # tiles of K, and of V, in shared memory
    CORRECTED: gl.constexpr,
    WRITE_LSE: gl.constexpr,
):
    """One tile of BLOCK_M queries of one cluster."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    gl.static_assert(BLOCK_M == CONSUMERS * SUBTILE)
    local = gl.program_id(1).to(gl.int64)
    g = first_head + local
    tile = gl.program_id(0)
    i = gl.load(tile_cluster_ptr + g * tiles + tile)
    there = i <= q_clusters
    i = gl.minimum(i, q_clusters)
    b = g // heads
    h = g % heads
    kv_head = h // (heads // kv_heads)
    g_kv = b * kv_heads + kv_head
    place = gl.load(tile_place_ptr + g * tiles + tile)
    cluster_end = gl.load(q_start_ptr + g * (q_clusters + 3) + i + 1)

    k_start = k_start_ptr + g_kv * (k_clusters + 3)
    exact_start = gl.load(k_start + k_clusters)
    exact_end = gl.load(k_start + k_clusters + 1)
    row = local * q_clusters + gl.minimum(i, q_clusters - 1)
    # Text queries and such as are not finite: every key, in sorted order.
    dense = i == q_clusters
    list_keys = gl.where(dense, 0, gl.load(row_ptr + row * 3))
    range_start = gl.where(dense, 0, gl.load(row_ptr + row * 3 + 1))
    range_keys = gl.where(dense, exact_end, gl.load(row_ptr + row * 3 + 2))
    keys = list_keys + range_keys + gl.where(dense, 0, exact_end - exact_start)
    proxy_count = gl.where(dense, 0, k_clusters)
    key_tiles = (keys + BLOCK_N - 1) // BLOCK_N
    count = key_tiles + (proxy_count + BLOCK_N - 1) // BLOCK_N
    # A tile without a cluster gathers and computes nothing.
    count = gl.where(there, count, 0)
    cluster_end = gl.where(there, cluster_end, 0)
    proxies = g_kv * k_clusters * D

    q_shared = gl.allocate_shared_memory(dtype, [CONSUMERS, SUBTILE, D], shared)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=32 * GATHER_WARPS)
        mbarrier.init(v_full.index(stage), count=32 * GATHER_WARPS)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)

    order_row = k_order_ptr + g_kv * k_tokens
    list_row = kv_indices_ptr + row * pitch
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head * stride_vh
    # Triton 3.6 fails on an argument of a group of warps that the group does not use.
    correction_base = correction_ptr if CORRECTED else lse_ptr
    weight_base = weight_ptr if CORRECTED else lse_ptr
    tiles_shared = (k_shared, v_shared, k_full, k_empty, v_full, v_empty)
    work = (
        count, gl.minimum(list_keys // BLOCK_N, count), key_tiles, keys, k_clusters,
        bias_ptr + row * k_clusters,
    )  # fmt: skip
    rows = (
        cluster_end, q_ptr + b * stride_qb + h * stride_qh, out_ptr + b * stride_ob + h * stride_oh,
        lse_ptr + g * q_tokens, correction_base + g * q_tokens, weight_base + g * q_tokens,
        q_order_ptr + g * q_tokens, stride_qn, stride_on, scale * LOG2E,
        cluster_end if WRITE_LSE else 0, CORRECTED,
    )  # fmt: skip
    rows_of_keys = (
        count, key_tiles, list_keys, range_start, range_keys, exact_start, keys, k_clusters,
        list_row, order_row, k_base, v_base, stride_kn, stride_vn,
        proxy_key_ptr + proxies, proxy_value_ptr + proxies,
    )  # fmt: skip
    first = (q_shared.index(0), place)
    second = (q_shared.index(1), place + SUBTILE)
    third = (q_shared.index(2), place + 2 * SUBTILE)
    gl.warp_specialize(
        [
            (attend_subtile, first + tiles_shared + work + rows),
            (attend_subtile, second + tiles_shared + work + rows),
            (attend_subtile, third + tiles_shared + work + rows),
            (gather, tiles_shared + rows_of_keys),
        ],
        [4, 4, GATHER_WARPS],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, GATHER_REGISTERS],
    )
