"""FlexAttention on the 128 x 128 tiles that cover the chosen blocks: the baseline off the shelf.

Tokens are sorted by cluster, and a tile is computed where any of its query-key pairs is in an exact
block. What it computes beyond those is waste; it has no compensation, and sorting is not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.attention.gate import GATE, relative_error
from benchmarks.attention.inputs import Inputs, exact_pairs
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import sparse_attention

TILE = 128


def covering_tiles(result: Result, queries: Tensor, keys: Tensor) -> Tensor:
    """Which tiles of sorted tokens hold a pair of an exact block, (B, H, T_q, T_k) bool.

    Args:
        result: labels and block mask.
        queries, keys: (B, H, N) labels in sorted order; text is exact for and with everything.
    """
    exact = torch.nn.functional.pad(result.block_mask, (0, 1, 0, 1), value=True).float()

    def members(labels: Tensor, clusters: int) -> Tensor:
        tiles = -(-labels.shape[-1] // TILE)
        found = labels.new_zeros(*labels.shape[:2], tiles, clusters + 1, dtype=torch.float32)
        place = torch.arange(labels.shape[-1], device=labels.device) // TILE
        index = place * (clusters + 1) + labels.long()  # [B, H, N]
        return found.flatten(2).scatter_(2, index, 1.0).view_as(found)

    q = members(queries, result.block_mask.shape[2])  # [B, H, T_q, Qc + 1]
    k = members(keys, result.block_mask.shape[3])  # [B, H, T_k, Kc + 1]
    return (q @ exact @ k.transpose(2, 3)) > 0


def block_mask(tiles: Tensor, tokens: int) -> BlockMask:
    """FlexAttention's mask that computes these tiles (B, H, T, T) whole."""
    counts = tiles.sum(-1, dtype=torch.int32)
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=TILE, seq_lengths=(tokens, tokens), compute_q_blocks=False
    )


def flex_row(
    inputs: Inputs,
    plan: AttentionPlan,
    dense_out: Tensor,
    timed: Callable[[Callable[[], object]], list[float]],
) -> dict[str, Any]:
    """One row: FlexAttention on the tiles that cover the blocks a plan chooses.

    Args:
        inputs: what is attended to.
        plan: chooses the blocks.
        dense_out: (B, H, N, D), what dense attention makes of the inputs.
        timed: raw milliseconds of a call.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    tokens, dim = q.shape[2:]
    result = sparse_attention(q, k, v, plan, kinds=exact_at_ends(q, k, 0, inputs.text))
    q_order = result.queries.labels.argsort(dim=-1, stable=True)
    k_order = result.keys.labels.argsort(dim=-1, stable=True)

    def sorted_by(x: Tensor, order: Tensor) -> Tensor:
        return x.gather(2, order.unsqueeze(-1).expand_as(x)).contiguous()

    sorted_q, sorted_k, sorted_v = (
        sorted_by(x, order) for x, order in ((q, q_order), (k, k_order), (v, k_order))
    )
    tiles = covering_tiles(
        result, result.queries.labels.gather(2, q_order), result.keys.labels.gather(2, k_order)
    )
    mask = block_mask(tiles, tokens)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        out: Tensor = compiled(sorted_q, sorted_k, sorted_v, block_mask=mask)
        return out

    taken = tiles[0, -1, 0].repeat_interleave(TILE)[:tokens]  # keys of the last head's first tile
    row = slice(0, min(TILE, tokens))
    logits = dim**-0.5 * sorted_q[0, -1, row].double() @ sorted_k[0, -1].double().T
    weights = logits.masked_fill(~taken, -torch.inf).softmax(-1)
    gate = relative_error(call()[0, -1, row], weights @ sorted_v[0, -1].double())
    found: dict[str, Any] = {"form": "flex", "gate": gate}
    if not gate < GATE:
        return found
    samples = timed(call)
    exact, computed = exact_pairs(result, inputs), float(tiles.sum()) * TILE**2
    ms = statistics.median(samples)
    return found | {
        "samples_ms": samples,
        "error": relative_error(call(), sorted_by(dense_out, q_order)),
        "useful_tflops": 4.0 * exact * dim / ms / 1e9,
        "computed_tflops": 4.0 * computed * dim / ms / 1e9,
        "waste": computed / exact,
    }
