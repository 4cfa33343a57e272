"""Stage 3 in plain PyTorch: routing chooses the exact blocks from the block scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Clusters
from svg_ear_compile.kernels.plan import AttentionPlan


class BlockScores(NamedTuple):
    """Scores of every block, computed with its query centroid, all (B, H, Qc, Kc).

    Attributes:
        log_error: natural log of ``E_ij``, the error of compensating the block as the paper
            estimates it.
        log_mass: ``log Z_ij``, where ``Z_ij = sum_t exp(a_it)`` over the keys of the block.
        centroid_logit: ``c_ij = s q_i . k_j``.
    """

    log_error: Tensor
    log_mass: Tensor
    centroid_logit: Tensor


def take_until(score: Tensor, weight: Tensor, budget: Tensor) -> Tensor:
    """Entries of each row in falling order of score, while the weight before is below the budget.

    The entry with which the weight reaches the budget is taken. Ties go to the lowest index. NaN
    counts as the highest score.

    Args:
        score, weight: (..., K); weights are not negative.
        budget: (...).

    Returns:
        (..., K) bool, True for the entries that are taken.
    """
    ranked = score.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    sorted_weight = weight.gather(-1, order)
    before = sorted_weight.cumsum(-1) - sorted_weight
    return torch.zeros_like(order, dtype=torch.bool).scatter(
        -1, order, before < budget.unsqueeze(-1)
    )


def error_per_area(scores: BlockScores, queries: Clusters, keys: Clusters) -> Tensor:
    """``log E_ij - log(m_i n_j)``, (B, H, Qc, Kc); -inf for an empty block."""
    area = queries.sizes.unsqueeze(-1) * keys.sizes.unsqueeze(-2)
    score = scores.log_error - area.clamp(min=1).to(scores.log_error.dtype).log()
    return score.masked_fill(area == 0, -math.inf)


def area_budget(keys: Clusters, plan: AttentionPlan) -> Tensor:
    """Keys that the exact blocks of a row may have before the last one, (B, H) float64.

    ``density * sum_j n_j`` is rounded up in float64, so that every dtype has the same budget.
    """
    return torch.ceil(plan.density * keys.sizes.sum(-1).double())


def route(scores: BlockScores, queries: Clusters, keys: Clusters, plan: AttentionPlan) -> Tensor:
    """Stage 3. The block mask (B, H, Qc, Kc) bool, True for blocks computed exactly.

    * ``"density"``: in every row the blocks of largest error per area, while the area before is
      below ``density * sum_j n_j``.
    * ``"top_p"``: the same with the budget of the paper, which is the area of the smallest set of
      blocks that holds ``top_p`` of ``softmax_j(c_ij + log n_j)``. The first ``min_block_ratio``
      of the row's blocks by that softmax are always taken, and their area counts.
    * ``"threshold"``: every block with ``rho_ij = E_ij / (Z_i^2 n_j) >= threshold``, where
      ``Z_i = sum_t exp(a_it)`` over the clustered keys. ``rho`` does not change when one vector is
      added to all keys, so one threshold fits all rows, heads and layers.
    """
    sizes = keys.sizes.unsqueeze(-2).to(scores.log_error.dtype).expand_as(scores.log_error)
    occupied = sizes > 0
    if plan.is_dense:
        return occupied
    score = error_per_area(scores, queries, keys)
    total = sizes.sum(-1)
    if plan.routing == "density":
        return take_until(score, sizes, area_budget(keys, plan).unsqueeze(-1)) & occupied
    if plan.routing == "threshold":
        log_row_mass = torch.logsumexp(scores.log_mass, -1, keepdim=True)
        log_rho = scores.log_error - 2 * log_row_mass - sizes.clamp(min=1).log()
        log_threshold = math.log(plan.threshold) if plan.threshold > 0 else -math.inf
        return (log_rho.nan_to_num(nan=math.inf, posinf=math.inf) >= log_threshold) & occupied
    mass_logit = (scores.centroid_logit + sizes.log()).masked_fill(~occupied, -math.inf)
    mass = torch.softmax(mass_logit, -1).nan_to_num(0.0)
    top_p = take_until(mass_logit, mass, torch.full_like(total, plan.top_p)) & occupied
    budget = (top_p * sizes).sum(-1)
    floor_count = torch.ceil(plan.min_block_ratio * occupied.sum(-1).to(total.dtype))
    guaranteed = take_until(mass_logit, torch.ones_like(sizes), floor_count) & occupied
    left = budget - (guaranteed * sizes).sum(-1)
    best = take_until(score, sizes.masked_fill(guaranteed, 0.0), left)
    return guaranteed | (best & occupied)


def row_area(block_mask: Tensor, keys: Clusters) -> Tensor:
    """(B, H, Qc) int64, number of keys computed exactly in each row of blocks."""
    return (block_mask * keys.sizes.unsqueeze(2)).sum(-1)
