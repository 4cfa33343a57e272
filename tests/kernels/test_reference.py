"""Properties of the definition in float64, one for each exact statement about the method."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from attention_cases import random_kinds
from hypothesis import given
from hypothesis import strategies as st
from labelled import Labelled, close
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

FORMS = get_args(Compensation)
SEEDS = st.integers(0, 2**31 - 1)


@given(
    seed=SEEDS,
    kv_heads=st.sampled_from((1, 2, 4)),
    tokens=st.tuples(st.integers(6, 40), st.integers(6, 40)),
    exact=st.sampled_from(((0.0, 0.0), (0.2, 0.2), (0.0, 0.4), (1.0, 0.0))),
    masked=st.booleans(),
)
@pytest.mark.parametrize("form", FORMS)
def test_density_one_is_dense_attention(
    form: str, seed: int, kv_heads: int, tokens: tuple[int, int], exact: tuple[float, float], masked
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, tokens[0], 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, tokens[1], 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, tokens[1], generator=generator) < 0.7 if masked else None
    plan = AttentionPlan(density=1.0, q_clusters=3, k_clusters=4, compensation=form)
    kinds = random_kinds(seed, mask, 2, tokens, exact, "cpu")
    found = reference.sparse_attention(q, k, v, plan, kinds=kinds)
    close(found.out, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))


@given(seed=SEEDS)
def test_density_zero_is_attention_over_weighted_centroids(seed: int) -> None:
    case = Labelled(seed)
    out, lse = case.attend(torch.zeros(1, 2, 3, 5, dtype=torch.bool), "centroid")
    _, keys = case.clusters()
    value_means, _ = reference.cluster_means(case.v, case.k_labels, 5)
    logits = case.scale * case.q @ keys.centroids.transpose(2, 3)
    logits = logits + keys.sizes.double().log().unsqueeze(2)
    close(out, logits.softmax(-1) @ value_means)
    close(lse, logits.logsumexp(-1))


@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_all_blocks_exact_is_dense_attention(form: str, seed: int) -> None:
    case = Labelled(seed)
    out, lse = case.attend(torch.ones(1, 2, 3, 5, dtype=torch.bool), form)
    close(out, case.dense()[0])
    close(lse, case.dense()[1])


@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_compensation_of_coinciding_keys_is_exact_whatever_the_values(form: str, seed: int) -> None:
    case = Labelled(seed)
    case.k = case.randn(1, 2, 5, 6).gather(2, case.k_labels.unsqueeze(-1).expand_as(case.k))
    out, lse = case.attend(case.random_blocks(), form)
    close(out, case.dense()[0])
    close(lse, case.dense()[1])


@given(seed=SEEDS)
def test_output_of_the_centroid_form_is_a_convex_combination_of_values(seed: int) -> None:
    case = Labelled(seed)
    out, _ = case.attend(case.random_blocks(), "centroid")
    assert (out <= case.v.amax(2, keepdim=True) + 1e-12).all()
    assert (out >= case.v.amin(2, keepdim=True) - 1e-12).all()
    case.v = case.randn(1, 2, 1, 6).expand_as(case.v).clone()
    out, _ = case.attend(case.random_blocks(), "centroid")
    close(out, case.v[:, :, :1].expand_as(out))


@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_permuting_tokens_with_their_labels_permutes_the_output(form: str, seed: int) -> None:
    case = Labelled(seed)
    exact = case.random_blocks()
    out, lse = case.attend(exact, form)
    q_order = torch.randperm(19, generator=case.generator)
    k_order = torch.randperm(23, generator=case.generator)
    case.q, case.q_labels = case.q[:, :, q_order], case.q_labels[..., q_order]
    case.k, case.v = case.k[:, :, k_order], case.v[:, :, k_order]
    case.k_labels = case.k_labels[..., k_order]
    permuted, permuted_lse = case.attend(exact, form)
    close(permuted, out[:, :, q_order])
    close(permuted_lse, lse[..., q_order])


@given(seed=SEEDS, added=st.integers(1, 4))
@pytest.mark.parametrize("form", FORMS)
def test_empty_clusters_carry_no_mass(form: str, seed: int, added: int) -> None:
    case = Labelled(seed)
    exact = case.random_blocks()
    out, lse = case.attend(exact, form)
    case.k_clusters += added
    assert (case.scores().log_mass[..., 5:] == -math.inf).all()
    with_empty, with_empty_lse = case.attend(F.pad(exact, (0, added)), form)
    close(with_empty, out)
    close(with_empty_lse, lse)


@given(seed=SEEDS, padded=st.integers(1, 7))
@pytest.mark.parametrize("form", FORMS)
def test_padding_keys_carry_no_mass(form: str, seed: int, padded: int) -> None:
    case = Labelled(seed)
    exact = case.random_blocks()
    out, lse = case.attend(exact, form)
    case.k = torch.cat([case.k, case.randn(1, 2, padded, 6)], 2)
    case.v = torch.cat([case.v, case.randn(1, 2, padded, 6)], 2)
    case.k_labels = F.pad(case.k_labels, (0, padded), value=6)
    with_padding, with_padding_lse = case.attend(exact, form)
    close(with_padding, out)
    close(with_padding_lse, lse)


def log_rho(case: Labelled) -> Tensor:
    """``log E_ij / (Z_i^2 n_j)``, from its definition."""
    found, (_, keys) = case.scores(), case.clusters()
    row_mass = found.log_mass.exp().sum(-1, keepdim=True)
    return (found.log_error.exp() / (row_mass**2 * keys.sizes.unsqueeze(2))).log()


@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_shifting_all_keys_changes_neither_attention_nor_the_threshold_route(
    form: str, seed: int
) -> None:
    case = Labelled(seed)
    exact = case.random_blocks()
    before, rho_before, error_before = case.attend(exact, form), log_rho(case), case.scores()[0]
    threshold = float(rho_before.exp().median()) * (1 + 1e-6)
    plan = AttentionPlan(routing="threshold", threshold=threshold)
    route_before = reference.route(case.scores(), *case.clusters(), plan)
    assert torch.equal(route_before, rho_before >= math.log(threshold))
    case.k = case.k + case.randn(1, 2, 1, 6)
    close(case.attend(exact, form)[0], before[0])
    close(log_rho(case), rho_before)
    assert torch.equal(reference.route(case.scores(), *case.clusters(), plan), route_before)
    # Without the normalisation of rho the error changes.
    assert (case.scores()[0] - error_before).abs().min() > 1e-6


@given(seed=SEEDS)
def test_score_of_error_is_the_sum_over_the_block(seed: int) -> None:
    case = Labelled(seed)
    queries, keys = case.clusters()
    value_means, _ = reference.cluster_means(case.v, case.k_labels, 5)
    found = case.scores()
    for h in range(2):
        for i in range(3):
            for j in range(5):
                inside = case.k_labels[0, h] == j
                a = case.scale * case.k[0, h, inside] @ queries.centroids[0, h, i]
                c = case.scale * queries.centroids[0, h, i] @ keys.centroids[0, h, j]
                lost = a.exp()[:, None] * case.v[0, h, inside] - c.exp() * value_means[0, h, j]
                error = lost.square().sum()
                assert found.log_error[0, h, i, j].exp().item() == pytest.approx(
                    error.item(), abs=1e-12
                )
                assert found.log_mass[0, h, i, j].item() == pytest.approx(a.logsumexp(0).item())


def brute_force_until(order: list[int], weight: list[float], budget: float) -> set[int]:
    """Entries in the given order while the weight before them is below the budget."""
    taken, before = set(), 0.0
    for index in order:
        if before >= budget:
            break
        taken.add(index)
        before += weight[index]
    return taken


def descending(score: Tensor) -> list[int]:
    return sorted(range(len(score)), key=lambda j: (-score[j].item(), j))


@given(seed=SEEDS, density=st.floats(0.0, 1.0, exclude_max=True))
def test_density_budget(seed: int, density: float) -> None:
    case = Labelled(seed)
    plan = AttentionPlan(density=density)
    queries, keys = case.clusters()
    found = case.scores()
    exact = reference.route(found, queries, keys, plan)
    for h in range(2):
        sizes = keys.sizes[0, h]
        for i in range(3):
            area = (queries.sizes[0, h, i] * sizes).double()
            score = found.log_error[0, h, i] - area.log()
            wanted = brute_force_until(descending(score), sizes.tolist(), density * 23)
            assert set(exact[0, h, i].nonzero().flatten().tolist()) == wanted
    area = reference.row_area(exact, keys)
    assert torch.equal(area, (exact.long() * keys.sizes.unsqueeze(2)).sum(-1))
    if density > 0:
        assert (area >= density * 23 - 1e-9).all()


@given(
    seed=SEEDS,
    top_p=st.floats(0.05, 0.99),
    floor=st.sampled_from((0.0, 0.2, 0.5, 1.0)),
)
def test_top_p_budget_and_floor(seed: int, top_p: float, floor: float) -> None:
    case = Labelled(seed)
    plan = AttentionPlan(routing="top_p", top_p=top_p, min_block_ratio=floor)
    queries, keys = case.clusters()
    found = case.scores()
    exact = reference.route(found, queries, keys, plan)
    for h in range(2):
        sizes = keys.sizes[0, h].tolist()
        for i in range(3):
            mass = (found.centroid_logit[0, h, i] + keys.sizes[0, h].log()).softmax(0)
            by_mass = descending(mass)
            top = brute_force_until(by_mass, mass.tolist(), top_p)
            budget = sum(sizes[j] for j in top)
            wanted = set(by_mass[: math.ceil(floor * 5)])
            left = budget - sum(sizes[j] for j in wanted)
            score = found.log_error[0, h, i] - keys.sizes[0, h].log()
            rest = [j for j in descending(score) if j not in wanted]
            wanted |= brute_force_until(rest, sizes, left)
            assert set(exact[0, h, i].nonzero().flatten().tolist()) == wanted


@given(seed=SEEDS, entries=st.integers(1, 12), budget=st.floats(0, 20), levels=st.integers(1, 4))
def test_take_until_with_ties(seed: int, entries: int, budget: float, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (entries,), generator=generator).double()
    weight = torch.randint(4, (entries,), generator=generator).double()
    taken = reference.take_until(score, weight, torch.tensor(budget, dtype=torch.float64))
    wanted = brute_force_until(descending(score), weight.tolist(), budget)
    assert set(taken.nonzero().flatten().tolist()) == wanted


def test_take_until_takes_nan_first() -> None:
    score = torch.tensor([3.0, math.nan, 1.0, -math.inf])
    taken = reference.take_until(score, torch.ones(4), torch.tensor(1.0))
    assert taken.tolist() == [False, True, False, False]


@given(seed=SEEDS, density=st.floats(0.0, 1.0))
def test_all_stages_stay_within_the_values(seed: int, density: float) -> None:
    case = Labelled(seed)
    plan = AttentionPlan(density=density, q_clusters=3, k_clusters=5, compensation="centroid")
    found = reference.sparse_attention(case.q, case.k, case.v, plan)
    assert (found.out <= case.v.amax(2, keepdim=True) + 1e-12).all()
    assert (found.out >= case.v.amin(2, keepdim=True) - 1e-12).all()
    again = reference.sparse_attention(case.q, case.k, case.v, replace(plan))
    assert torch.equal(found.out, again.out)
