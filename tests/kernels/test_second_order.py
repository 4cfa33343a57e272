"""Second-order compensation in float64: its formula, where it is exact, where it is nothing."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from labelled import Labelled, close
from torch import Tensor

from svg_ear_compile.kernels import cpu, reference
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.reference import LARGEST_GROWTH, Clusters, SecondOrder

SEEDS = st.integers(0, 2**31 - 1)


def second_order_of(case: Labelled) -> SecondOrder:
    queries, keys = case.clusters()
    means, _ = reference.cluster_means(case.v, case.k_labels, case.k_clusters)
    return reference.second_order(case.q, case.k, case.v, queries, keys, means, case.scale)


def attend(case: Labelled, exact: Tensor, second: SecondOrder | None) -> Tensor:
    return reference.attend(
        case.q, case.k, case.v, case.q_labels, case.k_labels, exact, case.tables("second_order"),
        case.scale, second,
    )[0]  # fmt: skip


@pytest.mark.parametrize("stretch", [0.3, 3.0])
def test_it_is_its_formula(stretch: float) -> None:
    case = Labelled(5)
    case.q *= stretch
    exact = case.random_blocks()
    out = attend(case, exact, second_order_of(case))
    stand_in, value, bias = case.tables("second_order")
    growths = []
    for h in (0, 1):
        k, v, labels = case.k[0, h], case.v[0, h], case.k_labels[0, h]
        apart_k, apart_v = (
            torch.stack([x[t] - x[labels == labels[t]].mean(0) for t in range(len(x))])
            for x in (k, v)
        )
        of_keys, of_values = apart_k.T @ apart_k / len(k), apart_v.T @ apart_k / len(k)
        for row in range(case.q.shape[2]):
            i = int(case.q_labels[0, h, row])
            mine = case.q[0, h][case.q_labels[0, h] == i]
            away = case.q[0, h, row] - mine.mean(0)
            growth = case.scale**2 / 2 * away @ of_keys @ away
            growths.append(float(growth))
            if growth > LARGEST_GROWTH:
                away = away * (LARGEST_GROWTH / growth).sqrt()
                growth = torch.tensor(LARGEST_GROWTH, dtype=torch.float64)
            taken, skipped = exact[0, h, i][labels], ~exact[0, h, i]
            query = case.q[0, h, row]
            rest = case.scale * stand_in[0, h, i] @ query + bias[0, h, i] + growth
            logits = torch.cat([case.scale * k[taken] @ query, rest[skipped]])
            moved = value[0, h, i] + case.scale * of_values @ away
            close(out[0, h, row], logits.softmax(0) @ torch.cat([v[taken], moved[skipped]]))
    assert (max(growths) > LARGEST_GROWTH) == (stretch > 1)


@pytest.mark.parametrize("form", ["gaussian", "second_order"])
def test_it_is_exact_on_gaussian_clusters(form: Compensation) -> None:
    """Many jointly Gaussian keys and values, the same about two centres: the rest is sampling."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = (torch.arange(40_000) % 2).view(1, 1, -1)
    noise = 0.5 * normal(40_000, 8)
    k = (normal(2, 8)[labels[0, 0]] + noise).view(1, 1, -1, 8)
    v = (normal(2, 8)[labels[0, 0]] + noise @ normal(8, 8)).view(1, 1, -1, 8)
    q = 1.5 * normal(1, 1, 6, 8)
    plan, scale = AttentionPlan(compensation=form), 8**-0.5
    of_queries = torch.zeros(1, 1, 6, dtype=torch.int64)
    queries = Clusters(of_queries, *reference.cluster_means(q, of_queries, 1))
    keys = Clusters(labels, *reference.cluster_means(k, labels, 2))
    means, _ = reference.cluster_means(v, labels, 2)
    probe = reference.probe(queries, keys, k, v, scale)
    tables = reference.compensation_tables(probe, queries, keys, means, plan, scale)
    second = reference.covariance_terms(q, k, v, queries, keys, means, plan, scale)
    none = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    assert second.growth.max() < LARGEST_GROWTH
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = [
        (reference.attend(q, k, v, of_queries, labels, none, tables, scale, x)[0] - dense).norm()
        for x in (None, second)
    ]
    assert errors[1] < 0.2 * errors[0]


@given(SEEDS)
def test_coinciding_keys_leave_first_order(seed: int) -> None:
    case = Labelled(seed)
    index = case.k_labels.unsqueeze(-1).expand_as(case.k)
    case.k = case.randn(1, 2, case.k_clusters, case.dim).gather(2, index)
    second = second_order_of(case)
    assert second.growth.abs().max() < 1e-20
    exact = case.random_blocks()
    close(attend(case, exact, second), attend(case, exact, None))


@given(SEEDS)
def test_it_is_nothing_at_the_centroid_and_bounded_away_from_it(seed: int) -> None:
    case = Labelled(seed)
    index = case.q_labels.unsqueeze(-1).expand_as(case.q)
    centers = case.randn(1, 2, case.q_clusters, case.dim)
    away = case.q
    case.q = centers.gather(2, index)
    at_center = second_order_of(case)
    assert at_center.growth.max() < 1e-20
    assert at_center.move.abs().max() < 1e-10
    case.q = centers.gather(2, index) + 1e3 * away
    far = second_order_of(case)
    assert far.growth.max() <= LARGEST_GROWTH
    case.q = centers.gather(2, index) + 1e6 * away
    close(second_order_of(case).move, far.move)


def test_a_growth_that_rounds_below_nothing_is_nothing() -> None:
    """Keys and queries that vary in different directions: no growth, up to its rounding."""
    generator = torch.Generator().manual_seed(3)
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    q, k = torch.randn(2, 1, 2, 1024, 64, generator=generator)
    q[..., 32:], k[..., :32] = 0, 0
    v = torch.randn(1, 2, 1024, 64, generator=generator)
    plan = AttentionPlan(density=0.2, q_clusters=8, k_clusters=16)
    assert cpu.sparse_attention(q @ turn, k @ turn, v, plan).out.isfinite().all()


@pytest.mark.parametrize("text", [(0, 0), (3, 4)])
def test_queries_and_keys_outside_of_the_clusters_have_no_part(text: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, 2, 61, 32, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    plan = AttentionPlan(density=0.3, q_clusters=4, k_clusters=9)
    queries, keys = reference.cluster(q, k, plan, None, text, None)
    means, _ = reference.cluster_means(v, keys.labels, 9)
    found = reference.second_order(q, k, v, queries, keys, means, 32**-0.5)
    outside = queries.labels == 4
    assert int(outside.sum()) == 2 * sum(text)
    assert not found.move[outside].any()
    assert not found.growth[outside].any()
    spoiled = k.clone()
    spoiled[:, :, : text[0]] = 1e30  # text keys are in no covariance
    again = reference.second_order(q, spoiled, v, queries, keys, means, 32**-0.5)
    close(again.move, found.move)


def test_it_lowers_the_error_of_values_that_follow_their_keys() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 900, 16, generator=generator) for _ in range(2))
    v = k @ torch.randn(16, 16, generator=generator)
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = {
        form: (
            cpu.sparse_attention(
                q, k, v, AttentionPlan(density=0.1, compensation=form, q_clusters=9, k_clusters=30)
            ).out
            - dense
        ).norm()
        for form in get_args(Compensation)
    }
    assert errors["second_order"] < 0.7 * errors["first_order"] < 0.7 * errors["centroid"]
    assert errors["second_order"] < errors["gaussian"] < 0.7 * errors["centroid"]
