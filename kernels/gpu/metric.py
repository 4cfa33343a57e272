"""Metrics of k-means on a GPU: second moments of all tokens of a head, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.clustering import as_metric
from svg_ear_compile.kernels.gpu.launch import LaunchConfig, parts_of, token_strides
from svg_ear_compile.kernels.kinds import CLUSTERED, TokenKinds


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


def logit_metrics(
    q: Tensor, k: Tensor, kinds: TokenKinds, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """`clustering.logit_metrics` with heads flattened: (G, D, D) and (G_kv, D, D) float32.

    Sums take the place of means, because `as_metric` scales the moments.

    Args:
        q: (B, H, N_q, D). k: (B, H_kv, N_k, D). Last strides 1.
        kinds: kinds of the queries and keys.
        config: see `launch_config`.
    """
    per_kv_head = q.shape[1] // k.shape[1]
    squares, _, count = _sums(q, kinds.queries, config)
    # The heads of a group count the same, however many finite queries each of them has.
    of_queries = squares / count[:, None, None] if per_kv_head > 1 else squares
    of_queries = of_queries.unflatten(0, (-1, per_kv_head)).sum(1)
    squares, total, count = _sums(k, kinds.keys, config)
    of_keys = squares - total.unsqueeze(2) * (total / count[:, None]).unsqueeze(1)
    return as_metric(of_keys.repeat_interleave(per_kv_head, 0)), as_metric(of_queries)


def _sums(x: Tensor, kinds: Tensor | None, config: LaunchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``x x'`` (G, D, D) and x (G, D) over the clustered tokens, and their number (G,).

    All are float32; the number is at least 1.
    """
    batch, heads, tokens, dim = x.shape
    groups, tiles = batch * heads, config.moments
    columns = triton.cdiv(dim, tiles.columns)
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
    return square.sum(0), total.sum(0), count.sum(0).clamp(min=1)
