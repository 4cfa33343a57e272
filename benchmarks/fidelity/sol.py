"""Sol-Attn (arXiv 2607.24027) in plain PyTorch, from its description: the published rival.

Tokens are cut into blocks of 64 in the order in which they lie. Block i of the queries and block j
of the keys have the proxy score ``a_ij = s q_i . k_j`` of their means. The blocks with the largest
scores are computed exactly: a fixed fraction of every row ("top-k"), or all that lie more than tau
standard deviations above the row's mean ("tau"; the deviation is that of keys whose features are
independent). The diagonal block and its two neighbours are always exact. Each of the others acts on
a query q as one term ``n_j e^{s q . k_j} v_j``.

The wheel `comfy-kitchen` can route single tokens in addition ("augmented"): the keys outside of the
exact blocks with the largest logit at the mean query become exact. Each of the others is a term of
its own, whose logit is that of the mean query, ``s q_i . (k_t - k)`` about the mean k of all keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from svg_ear_compile.kernels.plan import AttentionPlan

BLOCK = 64
"""Tokens of a block."""

_CUBE = 4  # tokens of each axis in a cube of BLOCK
_BLOCKS_AT_ONCE = 8  # blocks of queries whose logits are held

Grid = tuple[int, int, int]
Order = Literal["raster", "cubes"]


@dataclass(frozen=True)
class SolAttn:
    """One way to use it.

    Attributes:
        order: of the video tokens. ``"cubes"`` lays 4 x 4 x 4 tokens of space and time together.
        keeps_rest: whether a term stands for what is not exact; else it is dropped.
        augmented: keys of each block of queries that are routed one by one.
    """

    order: Order = "raster"
    keeps_rest: bool = True
    augmented: int = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, text: int, grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Attention, and the number of exact pairs of video tokens.

        Args:
            q, k, v: (B, H, N, D), the video tokens in raster order of `grid`, then text. Text keys
                are exact for every query, and text queries attend to everything.
            plan: ``routing="threshold"`` chooses by its `threshold`, which is tau; else `density`
                is the fraction of the blocks of a row.
            text: text tokens.
            grid: frames, rows and columns of the video tokens.

        Returns:
            (B, H, N, D) in the dtype of q, and () float64.
        """
        order = places(self.order, q, text, grid)
        out = torch.empty_like(q)
        pairs = torch.zeros((), dtype=torch.float64, device=q.device)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                wide = [x if x.dtype == torch.float64 else x.float() for x in (q, k, v)]
                head = [x[b, h, order] for x in wide]
                found, exact = self._one_head(*head, plan, text)
                out[b, h, order] = found.to(out.dtype)
                pairs += exact
        return out, pairs

    def _one_head(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, text: int
    ) -> tuple[Tensor, Tensor]:
        """(N, D) and the exact pairs of one head whose tokens lie in order."""
        tokens, dim = q.shape
        scale, video = dim**-0.5, tokens - text
        block = torch.arange(video, device=q.device) // BLOCK
        blocks = math.ceil(video / BLOCK)
        sizes = block.bincount(minlength=blocks).to(q.dtype)
        mean_q, mean_k, mean_v = (
            torch.zeros(blocks, dim, dtype=x.dtype, device=x.device).index_add_(0, block, x[:video])
            / sizes[:, None]
            for x in (q, k, v)
        )
        score = scale * mean_q @ mean_k.T
        if plan.routing == "threshold":
            chosen = above_deviations(score, scale * mean_q, mean_k, plan.threshold)
        else:
            chosen = largest(score, plan.density)
        place = torch.arange(blocks, device=q.device)
        chosen |= (place[:, None] - place).abs() <= 1
        exact = torch.ones(blocks, tokens, dtype=torch.bool, device=q.device)
        exact[:, :video] = chosen[:, block]
        if self.augmented:
            of_tokens = scale * mean_q @ k[:video].T
            exact[:, :video] |= _largest_outside(of_tokens, exact[:, :video], self.augmented)
        out = torch.empty_like(q)
        out[video:] = torch.softmax(scale * q[video:] @ k.T, -1) @ v
        out[:video], lse = _attend(q[:video], k, v, exact, scale)
        if self.keeps_rest:
            if self.augmented:
                rest = of_tokens.masked_fill(exact[:, :video], -math.inf)
                rest_out, rest_lse = (x[block] for x in _softmax(rest, v[:video]))
                rest_lse += scale * (q[:video] - mean_q[block]) @ mean_k.mean(0)
            else:
                rest = scale * q[:video] @ mean_k.T + sizes.log()
                rest_out, rest_lse = _softmax(rest.masked_fill(chosen[block], -math.inf), mean_v)
            # One softmax over exact keys and terms.
            share = torch.sigmoid(rest_lse - lse)[:, None]
            out[:video] = (1 - share) * out[:video] + share * rest_out
        return out, (exact[:, :video].sum(1, dtype=torch.float64) * sizes).sum()


