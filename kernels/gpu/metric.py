"""Metrics of k-means on a GPU: second moments of all tokens of a head, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.gpu.launch import (
    LaunchConfig,
    ceil_div,
    parts_of,
    power_of_2_from,
    token_strides,
)
from svg_ear_compile.kernels.kinds import CLUSTERED, TokenKinds

_ROWS = 16  # of a metric, for one program


@triton.jit(do_not_specialize=["heads", "tokens", "chunk"])
def moment_kernel(
    x_ptr,  # (B, H, N, D)
    kind_ptr,  # (B|1, H|1, N) uint8, see `kernels.kinds`
    square_ptr,  # (P, G, D, D) float32
    sum_ptr,  # (P, G, D) float32
    count_ptr,  # (P, G) float32
    stride_xb,
    stride_xh,
    stride_xn,
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    tokens,
    chunk,  # tokens of one part, a multiple of BLOCK_N
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    IS_CLUSTERED: tl.constexpr,
):
    """Sums over a part of a head's clustered tokens: BLOCK_C columns of ``x x'``, x, and 1."""
    part = tl.program_id(0)
    g = tl.program_id(2).to(tl.int64)
    b, h = g // heads, g % heads
    d = tl.arange(0, BLOCK_D)  # [BD]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    x_base = x_ptr + b * stride_xb + h * stride_xh
    square = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)  # [BN]
        token = at.to(tl.int64)
        inside = at < tokens
        if HAS_KINDS:
            kind_row = kind_ptr + b * stride_kb + h * stride_kh + token * stride_kn
            inside = inside & (tl.load(kind_row, mask=at < tokens, other=0) == IS_CLUSTERED)
        row = x_base + token[:, None] * stride_xn
        x = tl.load(row + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        column = x  # [BN, BC]
        if BLOCK_C < BLOCK_D:
            column = tl.load(row + c[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
        square = tl.dot(tl.trans(x), column, square, input_precision="ieee")
        total += tl.sum(column.to(tl.float32), 0)
        count += inside.to(tl.float32)
    to = part * tl.num_programs(2) + g
    mask = (d < D)[:, None] & (c < D)[None, :]
    tl.store(square_ptr + to * D * D + d[:, None] * D + c[None, :], square, mask=mask)
    tl.store(sum_ptr + to * D + c, total, mask=c < D)
    tl.store(count_ptr + to, tl.sum(count, 0))


@triton.jit
def summed(part_ptr, at, mask, parts, pitch):
    """Sum over the parts of what stands at places `at` of a part of `pitch` elements."""
    total = tl.load(part_ptr + at, mask=mask, other=0.0)
    for part in range(1, parts):
        total += tl.load(part_ptr + part * pitch + at, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["q_parts", "k_parts", "per_kv_head"])
def metric_kernel(
    q_square_ptr,  # (P, G, D, D) float32, see `moment_kernel`
    q_count_ptr,  # (P, G) float32
    k_square_ptr,  # (P', G_kv, D, D) float32
    k_sum_ptr,  # (P', G_kv, D) float32
    k_count_ptr,  # (P', G_kv) float32
    metric_ptr,  # (2, G_kv, D, D) float32, out: moments that measure queries, and keys
    norm_ptr,  # (2, G_kv, R) float32, out: sums of their squares
    q_parts,
    k_parts,
    per_kv_head,  # G / G_kv
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows of one moment, up to a factor: Cov(k) for queries, E[q q'] for keys."""
    g_kv, of_keys = tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_groups = tl.num_programs(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    d = tl.arange(0, BLOCK_D)  # [BD]
    mask = (r < D)[:, None] & (d < D)[None, :]
    at = r[:, None] * D + d[None, :]  # [BR, BD]
    moment = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if of_keys == 0:
        count = summed(k_count_ptr, g_kv, True, k_parts, kv_groups)
        of_row = summed(k_sum_ptr, g_kv * D + r, r < D, k_parts, kv_groups * D)
        of_column = summed(k_sum_ptr, g_kv * D + d, d < D, k_parts, kv_groups * D)
        square = summed(k_square_ptr, g_kv * D * D + at, mask, k_parts, kv_groups * D * D)
        moment += square - of_row[:, None] * (of_column / tl.maximum(count, 1.0))[None, :]
    else:
        groups = kv_groups * per_kv_head
        for head in range(0, per_kv_head):
            g = g_kv * per_kv_head + head
            # The heads of a group count the same, however many finite queries each of them has.
            count = summed(q_count_ptr, g, True, q_parts, groups)
            count = tl.where(per_kv_head > 1, tl.maximum(count, 1.0), 1.0)
            moment += summed(q_square_ptr, g * D * D + at, mask, q_parts, groups * D * D) / count
    g = of_keys * kv_groups + g_kv
    tl.store(metric_ptr + g * D * D + at, moment, mask=mask)
    to = norm_ptr + g * tl.num_programs(0) + tl.program_id(0)
    tl.store(to, tl.sum(tl.sum(moment * moment, 1), 0))


@triton.jit
def unit_norm_kernel(
    metric_ptr,  # (G, D, D) float32, in and out
    norm_ptr,  # (G, R) float32, see `metric_kernel`
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least R
    TINY: tl.constexpr,
):
    """`clustering.as_metric` of BLOCK_R rows."""
    g = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    d = tl.arange(0, BLOCK_D)  # [BD]
    p = tl.arange(0, BLOCK_P)  # [BP]
    rows = tl.num_programs(0)
    norm = tl.sqrt(tl.sum(tl.load(norm_ptr + g * rows + p, mask=p < rows, other=0.0), 0))
    mask = (r < D)[:, None] & (d < D)[None, :]
    at = metric_ptr + g * D * D + r[:, None] * D + d[None, :]
    metric = tl.load(at, mask=mask, other=0.0) / tl.maximum(norm, TINY)
    euclidean = (r[:, None] == d[None, :]).to(tl.float32)
    tl.store(at, tl.where(norm < float("inf"), metric, euclidean), mask=mask)


def logit_metrics(
    q: Tensor, k: Tensor, kinds: TokenKinds, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """`clustering.logit_metrics` with heads flattened, both (G_kv, D, D) float32.

    All query heads of a group have one metric. Sums take the place of means, because the moments
    are scaled.

    Args:
        q: (B, H, N_q, D). k: (B, H_kv, N_k, D). Last strides 1.
        kinds: kinds of the queries and keys.
        config: see `launch_config`.
    """
    groups, dim = k.shape[0] * k.shape[1], q.shape[-1]
    q_square, _, q_count = _sums(q, kinds.queries, config)
    k_square, k_sum, k_count = _sums(k, kinds.keys, config)
    blocks = ceil_div(dim, _ROWS)
    metrics = q_square.new_empty(2, groups, dim, dim)
    norms = q_square.new_empty(2, groups, blocks)
    metric_kernel[(blocks, groups, 2)](
        q_square, q_count, k_square, k_sum, k_count, metrics, norms,
        q_square.shape[0], k_square.shape[0], q.shape[1] // k.shape[1],
        D=dim, BLOCK_D=config.block_dim, BLOCK_R=_ROWS, num_warps=4, num_stages=1,
    )  # fmt: skip
    unit_norm_kernel[(blocks, 2 * groups)](
        metrics, norms, D=dim, BLOCK_D=config.block_dim, BLOCK_R=_ROWS,
        BLOCK_P=power_of_2_from(blocks), TINY=torch.finfo(torch.float32).tiny,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return metrics[0], metrics[1]


def _sums(x: Tensor, kinds: Tensor | None, config: LaunchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``x x'`` (P, G, D, D) and x (P, G, D) over the clustered tokens of P parts.

    And their numbers (P, G). All are float32.
    """
    batch, heads, tokens, dim = x.shape
    groups, tiles = batch * heads, config.moments
    columns = ceil_div(dim, tiles.columns)
    parts, chunk = parts_of(tokens, groups * columns, tiles.rows)
    square, total, count = (
        torch.empty(parts, groups, *shape, dtype=torch.float32, device=x.device)
        for shape in ((dim, dim), (dim,), ())
    )
    kind_strides = (0, 0, 0) if kinds is None else token_strides(kinds)
    moment_kernel[(parts, columns, groups)](
        x, x if kinds is None else kinds, square, total, count,
        *token_strides(x), *kind_strides, heads, tokens, chunk,
        D=dim, BLOCK_D=config.block_dim, BLOCK_C=tiles.columns, BLOCK_N=tiles.rows,
        HAS_KINDS=kinds is not None, IS_CLUSTERED=CLUSTERED,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return square, total, count
