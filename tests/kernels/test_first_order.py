"""First-order compensation in float64: what it leaves out, and how fast that vanishes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled import Labelled, block_log_masses
from torch import Tensor

from svg_ear_compile.kernels import cpu, reference
from svg_ear_compile.kernels.plan import AttentionPlan

SEEDS = st.integers(0, 2**31 - 1)


def block_means(case: Labelled, q: Tensor, of: Tensor) -> Tensor:
    """(1, 2, rows, Kc, D), the mean of `of` in every block under the weights that q gives it."""
    logits = case.scale * q @ case.k.transpose(2, 3)  # [1, 2, rows, N]
    member = torch.nn.functional.one_hot(case.k_labels, case.k_clusters).bool().transpose(2, 3)
    blocks = logits.unsqueeze(3).masked_fill(~member.unsqueeze(2), -torch.inf)
    return blocks.softmax(-1) @ of.unsqueeze(2)


def covariance(case: Labelled, center: Tensor) -> Tensor:
    """``Cov_ij(v, k)`` under the block's weights at the query centroids, (1, 2, Qc, Kc, D, D)."""
    products = (case.v.unsqueeze(-1) * case.k.unsqueeze(-2)).flatten(-2)
    joint = block_means(case, center, products).unflatten(-1, (case.dim, case.dim))
    v, k = block_means(case, center, case.v), block_means(case, center, case.k)
    return joint - v.unsqueeze(-1) * k.unsqueeze(-2)


def shrunk(seed: int, radius: float) -> tuple[Labelled, Tensor]:
    """A case whose queries lie about their centroids within a radius, and the centroids."""
    case = Labelled(seed)
    at_label = case.q_labels.unsqueeze(-1).expand(-1, -1, -1, case.dim)
    spread = case.randn(1, 2, 19, case.dim)
    means, _ = reference.cluster_means(spread, case.q_labels, case.q_clusters)
    center = case.randn(1, 2, case.q_clusters, case.dim)
    case.q = center.gather(2, at_label) + radius * (spread - means.gather(2, at_label))
    return case, center


def attend_with_covariance(case: Labelled, center: Tensor, exact: Tensor) -> Tensor:
    """(N, D) of the first head: the values of skipped blocks move with the query."""
    stand_in, value, bias = (t[0, 0] for t in case.tables("first_order"))
    moved = covariance(case, center)[0, 0]  # [Qc, Kc, D, D]
    out = []
    for query, i in zip(case.q[0, 0], case.q_labels[0, 0], strict=True):
        taken = exact[0, 0, i][case.k_labels[0, 0]]
        keys, values = case.k[0, 0][taken], case.v[0, 0][taken]
        skipped = ~exact[0, 0, i]
        logits = torch.cat(
            [case.scale * keys @ query, (case.scale * stand_in[i] @ query + bias[i])[skipped]]
        )
        moves = case.scale * moved[i] @ (query - center[0, 0, i])  # [Kc, D]
        out.append(logits.softmax(0) @ torch.cat([values, (value[i] + moves)[skipped]]))
    return torch.stack(out)


@given(seed=SEEDS)
def test_the_value_leaves_out_the_covariance_of_values_and_keys(seed: int) -> None:
    case = Labelled(seed)
    center = case.clusters()[0].centroids
    step = 1e-5 * case.randn(*center.shape)
    change = block_means(case, center + step, case.v) - block_means(case, center - step, case.v)
    slope = case.scale * torch.einsum("bhijvk,bhik->bhijv", covariance(case, center), 2 * step)
    torch.testing.assert_close(change, slope, rtol=1e-5, atol=1e-12)


@given(seed=SEEDS, some=st.booleans())
def test_rates_as_the_query_cluster_shrinks(seed: int, some: bool) -> None:
    """Output: linear in the radius without the covariance term, quadratic with it."""
    without, with_term = [], []
    for radius in (2e-3, 1e-3):
        case, center = shrunk(seed, radius)
        exact = torch.zeros(1, 2, 3, 5, dtype=torch.bool)
        exact[..., 2] = some  # rates do not depend on the company of exact blocks
        dense, _ = case.dense()
        without.append((case.attend(exact, "first_order")[0] - dense)[0, 0].norm())
        with_term.append((attend_with_covariance(case, center, exact) - dense[0, 0]).norm())
    assert 1.9 < without[0] / without[1] < 2.1
    assert 3.8 < with_term[0] / with_term[1] < 4.2
    assert with_term[1] < 0.1 * without[1]


@given(seed=SEEDS)
def test_mass_error_is_half_the_variance_of_the_keys_along_the_query(seed: int) -> None:
    """``log Z(q)`` beyond first order is ``s^2/2 (q - q_i)' Cov_ij(k, k) (q - q_i)``."""
    case, center = shrunk(seed, 1e-3)
    stand_in, _, bias = case.tables("first_order")
    case.v = case.k  # so that `covariance` is that of the keys
    spread = covariance(case, center)[0, 0]
    mine = case.q_labels[0, 0]
    away = case.q[0, 0] - center[0, 0, mine]
    logit = case.scale * torch.einsum("nd,njd->nj", case.q[0, 0], stand_in[0, 0, mine])
    found = block_log_masses(case, case.q)[0, 0] - logit - bias[0, 0, mine]
    wanted = 0.5 * case.scale**2 * torch.einsum("na,njab,nb->nj", away, spread[mine], away)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-11)
    assert (wanted >= -1e-15).all()  # mass is never overestimated


@given(seed=SEEDS, density=st.floats(0.0, 0.9), text=st.sampled_from((0, 3)))
def test_a_cluster_for_every_query_is_dense_attention(seed: int, density: float, text: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 21, 32, generator=generator) for _ in range(3))
    plan = AttentionPlan(
        density=density, compensation="second_order", q_clusters=21 - text, k_clusters=4
    )
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    found = cpu.sparse_attention(q, k, v, plan, text=(0, text))
    assert bool((found.queries.sizes == 1).all())
    torch.testing.assert_close(found.out, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("radius", [1e-2, 1e-3])
@given(seed=SEEDS)
def test_both_forms_meet_as_key_clusters_shrink(radius: float, seed: int) -> None:
    case = Labelled(seed)
    center = case.randn(1, 2, 5, 6).gather(2, case.k_labels.unsqueeze(-1).expand_as(case.k))
    spread = case.randn(1, 2, 23, 6)
    case.k = center + radius * spread
    exact = case.random_blocks()
    first_order, centroid = (case.attend(exact, form)[0] for form in ("first_order", "centroid"))
    difference = (first_order - centroid).abs().max()
    assert 0 < difference < 30 * radius
