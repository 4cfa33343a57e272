"""Clusters and exact blocks that a later step takes over: what is kept, what is made anew."""

from __future__ import annotations

from dataclasses import replace
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
    random_mask,
    random_qkv,
)
from hypothesis import Phase, given, settings
from test_sparse_attention import BF16, F16, F32, Case, cases, check_output
from torch import Tensor

from svg_ear_compile.kernels import op, reference, state
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation, Routing
from svg_ear_compile.kernels.reference import Blocks, Result
from svg_ear_compile.kernels.state import Call, Memory

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
    settings: dict[str, Any] = {"scale": case.scale, "text": case.text, "return_lse": True}
    if case.mask is not None:
        kv_shape = (case.batch, case.heads[1])
        mask = random_mask(case.seed, case.mask, kv_shape, case.tokens[1], form.device)
        settings["attn_mask"] = mask
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
def test_cpu_equals_the_definition_on_blocks_taken_over(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(CPU, dim, dtype, compensation, case)


@needs_interpreter
@given(case=cases(17, 45, 70))
@settings(max_examples=2, phases=[Phase.generate])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, F32), (40, F16)], ids=str)
def test_interpreted_kernels_equal_the_definition_on_blocks_taken_over(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(INTERPRETER, dim, dtype, compensation, case)


@pytest.mark.gpu
@given(case=cases(257, 515, 1031))
@settings(max_examples=4, phases=[Phase.generate])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, BF16), (80, BF16), (128, BF16)], ids=str)
def test_cuda_kernels_equal_the_definition_on_blocks_taken_over(
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
def test_a_mask_counts_as_it_is_now(form: Form) -> None:
    q, k, v = random_qkv(0, 2, (4, 2), (61, 45), 32, F32, form.device)
    plan = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7)
    before = torch.arange(45, device=form.device).expand(2, 1, 1, 45) < 40
    now = torch.arange(45, device=form.device).expand(2, 1, 1, 45) >= 5
    first = form(q, k, v, plan, attn_mask=before)
    settings: dict[str, Any] = {
        "centroids": (first.queries.centroids, first.keys.centroids),
        "blocks": first.blocks,
        "attn_mask": now,
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


class Steps:
    """A resolver for one layer that remembers."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan, self.memory = plan, Memory()
        self.leader: Memory | None = None
        self.stacked: tuple[Memory, ...] = ()

    def resolve(self, layer: Tensor | None, site: str, plan: AttentionPlan) -> Call:
        return Call(self.plan, self.memory, self.leader, self.stacked, batch=2)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> int:
        """Attend; the age of the blocks that served."""
        with state.active(self):
            op.attention(q, k, v)
        return self.memory.age


PLAN = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7, max_drift=0.2)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
def test_still_tokens_are_clustered_as_seldom_as_may_be(device: str) -> None:
    qkv = random_qkv(0, 1, (2, 2), (61, 45), 32, F32, device)
    # Well apart, so that no token changes its cluster once they are found.
    steps = Steps(replace(PLAN, q_clusters=2, k_clusters=2, first_iterations=9))
    ages = [steps.step(*qkv) for _ in range(14)]
    assert ages == [0, *[0, 1] * 6, 0]
    assert (steps.memory.calls, steps.memory.taken_over) == (14, 6)


@DEVICES
def test_drifting_tokens_are_clustered_as_often_as_they_must(device: str) -> None:
    steps, ages = Steps(PLAN), []
    for seed in range(6):  # every step shows something else
        ages.append(steps.step(*random_qkv(seed, 1, (2, 2), (61, 45), 32, F32, device)))
    assert ages == [0] * 6
    assert steps.memory.drift is not None
    assert 0.2 < steps.memory.drift.of_a_call() <= 1.0
    assert steps.memory.blocks is not None
    assert steps.memory.blocks.q_labels.dtype == torch.int16


@DEVICES
def test_drift_is_the_share_of_tokens_that_changed_cluster(device: str) -> None:
    exact = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=device)
    labels = torch.arange(40, device=device).reshape(1, 1, 40) % 4
    moved = labels.clone()
    moved[..., :10] = 3 - moved[..., :10]
    before, after = Blocks(labels, labels, exact), Blocks(moved, labels, exact)
    drift = state.Drift(before, after, calls=2)
    assert drift.of_a_call() == pytest.approx(0.25 / 2 / 2)


@pytest.mark.parametrize("shared", [False, True])
def test_without_drift_blocks_are_made_at_every_step(shared: bool) -> None:
    qkv = random_qkv(0, 1, (2, 2), (61, 45), 32, F32, "cpu")
    steps = Steps(replace(PLAN, max_drift=0.0, shared_branches=shared))
    assert [steps.step(*qkv) for _ in range(4)] == [0, 0, 0, 0]
    assert (steps.memory.blocks is not None) == shared  # nobody would ask for them


@pytest.mark.parametrize("change", ["density", "tokens", "dense step", "reuse forbidden meanwhile"])
def test_blocks_do_not_outlive_what_they_were_made_for(change: str) -> None:
    q, k, v = random_qkv(0, 1, (2, 2), (61, 45), 32, F32, "cpu")
    steps = Steps(replace(PLAN, max_drift=1.0))
    steps.step(q, k, v)
    assert steps.memory.lasting_blocks(steps.plan, 61, 45) is None  # their drift is not known yet
    steps.step(q, k, v)
    assert steps.memory.lasting_blocks(steps.plan, 61, 45) is not None
    if change == "density":
        steps.plan = replace(steps.plan, density=0.2)
    elif change == "tokens":
        k, v = k[:, :, :44], v[:, :, :44]
    else:
        other = {"density": 1.0} if change == "dense step" else {"max_drift": 0.0}
        before, steps.plan = steps.plan, replace(steps.plan, **other)
        steps.step(q, k, v)
        steps.plan = before
    assert steps.step(q, k, v) == 0
    assert steps.memory.taken_over == 0


def branches(device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of two guidance branches: the same video, told and not told."""
    qkv = random_qkv(0, 1, (4, 2), (61, 45), 32, F32, device)
    return [qkv, tuple(later_step(x, 1) for x in qkv)]


@DEVICES
def test_a_led_branch_takes_over_what_the_first_made(device: str) -> None:
    form = CUDA if device == "cuda" else CPU
    first, other = branches(device)
    leader = Steps(PLAN)
    leader.step(*first)
    made = form(*first, PLAN)
    wanted = form(
        *other, PLAN, centroids=(made.queries.centroids, made.keys.centroids), blocks=made.blocks
    )
    follower = Steps(PLAN)
    follower.leader = leader.memory
    with state.active(follower):
        found, _ = op.attention(*other)
    assert torch.equal(found, wanted.out)
    memory = follower.memory
    assert (memory.calls, memory.taken_over, memory.blocks, memory.q_centroids) == (
        1,
        1,
        None,
        None,
    )
    assert memory.density == leader.memory.density
    # Of another length there is nothing to take over.
    q, k, v = other
    with state.active(follower):
        op.attention(q, k[:, :, :40], v[:, :, :40])
    assert (memory.calls, memory.taken_over) == (2, 1)


@DEVICES
@pytest.mark.parametrize("masked", ["no", "alike", "each"])
def test_branches_along_the_batch_are_led_by_the_first(device: str, masked: str) -> None:
    pair = branches(device)
    q, k, v = (torch.cat(parts) for parts in zip(*pair, strict=True))
    mask = None
    if masked != "no":
        mask = random_mask(0, (masked == "each", False), (2, 2), 45, device)
    together = Steps(PLAN)
    together.stacked = (Memory(),)
    with state.active(together):
        out, lse = op.attention(q, k, v, mask, return_lse=True)
        op.attention(*(torch.cat([x, x]) for x in (q, k, v)))  # frames, say: another batch
    assert (together.memory.taken_over, together.stacked[0].taken_over) == (0, 1)
    apart = Steps(PLAN)
    for place, qkv in enumerate(pair):
        mine = mask if mask is None or masked == "alike" else mask[place : place + 1]
        with state.active(apart):
            wanted, wanted_lse = op.attention(*qkv, mine, return_lse=True)
        assert torch.equal(out[place : place + 1], wanted)
        assert torch.equal(lse[place : place + 1], wanted_lse)
        leader, apart = apart.memory, Steps(PLAN)
        apart.leader = leader


def test_memory_counts_what_it_holds() -> None:
    q, k, v = random_qkv(0, 1, (2, 2), (61, 45), 32, F16, "cpu")
    steps = Steps(PLAN)
    steps.step(q, k, v)
    centroids, labels, exact = 2 * 2 * 32 * (3 + 7), 2 * 2 * (61 + 45), 2 * 3 * 7
    assert steps.memory.nbytes() == centroids + labels + exact + 8
