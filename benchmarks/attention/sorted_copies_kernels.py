"""Kernels of the experiment in `sorted_copies.py`: K and V copied once in cluster order, then TMA.

A page is PAGE places of one key cluster; the last page of a cluster ends in empty places. Pages lie
in memory as the tensor cores want them, so that one thread copies them by TMA. After the pages of a
head's keys come the pages of its proxy tokens, all of them, so that one loop reads both.

e4m3: a query is scaled by itself, the keys of a head less their mean together, the values by
channel, all by powers of two. The values of a page lie transposed, and their order within 32 keys
is that in which a thread holds its weights, so that no weight moves between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from svg_ear_compile.kernels.gpu.attend_wgmma import LOG2E, barrier, copy_rows

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

SUBTILE = gl.constexpr(64)
FP8_MAX = gl.constexpr(448.0)
RAISED = gl.constexpr(8.0)  # weights in e4m3 reach 2**8


@triton.jit
def place_of_weight(n):
    """Key within 32 whose weight a thread multiplies with row n of an e4m3 product."""
    block, of_thread, pair = (n >> 4) & 1, (n >> 2) & 3, (n >> 1) & 1
    return (n & -32) + 8 * (2 * block + pair) + 2 * of_thread + (n & 1)


@triton.jit
def load_rows(base, token, stride, there, d):
    at = base + token.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)


@triton.jit
def copy_pages_kernel(
    k_ptr, v_ptr, order_ptr, start_ptr, first_page_ptr,
    proxy_key_ptr, proxy_value_ptr, k_mean_ptr, k_scale_ptr, v_scale_ptr,
    fill_ptr, k_copy_ptr, v_copy_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, tokens, clusters, key_pages, pages,
    D: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, K8: tl.constexpr, V8: tl.constexpr,
):  # fmt: skip
    """Pages of one key cluster, or ROWS proxy tokens."""
    j = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    n, d = tl.arange(0, ROWS), tl.arange(0, D)
    of_keys = j < clusters
    if of_keys:
        first = tl.load(start_ptr + g * (clusters + 3) + j)
        size = tl.load(start_ptr + g * (clusters + 3) + j + 1) - first
        page = tl.load(first_page_ptr + g * clusters + j)
        k_base, v_base = (
            k_ptr + b * stride_kb + h * stride_kh,
            v_ptr + b * stride_vb + h * stride_vh,
        )
        k_stride, v_stride = stride_kn, stride_vn
    else:
        first = (j - clusters) * ROWS
        size = tl.minimum(clusters - first, ROWS)
        page = key_pages + first // PAGE
        k_base, v_base = proxy_key_ptr + g * clusters * D, proxy_value_ptr + g * clusters * D
        k_stride, v_stride = D, D
    in_page = tl.arange(0, ROWS // PAGE)
    places = (size + PAGE - 1) // PAGE * PAGE
    for begin in range(0, places, ROWS):
        at = begin + n  # [ROWS]
        to = (g * pages + page) * PAGE + at
        token = first + at
        if of_keys:
            token = tl.load(order_ptr + g * tokens + token, mask=at < size, other=0)
            left = size - begin - in_page * PAGE
            fill = fill_ptr + g * key_pages + page + begin // PAGE + in_page
            tl.store(fill, tl.minimum(left, PAGE), mask=left > 0)
        k = load_rows(k_base, token, k_stride, at < size, d)
        there = (at < places)[:, None]
        if K8:
            k_mean = tl.load(k_mean_ptr + g * D + d)
            k = (k - k_mean[None, :]) / tl.load(k_scale_ptr + g)
            k = tl.where((at < size)[:, None], tl.clamp(k, -448.0, 448.0), 0.0)
        tl.store(
            k_copy_ptr + to[:, None] * D + d[None, :], k.to(k_copy_ptr.dtype.element_ty), mask=there
        )
        if V8:
            at_v = begin + place_of_weight(n)
            token = first + at_v
            if of_keys:
                token = tl.load(order_ptr + g * tokens + token, mask=at_v < size, other=0)
            v = load_rows(v_base, token, v_stride, at_v < size, d)
            v = tl.clamp(v / tl.load(v_scale_ptr + g * D + d)[None, :], -448.0, 448.0)
            row = (to // PAGE)[:, None] * D + d[None, :]
            to_v = v_copy_ptr + row * PAGE + (at % PAGE)[:, None]
            tl.store(to_v, v.to(v_copy_ptr.dtype.element_ty), mask=there)
        else:
            v = load_rows(v_base, token, v_stride, at < size, d)
            to_v = v_copy_ptr + to[:, None] * D + d[None, :]
            tl.store(to_v, v.to(v_copy_ptr.dtype.element_ty), mask=there)


@triton.jit
def page_list_kernel(
    block_mask_ptr, start_ptr, first_page_ptr, bias_ptr, list_ptr, row_ptr,
    heads, kv_heads, q_clusters, k_clusters, pitch,
    BLOCK_K: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Pages of one row of blocks, full ones first, and the bias of its proxy tokens."""
    i = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    g_kv = (g // heads) * kv_heads + (g % heads) // (heads // kv_heads)
    row = g * q_clusters + i
    j = tl.arange(0, BLOCK_K)
    inside = j < k_clusters
    k_start = start_ptr + g_kv * (k_clusters + 3) + j
    size = tl.load(k_start + 1, mask=inside, other=0) - tl.load(k_start, mask=inside, other=0)
    page = tl.load(first_page_ptr + g_kv * k_clusters + j, mask=inside, other=0)
    taken = (tl.load(block_mask_ptr + row * k_clusters + j, mask=inside, other=0) != 0) & (size > 0)
    bias = tl.log2(tl.maximum(size.to(tl.float32), 1.0))
    bias = tl.where(taken | (size == 0), float("-inf"), bias)
    tl.store(bias_ptr + row * k_clusters + j, bias, mask=inside)
    full = tl.where(taken, size // PAGE, 0)
    part = (taken & (size % PAGE > 0)).to(tl.int32)
    full_pages = tl.sum(full, 0)
    tl.store(row_ptr + row * 2, full_pages)
    tl.store(row_ptr + row * 2 + 1, full_pages + tl.sum(part, 0))
    to = list_ptr + row * pitch
    tl.store(to + full_pages + tl.cumsum(part, 0) - part, page + full, mask=part > 0)
    to = to + tl.cumsum(full, 0) - full
    for p in range(0, tl.max(full, 0)):
        tl.store(to + p, page + p, mask=p < full)


@gluon.jit
def page_of(
    at, tile, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES: gl.constexpr
):
    """Page at place `at` of a row's pages, those of the proxy tokens after those of its keys."""
    listed = gl.load(list_row + at, mask=at < pages_listed, other=0)
    proxy = gl.minimum(first_proxy + at - key_tiles * PAGES, last_page)
    return gl.where(tile < key_tiles, listed, proxy)


@gluon.jit
def copy_page(
    page, p: gl.constexpr, stage, desc, full, chunks, PAGES: gl.constexpr, HALVES: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    for half in gl.static_range(HALVES):
        chunk = chunks.index((stage * HALVES + half) * PAGES + p)
        copy_tile(desc, [page * ROWS, half * 64], full.index(stage), chunk)


@gluon.jit
def produce(shared, copies, PAGE: gl.constexpr, PAGES: gl.constexpr):
    """Copy the pages of every tile; the numbers of the next tile's pages are loaded meanwhile."""
    k_shared, v_shared, k_full, k_empty, v_full, v_empty = shared
    (
        k_desc, v_desc, count, key_tiles, pages_listed, list_row, head_page, first_proxy, last_page,
    ) = copies  # fmt: skip
    STAGES: gl.constexpr = k_shared.shape[0]
    D: gl.constexpr = k_shared.shape[2]
    K8: gl.constexpr = k_shared.dtype.primitive_bitwidth == 8
    V8: gl.constexpr = v_shared.dtype.primitive_bitwidth == 8
    K_HALVES: gl.constexpr = 1 if K8 else 2
    V_HALVES: gl.constexpr = 1 if V8 else 2
    V_ROWS: gl.constexpr = D if V8 else PAGE
    K_BYTES: gl.constexpr = PAGES * PAGE * D * k_shared.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = PAGES * PAGE * D * v_shared.dtype.primitive_bitwidth // 8
    k_chunks = k_shared._reinterpret(
        k_shared.dtype, [STAGES * K_HALVES * PAGES, PAGE, D // K_HALVES], k_desc.layout
    )
    v_chunks = v_shared._reinterpret(
        v_shared.dtype,
        [STAGES * V_HALVES * PAGES, V_ROWS, PAGE if V8 else D // 2],
        v_desc.layout,
    )
    a = page_of(0, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    if PAGES > 1:
        b = page_of(1, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
    if PAGES > 2:
        c = page_of(2, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
        d = page_of(3, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
    if PAGES > 4:
        e = page_of(4, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
        f = page_of(5, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
        g = page_of(6, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
        h = page_of(7, 0, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
    for t in range(count):
        stage = t % STAGES
        free = (t // STAGES + 1) & 1
        pages = (a, b, c, d, e, f, g, h)
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), K_BYTES)
        for p in gl.static_range(PAGES):
            copy_page(
                head_page + pages[p], p, stage, k_desc, k_full, k_chunks, PAGES, K_HALVES, PAGE
            )
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), V_BYTES)
        for p in gl.static_range(PAGES):
            copy_page(
                head_page + pages[p], p, stage, v_desc, v_full, v_chunks, PAGES, V_HALVES, V_ROWS
            )
        to = t + 1
        at = to * PAGES
        a = page_of(at, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES)
        if PAGES > 1:
            b = page_of(
                at + 1, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )
        if PAGES > 2:
            c = page_of(
                at + 2, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )
            d = page_of(
                at + 3, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )
        if PAGES > 4:
            e = page_of(
                at + 4, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )
            f = page_of(
                at + 5, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )
            g = page_of(
                at + 6, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )
            h = page_of(
                at + 7, to, key_tiles, pages_listed, list_row, first_proxy, last_page, PAGES
            )


@gluon.jit
def tile_bias(
    tile, n, key_tiles, pages_listed, k_clusters, list_row, fill_row, bias_row, PAGE: gl.constexpr,
    PAGES: gl.constexpr,
):  # fmt: skip
    """Log2 bias [BN] of a tile's logits, -inf where there is no key."""
    at = tile * PAGES + n // PAGE
    of_keys = tile < key_tiles
    listed = of_keys & (at < pages_listed)
    page = gl.load(list_row + at, mask=listed, other=0)
    fill = gl.load(fill_row + page, mask=listed, other=0)
    j = (tile - key_tiles) * (PAGE * PAGES) + n
    of_proxy = gl.load(
        bias_row + j, mask=(j >= 0) & (j < k_clusters) & (not of_keys), other=float("-inf")
    )
    return gl.where(of_keys & (n % PAGE < fill), 0.0, of_proxy)


@gluon.jit
def softmax_step(
    logit, bias, correction, of_keys, total, proxy_total, largest, to_log2, raised: gl.constexpr,
    BIASED: gl.constexpr, CORRECTED: gl.constexpr,
):  # fmt: skip
    """As in `attend_wgmma.py`, with a factor of the logits by row and weights times 2**raised."""
    factor = gl.expand_dims(to_log2, 1)
    if BIASED:
        logit = logit * factor + gl.expand_dims(bias, 0)
        if CORRECTED:
            logit = logit + gl.expand_dims(gl.where(of_keys, 0.0, correction), 1)
        now = gl.maximum(largest, gl.max(logit, 1))
        shift = gl.where(now == float("-inf"), 0.0, now)
        weight = gl.exp2(logit - gl.expand_dims(shift - raised, 1))
    else:
        now = gl.maximum(largest, gl.max(logit, 1) * to_log2)
        shift = now
        weight = gl.exp2(logit * factor - gl.expand_dims(now - raised, 1))
    rescale = gl.exp2(largest - shift)
    mass = gl.sum(weight, 1)
    total = total * rescale + mass
    if BIASED and CORRECTED:
        proxy_total = proxy_total * rescale + gl.where(of_keys, 0.0, mass)
    return weight, rescale, total, proxy_total, now


@gluon.jit
def as_operand(weight, dtype: gl.constexpr, layout: gl.constexpr):
    """Weights [BM, BN] in the registers that hold them; e4m3 names the keys anew, see the module."""
    if dtype.primitive_bitwidth == 8:
        M: gl.constexpr = weight.shape[0]
        N: gl.constexpr = weight.shape[1]
        weight = weight.to(dtype)
        weight = (
            weight.reshape((M, N // 32, 2, 2, 4, 2)).permute((0, 1, 2, 4, 3, 5)).reshape((M, N))
        )
        return gl.convert_layout(weight, layout, assert_trivial=True)
    return gl.convert_layout(weight.to(dtype), layout)


@gluon.jit
def value_tile(v_shared, stage, first: gl.constexpr, columns: gl.constexpr):
    """Columns of the values [BN, D] of a stage; those in e4m3 lie transposed."""
    tile = v_shared.index(stage)
    if v_shared.dtype.primitive_bitwidth == 8:
        tile = tile.slice(first, columns, dim=0).permute((1, 0))
    return tile


@gluon.jit
def advance(
    t, weight, rescale, acc, acc_high, total, proxy_total, largest, bias, correction, of_keys,
    q_subtile, k_shared, v_shared, k_full, k_empty, v_full, v_empty, to_log2,
    BLOCK_N: gl.constexpr, raised: gl.constexpr, PARTS: gl.constexpr, BIASED: gl.constexpr,
    CORRECTED: gl.constexpr,
):  # fmt: skip
    """Logits and softmax of tile t > 0 while the values of tile t - 1 are multiplied.

    With PARTS the tensor cores add up the values of one tile only, and float32 registers the tiles;
    with 2, half of the columns at a time. `rescale` is then the factor of the sums that the softmax
    of tile t - 1 asked for.
    """
    STAGES: gl.constexpr = k_shared.shape[0]
    columns: gl.constexpr = acc.shape[1]
    acc_layout: gl.constexpr = acc.type.layout
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    logit_layout: gl.constexpr = largest.type.layout.parent
    operand_layout: gl.constexpr = weight.type.layout
    operand_dtype: gl.constexpr = weight.dtype
    stage = t % STAGES
    before = (t - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((t - 1) // STAGES) & 1)
    mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)
    k_tile = k_shared.index(stage).permute((1, 0))
    nothing = gl.zeros([SUBTILE, BLOCK_N], gl.float32, logit_layout)
    empty = gl.zeros([SUBTILE, columns], gl.float32, acc_layout)
    values = value_tile(v_shared, before, 0, columns)
    if PARTS == 2:
        part = warpgroup_mma(weight, values, empty, use_acc=False, is_async=True)
        logit = warpgroup_mma(q_subtile, k_tile, nothing, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(1, deps=[part])
        acc = acc * gl.expand_dims(rescale, 1) + part
        values = value_tile(v_shared, before, columns, columns)
        part = warpgroup_mma(weight, values, empty, use_acc=False, is_async=True)
    else:
        logit = warpgroup_mma(q_subtile, k_tile, nothing, use_acc=False, is_async=True)
        if PARTS == 1:
            part = warpgroup_mma(weight, values, empty, use_acc=False, is_async=True)
        else:
            part = warpgroup_mma(weight, values, acc, is_async=True)
    logit = warpgroup_mma_wait(1, deps=[logit])
    barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    following, factor, total, proxy_total, largest = softmax_step(
        logit, bias, correction, of_keys, total, proxy_total, largest, to_log2, raised, BIASED,
        CORRECTED,
    )  # fmt: skip
    factor = gl.convert_layout(factor, acc_rows)
    part = warpgroup_mma_wait(0, deps=[part])
    barrier()
    mbarrier.arrive(v_empty.index(before), count=1)
    if PARTS == 2:
        acc_high = acc_high * gl.expand_dims(rescale, 1) + part
    elif PARTS == 1:
        acc = acc * gl.expand_dims(rescale, 1) + part
    else:
        acc = part * gl.expand_dims(factor, 1)
    weight = as_operand(following, operand_dtype, operand_layout)
    return weight, factor, acc, acc_high, total, proxy_total, largest


@gluon.jit
def load_queries(q_subtile, q_row, stride_qn, token, there, d):
    """Rows of queries into shared memory; returns the factor [BM] of each, 1 unless in e4m3."""
    at = q_row + (gl.expand_dims(token * stride_qn, 1) + d)
    if q_subtile.dtype.primitive_bitwidth == 8:
        q = gl.load(at, mask=there, other=0.0).to(gl.float32)
        largest = gl.max(gl.maximum(q, -q), 1)
        factor = gl.exp2(gl.ceil(gl.log2(gl.maximum(largest, 1e-30) / FP8_MAX)))
        q = q * gl.expand_dims(1.0 / factor, 1)
        q_subtile.store(q.to(q_subtile.dtype))
    else:
        copy_rows(q_subtile, at, mask=there)
        async_copy.commit_group()
        async_copy.wait_group(0)
        factor = gl.full(token.shape, 1.0, gl.float32, token.type.layout)
    fence_async_shared()
    barrier()
    return factor


@gluon.jit
def consume(
    queries, shared, work, PAGE: gl.constexpr, PAGES: gl.constexpr, PARTS: gl.constexpr,
    CORRECTED: gl.constexpr,
):  # fmt: skip
    """Attention of SUBTILE queries of one cluster, from place `first_place` of the sorted order."""
    q_subtile, out_subtile, first_place = queries
    k_shared, v_shared, k_full, k_empty, v_full, v_empty = shared
    (
        count, whole, key_tiles, pages_listed, k_clusters, list_row, fill_row, bias_row,
        cluster_end, q_base, out_base, correction_row, weight_row, order_row, k_scale_at,
        v_scale_row, stride_qn, stride_on, to_log2,
    ) = work  # fmt: skip
    STAGES: gl.constexpr = k_shared.shape[0]
    BLOCK_N: gl.constexpr = PAGE * PAGES
    D: gl.constexpr = k_shared.shape[2]
    warps: gl.constexpr = gl.num_warps()
    V8: gl.constexpr = v_shared.dtype.primitive_bitwidth == 8
    K8: gl.constexpr = k_shared.dtype.primitive_bitwidth == 8
    raised: gl.constexpr = RAISED if V8 else 0.0
    COLUMNS: gl.constexpr = D // 2 if PARTS == 2 else D
    lanes: gl.constexpr = D // 8
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])
    rows_copied: gl.constexpr = gl.SliceLayout(1, copied)
    logit_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [warps, 1], [16, BLOCK_N, 32 if K8 else 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [warps, 1], [16, COLUMNS, 32 if V8 else 16]
    )
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4 if V8 else 2)
    logit_rows: gl.constexpr = gl.SliceLayout(1, logit_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    weight_dtype: gl.constexpr = v_shared.dtype

    if first_place >= cluster_end:  # no queries, but the producer waits for free stages
        for t in range(count):
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
        factor = load_queries(q_subtile, q_base, stride_qn, token, there, d)
        factor = gl.convert_layout(factor, logit_rows) * (to_log2 * gl.load(k_scale_at))

        n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, logit_layout))  # [BN]
        acc = gl.zeros([SUBTILE, COLUMNS], gl.float32, acc_layout)
        acc_high = acc if PARTS == 2 else 0.0
        largest = gl.full([SUBTILE], float("-inf"), gl.float32, logit_rows)
        total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        proxy_total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        correction = gl.zeros([SUBTILE], gl.float32, logit_rows)
        if CORRECTED:
            correction = gl.load(correction_row + gl.convert_layout(token, logit_rows))
        if count > 0:
            bias = tile_bias(
                0, n, key_tiles, pages_listed, k_clusters, list_row, fill_row, bias_row, PAGE, PAGES
            )
            mbarrier.wait(k_full.index(0), 0)
            nothing = gl.zeros([SUBTILE, BLOCK_N], gl.float32, logit_layout)
            logit = warpgroup_mma(
                q_subtile, k_shared.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            logit = warpgroup_mma_wait(0, deps=[logit])
            barrier()
            mbarrier.arrive(k_empty.index(0), count=1)
            weight, rescale, total, proxy_total, largest = softmax_step(
                logit, bias, correction, key_tiles > 0, total, proxy_total, largest, factor, raised,
                True, CORRECTED,
            )  # fmt: skip
            rescale = gl.convert_layout(rescale, acc_rows)
            weight = as_operand(weight, weight_dtype, weight_layout)
            for t in range(1, whole):
                weight, rescale, acc, acc_high, total, proxy_total, largest = advance(
                    t, weight, rescale, acc, acc_high, total, proxy_total, largest, bias,
                    correction, True, q_subtile, k_shared, v_shared, k_full, k_empty, v_full, v_empty, factor,
                    BLOCK_N, raised, PARTS, False, CORRECTED,
                )  # fmt: skip
            for t in range(gl.maximum(whole, 1), count):
                bias = tile_bias(
                    t, n, key_tiles, pages_listed, k_clusters, list_row, fill_row, bias_row, PAGE,
                    PAGES,
                )  # fmt: skip
                weight, rescale, acc, acc_high, total, proxy_total, largest = advance(
                    t, weight, rescale, acc, acc_high, total, proxy_total, largest, bias,
                    correction, t < key_tiles, q_subtile, k_shared, v_shared, k_full, k_empty, v_full, v_empty,
                    factor, BLOCK_N, raised, PARTS, True, CORRECTED,
                )  # fmt: skip
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            if PARTS:
                acc = acc * gl.expand_dims(rescale, 1)
            acc = warpgroup_mma(weight, value_tile(v_shared, last, 0, COLUMNS), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if PARTS == 2:
                acc_high = acc_high * gl.expand_dims(rescale, 1)
                values = value_tile(v_shared, last, COLUMNS, COLUMNS)
                acc_high = warpgroup_mma(weight, values, acc_high, is_async=True)
                acc_high = warpgroup_mma_wait(0, deps=[acc_high])

        inverse = gl.expand_dims(
            gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), acc_rows), 1
        )
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, acc_layout))
        v_scale = gl.expand_dims(gl.load(v_scale_row + column), 0)
        barrier()
        if PARTS == 2:
            low = out_subtile.slice(0, COLUMNS, dim=1)
            low.store((acc * inverse * v_scale).to(out_subtile.dtype))
            v_scale = gl.expand_dims(gl.load(v_scale_row + COLUMNS + column), 0)
            high = out_subtile.slice(COLUMNS, COLUMNS, dim=1)
            high.store((acc_high * inverse * v_scale).to(out_subtile.dtype))
        else:
            out_subtile.store((acc * inverse * v_scale).to(out_subtile.dtype))
        barrier()
        token = gl.load(order_row + m, mask=m < cluster_end, other=0).to(gl.int64)
        out_row = out_base + (gl.expand_dims(token * stride_on, 1) + d)
        gl.store(out_row, out_subtile.load(copied), mask=there)
        if CORRECTED:
            proxy_weight = proxy_total / gl.where(total == 0.0, 1.0, total)
            proxy_weight = gl.convert_layout(proxy_weight, rows_copied)
            gl.store(weight_row + token, proxy_weight, mask=m < cluster_end)


@gluon.jit(
    do_not_specialize=[
        "heads", "kv_heads", "q_tokens", "q_clusters", "k_clusters", "tiles", "pitch", "key_pages",
        "pages",
    ]
)  # fmt: skip
def attend_pages_kernel(
    q_ptr,  # (B, H, N, D)
    k_desc,  # (G * pages * PAGE, D), boxes of a page's rows and 128 bytes
    v_desc,  # as k_desc, or in e4m3 (G * pages * D, PAGE), boxes of D rows
    out_ptr,  # (B, H, N, D)
    tile_cluster_ptr,  # (G, T) int32
    tile_place_ptr,  # (G, T) int32
    q_order_ptr,  # (G, N) int32
    q_start_ptr,  # (G, Qc + 3) int32
    list_ptr,  # (G, Qc, pitch) int32, pages
    row_ptr,  # (G, Qc, 2) int32, full pages and all pages of a row
    fill_ptr,  # (G_kv, key_pages) int32, keys of a page
    bias_ptr,  # (G, Qc, Kc) float32 log2
    correction_ptr,  # (G, N) float32 log2
    weight_ptr,  # (G, N) float32, out
    k_scale_ptr,  # (G_kv,) float32
    v_scale_ptr,  # (G_kv, D) float32
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    heads, kv_heads, q_tokens, q_clusters, k_clusters, tiles, pitch, key_pages, pages, scale,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    PAGES: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PARTS: gl.constexpr,
    CORRECTED: gl.constexpr,
):  # fmt: skip
    """One tile of CONSUMERS * SUBTILE queries of one cluster; no always exact tokens."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_dtype: gl.constexpr = k_desc.dtype
    v_dtype: gl.constexpr = v_desc.dtype
    K8: gl.constexpr = k_dtype.primitive_bitwidth == 8
    V8: gl.constexpr = v_dtype.primitive_bitwidth == 8
    BLOCK_N: gl.constexpr = PAGE * PAGES
    k_layout: gl.constexpr = gl.NVMMASharedLayout(128, 8 if K8 else 16, rank=2)
    v_layout: gl.constexpr = gl.NVMMASharedLayout(PAGE if V8 else 128, 8 if V8 else 16, rank=2)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    g = gl.program_id(1).to(gl.int64)
    tile = gl.program_id(0)
    i = gl.load(tile_cluster_ptr + g * tiles + tile)
    there = i < q_clusters
    i = gl.minimum(i, q_clusters - 1)
    b = g // heads
    h = g % heads
    kv_head = h // (heads // kv_heads)
    g_kv = b * kv_heads + kv_head
    place = gl.load(tile_place_ptr + g * tiles + tile)
    cluster_end = gl.load(q_start_ptr + g * (q_clusters + 3) + i + 1)
    row = g * q_clusters + i
    full_pages = gl.load(row_ptr + row * 2)
    pages_listed = gl.load(row_ptr + row * 2 + 1)
    key_tiles = (pages_listed + PAGES - 1) // PAGES
    count = key_tiles + (k_clusters + BLOCK_N - 1) // BLOCK_N
    count = gl.where(there, count, 0)
    cluster_end = gl.where(there, cluster_end, 0)

    q_shared = gl.allocate_shared_memory(k_dtype, [CONSUMERS, SUBTILE, D], k_layout)
    k_shared = gl.allocate_shared_memory(k_dtype, [STAGES, BLOCK_N, D], k_layout)
    if V8:
        v_shared = gl.allocate_shared_memory(v_dtype, [STAGES, D, BLOCK_N], v_layout)
    else:
        v_shared = gl.allocate_shared_memory(v_dtype, [STAGES, BLOCK_N, D], v_layout)
    if K8:
        out_shared = gl.allocate_shared_memory(dtype, [CONSUMERS, SUBTILE, D], out_layout)
    else:
        out_shared = q_shared
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    barrier()

    list_row = list_ptr + row * pitch
    # Triton 3.6 fails on an argument of a group of warps that the group does not use.
    correction_base = correction_ptr if CORRECTED else v_scale_ptr
    weight_base = weight_ptr if CORRECTED else v_scale_ptr
    shared = (k_shared, v_shared, k_full, k_empty, v_full, v_empty)
    work = (
        count, gl.minimum(full_pages // PAGES, count), key_tiles, pages_listed, k_clusters,
        list_row, fill_ptr + g_kv * key_pages, bias_ptr + row * k_clusters, cluster_end,
        q_ptr + b * stride_qb + h * stride_qh, out_ptr + b * stride_ob + h * stride_oh,
        correction_base + g * q_tokens, weight_base + g * q_tokens, q_order_ptr + g * q_tokens,
        k_scale_ptr + g_kv, v_scale_ptr + g_kv * D, stride_qn, stride_on, scale * LOG2E,
    )  # fmt: skip
    copies = (
        k_desc, v_desc, count, key_tiles, pages_listed, list_row, (g_kv * pages).to(gl.int32),
        key_pages, pages - 1,
    )  # fmt: skip
    first = (q_shared.index(0), out_shared.index(0), place)
    second = (q_shared.index(1), out_shared.index(1), place + SUBTILE)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (first, shared, work, PAGE, PAGES, PARTS, CORRECTED)),
                (consume, (second, shared, work, PAGE, PAGES, PARTS, CORRECTED)),
                (produce, (shared, copies, PAGE, PAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        third = (q_shared.index(2), out_shared.index(2), place + 2 * SUBTILE)
        gl.warp_specialize(
            [
                (consume, (first, shared, work, PAGE, PAGES, PARTS, CORRECTED)),
                (consume, (second, shared, work, PAGE, PAGES, PARTS, CORRECTED)),
                (consume, (third, shared, work, PAGE, PAGES, PARTS, CORRECTED)),
                (produce, (shared, copies, PAGE, PAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
