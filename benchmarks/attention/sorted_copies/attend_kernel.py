"""The attend stage over pages of keys and values: the loop of `attend_wgmma.py`, copied by TMA.

Two threads copy the pages of K, and two those of V. A query in e4m3 is scaled by itself.

The pages of a row of blocks are listed with full ones first. A list holds the numbers of the pages
of a tile, 16 bits each, and the numbers of keys in them, 8 bits each. A thread loads one word of
either before it is needed, which takes one register.

Longer than 400 lines: one kernel, whose parts no other kernel can use.
"""

from __future__ import annotations

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

# Gluon's name since Triton 3.7, else that of earlier versions.
copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

SUBTILE = gl.constexpr(64)
FP8_MAX = gl.constexpr(448.0)
RAISED = gl.constexpr(8.0)  # weights in e4m3 reach 2**8


@gluon.jit
def copy_pages(
    tile, listed, stage, full, chunks, desc, copies, PART: gl.constexpr, PAGES: gl.constexpr,
    HALVES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Start the copies of half of a tile's pages; those of the proxy tokens follow the keys'."""
    _, key_tiles, _, head_page, first_proxy, last_page = copies
    mbarrier.expect(full.index(stage), BYTES)
    for p in gl.static_range(PART * PAGES // 2, (PART + 1) * PAGES // 2):
        page = (listed >> (16 * (p % 4))).to(gl.int32) & 0xFFFF
        proxy = gl.minimum(first_proxy + (tile - key_tiles) * PAGES + p, last_page)
        row = (head_page + gl.where(tile < key_tiles, page, proxy)) * desc.block_type.shape[0]
        for half in gl.static_range(HALVES):
            chunk = chunks.index((stage * HALVES + half) * PAGES + p)
            copy_box(desc, [row, half * 64], full.index(stage), chunk)


@gluon.jit
def copy_tiles(tiles, desc, copies, PART: gl.constexpr, PAGES: gl.constexpr, COPIED: gl.constexpr):
    """Copy half of the pages of K, or of V, of every tile."""
    shared, full, empty = tiles
    count, key_tiles, list_row, _, _, _ = copies
    STAGES: gl.constexpr = shared.shape[0]
    ROWS: gl.constexpr = desc.block_type.shape[0]
    COLUMNS: gl.constexpr = desc.block_type.shape[1]
    ELEMENTS: gl.constexpr = shared.shape[1] * shared.shape[2]
    BOXES: gl.constexpr = ELEMENTS // (ROWS * COLUMNS)
    BYTES: gl.constexpr = ELEMENTS * shared.dtype.primitive_bitwidth // 16
    HALVES: gl.constexpr = BOXES // PAGES
    WORDS: gl.constexpr = 2 if PAGES == 8 else 1
    chunks = shared._reinterpret(shared.dtype, [STAGES * BOXES, ROWS, COLUMNS], desc.layout)
    list_row += PART if PAGES == 8 else 0
    listed = gl.load(list_row, mask=key_tiles > 0, other=0)
    following = gl.load(list_row + WORDS, mask=key_tiles > 1, other=0)
    for t in range(count):
        stage = t % STAGES
        mbarrier.wait(empty.index(stage), (t // STAGES + 1) & 1)
        if COPIED:  # noqa: SIM114, chosen at compile time
            copy_pages(t, listed, stage, full, chunks, desc, copies, PART, PAGES, HALVES, BYTES)
        elif t < STAGES:
            copy_pages(t, listed, stage, full, chunks, desc, copies, PART, PAGES, HALVES, BYTES)
        else:
            mbarrier.arrive(full.index(stage), count=1)
        listed = following
        following = gl.load(list_row + (t + 2) * WORDS, mask=t + 2 < key_tiles, other=0)


@gluon.jit
def keys_of_pages(tile, key_tiles, fill_row):
    """Numbers of keys of the pages of a tile, 8 bits each."""
    fills = gl.load(fill_row + tile, mask=tile < key_tiles, other=0)
    return fills if fills.dtype.primitive_bitwidth >= 32 else fills.to(gl.int32)


@gluon.jit
def bias_of_keys(fills, n, PAGE: gl.constexpr):
    """Bias [BN] of a tile of keys: -inf in empty places."""
    fill = (fills >> (8 * (n // PAGE))) & 255
    return gl.where(n % PAGE < fill, 0.0, float("-inf"))


@gluon.jit
def bias_of_proxies(tile, n, key_tiles, k_clusters, bias_row, BLOCK_N: gl.constexpr):
    """Log2 bias [BN] of a tile of proxy tokens; -inf for a tile of keys."""
    j = (tile - key_tiles) * BLOCK_N + n
    return gl.load(bias_row + j, mask=(j >= 0) & (j < k_clusters), other=float("-inf"))


@gluon.jit
def softmax_step(
    logit, bias, correction, total, proxy_total, largest, to_log2, raised: gl.constexpr,
    BIASED: gl.constexpr, CORRECTED: gl.constexpr,
):  # fmt: skip
    """As in `attend_wgmma.py`, with a factor of the logits by row and weights times 2**raised.

    With CORRECTED every key of the tile is a proxy token, otherwise none is.
    """
    factor = gl.expand_dims(to_log2, 1)
    if BIASED:
        logit = logit * factor + gl.expand_dims(bias, 0)
        if CORRECTED:
            logit = logit + gl.expand_dims(correction, 1)
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
    proxy_total = proxy_total * rescale
    if CORRECTED:
        proxy_total = proxy_total + mass
    return weight, rescale, total, proxy_total, now


@gluon.jit
def as_operand(weight, dtype: gl.constexpr, layout: gl.constexpr):
    """Weights [BM, BN] in the registers that hold them.

    In e4m3 the keys are named anew, as `copy_kernels.place_of_weight` says.
    """
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
def value_tile(v_shared, stage):
    """Values [BN, D] of a stage; those in e4m3 lie transposed."""
    tile = v_shared.index(stage)
    if v_shared.dtype.primitive_bitwidth == 8:
        tile = tile.permute((1, 0))
    return tile


@gluon.jit
def advance(
    t, weight, rescale, acc, total, proxy_total, largest, bias, correction, q_subtile, k_tiles,
    v_tiles, to_log2, raised: gl.constexpr, PARTS: gl.constexpr, BIASED: gl.constexpr,
    CORRECTED: gl.constexpr,
):  # fmt: skip
    """Logits and softmax of tile t > 0 while the values of tile t - 1 are multiplied.

    With PARTS the tensor cores add up the values of one tile only, and float32 registers the tiles.
    `rescale` is then the factor of the sums that the softmax of tile t - 1 asked for.
    """
    k_shared, k_full, k_empty = k_tiles
    v_shared, v_full, v_empty = v_tiles
    STAGES: gl.constexpr = k_shared.shape[0]
    BLOCK_N: gl.constexpr = k_shared.shape[1]
    D: gl.constexpr = k_shared.shape[2]
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
    logit = warpgroup_mma(q_subtile, k_tile, nothing, use_acc=False, is_async=True)
    if PARTS:
        empty = gl.zeros([SUBTILE, D], gl.float32, acc_layout)
        part = warpgroup_mma(
            weight, value_tile(v_shared, before), empty, use_acc=False, is_async=True
        )
    else:
        part = warpgroup_mma(weight, value_tile(v_shared, before), acc, is_async=True)
    logit = warpgroup_mma_wait(1, deps=[logit])
    barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    following, factor, total, proxy_total, largest = softmax_step(
        logit, bias, correction, total, proxy_total, largest, to_log2, raised, BIASED, CORRECTED
    )
    factor = gl.convert_layout(factor, acc_rows)
    part = warpgroup_mma_wait(0, deps=[part])
    barrier()
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.expand_dims(rescale, 1) + part if PARTS else part * gl.expand_dims(factor, 1)
    weight = as_operand(following, operand_dtype, operand_layout)
    return weight, factor, acc, total, proxy_total, largest


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
def consume(queries, k_tiles, v_tiles, work, PAGE: gl.constexpr, PARTS: gl.constexpr):
    """Attention of SUBTILE queries of one cluster, from place `first_place` of the sorted order."""
    q_subtile, out_subtile, first_place = queries
    k_shared, k_full, k_empty = k_tiles
    v_shared, v_full, v_empty = v_tiles
    (
        count, whole, key_tiles, k_clusters, fill_row, bias_row, cluster_end, q_base, out_base,
        correction_row, weight_row, order_row, k_scale_at, v_scale_row, stride_qn, stride_on,
        to_log2,
    ) = work  # fmt: skip
    STAGES: gl.constexpr = k_shared.shape[0]
    BLOCK_N: gl.constexpr = k_shared.shape[1]
    D: gl.constexpr = k_shared.shape[2]
    warps: gl.constexpr = gl.num_warps()
    V8: gl.constexpr = v_shared.dtype.primitive_bitwidth == 8
    K8: gl.constexpr = k_shared.dtype.primitive_bitwidth == 8
    raised: gl.constexpr = RAISED if V8 else 0.0
    lanes: gl.constexpr = D // 8
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])
    rows_copied: gl.constexpr = gl.SliceLayout(1, copied)
    logit_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [warps, 1], [16, BLOCK_N, 32 if K8 else 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [warps, 1], [16, D, 32 if V8 else 16]
    )
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4 if V8 else 2)
    logit_rows: gl.constexpr = gl.SliceLayout(1, logit_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)

    if first_place >= cluster_end:  # no queries, but the copying threads wait for free stages
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
        acc = gl.zeros([SUBTILE, D], gl.float32, acc_layout)
        largest = gl.full([SUBTILE], float("-inf"), gl.float32, logit_rows)
        total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        proxy_total = gl.zeros([SUBTILE], gl.float32, logit_rows)
        correction = gl.load(correction_row + gl.convert_layout(token, logit_rows))
        if count > 0:
            of_keys = bias_of_keys(keys_of_pages(0, key_tiles, fill_row), n, PAGE)
            of_proxies = bias_of_proxies(0, n, key_tiles, k_clusters, bias_row, BLOCK_N)
            bias = gl.where(key_tiles > 0, of_keys, of_proxies)
            mbarrier.wait(k_full.index(0), 0)
            nothing = gl.zeros([SUBTILE, BLOCK_N], gl.float32, logit_layout)
            logit = warpgroup_mma(
                q_subtile, k_shared.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            logit = warpgroup_mma_wait(0, deps=[logit])
            barrier()
            mbarrier.arrive(k_empty.index(0), count=1)
            correction_0 = gl.where(key_tiles > 0, 0.0, correction)
            weight, rescale, total, proxy_total, largest = softmax_step(
                logit, bias, correction_0, total, proxy_total, largest, factor, raised, True, True
            )
            proxy_total = gl.where(key_tiles > 0, 0.0, proxy_total)
            rescale = gl.convert_layout(rescale, acc_rows)
            weight = as_operand(weight, v_shared.dtype, weight_layout)
            first_masked = gl.maximum(whole, 1)
            fills = keys_of_pages(first_masked, key_tiles, fill_row)
            for t in range(1, whole):
                weight, rescale, acc, total, proxy_total, largest = advance(
                    t, weight, rescale, acc, total, proxy_total, largest, bias, correction,
                    q_subtile, k_tiles, v_tiles, factor, raised, PARTS, False, False,
                )  # fmt: skip
            for t in range(first_masked, key_tiles):
                bias = bias_of_keys(fills, n, PAGE)
                fills = keys_of_pages(t + 1, key_tiles, fill_row)
                weight, rescale, acc, total, proxy_total, largest = advance(
                    t, weight, rescale, acc, total, proxy_total, largest, bias, correction,
                    q_subtile, k_tiles, v_tiles, factor, raised, PARTS, True, False,
                )  # fmt: skip
            for t in range(gl.maximum(key_tiles, 1), count):
                bias = bias_of_proxies(t, n, key_tiles, k_clusters, bias_row, BLOCK_N)
                weight, rescale, acc, total, proxy_total, largest = advance(
                    t, weight, rescale, acc, total, proxy_total, largest, bias, correction,
                    q_subtile, k_tiles, v_tiles, factor, raised, PARTS, True, True,
                )  # fmt: skip
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            if PARTS:
                acc = acc * gl.expand_dims(rescale, 1)
            acc = warpgroup_mma(weight, value_tile(v_shared, last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])

        inverse = gl.expand_dims(
            gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), acc_rows), 1
        )
        column = gl.arange(0, D, gl.SliceLayout(0, acc_layout))
        v_scale = gl.expand_dims(gl.load(v_scale_row + column), 0)
        barrier()
        out_subtile.store((acc * inverse * v_scale).to(out_subtile.dtype))
        barrier()
        token = gl.load(order_row + m, mask=m < cluster_end, other=0).to(gl.int64)
        out_row = out_base + (gl.expand_dims(token * stride_on, 1) + d)
        gl.store(out_row, out_subtile.load(copied), mask=there)
        proxy_weight = proxy_total / gl.where(total == 0.0, 1.0, total)
        proxy_weight = gl.convert_layout(proxy_weight, rows_copied)
        gl.store(weight_row + token, proxy_weight, mask=m < cluster_end)


@gluon.jit(
    do_not_specialize=[
        "heads", "kv_heads", "q_tokens", "q_clusters", "k_clusters", "tiles", "list_pitch",
        "fill_pitch", "first_proxy", "pages",
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
    list_ptr,  # (G, Qc, list_pitch) words of pages
    fill_ptr,  # (G, Qc, fill_pitch) words of numbers of keys
    row_ptr,  # (G, Qc, 2) int32, full pages and all pages of a row
    bias_ptr,  # (G, Qc, Kc) float32 log2
    correction_ptr,  # (G, N) float32 log2
    weight_ptr,  # (G, N) float32, out
    k_scale_ptr,  # (G_kv,) float32
    v_scale_ptr,  # (G_kv, D) float32
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    heads, kv_heads, q_tokens, q_clusters, k_clusters, tiles, list_pitch, fill_pitch, first_proxy,
    pages, scale,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    PAGES: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PARTS: gl.constexpr,
    COPIED: gl.constexpr,
):  # fmt: skip
    """One tile of CONSUMERS * SUBTILE queries of one cluster; no always exact tokens."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    K8: gl.constexpr = k_desc.dtype.primitive_bitwidth == 8
    V8: gl.constexpr = v_desc.dtype.primitive_bitwidth == 8
    BLOCK_N: gl.constexpr = PAGE * PAGES
    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 8 if K8 else 16, rank=2)
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
    key_tiles = (gl.load(row_ptr + row * 2 + 1) + PAGES - 1) // PAGES
    count = key_tiles + (k_clusters + BLOCK_N - 1) // BLOCK_N
    count = gl.where(there, count, 0)
    cluster_end = gl.where(there, cluster_end, 0)

    q_shared = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, SUBTILE, D], q_layout)
    k_shared = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    if V8:
        v_shared = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BLOCK_N], v_desc.layout)
    else:
        v_shared = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    if K8:
        out_shared = gl.allocate_shared_memory(dtype, [CONSUMERS, SUBTILE, D], out_layout)
    else:
        out_shared = q_shared
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=2)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    barrier()

    k_tiles = (k_shared, k_full, k_empty)
    v_tiles = (v_shared, v_full, v_empty)
    work = (
        count, gl.minimum(full_pages // PAGES, count), key_tiles, k_clusters,
        fill_ptr + row * fill_pitch, bias_ptr + row * k_clusters, cluster_end,
        q_ptr + b * stride_qb + h * stride_qh, out_ptr + b * stride_ob + h * stride_oh,
        correction_ptr + g * q_tokens, weight_ptr + g * q_tokens, q_order_ptr + g * q_tokens,
        k_scale_ptr + g_kv, v_scale_ptr + g_kv * D, stride_qn, stride_on, scale * LOG2E,
    )  # fmt: skip
    copies = (
        count, key_tiles, list_ptr + row * list_pitch, (g_kv * pages).to(gl.int32), first_proxy,
        pages - 1,
    )  # fmt: skip
    first = (q_shared.index(0), out_shared.index(0), place)
    second = (q_shared.index(1), out_shared.index(1), place + SUBTILE)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (first, k_tiles, v_tiles, work, PAGE, PARTS)),
                (consume, (second, k_tiles, v_tiles, work, PAGE, PARTS)),
                (copy_tiles, (k_tiles, k_desc, copies, 0, PAGES, COPIED)),
                (copy_tiles, (v_tiles, v_desc, copies, 0, PAGES, COPIED)),
                (copy_tiles, (k_tiles, k_desc, copies, 1, PAGES, COPIED)),
                (copy_tiles, (v_tiles, v_desc, copies, 1, PAGES, COPIED)),
            ],
            [4, 1, 1, 1, 1],
            [240, 24, 24, 24, 24],
        )
    else:
        third = (q_shared.index(2), out_shared.index(2), place + 2 * SUBTILE)
        gl.warp_specialize(
            [
                (consume, (first, k_tiles, v_tiles, work, PAGE, PARTS)),
                (consume, (second, k_tiles, v_tiles, work, PAGE, PARTS)),
                (consume, (third, k_tiles, v_tiles, work, PAGE, PARTS)),
                (copy_tiles, (k_tiles, k_desc, copies, 0, PAGES, COPIED)),
                (copy_tiles, (v_tiles, v_desc, copies, 0, PAGES, COPIED)),
                (copy_tiles, (k_tiles, k_desc, copies, 1, PAGES, COPIED)),
                (copy_tiles, (v_tiles, v_desc, copies, 1, PAGES, COPIED)),
            ],
            [4, 4, 1, 1, 1, 1],
            [160, 160, 32, 32, 32, 32],
        )
