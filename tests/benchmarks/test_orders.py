"""First and second order in float64: where they are exact, and how fast they become so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.fidelity import head, orders
from benchmarks.fidelity.head import Head
from svg_ear_compile.kernels import reference

SEEDS = st.integers(0, 2**31 - 1)


def labelled_head(seed: int, radius: float = 1.0) -> Head:
    """19 queries in 3 clusters of that radius and 2 of text, 23 keys in 5, labels at random."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def labels(tokens: int, clusters: int) -> Tensor:
        drawn = torch.randint(clusters, (tokens,), generator=generator)
        drawn[: 2 * clusters] = torch.arange(clusters).repeat(2)
        return drawn

    q_labels, k_labels = labels(19, 3), labels(23, 5)
    k, v, spread, centers = randn(23, 6), randn(23, 6), randn(19, 6), randn(3, 6)
    means, q_sizes = reference.cluster_means(spread[None, None], q_labels[None, None], 3)
    q = centers[q_labels] + radius * (spread - means[0, 0][q_labels])
    k_centroids, k_sizes = reference.cluster_means(k[None, None], k_labels[None, None], 5)
    q, q_labels = torch.cat([q, randn(2, 6)]), torch.cat([q_labels, q_labels.new_full((2,), 3)])
    return Head(
        q, k, v, q_labels, k_labels, centers, k_centroids[0, 0], q_sizes[0, 0], k_sizes[0, 0],
        6**-0.5,
    )  # fmt: skip


def error(this: Head, exact: Tensor, second: bool) -> float:
    dense = (this.scale * this.q @ this.k.T).softmax(-1) @ this.v
    found = orders.attend(this, exact, head.score_blocks(this), second)
    return float((found - dense).norm())


@pytest.mark.parametrize("second", [False, True])
@given(seed=SEEDS)
def test_both_are_exact_at_the_query_centroid_and_for_text(second: bool, seed: int) -> None:
    exact = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.4
    assert error(labelled_head(seed, 0.0), exact, second) < 1e-10


@given(seed=SEEDS)
def test_the_mass_has_its_value_and_its_gradient_at_the_query_centroid(seed: int) -> None:
    this = labelled_head(seed)
    blocks = head.score_blocks(this)
    center = this.q_centroids.clone().requires_grad_()
    for j in range(5):
        mass = (this.scale * center @ this.k[this.k_labels == j].T).logsumexp(-1)
        logit = this.scale * (center * blocks.mean_key[:, j]).sum(-1)
        torch.testing.assert_close(logit + orders.bias_of(this, blocks)[:, j], mass)
        (slope,) = torch.autograd.grad(mass.sum(), center)
        torch.testing.assert_close(this.scale * blocks.mean_key[:, j], slope)


@given(seed=SEEDS)
def test_the_error_of_first_order_falls_with_the_radius_of_the_query_cluster(seed: int) -> None:
    none = torch.zeros(3, 5, dtype=torch.bool)
    wide, narrow = (error(labelled_head(seed, r), none, False) for r in (2e-3, 1e-3))
    assert 1.9 < wide / narrow < 2.1


def test_second_order_serves_values_that_follow_their_keys() -> None:
    this = labelled_head(3, 0.3)
    turn = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    this = Head(**{**vars(this), "v": this.k @ turn})
    none = torch.zeros(3, 5, dtype=torch.bool)
    assert error(this, none, True) < 0.8 * error(this, none, False)
