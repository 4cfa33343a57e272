"""What covariances add to compensation on a GPU, in the Gaussian form and that of second order.

Defined by `reference.covariance_terms`. The growth goes into the logits of the attend stage as
one number for a query. The move is the same for all stand-ins of a query, so it is added to the
finished output, times the weight that the attend stage gave to stand-ins.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.gpu.kmeans import SortedClusters
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, parts_of, token_strides
from svg_ear_compile.kernels.reference import LARGEST_GROWTH


@triton.jit
def rows_away(
    row_ptr, label, token, stride_n, mean_ptr, clusters, d, there,
    D: tl.constexpr, FROM_MEAN: tl.constexpr,
):  # fmt: skip
    """``x - mean of its cluster`` [BN, BD] float32 at columns d; 0 outside of the clusters.

    Only x where it is not FROM_MEAN.
    """
    mask = (there & (label < clusters))[:, None] & (d < D)[None, :]
    x = tl.load(row_ptr + token[:, None] * stride_n + d[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if FROM_MEAN:
        mean = tl.load(mean_ptr + label[:, None] * D + d[None, :], mask=mask, other=0.0)
        x -= mean.to(tl.float32)
    return x


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
    """Sums over a part of the tokens: BLOCK_C columns of Cov(k, k) and of Cov(v, k)."""
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
        column = rows_away(
            k_row, label, token, stride_kn, key_mean, clusters, c, there, D, True
        ).to(dtype)  # [BN, BC]
        k = rows_away(k_row, label, token, stride_kn, key_mean, clusters, d, there, D, True)
        of_keys = tl.dot(tl.trans(k.to(dtype)), column, of_keys, input_precision="ieee")
        v = rows_away(v_row, label, token, stride_vn, value_mean, clusters, d, there, D, True)
        of_values = tl.dot(tl.trans(v.to(dtype)), column, of_values, input_precision="ieee")
    to = (part * tl.num_programs(2) + g) * 2 * D * D + d[:, None] * D + c[None, :]
    mask = (d < D)[:, None] & (c < D)[None, :]
    tl.store(part_ptr + to, of_keys, mask=mask)
    tl.store(part_ptr + to + D * D, of_values, mask=mask)


@triton.jit(do_not_specialize=["heads", "kv_heads", "tokens", "clusters"])
def growth_kernel(
    q_ptr,  # (B, H, N, D)
    label_ptr,  # (G, N) int32
    centroid_ptr,  # (G, Qc, D) in the dtype of q; not read unless FROM_CENTROID
    curvature_ptr,  # (G_kv, D, D) in the dtype of q, symmetric
    growth_ptr,  # (G, N) float32 log2
    length_ptr,  # (G, N) float32, what dq is shortened to
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
    FROM_CENTROID: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """``dq' curvature dq`` of BLOCK_N queries, dq shortened to where it is LIMIT; 0 for others."""
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    g_kv = b * kv_heads + h // (heads // kv_heads)
    d = tl.arange(0, BLOCK_D)  # [BD]
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    there = at < tokens
    token = at.to(tl.int64)
    label = tl.load(label_ptr + g * tokens + at, mask=there, other=clusters)
    q_row = q_ptr + b * stride_qb + h * stride_qh
    centroid = centroid_ptr + g * clusters * D
    away = rows_away(q_row, label, token, stride_qn, centroid, clusters, d, there, D, FROM_CENTROID)
    away = away.to(q_ptr.dtype.element_ty)  # [BN, BD]
    growth = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BC]
        mask = (d < D)[:, None] & (c < D)[None, :]
        at_column = curvature_ptr + (g_kv * D + d[:, None]) * D + c[None, :]
        column = tl.load(at_column, mask=mask, other=0.0)  # [BD, BC]
        bent = tl.dot(away, column, input_precision="ieee")  # [BN, BC]
        mine = rows_away(
            q_row, label, token, stride_qn, centroid, clusters, c, there, D, FROM_CENTROID
        )
        growth += tl.sum(bent * mine, 1)
    length = tl.sqrt(LIMIT / tl.maximum(growth, LIMIT))
    tl.store(growth_ptr + g * tokens + at, tl.minimum(growth, LIMIT), mask=there)
    tl.store(length_ptr + g * tokens + at, length, mask=there)


