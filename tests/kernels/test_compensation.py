"""The Gaussian form in float64: its formula, where it is exact, where it is 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from labelled import Labelled, close
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.cpu import CPU
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import LARGEST_LOGIT_CORRECTION, Clusters

SEEDS = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("stretch", [0.3, 3.0])
def test_it_is_its_formula(stretch: float) -> None:
    case = Labelled(5)
    case.q *= stretch
    exact = case.random_blocks()
    out, _ = case.attend(exact, "gaussian")
    proxies = case.proxies()
    largest = 0.0
    for h in (0, 1):
        k, v, labels = case.k[0, h], case.v[0, h], case.k_labels[0, h]
        apart_k, apart_v = (
            torch.stack([x[t] - x[labels == labels[t]].mean(0) for t in range(len(x))])
            for x in (k, v)
        )
        of_keys, of_values = apart_k.T @ apart_k / len(k), apart_v.T @ apart_k / len(k)
        for query, i, got in zip(case.q[0, h], case.q_labels[0, h], out[0, h], strict=True):
            clipped, logit = query, case.scale**2 / 2 * query @ of_keys @ query
            largest = max(largest, float(logit))
            if logit > LARGEST_LOGIT_CORRECTION:
                clipped = query * (LARGEST_LOGIT_CORRECTION / logit).sqrt()
                logit = logit.new_tensor(LARGEST_LOGIT_CORRECTION)
            taken, skipped = exact[0, h, i][labels], ~exact[0, h, i]
            rest = case.scale * proxies.keys[0, h] @ query + proxies.bias[0, h] + logit
            logits = torch.cat([case.scale * k[taken] @ query, rest[skipped]])
            values = proxies.values[0, h] + case.scale * of_values @ clipped
            close(got, logits.softmax(0) @ torch.cat([v[taken], values[skipped]]))
    assert (largest > LARGEST_LOGIT_CORRECTION) == (stretch > 1)


def test_it_is_exact_on_gaussian_clusters() -> None:
    """Many jointly Gaussian keys and values, alike about two centres: only a sampling error."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = (torch.arange(40_000) % 2).view(1, 1, -1)
    noise = 0.5 * normal(40_000, 8)
    k = (normal(2, 8)[labels[0, 0]] + noise).view(1, 1, -1, 8)
    v = (normal(2, 8)[labels[0, 0]] + noise @ normal(8, 8)).view(1, 1, -1, 8)
    q, scale = 1.5 * normal(1, 1, 6, 8), 8**-0.5
    of_queries = torch.zeros(1, 1, 6, dtype=torch.int64)
    queries = Clusters(of_queries, *reference.cluster_means(q, of_queries, 1))
    keys = Clusters(labels, *reference.cluster_means(k, labels, 2))
    means, _ = reference.cluster_means(v, labels, 2)
    proxies = reference.proxy_tokens(keys, means)
    found = reference.corrections(q, k, v, queries, keys, means, scale)
    none = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    assert found.logit.max() < LARGEST_LOGIT_CORRECTION
    dense = F.scaled_dot_product_attention(q, k, v)
    outs = (
        reference.softmax_over(q, k, v, of_queries, labels, none, proxies, scale, x)[0]
        for x in (None, found)
    )
    errors = [(out - dense).norm() for out in outs]
    assert errors[1] < 0.2 * errors[0]


@given(SEEDS)
def test_coinciding_keys_leave_the_centroid_form(seed: int) -> None:
    case = Labelled(seed)
    index = case.k_labels.unsqueeze(-1).expand_as(case.k)
    case.k = case.randn(1, 2, case.k_clusters, case.dim).gather(2, index)
    assert case.corrections().logit.abs().max() < 1e-20
    exact = case.random_blocks()
    close(case.attend(exact, "gaussian")[0], case.attend(exact, "centroid")[0])


@given(SEEDS)
def test_it_is_nothing_at_the_origin_and_bounded_away_from_it(seed: int) -> None:
    case = Labelled(seed)
    direction, case.q = case.q, torch.zeros_like(case.q)
    at_origin = case.corrections()
    assert not at_origin.logit.any()
    assert not at_origin.value.any()
    case.q = 1e3 * direction
    far = case.corrections()
    assert far.logit.max() <= LARGEST_LOGIT_CORRECTION
    case.q = 1e6 * direction
    close(case.corrections().value, far.value)


def test_a_correction_that_rounds_below_nothing_is_nothing() -> None:
    """Keys and queries vary in different directions: the correction is 0, up to rounding."""
    generator = torch.Generator().manual_seed(3)
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    q, k = torch.randn(2, 1, 2, 1024, 64, generator=generator)
    q[..., 32:], k[..., :32] = 0, 0
    v = torch.randn(1, 2, 1024, 64, generator=generator)
    plan = AttentionPlan(density=0.2, q_clusters=8, k_clusters=16)
    assert CPU.sparse_attention(q @ turn, k @ turn, v, plan).out.isfinite().all()


@pytest.mark.parametrize("text", [(0, 0), (3, 4)])
def test_queries_and_keys_outside_of_the_clusters_have_no_part(text: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, 2, 61, 32, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    plan = AttentionPlan(density=0.3, q_clusters=4, k_clusters=9)
    queries, keys, _ = reference.cluster(q, k, plan, exact_at_ends(q, k, *text), None)
    means, _ = reference.cluster_means(v, keys.labels, 9)
    found = reference.corrections(q, k, v, queries, keys, means, 32**-0.5)
    outside = queries.labels == 4
    assert int(outside.sum()) == 2 * sum(text)
    assert not found.value[outside].any()
    assert not found.logit[outside].any()
    spoiled = k.clone()
    spoiled[:, :, : text[0]] = 1e30  # text keys are in no covariance
    again = reference.corrections(q, spoiled, v, queries, keys, means, 32**-0.5)
    close(again.value, found.value)


def test_it_lowers_the_error_of_values_that_follow_their_keys() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 900, 16, generator=generator) for _ in range(2))
    v = k @ torch.randn(16, 16, generator=generator)
    dense = F.scaled_dot_product_attention(q, k, v)
    plans = {
        form: AttentionPlan(density=0.1, compensation=form, q_clusters=9, k_clusters=30)
        for form in ("gaussian", "centroid")
    }
    error = {
        form: (CPU.sparse_attention(q, k, v, plan).out - dense).norm()
        for form, plan in plans.items()
    }
    assert error["gaussian"] < 0.7 * error["centroid"]
