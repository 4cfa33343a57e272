"""Corrections of the Gaussian form on a GPU, see `compensation.corrections`.

The attend stage gets the logit correction as one number for each query; `finish` adds the value
correction to the output.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.compensation import LARGEST_LOGIT_CORRECTION
from svg_ear_compile.kernels.gpu.kmeans import SortedClusters
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, ceil_div, parts_of, token_strides


@triton.jit
def clustered_rows(row_ptr, label, token, stride_n, clusters, d, there, D: tl.constexpr):
    """Tokens [BN, BD] float32 at columns d; 0 for tokens that are in no cluster."""
    mask = (there & (label < clusters))[:, None] & (d < D)[None, :]
    x = tl.load(row_ptr + token[:, None] * stride_n + d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def centred_rows(row_ptr, label, token, stride_n, mean_ptr, clusters, d, there, D: tl.constexpr):
    """`clustered_rows` minus the means of their clusters."""
    x = clustered_rows(row_ptr, label, token, stride_n, clusters, d, there, D)
    mask = (there & (label < clusters))[:, None] & (d < D)[None, :]
    mean = tl.load(mean_ptr + label[:, None] * D + d[None, :], mask=mask, other=0.0)
    return x - mean.to(tl.float32)


@triton.jit(do_not_specialize=["heads", "tokens", "clusters", "chunk"])
def covariance_kernel(
    k_ptr,  # (B, H_kv, N, D)
    v_ptr,  # (B, H_kv, N, D)
    label_ptr,  # (G_kv, N) int32
    key_mean_ptr,  # (G_kv, Kc, D) in the dtype of k
    value_mean_ptr,  # (G_kv, Kc, D) in the dtype of k
    part_ptr,  # (P, G_kv, 2, D, D) float32
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    heads,  # H_kv
    tokens,
    clusters,  # Kc
    chunk,  # tokens of one part, a multiple of BLOCK_N
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over a part of the tokens for BLOCK_C columns of Cov(k, k) and of Cov(v, k)."""
    part = tl.program_id(0)
    g = tl.program_id(2).to(tl.int64)
    b, h = g // heads, g % heads
    d = tl.arange(0, BLOCK_D)  # [BD]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    k_row = k_ptr + b * stride_kb + h * stride_kh
    v_row = v_ptr + b * stride_vb + h * stride_vh
    key_mean = key_mean_ptr + g * clusters * D
    value_mean = value_mean_ptr + g * clusters * D
    dtype = k_ptr.dtype.element_ty
    of_keys = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    of_values = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)  # [BN]
        there = at < tokens
        label = tl.load(label_ptr + g * tokens + at, mask=there, other=clusters)
        token = at.to(tl.int64)
        column = centred_rows(k_row, label, token, stride_kn, key_mean, clusters, c, there, D).to(
            dtype
        )  # [BN, BC]
        k = centred_rows(k_row, label, token, stride_kn, key_mean, clusters, d, there, D)
        of_keys = tl.dot(tl.trans(k.to(dtype)), column, of_keys, input_precision="ieee")
        v = centred_rows(v_row, label, token, stride_vn, value_mean, clusters, d, there, D)
        of_values = tl.dot(tl.trans(v.to(dtype)), column, of_values, input_precision="ieee")
    to = (part * tl.num_programs(2) + g) * 2 * D * D + d[:, None] * D + c[None, :]
    mask = (d < D)[:, None] & (c < D)[None, :]
    tl.store(part_ptr + to, of_keys, mask=mask)
    tl.store(part_ptr + to + D * D, of_values, mask=mask)


