"""Keys less their mean in e4m3 on a GPU, and the rounding of queries; see `kernels.e4m3`.

The keys are read twice, for their largest number and for the rounded copy, which the attend stage
gathers in place of the keys at half the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels import e4m3
from svg_ear_compile.kernels.gpu.kmeans import SortedClusters
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, parts_of, token_strides

SMALLEST = tl.constexpr(e4m3.SMALLEST)
MOST_PARTS = 512
"""Parts of a sum that `parts_of` gives at most, a power of two."""
ROWS = 64
"""Keys that a program has in registers."""


class RoundedKeys(NamedTuple):
    """Keys of G_kv heads in e4m3.

    A key is ``scale * rounded + mean``.

    Attributes:
        rounded: (G_kv, N_k, BD) e4m3 in token order, BD being `LaunchConfig.block_dim`; columns
            past D are 0, and rows of padding arbitrary.
        scale: (G_kv,) float32. mean: (G_kv, D) float32.
        proxies: (G_kv, Kc, D) proxy keys less the mean, in the dtype of the keys.
    """

    rounded: Tensor
    scale: Tensor
    mean: Tensor
    proxies: Tensor


@triton.jit
def magnitude(x):
    """|x|, 0 for numbers that are not finite."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def scale_of(largest):
    """Power of two that divides numbers up to `largest` to numbers below 256."""
    bits = tl.maximum(largest, SMALLEST).to(tl.int32, bitcast=True)
    return ((bits & 0x7F800000) - (7 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x):
    """The numbers of e4m3 nearest to float32 numbers below 256; NaN for what is not finite.

    The rounding is written out, because the conversion of Triton's interpreter truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # multiples of 2^-9
    x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
    nearest = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return tl.where(x == x, nearest, x).to(tl.float8e4nv)


@triton.jit
def centred_keys(row_ptr, at, tokens, stride_n, mean, d, D: tl.constexpr):
    """Keys [BN, BD] float32 less the mean [BD]; 0 past the last token and past D."""
    there = (at < tokens)[:, None] & (d < D)[None, :]
    row = at.to(tl.int64)[:, None] * stride_n + d[None, :]
    k = tl.load(row_ptr + row, mask=there, other=0.0).to(tl.float32)
    return tl.where(there, k - mean[None, :], 0.0)


@triton.jit(do_not_specialize=["heads", "tokens", "clusters", "chunk", "parts"])
def largest_key_kernel(
    k_ptr,  # (B, H_kv, N, D)
    label_ptr,  # (G_kv, N) int32
    mean_ptr,  # (G_kv, D) float32
    largest_ptr,  # (G_kv, P) float32, out
    stride_kb,
    stride_kh,
    stride_kn,
    heads,  # H_kv
    tokens,
    clusters,  # Kc
    chunk,  # tokens of one part
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Largest number of the centred keys of a part that are not padding."""
    part = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BD]
    mean = tl.load(mean_ptr + g * D + d, mask=d < D, other=0.0)
    row_ptr = k_ptr + (g // heads) * stride_kb + (g % heads) * stride_kh
    largest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)  # [BN]
        label = tl.load(label_ptr + g * tokens + at, mask=at < tokens, other=clusters + 1)
        k = centred_keys(row_ptr, at, tokens, stride_kn, mean, d, D)
        of_rows = tl.max(magnitude(k), 1)
        largest = tl.maximum(largest, tl.where(label <= clusters, of_rows, 0.0))
    tl.store(largest_ptr + g * parts + part, tl.max(largest, 0))


@triton.jit(do_not_specialize=["heads", "tokens", "parts"])
def round_keys_kernel(
    k_ptr,  # (B, H_kv, N, D)
    mean_ptr,  # (G_kv, D) float32
    largest_ptr,  # (G_kv, P) float32
    rounded_ptr,  # (G_kv, N, BD) e4m3, out
    scale_ptr,  # (G_kv,) float32, out
    stride_kb,
    stride_kh,
    stride_kn,
    heads,  # H_kv
    tokens,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """BLOCK_N keys of one head."""
    g = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    scale = scale_of(tl.max(tl.load(largest_ptr + g * parts + p, mask=p < parts, other=0.0), 0))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + g, scale)
    d = tl.arange(0, BLOCK_D)  # [BD]
    mean = tl.load(mean_ptr + g * D + d, mask=d < D, other=0.0)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    row_ptr = k_ptr + (g // heads) * stride_kb + (g % heads) * stride_kh
    k = centred_keys(row_ptr, at, tokens, stride_kn, mean, d, D) * (1.0 / scale)
    to = rounded_ptr + (g * tokens + at)[:, None] * BLOCK_D + d[None, :]
    tl.store(to, to_e4m3(k), mask=(at < tokens)[:, None])


def rounded_keys(k: Tensor, keys: SortedClusters, config: LaunchConfig) -> RoundedKeys:
    """Keys (B, H_kv, N_k, D) with dense rows in e4m3, for all heads.

    Args:
        k: the keys.
        keys: key clusters.
        config: see `launch_config`.
    """
    batch, heads, tokens, dim = k.shape
    kv_heads, clusters = batch * heads, keys.centroids.shape[1]
    mean = e4m3.key_mean(keys.centroids, keys.starts.diff()[:, :clusters])
    parts, chunk = parts_of(tokens, kv_heads, ROWS)
    largest = torch.empty(kv_heads, parts, device=k.device)
    rounded = torch.empty(
        kv_heads, tokens, config.block_dim, dtype=torch.float8_e4m3fn, device=k.device
    )
    scale = torch.empty(kv_heads, device=k.device)
    sizes = {"D": dim, "BLOCK_D": config.block_dim, "BLOCK_N": ROWS}
    largest_key_kernel[(parts, kv_heads)](
        k, keys.labels, mean, largest, *token_strides(k), heads, tokens, clusters, chunk, parts,
        **sizes, num_warps=8,
    )  # fmt: skip
    round_keys_kernel[(triton.cdiv(tokens, ROWS), kv_heads)](
        k, mean, largest, rounded, scale, *token_strides(k), heads, tokens, parts,
        **sizes, BLOCK_P=MOST_PARTS, num_warps=8,
    )  # fmt: skip
    proxies = (keys.centroids - mean.unsqueeze(1)).to(k.dtype)
    return RoundedKeys(rounded, scale, mean, proxies)