def places(order: Order, q: Tensor, text: int, grid: Grid) -> Tensor:
    """(N,) int64 places of the tokens of q (B, H, N, D) in an order, text last."""
    found = torch.arange(q.shape[2], device=q.device)
    if order == "cubes":
        found[: len(found) - text] = cube_order(grid).to(q.device)
    return found


def largest(score: Tensor, fraction: float) -> Tensor:
    """The largest scores of each row (R, C): a fraction of them, at least one; (R, C) bool."""
    count = min(score.shape[1], max(1, round(fraction * score.shape[1])))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(count).indices, True)


def above_deviations(score: Tensor, query: Tensor, keys: Tensor, tau: float) -> Tensor:
    """Scores (R, C) more than tau deviations above their row's mean; (R, C) bool.

    Args:
        score: products of `query` and `keys`.
        query: (R, D) mean queries times the scale.
        keys: (C, D) mean keys, whose features count as independent.
        tau: deviations.
    """
    deviation = (query.square() @ keys.var(0, correction=0)).sqrt()
    return score > score.mean(1, keepdim=True) + tau * deviation[:, None]


@cache  # every call of every step asks, and the sort is the CPU's
def cube_order(grid: Grid) -> Tensor:
    """(N,) int64 places of the tokens of a grid, cube by cube; cubes at the far sides are cut."""
    axes = [torch.arange(n) for n in grid]
    t, y, x = (part.flatten() for part in torch.meshgrid(*axes, indexing="ij"))
    cubes = [math.ceil(n / _CUBE) for n in grid]
    cube = (t // _CUBE * cubes[1] + y // _CUBE) * cubes[2] + x // _CUBE
    return cube.argsort(stable=True)


def _largest_outside(logits: Tensor, exact: Tensor, count: int) -> Tensor:
    """The `count` largest logits of each row (R, N) that are not exact, or all of them."""
    outside = logits.masked_fill(exact, -math.inf)
    top = outside.topk(min(count, logits.shape[1])).indices
    found = torch.zeros_like(exact).scatter_(1, top, True)
    return found & ~exact


def _attend(q: Tensor, k: Tensor, v: Tensor, exact: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exact keys alone, of queries (M, D) in blocks: out (M, D) and log-sum-exp (M,).

    Args:
        q: (M, D), `BLOCK` queries for each row of `exact`, fewer for the last.
        k, v: (N, D).
        exact: (R, N) bool, keys that the queries of a block see; at least one.
        scale: of the logits.
    """
    rows_at_once = BLOCK * _BLOCKS_AT_ONCE
    outs, totals = [], []
    for rows, seen in zip(q.split(rows_at_once), exact.split(_BLOCKS_AT_ONCE), strict=True):
        logits = scale * rows @ k.T
        logits.masked_fill_(~seen.repeat_interleave(BLOCK, 0)[: len(rows)], -math.inf)
        out, total = _softmax(logits, v)
        outs.append(out)
        totals.append(total)
    return torch.cat(outs), torch.cat(totals)


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean values (R, D) and log-sum-exp (R,) of logits (R, N); 0 and -inf where all are -inf."""
    total = logits.logsumexp(1)
    return (logits - total.masked_fill(total == -math.inf, 0.0)[:, None]).exp() @ values, total
