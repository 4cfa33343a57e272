"""Block-sparse attention of one head in plain PyTorch, in parts that rules put together.

For rules that the kernels do not have. Quick enough for whole generations on a GPU: clusters are
padded to one width and one (N, N + Kc) matrix of logits is held at a time. Notation as in
`kernels/reference.py`; tokens labelled Qc or Kc are text and exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.reference import Clusters


@dataclass(frozen=True)
class Head:
    """Tokens of one head and their clusters.

    Attributes:
        q, k, v: (N, D) of one float dtype.
        q_labels, k_labels: (N,) int64, Qc or Kc for text.
        q_centroids, k_centroids: (Qc, D) and (Kc, D).
        q_sizes, k_sizes: (Qc,) and (Kc,) int64.
        scale: of the logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_labels: Tensor
    k_labels: Tensor
    q_centroids: Tensor
    k_centroids: Tensor
    q_sizes: Tensor
    k_sizes: Tensor
    scale: float

    @property
    def centroid_logits(self) -> Tensor:
        """``c_ij``, (Qc, Kc)."""
        return self.scale * self.q_centroids @ self.k_centroids.T


def heads_of(
    q: Tensor, k: Tensor, v: Tensor, queries: Clusters, keys: Clusters, scale: float
) -> list[tuple[tuple[int, int], Head]]:
    """Every head of (B, H, N, D) tensors with its place in the batch, clusters as given."""
    return [
        (
            (b, h),
            Head(
                q[b, h], k[b, h], v[b, h],
                queries.labels[b, h], keys.labels[b, h],
                queries.centroids[b, h], keys.centroids[b, h],
                queries.sizes[b, h], keys.sizes[b, h], scale,
            ),
        )
        for b in range(q.shape[0])
        for h in range(q.shape[1])
    ]  # fmt: skip


@dataclass(frozen=True)
class Members:
    """Tokens of every cluster, padded to the largest.

    Attributes:
        index: (C, M) int64 places of the tokens.
        inside: (C, M) bool, False where there is none.
    """

    index: Tensor
    inside: Tensor


def members(labels: Tensor, sizes: Tensor) -> Members:
    """Tokens by cluster of (N,) labels, in token order within a cluster."""
    order = labels.argsort(stable=True)
    slot = torch.arange(int(sizes.max()), device=labels.device)
    place = (sizes.cumsum(0) - sizes)[:, None] + slot
    inside = slot < sizes[:, None]
    return Members(order[place.clamp(max=len(labels) - 1)], inside)


@dataclass(frozen=True)
class Blocks:
    """What blocks look like from their query centroids; see `reference.Probe`.

    Attributes:
        log_error, log_mass: (Qc, Kc).
        mean_key, mean_value: (Qc, Kc, D).
    """

    log_error: Tensor
    log_mass: Tensor
    mean_key: Tensor
    mean_value: Tensor


def probe(head: Head) -> Blocks:
    """Stage 2, every block of a head; an empty block has log_error and log_mass -inf."""
    keys = members(head.k_labels, head.k_sizes)
    inside = keys.inside[:, None]  # [Kc, 1, M]
    logits = head.scale * head.q_centroids @ head.k.T  # [Qc, N]
    block = logits[:, keys.index].transpose(0, 1)  # [Kc, Qc, M]
    block = block.masked_fill(~inside, -math.inf)
    shift = block.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weight = (block - shift).exp()
    mass = weight.sum(-1)
    k, v = head.k[keys.index], head.v[keys.index]  # [Kc, M, D]
    center = (v * keys.inside[..., None]).sum(1) / head.k_sizes.clamp(min=1)[:, None]
    spread = (v - center[:, None]) * keys.inside[..., None]  # sums to zero: nothing cancels below
    central = (head.centroid_logits.T[..., None] - shift).exp()
    lag = (weight - central) * inside
    error = (
        lag.square().sum(-1) * center.square().sum(-1)[:, None]
        + 2 * ((weight * lag) @ (spread @ center[..., None])).squeeze(-1)
        + (weight.square() @ spread.square().sum(-1, keepdim=True)).squeeze(-1)
    )
    divisor = mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    return Blocks(
        (error.clamp(min=0).log() + 2 * shift.squeeze(-1)).T,
        (mass.log() + shift.squeeze(-1)).T,
        ((weight @ k) / divisor).transpose(0, 1),
        ((weight @ v) / divisor).transpose(0, 1),
    )


