"""First and second order: proxy tokens of every query cluster's own, exact at its centroid.

Both were forms of the operator. At equal time the Gaussian form is nearer to dense attention
(`NOTES.md`), so they live here, in plain PyTorch of any float dtype, for the fidelity bench.

A skipped block (i, j) acts on a query q of cluster i as one key ``K_ij`` with value ``V_ij``, the
means under the weights that the query centroid gives, and the logit ``s q . K_ij + bias_ij``, with
``bias_ij = log Z_ij - s q_i . K_ij``: the mass and its gradient are exact at ``q = q_i``. Second
order adds what the pooled covariances of the head make of ``q - q_i``, as the Gaussian form does of
q, see `compensation.corrections`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.fidelity import head
from benchmarks.fidelity.head import BlockScores, Head
from svg_ear_compile.kernels.clusters import Clusters
from svg_ear_compile.kernels.compensation import LARGEST_LOGIT_CORRECTION, pooled_covariances


def first_order(this: Head, density: float) -> tuple[Tensor, Tensor]:
    """The paper's blocks; the others keep their mass and mean value to first order."""
    blocks = head.score_blocks(this)
    block_mask = head.choose(this, head.error_score(this, blocks), density)
    return attend(this, block_mask, blocks, second=False), block_mask


def second_order(this: Head, density: float) -> tuple[Tensor, Tensor]:
    """`first_order` with the corrections of the pooled covariances about the centroids."""
    blocks = head.score_blocks(this)
    block_mask = head.choose(this, head.error_score(this, blocks), density)
    return attend(this, block_mask, blocks, second=True), block_mask


def bias_of(this: Head, blocks: BlockScores) -> Tensor:
    """``log Z_ij - s q_i . K_ij``, (Qc, Kc); -inf for an empty block."""
    own = torch.einsum("id,ijd->ij", this.q_centroids, blocks.mean_key)
    return blocks.log_mass - this.scale * own


def corrections_about_centroids(this: Head) -> tuple[Tensor, Tensor]:
    """Logit (N,) and value (N, D) corrections of every query; 0 for text."""
    keys = Clusters(*(x[None, None] for x in (this.k_labels, this.k_centroids, this.k_sizes)))
    of_keys, of_values = pooled_covariances(
        this.k[None, None], this.v[None, None], keys, head.value_means(this)[None]
    )
    label = this.q_labels.clamp(max=len(this.q_sizes) - 1)
    clustered = (this.q_labels < len(this.q_sizes))[:, None]
    away = torch.where(clustered, this.q - this.q_centroids[label], 0.0)
    logit = this.scale**2 / 2 * (away @ of_keys[0, 0] * away).sum(-1)
    clip = (LARGEST_LOGIT_CORRECTION / logit.clamp(min=LARGEST_LOGIT_CORRECTION)).sqrt()
    value = this.scale * (away * clip[:, None]) @ of_values[0, 0].T
    return logit.clamp(max=LARGEST_LOGIT_CORRECTION), value


def attend(this: Head, block_mask: Tensor, blocks: BlockScores, second: bool) -> Tensor:
    """Stages 4 and 5, (N, D): one softmax over exact keys and the proxy tokens of each cluster.

    Args:
        this: tokens and clusters.
        block_mask: (Qc, Kc) bool, True where computed exactly.
        blocks: what the skipped ones look like.
        second: of second order.
    """
    tokens = len(this.k)
    hidden = ~torch.nn.functional.pad(block_mask, (0, 1, 0, 1), value=True)[:, this.k_labels]
    logits = this.q.new_full((len(this.q), tokens + len(this.k_sizes)), -math.inf)
    logits[:, :tokens] = (this.scale * this.q @ this.k.T).masked_fill_(
        hidden[this.q_labels], -math.inf
    )
    rows = head.members(this.q_labels, this.q_sizes)
    index = rows.index[rows.inside]
    bias = bias_of(this, blocks).masked_fill(block_mask, -math.inf)
    proxy_logits = this.scale * this.q[rows.index] @ blocks.mean_key.transpose(1, 2) + bias[:, None]
    value_correction = None
    if second:
        logit_correction, value_correction = corrections_about_centroids(this)
        proxy_logits = proxy_logits + logit_correction[rows.index][..., None]
    logits[index, tokens:] = proxy_logits[rows.inside]
    weights = torch.softmax(logits, -1)
    out = weights[:, :tokens] @ this.v
    out[index] += (weights[:, tokens:][rows.index] @ blocks.mean_value)[rows.inside]
    if value_correction is not None:
        out += weights[:, tokens:].sum(-1, keepdim=True) * value_correction
    return out