@triton.jit(do_not_specialize=["parts", "clusters"])
def pooled_kernel(
    part_ptr,  # (P, G_kv, 2, D, D) float32, see `covariance_kernel`
    start_ptr,  # (G_kv, Kc + 3) int32
    curvature_ptr,  # (G_kv, D, D), out, see `curvature_and_slope`
    slope_ptr,  # (G_kv, D, D), out
    parts,
    clusters,  # Kc
    curvature_factor,
    slope_factor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Means over all parts, times factors, of BLOCK elements of both covariances."""
    g = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = at < D * D
    of_keys = tl.zeros([BLOCK], tl.float32)
    of_values = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        row = part_ptr + (part * tl.num_programs(1) + g) * 2 * D * D + at
        of_keys += tl.load(row, mask=inside, other=0.0)
        of_values += tl.load(row + D * D, mask=inside, other=0.0)
    count = tl.maximum(tl.load(start_ptr + g * (clusters + 3) + clusters), 1).to(tl.float32)
    curvature = of_keys / count * curvature_factor
    slope = of_values / count * slope_factor
    to = g * D * D + at
    tl.store(curvature_ptr + to, curvature.to(curvature_ptr.dtype.element_ty), mask=inside)
    tl.store(slope_ptr + to, slope.to(slope_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "kv_heads", "tokens", "clusters"])
def logit_correction_kernel(
    q_ptr,  # (B, H, N, D)
    label_ptr,  # (G, N) int32
    curvature_ptr,  # (G_kv, D, D) in the dtype of q, symmetric, see `curvature_and_slope`
    logit_ptr,  # (G, N) float32 log2, out: the logit correction
    clip_ptr,  # (G, N) float32, out: the clip factor
    stride_qb,
    stride_qh,
    stride_qn,
    heads,
    kv_heads,
    tokens,
    clusters,  # Qc
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Logit correction ``q' curvature q``, at most LIMIT, and clip factor of BLOCK_N queries.

    Queries that are in no cluster have the correction 0.
    """
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    g_kv = b * kv_heads + h // (heads // kv_heads)
    d = tl.arange(0, BLOCK_D)  # [BD]
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    there = at < tokens
    token = at.to(tl.int64)
    label = tl.load(label_ptr + g * tokens + at, mask=there, other=clusters)
    q_row = q_ptr + b * stride_qb + h * stride_qh
    q = clustered_rows(q_row, label, token, stride_qn, clusters, d, there, D)
    q = q.to(q_ptr.dtype.element_ty)  # [BN, BD]
    logit = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BC]
        mask = (d < D)[:, None] & (c < D)[None, :]
        at_column = curvature_ptr + (g_kv * D + d[:, None]) * D + c[None, :]
        column = tl.load(at_column, mask=mask, other=0.0)  # [BD, BC]
        bent = tl.dot(q, column, input_precision="ieee")  # [BN, BC]
        mine = clustered_rows(q_row, label, token, stride_qn, clusters, c, there, D)
        logit += tl.sum(bent * mine, 1)
    clip = tl.sqrt(LIMIT / tl.maximum(logit, LIMIT))
    tl.store(logit_ptr + g * tokens + at, tl.minimum(logit, LIMIT), mask=there)
    tl.store(clip_ptr + g * tokens + at, clip, mask=there)


def curvature_and_slope(
    k: Tensor, v: Tensor, keys: SortedClusters, value_means: Tensor, scale: float,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``s^2/2 Cov(k, k)`` in log2 units and ``s Cov(v, k)``, both (G_kv, D, D) in the dtype of k.

    Args:
        k, v: (B, H_kv, N, D).
        keys: key clusters.
        value_means: (G_kv, Kc, D) in the dtype of v. Means may be rounded, as `keys.rounded` is:
            only the square of their rounding error enters the covariances.
        scale: s.
        config: see `launch_config`.
    """
    batch, heads, tokens, dim = k.shape
    groups, clusters = batch * heads, keys.rounded.shape[1]
    tiles = config.covariance
    columns = ceil_div(dim, tiles.columns)
    parts, chunk = parts_of(tokens, groups * columns, tiles.rows)
    sums = torch.empty(parts, groups, 2, dim, dim, dtype=torch.float32, device=k.device)
    covariance_kernel[(parts, columns, groups)](
        k, v, keys.labels, keys.rounded, value_means, sums,
        *token_strides(k), *token_strides(v), heads, tokens, clusters, chunk,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    curvature, slope = torch.empty(2, groups, dim, dim, dtype=k.dtype, device=k.device).unbind()
    block = 1024
    pooled_kernel[(ceil_div(dim * dim, block), groups)](
        sums, keys.starts, curvature, slope, parts, clusters, scale**2 / 2 / math.log(2), scale,
        D=dim, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return curvature, slope


def logit_corrections(
    q: Tensor, queries: SortedClusters, curvature: Tensor, kv_heads: int, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """Logit corrections in log2 and clip factors of all queries, both (G, N) float32.

    Args:
        q: (B, H, N, D).
        queries: query clusters.
        curvature: see `curvature_and_slope`.
        kv_heads: H_kv.
        config: see `launch_config`.
    """
    _, heads, tokens, dim = q.shape
    groups, clusters, _ = queries.centroids.shape
    logit, clip = torch.empty(2, groups, tokens, dtype=torch.float32, device=q.device).unbind()
    tiles = config.correction
    logit_correction_kernel[(ceil_div(tokens, tiles.rows), groups)](
        q, queries.labels, curvature, logit, clip,
        *token_strides(q), heads, kv_heads, tokens, clusters,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        LIMIT=LARGEST_LOGIT_CORRECTION / math.log(2),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return logit, clip
