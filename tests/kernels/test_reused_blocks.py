"""Clusters and block masks that a later step reuses: what is kept, what is recomputed."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from attention_cases import (
    CPU,
    CUDA,
    FORMS,
    INTERPRETER,
    Form,
    Oracle,
    needs_interpreter,
    random_kinds,
    random_mask,
    random_qkv,
)
from hypothesis import Phase, given, settings
from test_sparse_attention import BF16, F16, F32, Case, cases, check_output
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.kinds import token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation, Routing
from svg_ear_compile.kernels.reference import Result

COMPENSATIONS = get_args(Compensation)


def later_step(x: Tensor, seed: int) -> Tensor:
    """The same tokens a little later: most are still nearest to their cluster, some are not."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    return x + 0.3 * noise


def two_steps(
    form: Form, dim: int, dtype: torch.dtype, plan: AttentionPlan, case: Case
) -> tuple[tuple[Tensor, Tensor, Tensor], Result, Result]:
    """Inputs of the second of two steps, and the results of both."""
    q, k, v = random_qkv(
        case.seed, case.batch, case.heads, case.tokens, dim, dtype, form.device, case.layout
    )
    mask = None
    if case.mask is not None:
        kv_shape = (case.batch, case.heads[1])
        mask = random_mask(case.seed, case.mask, kv_shape, case.tokens[1], form.device)
    kinds = random_kinds(case.seed, mask, case.batch, case.tokens, case.exact, form.device)
    settings: dict[str, Any] = {"scale": case.scale, "kinds": kinds, "return_lse": True}
    first = form(q, k, v, plan, **settings)
    now = tuple(later_step(x, case.seed + 1) for x in (q, k, v))
    centroids = (first.queries.centroids, first.keys.centroids)
    return now, first, form(*now, plan, centroids=centroids, blocks=first.blocks, **settings)


def check_case(form: Form, dim: int, dtype: torch.dtype, compensation: str, case: Case) -> None:
    plan = case.plan(compensation)
    (q, k, v), first, got = two_steps(form, dim, dtype, plan, case)
    for mine, taken in zip(got.blocks, first.blocks, strict=True):
        assert torch.equal(mine, taken)
    row = got.queries.sizes > 0
    assert torch.equal(got.row_area[row], first.row_area[row])
    for found, x in ((got.queries, q), (got.keys, k)):
        means, sizes = reference.cluster_means(
            x.cpu().double(), found.labels.cpu().long(), found.centroids.shape[2]
        )
        assert torch.equal(found.sizes.cpu().long(), sizes)
        difference = (found.centroids.cpu().double() - means)[sizes > 0]
        assert difference.numel() == 0 or difference.abs().max() < 1e-5
    check_output(Oracle.of(form, q, k, v, plan, case.scale or dim**-0.5, got), got)


@given(case=cases(33, 97, 150))
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("dim", "dtype"), [(32, F32), (64, BF16)], ids=str)
def test_cpu_equals_the_definition_on_reused_blocks(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(CPU, dim, dtype, compensation, case)


@needs_interpreter
@given(case=cases(17, 45, 70))
@settings(max_examples=2, phases=[Phase.generate])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, F32), (40, F16)], ids=str)
def test_interpreted_kernels_equal_the_definition_on_reused_blocks(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(INTERPRETER, dim, dtype, compensation, case)


@pytest.mark.gpu
@given(case=cases(257, 515, 1031))
@settings(max_examples=4, phases=[Phase.generate])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, BF16), (80, BF16), (128, BF16)], ids=str)
def test_cuda_kernels_equal_the_definition_on_reused_blocks(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(CUDA, dim, dtype, compensation, case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("routing", get_args(Routing))
def test_the_same_tokens_give_the_same_output(form: Form, routing: str) -> None:
    q, k, v = random_qkv(0, 1, (4, 2), (61, 45), 32, F16, form.device)
    plan = AttentionPlan(density=0.3, routing=routing, q_clusters=3, k_clusters=7)
    first = form(q, k, v, plan)
    centroids = (first.queries.centroids, first.keys.centroids)
    again = form(q, k, v, plan, centroids=centroids, blocks=first.blocks)
    assert torch.equal(again.row_area, first.row_area)
    # Another block than the one that crossed the budget is kept apart: sums in another order.
    torch.testing.assert_close(again.out, first.out, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_padding_of_an_earlier_step_takes_part_where_there_is_no_mask(form: Form) -> None:
    q, k, v = random_qkv(0, 2, (4, 2), (61, 45), 32, F32, form.device)
    plan = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7)
    mask = torch.arange(45, device=form.device).expand(2, 1, 1, 45) < 40
    first = form(q, k, v, plan, kinds=token_kinds(mask))
    centroids = (first.queries.centroids, first.keys.centroids)
    got = form(q, k, v, plan, centroids=centroids, blocks=first.blocks, return_lse=True)
    assert (got.keys.labels[..., 40:] == 7).all()
    assert torch.equal(got.keys.labels[..., :40], first.keys.labels[..., :40])
    check_output(Oracle.of(form, q, k, v, plan, 32**-0.5, got), got)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_counts_as_it_is_now(form: Form) -> None:
    q, k, v = random_qkv(0, 2, (4, 2), (61, 45), 32, F32, form.device)
    plan = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7)
    before = torch.arange(45, device=form.device).expand(2, 1, 1, 45) < 40
    now = torch.arange(45, device=form.device).expand(2, 1, 1, 45) >= 5
    first = form(q, k, v, plan, kinds=token_kinds(before))
    settings: dict[str, Any] = {
        "centroids": (first.queries.centroids, first.keys.centroids),
        "blocks": first.blocks,
        "kinds": token_kinds(now),
        "return_lse": True,
    }
    got = form(q, k, v, plan, **settings)
    labels = got.keys.labels
    assert (labels[..., :5] == 8).all()
    assert (labels[..., 40:] == 7).all()
    assert torch.equal(labels[..., 5:40], first.keys.labels[..., 5:40])
    spoiled = [x.clone() for x in (k, v)]
    for x in spoiled:
        x[:, :, :5] = 1e4
    assert torch.equal(form(q, *spoiled, plan, **settings).out, got.out)
    check_output(Oracle.of(form, q, k, v, plan, 32**-0.5, got), got)
