"""Block-sparse attention of one head in plain PyTorch, in parts that rules put together.

For rules that the kernels do not have. Quick enough for whole generations on a GPU: clusters are
padded to one width and one (N, N + Kc) matrix of logits is held at a time. Notation as in
`kernels/reference.py`; tokens labelled Qc or Kc are text and exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.clusters import Clusters


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
class BlockScores:
    """What blocks look like from their query centroids; see `routing.BlockScores`.

    Attributes:
        log_error, log_mass: (Qc, Kc).
        mean_key, mean_value: (Qc, Kc, D), means under the weights of the query centroid.
    """

    log_error: Tensor
    log_mass: Tensor
    mean_key: Tensor
    mean_value: Tensor


def score_blocks(head: Head) -> BlockScores:
    """Stage 2, every block of a head; an empty block has log_error and log_mass -inf."""
    keys = members(head.k_labels, head.k_sizes)
    inside = keys.inside[:, None]  # [Kc, 1, M]
    logits = head.scale * head.q_centroids @ head.k.T  # [Qc, N]
    block = logits[:, keys.index].transpose(0, 1)  # [Kc, Qc, M]
    block = block.masked_fill(~inside, -math.inf)
    shift = block.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weight = (block - shift).exp()
    mass = weight.sum(-1)
    v = head.v[keys.index]  # [Kc, M, D]
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
    return BlockScores(
        (error.clamp(min=0).log() + 2 * shift.squeeze(-1)).T,
        (mass.log() + shift.squeeze(-1)).T,
        ((weight @ head.k[keys.index]) / divisor).transpose(0, 1),
        ((weight @ v) / divisor).transpose(0, 1),
    )


def error_score(head: Head, blocks: BlockScores) -> Tensor:
    """The paper's score ``log E_ij - log(m_i n_j)``, (Qc, Kc)."""
    area = head.q_sizes[:, None] * head.k_sizes
    return blocks.log_error - area.clamp(min=1).to(blocks.log_error.dtype).log()


def mass_score(head: Head) -> Tensor:
    """SVG2's score, the mass of a block by centroids: ``c_ij + log n_j``, (Qc, Kc)."""
    return head.centroid_logits + head.k_sizes.to(head.q_centroids.dtype).log()


def choose(head: Head, score: Tensor, density: float) -> Tensor:
    """In every row the best blocks while the area before them is below the budget, (Qc, Kc) bool.

    The budget is that of `routing.area_budget`.
    """
    occupied = head.k_sizes > 0
    budget = math.ceil(density * int(head.k_sizes.sum()))
    weight = head.k_sizes.to(score.dtype).expand_as(score)
    limit = torch.full_like(score[:, 0], budget)
    return reference.take_until(score.masked_fill(~occupied, -math.inf), weight, limit) & occupied


def value_means(head: Head) -> Tensor:
    """Mean value of every key cluster, (1, Kc, D): what skipped blocks give in the paper."""
    means, _ = reference.cluster_means(
        head.v[None, None], head.k_labels[None, None], len(head.k_sizes)
    )
    return means[0]


def attend(head: Head, block_mask: Tensor, proxies: Tensor | None) -> Tensor:
    """Stages 4 and 5, (N, D): one softmax over exact keys and proxy tokens, or exact keys alone.

    Args:
        head: tokens and clusters.
        block_mask: (Qc, Kc) bool, True where computed exactly.
        proxies: value of every other block, (Qc, Kc, D), or (1, Kc, D) where all query clusters
            use the same; their logits are ``c_ij + log n_j`` at the query instead of its centroid.
    """
    tokens = len(head.k)
    hidden = ~torch.nn.functional.pad(block_mask, (0, 1, 0, 1), value=True)[:, head.k_labels]
    if proxies is None:
        logits = head.scale * head.q @ head.k.T
        return torch.softmax(logits.masked_fill_(hidden[head.q_labels], -math.inf), -1) @ head.v
    logits = head.scale * head.q @ torch.cat([head.k, head.k_centroids]).T  # [N, N_k + Kc]
    logits[:, tokens:] += head.k_sizes.to(head.q.dtype).log()
    # Exact and empty blocks have no proxy token; text queries (row Qc) have none at all.
    without = torch.nn.functional.pad(block_mask | (head.k_sizes == 0), (0, 0, 0, 1), value=True)
    hidden = torch.cat([hidden, without], 1)
    weights = torch.softmax(logits.masked_fill_(hidden[head.q_labels], -math.inf), -1)
    if proxies.shape[0] == 1:
        return weights @ torch.cat([head.v, proxies[0]])
    out = weights[:, :tokens] @ head.v
    rows = members(head.q_labels, head.q_sizes)
    mine = weights[:, tokens:][rows.index]  # [Qc, M, Kc]
    out[rows.index[rows.inside]] += (mine @ proxies)[rows.inside]
    return out