def error_score(head: Head, blocks: Blocks, cost_exponent: float = 1.0) -> Tensor:
    """The paper's score ``log E_ij - gamma log(m_i n_j)``, (Qc, Kc)."""
    area = head.q_sizes[:, None] * head.k_sizes
    return blocks.log_error - cost_exponent * area.clamp(min=1).to(blocks.log_error.dtype).log()


def mass_score(head: Head) -> Tensor:
    """SVG2's score, the mass of a block by centroids: ``c_ij + log n_j``, (Qc, Kc)."""
    return head.centroid_logits + head.k_sizes.to(head.q_centroids.dtype).log()


def choose(head: Head, score: Tensor, density: float) -> Tensor:
    """In every row the best blocks while the area before them is below the budget, (Qc, Kc) bool.

    The budget is that of `reference.area_budget`.
    """
    occupied = head.k_sizes > 0
    budget = math.ceil(density * int(head.k_sizes.sum()))
    weight = head.k_sizes.to(score.dtype).expand_as(score)
    limit = torch.full_like(score[:, 0], budget)
    return reference.take_until(score.masked_fill(~occupied, -math.inf), weight, limit) & occupied


@dataclass(frozen=True)
class StandIns:
    """One key, value and logit bias for each block that is not exact.

    Attributes:
        key, value: (Qc, Kc, D), or (1, Kc, D) where all query clusters share them.
        bias: (Qc, Kc).
        curvature: (Kc, D) or None; the logit grows by ``sum_d dq_d^2 curvature_d``, dq = q - q_i,
            at most by `LARGEST_GROWTH`.
        moves: (Qc, D, D) or None; what stand-ins give is moved by ``moves dq`` times their weight.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    curvature: Tensor | None = None
    moves: Tensor | None = None


def centroid_stand_ins(head: Head) -> StandIns:
    """The paper's: means of keys and values, and ``log n_j``."""
    value, _ = reference.cluster_means(
        head.v[None, None], head.k_labels[None, None], len(head.k_sizes)
    )
    bias = head.k_sizes.to(head.q_centroids.dtype).log().expand(len(head.q_sizes), -1)
    return StandIns(head.k_centroids[None], value[0, 0][None], bias)


def first_order_stand_ins(head: Head, blocks: Blocks) -> StandIns:
    """Posterior means at the query centroid and ``log Z_ij - s q_i . K_ij``."""
    own = head.scale * torch.einsum("id,ijd->ij", head.q_centroids, blocks.mean_key)
    return StandIns(blocks.mean_key, blocks.mean_value, blocks.log_mass - own)


LARGEST_GROWTH = 0.5
"""Far from its centroid a query sees the few keys that it is near to, and no Gaussian: without a
limit late layers lose more than they gain."""

Mass = Literal["first order", "isotropic", "diagonal"]
"""How far a stand-in's mass follows a query away from its centroid."""


