"""The pre-pass that writes keys and values into pages, and the lists of pages of a row of blocks.

A page is PAGE places of one key cluster; the last page of a cluster ends in empty places. Pages lie
in memory as the tensor cores want them, so that one thread copies them by TMA. After the pages of a
head's keys come the pages of its proxy tokens, all of them, so that one loop reads both.

e4m3: the keys of a head less their mean are scaled together, the values by channel, by powers of
two. The values of a page lie transposed, and their order within 32 keys is that in which a thread
holds its weights, so that no weight moves between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    k_copy_ptr, v_copy_ptr,
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
        k_base = k_ptr + b * stride_kb + h * stride_kh
        v_base = v_ptr + b * stride_vb + h * stride_vh
        k_stride, v_stride = stride_kn, stride_vn
    else:
        first = (j - clusters) * ROWS
        size = tl.minimum(clusters - first, ROWS)
        page = key_pages + first // PAGE
        k_base, v_base = proxy_key_ptr + g * clusters * D, proxy_value_ptr + g * clusters * D
        k_stride, v_stride = D, D
    places = (size + PAGE - 1) // PAGE * PAGE
    for begin in range(0, places, ROWS):
        at = begin + n  # [ROWS]
        to = (g * pages + page) * PAGE + at
        token = first + at
        if of_keys:
            token = tl.load(order_ptr + g * tokens + token, mask=at < size, other=0)
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
    block_mask_ptr, start_ptr, first_page_ptr, bias_ptr, list_ptr, fill_ptr, row_ptr,
    heads, kv_heads, q_clusters, k_clusters, pitch,
    BLOCK_K: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Pages of one row of blocks, full ones first, their keys, and the bias of its proxy tokens."""
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
    listed = full_pages + tl.sum(part, 0)
    tl.store(row_ptr + row * 2 + 1, listed)
    at = row * pitch + full_pages + tl.cumsum(part, 0) - part
    tl.store(list_ptr + at, page + full, mask=part > 0)
    tl.store(fill_ptr + at, size % PAGE, mask=part > 0)
    # The last tile ends in pages without a key.
    rest = listed + tl.arange(0, PAGES)
    tl.store(fill_ptr + row * pitch + rest, tl.zeros_like(rest), mask=rest < pitch)
    at = row * pitch + tl.cumsum(full, 0) - full
    for p in range(0, tl.max(full, 0)):
        tl.store(list_ptr + at + p, page + p, mask=p < full)
        tl.store(fill_ptr + at + p, tl.zeros_like(full) + PAGE, mask=p < full)
