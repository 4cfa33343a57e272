"""Stages 4 and 5 on Hopper with ``precision="fp8"``: `attend_wgmma.py` with e4m3 for Q and K.

The logits of keys are products in e4m3, which run at twice the rate, and the gathered copy of the
keys has half the bytes. The logits of proxy tokens are not rounded, see `kernels.e4m3`. So queries
are in shared memory in both forms, and a stage of K holds a tile of rounded keys or of proxy keys.
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

from svg_ear_compile.kernels.e4m3 import SMALLEST
from svg_ear_compile.kernels.gpu.attend_wgmma import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    GATHER_REGISTERS,
    GATHER_WARPS,
    LN2,
    LOG2E,
    SUBTILE,
    advance,
    barrier,
    copy_rows,
    key_rows,
    skip_tiles,
    softmax_step,
    start_logits,
    tile_bias,
)

# Gluon's name in late versions, else that of earlier ones.
reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret
)

SMALLEST_QUERY = gl.constexpr(SMALLEST)


@gluon.jit
def gather_e4m3(
    k_shared, rounded_shared, v_shared, k_full, k_empty, v_full, v_empty,
    count, key_tiles, list_keys, range_start, range_keys, exact_start, keys, k_clusters,
    list_row, order_row, rounded_base, v_base, stride_vn, proxy_key, proxy_value,
):  # fmt: skip
    """Copy the rows of every tile into shared memory; a row of -1 is filled with 0."""
    STAGES: gl.constexpr = v_shared.shape[0]
    BLOCK_N: gl.constexpr = v_shared.shape[1]
    D: gl.constexpr = v_shared.shape[2]
    # A thread copies 16 bytes of a row: 16 numbers of a rounded key, 8 of any other row.
    narrow: gl.constexpr = gl.BlockedLayout(
        [1, 16], [32 // (D // 16), D // 16], [gl.num_warps(), 1], [1, 0]
    )
    wide: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (D // 8), D // 8], [gl.num_warps(), 1], [1, 0]
    )
    n_narrow = gl.arange(0, BLOCK_N, gl.SliceLayout(1, narrow))  # [BN]
    d_narrow = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, narrow)), 0)  # [1, D]
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide))  # [BN]
    d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, wide)), 0)  # [1, D]
    for t in range(key_tiles):
        key = key_rows(
            t, n_narrow, key_tiles, list_keys, range_start, range_keys, exact_start, keys,
            k_clusters, list_row, order_row, BLOCK_N,
        )  # fmt: skip
        row = key_rows(
            t, n, key_tiles, list_keys, range_start, range_keys, exact_start, keys,
            k_clusters, list_row, order_row, BLOCK_N,
        )  # fmt: skip
        stage = t % STAGES
        free = (t // STAGES + 1) & 1
        at = rounded_base + (gl.expand_dims(gl.maximum(key, 0) * D, 1) + d_narrow)
        mbarrier.wait(k_empty.index(stage), free)
        copy_rows(rounded_shared.index(2 * stage), at, mask=gl.expand_dims(key >= 0, 1))
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        at_v = v_base + (gl.expand_dims(gl.maximum(row, 0) * stride_vn, 1) + d)
        mbarrier.wait(v_empty.index(stage), free)
        copy_rows(v_shared.index(stage), at_v, mask=gl.expand_dims(row >= 0, 1))
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
    for t in range(key_tiles, count):
        j = gl.expand_dims((t - key_tiles) * BLOCK_N + n, 1)  # [BN, 1]
        # A masked row is not read, yet its address has to be inside of an allocation.
        at = gl.minimum(j, k_clusters - 1) * D + d
        stage = t % STAGES
        free = (t // STAGES + 1) & 1
        mbarrier.wait(k_empty.index(stage), free)
        copy_rows(k_shared.index(stage), proxy_key + at, mask=j < k_clusters)
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        mbarrier.wait(v_empty.index(stage), free)
        copy_rows(v_shared.index(stage), proxy_value + at, mask=j < k_clusters)
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)


@gluon.jit
def round_queries(q, rounded_subtile):
    """Store queries [BM, D] in e4m3; returns the scale [BM] of each, see `rounded_keys`."""
    q = q.to(gl.float32)
    size = gl.maximum(q, -q)
    finite = size < float("inf")
    largest = gl.max(gl.where(finite, size, 0.0), 1)
    bits = gl.maximum(largest, SMALLEST_QUERY).to(gl.int32, bitcast=True)
    scale = ((bits & 0x7F800000) - (7 << 23)).to(gl.float32, bitcast=True)
    rounded = gl.where(finite, q, float("nan")) * gl.expand_dims(1.0 / scale, 1)
    rounded_subtile.store(rounded.to(rounded_subtile.dtype))
    return scale


@gluon.jit
def attend_subtile_e4m3(
    q_subtile, rounded_subtile, first_place,
    k_shared, rounded_shared, v_shared, k_full, k_empty, v_full, v_empty,
    count, whole, key_tiles, keys, k_clusters, bias_row, cluster_end, q_base, out_base,
    lse_row, correction_row, weight_row, order_row, k_scale_at, k_mean_row, stride_qn, stride_on,
    scale, lse_end, CORRECTED: gl.constexpr,
):  # fmt: skip
    """Attention of SUBTILE queries of one cluster, from place `first_place` of the sorted order."""
    STAGES: gl.constexpr = v_shared.shape[0]
    BLOCK_N: gl.constexpr = v_shared.shape[1]
    D: gl.constexpr = v_shared.shape[2]
    warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q_subtile.dtype
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [warps, 1], [1, 0])
    rows_copied: gl.constexpr = gl.SliceLayout(1, copied)
    logit_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, BLOCK_N, 32])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    logit_rows: gl.constexpr = gl.SliceLayout(1, logit_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    to_log2 = scale * LOG2E

    if first_place >= cluster_end:  # no queries, but the gathering warps wait for free stages
        skip_tiles(count, k_full, k_empty, v_full, v_empty, STAGES)
    else:
        m = first_place + gl.arange(0, SUBTILE, rows_copied)  # [BM]
        token = gl.load(order_row + m, mask=m < cluster_end, other=0).to(gl.int64)
        d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, copied)), 0)  # [1, D]
        there = gl.expand_dims(m < cluster_end, 1)
        q_row = q_base + (gl.expand_dims(token * stride_qn, 1) + d)
        q = gl.load(q_row, mask=there, other=0.0)
        q_subtile.store(q)
        factor = gl.convert_layout(round_queries(q, rounded_subtile), logit_rows)
        factor = factor * (gl.load(k_scale_at) * to_log2)
        fence_async_shared()
        barrier()

        n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, logit_layout))  # [BN]
        acc = gl.zeros([SUBTILE, D], gl.float32, acc_layout)
        largest = gl.full([SUBTILE], float("-inf"), gl.float32, logit_rows)
        total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        proxy_total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        correction = gl.zeros([SUBTILE], gl.float32, logit_rows)
        if CORRECTED:
            correction = gl.load(correction_row + gl.convert_layout(token, logit_rows))
        if count > 0:
            bias = tile_bias(0, n, key_tiles, keys, k_clusters, bias_row, BLOCK_N)
            mbarrier.wait(k_full.index(0), 0)
            fence_async_shared()
            if key_tiles > 0:
                logit = start_logits(rounded_subtile, rounded_shared.index(0))
                logit = warpgroup_mma_wait(0, deps=[logit]) * gl.expand_dims(factor, 1)
            else:
                logit = start_logits(q_subtile, k_shared.index(0))
                logit = warpgroup_mma_wait(0, deps=[logit]) * to_log2
                logit = gl.convert_layout(logit, logit_layout)
            barrier()
            mbarrier.arrive(k_empty.index(0), count=1)
            weight, _, total, proxy_total, largest = softmax_step(
                logit, bias, correction, key_tiles > 0, total, proxy_total, largest, 1.0, True,
                CORRECTED,
            )  # fmt: skip
            weight = gl.convert_layout(weight.to(dtype), weight_layout)
            for t in range(1, whole):
                weight, acc, total, proxy_total, largest = advance(
                    t, weight, acc, total, proxy_total, largest, bias, correction, True,
                    rounded_subtile, rounded_shared, v_shared, k_full, k_empty, v_full, v_empty,
                    factor, False, False, 2, True,
                )  # fmt: skip
            for t in range(gl.maximum(whole, 1), key_tiles):
                bias = tile_bias(t, n, key_tiles, keys, k_clusters, bias_row, BLOCK_N)
                weight, acc, total, proxy_total, largest = advance(
                    t, weight, acc, total, proxy_total, largest, bias, correction, True,
                    rounded_subtile, rounded_shared, v_shared, k_full, k_empty, v_full, v_empty,
                    factor, True, False, 2, True,
                )  # fmt: skip
            for t in range(gl.maximum(key_tiles, 1), count):
                bias = tile_bias(t, n, key_tiles, keys, k_clusters, bias_row, BLOCK_N)
                weight, acc, total, proxy_total, largest = advance(
                    t, weight, acc, total, proxy_total, largest, bias, correction, False,
                    q_subtile, k_shared, v_shared, k_full, k_empty, v_full, v_empty,
                    to_log2, True, CORRECTED,
                )  # fmt: skip
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            fence_async_shared()
            acc = warpgroup_mma(weight, v_shared.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])

        # A query without any key gets 0 and -inf, as with PyTorch's boolean masks; NaN stays NaN.
        inverse = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), acc_rows)
        out = acc * gl.expand_dims(inverse, 1)
        mean = gl.load(k_mean_row + d)
        of_mean = scale * gl.sum(q_subtile.load(copied).to(gl.float32) * mean, 1)
        barrier()
        q_subtile.store(out.to(dtype))
        barrier()
        # The tokens are read again: kept through the loops they would take 16 registers.
        token = gl.load(order_row + m, mask=m < cluster_end, other=0).to(gl.int64)
        out_row = out_base + (gl.expand_dims(token * stride_on, 1) + d)
        gl.store(out_row, q_subtile.load(copied), mask=there)
        lse = gl.convert_layout((largest + gl.log2(total)) * LN2, rows_copied) + of_mean
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
def attend_wgmma_e4m3_kernel(
    q_ptr,  # (B, H, N_q, D)
    k_ptr,  # not read
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
    proxy_key_ptr,  # (G_kv, Kc, D), less the mean of the keys
    proxy_value_ptr,  # (G_kv, Kc, D)
    bias_ptr,  # (L, Qc, Kc) float32 log2, -inf where the block is exact or empty
    correction_ptr,  # (G, N_q) float32 log2, added to the logits of a query's proxy tokens
    weight_ptr,  # (G, N_q) float32, out: weight of a query's proxy tokens
    rounded_ptr,  # (G_kv, N_k, D) e4m3
    k_scale_ptr,  # (G_kv,) float32
    k_mean_ptr,  # (G_kv, D) float32
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
    e4m3: gl.constexpr = rounded_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shared_e4m3: gl.constexpr = gl.NVMMASharedLayout(D if D < 128 else 128, 8, 2)
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
    # A tile without a cluster gathers and computes nothing.
    key_tiles = gl.where(there, (keys + BLOCK_N - 1) // BLOCK_N, 0)
    proxy_tiles = gl.where(there, (proxy_count + BLOCK_N - 1) // BLOCK_N, 0)
    count = key_tiles + proxy_tiles
    cluster_end = gl.where(there, cluster_end, 0)
    proxies = g_kv * k_clusters * D

    q_shared = gl.allocate_shared_memory(dtype, [CONSUMERS, SUBTILE, D], shared)
    q_rounded = gl.allocate_shared_memory(e4m3, [CONSUMERS, SUBTILE, D], shared_e4m3)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], shared)
    # The rounded keys of a stage lie in its first half.
    k_rounded = reinterpret(k_shared, e4m3, [2 * STAGES, BLOCK_N, D], shared_e4m3)
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

    # Triton 3.6 fails on an argument of a group of warps that the group does not use.
    correction_base = correction_ptr if CORRECTED else lse_ptr
    weight_base = weight_ptr if CORRECTED else lse_ptr
    tiles_shared = (k_shared, k_rounded, v_shared, k_full, k_empty, v_full, v_empty)
    work = (
        count, gl.minimum(list_keys // BLOCK_N, key_tiles), key_tiles, keys, k_clusters,
        bias_ptr + row * k_clusters,
    )  # fmt: skip
    rows = (
        cluster_end, q_ptr + b * stride_qb + h * stride_qh, out_ptr + b * stride_ob + h * stride_oh,
        lse_ptr + g * q_tokens, correction_base + g * q_tokens, weight_base + g * q_tokens,
        q_order_ptr + g * q_tokens, k_scale_ptr + g_kv, k_mean_ptr + g_kv * D, stride_qn, stride_on,
        scale, cluster_end if WRITE_LSE else 0, CORRECTED,
    )  # fmt: skip
    rows_of_keys = (
        count, key_tiles, list_keys, range_start, range_keys, exact_start, keys, k_clusters,
        kv_indices_ptr + row * pitch, k_order_ptr + g_kv * k_tokens,
        rounded_ptr + g_kv * k_tokens * D, v_ptr + b * stride_vb + kv_head * stride_vh, stride_vn,
        proxy_key_ptr + proxies, proxy_value_ptr + proxies,
    )  # fmt: skip
    first = (q_shared.index(0), q_rounded.index(0), place)
    second = (q_shared.index(1), q_rounded.index(1), place + SUBTILE)
    third = (q_shared.index(2), q_rounded.index(2), place + 2 * SUBTILE)
    gl.warp_specialize(
        [
            (attend_subtile_e4m3, first + tiles_shared + work + rows),
            (attend_subtile_e4m3, second + tiles_shared + work + rows),
            (attend_subtile_e4m3, third + tiles_shared + work + rows),
            (gather_e4m3, tiles_shared + rows_of_keys),
        ],
        [4, 4, GATHER_WARPS],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, GATHER_REGISTERS],
    )