def second_order_stand_ins(
    head: Head, blocks: Blocks, exact: Tensor, mass: Mass = "diagonal"
) -> StandIns:
    """First-order stand-ins and what they leave out, under one covariance for a key cluster.

    Under weights ``e^{s q.k}`` a cluster of jointly Gaussian keys and values keeps its covariance
    whatever the query, its mean value moves by ``s Cov(v, k) dq`` and its log-mass by the slope and
    ``s^2/2 dq' Cov(k, k) dq``, exactly. So ``Cov_j`` of the cluster's own tokens serves every query
    cluster i, with ``dq = q - q_i``:

    * values: what stand-ins give to a query is moved by their weight times ``T_i dq``, where
      ``T_i = s sum_j p_ij Cov_j(v, k)`` with ``p_ij`` the masses of the skipped blocks at the query
      centroid, together 1: one (D, D) matrix for a query cluster, by one (Qc, Kc) by (Kc, D D)
      product;
    * mass: a stand-in's logit grows by ``s^2/2 sum_d dq_d^2 Var_j(k_d)``, at most by
      `LARGEST_GROWTH`; or with `mass` "isotropic" by ``s^2/2 |dq|^2`` times the mean of the
      variances, with "first order" not at all.

    Args:
        head, blocks, exact: see `probe` and `attend`.
        mass: order of the mass.
    """
    keys = members(head.k_labels, head.k_sizes)
    sizes = head.k_sizes.clamp(min=1)[:, None, None]
    inside = keys.inside[..., None]
    v, k = (x[keys.index] * inside for x in (head.v, head.k))  # [Kc, M, D]
    v, k = ((x - x.sum(1, keepdim=True) / sizes) * inside for x in (v, k))
    covariance = v.transpose(1, 2) @ k / sizes  # [Kc, D, D]
    skipped = blocks.log_mass.masked_fill(exact, -math.inf)
    share = torch.softmax(skipped, -1).nan_to_num(0.0)  # a row may have no skipped block
    moves = head.scale * (share @ covariance.flatten(1)).unflatten(1, covariance.shape[1:])
    variance = k.square().sum(1) / sizes[..., 0]  # [Kc, D]
    if mass == "isotropic":
        variance = variance.mean(-1, keepdim=True).expand_as(variance)
    curvature = None if mass == "first order" else 0.5 * head.scale**2 * variance
    return replace(first_order_stand_ins(head, blocks), curvature=curvature, moves=moves)


def attend(head: Head, exact: Tensor, stand_ins: StandIns | None) -> Tensor:
    """Stages 4 and 5, (N, D): one softmax over exact keys and stand-ins, or exact keys alone."""
    clusters = len(head.k_sizes)
    tokens = len(head.k)
    hidden = ~torch.nn.functional.pad(exact, (0, 1, 0, 1), value=True)[:, head.k_labels]
    if stand_ins is None:
        logits = head.scale * head.q @ head.k.T
        return torch.softmax(logits.masked_fill_(hidden[head.q_labels], -math.inf), -1) @ head.v
    rows = members(head.q_labels, head.q_sizes)
    shared = stand_ins.key.shape[0] == 1
    key = stand_ins.key[0] if shared else head.k_centroids  # others are filled in below
    logits = head.scale * head.q @ torch.cat([head.k, key]).T  # [N, N_k + Kc]
    if not shared:
        mine = head.scale * head.q[rows.index] @ stand_ins.key.transpose(1, 2)  # [Qc, M, Kc]
        logits[rows.index[rows.inside], tokens:] = mine[rows.inside]
    # Exact and empty blocks have no stand-in; text queries (row Qc) have none at all.
    bias = torch.nn.functional.pad(
        stand_ins.bias.masked_fill(exact | (head.k_sizes == 0), -math.inf), (0, 0, 0, 1),
        value=-math.inf,
    )  # fmt: skip
    logits[:, tokens:] += bias[head.q_labels]
    away = torch.zeros_like(head.q)
    apart = head.q[rows.index] - head.q_centroids[:, None]  # [Qc, M, D]
    away[rows.index[rows.inside]] = apart[rows.inside]
    if stand_ins.curvature is not None:
        growth = away.square() @ stand_ins.curvature.T
        logits[:, tokens:] += growth.clamp(max=LARGEST_GROWTH)
    hidden = torch.nn.functional.pad(hidden, (0, clusters))
    weights = torch.softmax(logits.masked_fill_(hidden[head.q_labels], -math.inf), -1)
    if stand_ins.value.shape[0] == 1 and stand_ins.moves is None:
        return weights @ torch.cat([head.v, stand_ins.value[0]])
    out = weights[:, :tokens] @ head.v
    mine = weights[:, tokens:][rows.index]  # [Qc, M, Kc]
    theirs = mine @ stand_ins.value
    if stand_ins.moves is not None:
        theirs += mine.sum(-1, keepdim=True) * (apart @ stand_ins.moves.transpose(1, 2))
    out[rows.index[rows.inside]] += theirs[rows.inside]
    return out