@triton.jit(do_not_specialize=["heads", "kv_heads", "tokens", "clusters"])
def move_kernel(
    q_ptr,  # (B, H, N, D)
    out_ptr,  # (B, H, N, D), in and out
    label_ptr,  # (G, N) int32
    centroid_ptr,  # (G, Qc, D) in the dtype of q; not read unless FROM_CENTROID
    slope_ptr,  # (G_kv, D, D) in the dtype of q, s Cov(v, k)
    length_ptr,  # (G, N) float32, what dq is shortened to
    share_ptr,  # (G, N) float32, weight of a query's stand-ins
    stride_qb,
    stride_qh,
    stride_qn,
    stride_ob,
    stride_oh,
    stride_on,
    heads,
    kv_heads,
    tokens,
    clusters,  # Qc
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FROM_CENTROID: tl.constexpr,
):
    """Add ``share * length * slope dq`` to the output of BLOCK_N queries."""
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    g_kv = b * kv_heads + h // (heads // kv_heads)
    d = tl.arange(0, BLOCK_D)  # [BD]
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    there = at < tokens
    token = at.to(tl.int64)
    label = tl.load(label_ptr + g * tokens + at, mask=there, other=clusters)
    q_row = q_ptr + b * stride_qb + h * stride_qh
    centroid = centroid_ptr + g * clusters * D
    away = rows_away(q_row, label, token, stride_qn, centroid, clusters, d, there, D, FROM_CENTROID)
    away = away.to(q_ptr.dtype.element_ty)  # [BN, BD]
    share = tl.load(share_ptr + g * tokens + at, mask=there, other=0.0)  # [BN]
    share *= tl.load(length_ptr + g * tokens + at, mask=there, other=0.0)
    out_row = out_ptr + b * stride_ob + h * stride_oh + token[:, None] * stride_on
    clustered = there & (label < clusters)
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)  # [BC], dims of the value
        mask = (d < D)[:, None] & (c < D)[None, :]
        column = tl.load(slope_ptr + (g_kv * D + c[None, :]) * D + d[:, None], mask=mask, other=0.0)
        move = tl.dot(away, column, input_precision="ieee")  # [BN, BC]
        to = out_row + c[None, :]
        mine = clustered[:, None] & (c < D)[None, :]
        out = tl.load(to, mask=mine, other=0.0).to(tl.float32) + share[:, None] * move
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mine)


def curvature_and_slope(
    k: Tensor, v: Tensor, keys: SortedClusters, value_means: Tensor, scale: float,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``s^2/2 Cov(k, k)`` in log2 units and ``s Cov(v, k)``, both (G_kv, D, D) in the dtype of k.

    Args:
        k, v: (B, H_kv, N, D).
        keys: their clusters.
        value_means: (G_kv, Kc, D) in the dtype of v, as `keys.rounded`: what rounding adds to a
            covariance is its square.
        scale: s.
        config: see `launch_config`.
    """
    batch, heads, tokens, dim = k.shape
    groups, clusters = batch * heads, keys.rounded.shape[1]
    tiles = config.covariance
    columns = triton.cdiv(dim, tiles.columns)
    parts, chunk = parts_of(tokens, groups * columns, tiles.rows)
    sums = torch.empty(parts, groups, 2, dim, dim, dtype=torch.float32, device=k.device)
    covariance_kernel[(parts, columns, groups)](
        k, v, keys.labels, keys.rounded, value_means, sums,
        *token_strides(k), *token_strides(v), heads, tokens, clusters, chunk,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    count = keys.starts[:, clusters].clamp(min=1)[:, None, None]
    of_keys, of_values = (sums.sum(0) / count.unsqueeze(1)).unbind(1)
    curvature = (scale**2 / 2 / math.log(2)) * of_keys
    return curvature.to(k.dtype), (scale * of_values).to(k.dtype)


def growth_and_length(
    q: Tensor, queries: SortedClusters, curvature: Tensor, kv_heads: int, from_centroid: bool,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Growth in log2 of the mass of a query's stand-ins, and the length of dq; (G, N) float32.

    Args:
        q: (B, H, N, D).
        queries: their clusters.
        curvature: see `curvature_and_slope`.
        kv_heads: H_kv.
        from_centroid: dq is the distance from the query's centroid, else from 0.
        config: see `launch_config`.
    """
    _, heads, tokens, dim = q.shape
    groups, clusters, _ = queries.centroids.shape
    grown, length = torch.empty(2, groups, tokens, dtype=torch.float32, device=q.device).unbind()
    tiles = config.away
    growth_kernel[(triton.cdiv(tokens, tiles.rows), groups)](
        q, queries.labels, queries.rounded, curvature, grown, length,
        *token_strides(q), heads, kv_heads, tokens, clusters,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        FROM_CENTROID=from_centroid, LIMIT=LARGEST_GROWTH / math.log(2),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return grown, length


def add_moves(
    out: Tensor, q: Tensor, queries: SortedClusters, slope: Tensor, length: Tensor, share: Tensor,
    kv_heads: int, from_centroid: bool, config: LaunchConfig,
) -> None:  # fmt: skip
    """Add the moves of the stand-ins to the output.

    Args:
        out: (B, H, N, D), changed.
        q, queries, kv_heads, from_centroid, config: see `growth_and_length`.
        slope: see `curvature_and_slope`.
        length: see `growth_and_length`.
        share: (G, N) float32, weight that a query gives to its stand-ins.
    """
    _, heads, tokens, dim = q.shape
    groups, clusters, _ = queries.centroids.shape
    tiles = config.away
    move_kernel[(triton.cdiv(tokens, tiles.rows), groups)](
        q, out, queries.labels, queries.rounded, slope, length, share,
        *token_strides(q), *token_strides(out), heads, kv_heads, tokens, clusters,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        FROM_CENTROID=from_centroid, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
