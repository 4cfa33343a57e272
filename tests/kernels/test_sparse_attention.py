"""All stages on a CPU and on a GPU, tested for the labels and block mask that a call returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from attention_cases import (
    CPU,
    CUDA,
    INTERPRETER,
    LAYOUTS,
    SEEDS,
    Form,
    Oracle,
    assert_within_rounding,
    needs_interpreter,
    random_kinds,
    random_mask,
    random_qkv,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.kinds import CLUSTERED, EXACT, PADDING
from svg_ear_compile.kernels.plan import HEAD_DIMS, AttentionPlan, Compensation
from svg_ear_compile.kernels.reference import Result

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
COMPENSATIONS = get_args(Compensation)

# Largest difference of two float32 evaluations of the score of one block (natural log).
SCORE_TOLERANCE = 2e-3
# Errors of a block below this fraction of its terms are rounding: a block of one key has none.
ERROR_FLOOR = 1e-9


@dataclass(frozen=True)
class Case:
    """An attention call of any head dim and dtype."""

    seed: int
    batch: int
    heads: tuple[int, int]
    tokens: tuple[int, int]
    layout: str
    exact: tuple[float, float]
    mask: tuple[bool, bool] | None
    clusters: tuple[int, int]
    routing: str
    density: float
    scale: float | None

    def plan(self, compensation: str) -> AttentionPlan:
        return AttentionPlan(
            density=self.density,
            routing=self.routing,
            threshold=10 ** (-4 * self.density),
            compensation=compensation,
            q_clusters=self.clusters[0],
            k_clusters=self.clusters[1],
            first_iterations=2,
        )


def cases(*tokens: int) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        seed=SEEDS,
        batch=st.sampled_from((1, 2)),
        heads=st.sampled_from(((2, 2), (4, 2), (3, 1))),
        tokens=st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)),
        layout=st.sampled_from(LAYOUTS),
        exact=st.sampled_from(((0.0, 0.0), (0.1, 0.1), (0.0, 0.3), (0.3, 0.0))),
        mask=st.sampled_from((None, (True, True), (True, False), (False, True), (False, False))),
        clusters=st.sampled_from(((2, 5), (3, 7), (5, 11))),
        routing=st.sampled_from(("density", "density", "top_p", "threshold")),
        density=st.floats(0.0, 0.95),
        scale=st.sampled_from((None, 0.2)),
    )


def check_clusters(found: reference.Clusters, x: Tensor, kinds: Tensor | None) -> None:
    """Check special labels, sizes and centroids of a result."""
    labels, clusters = found.labels.cpu().long(), found.centroids.shape[2]
    kinds = torch.tensor(CLUSTERED) if kinds is None else kinds.cpu()
    assert torch.equal(labels == clusters + 1, (kinds == PADDING).expand_as(labels))
    assert torch.equal(labels == clusters, (kinds == EXACT).expand_as(labels))
    assert labels.min() >= 0
    means, sizes = reference.cluster_means(x.cpu().double(), labels, clusters)
    assert torch.equal(found.sizes.cpu().long(), sizes)
    difference = (found.centroids.cpu().double() - means)[sizes > 0]
    assert difference.numel() == 0 or difference.abs().max() < 1e-5


def check_route(oracle: Oracle, got: Result) -> None:
    """Check the block mask of a result: its budget, the best scores up to rounding, its areas."""
    plan, sizes = oracle.plan, oracle.keys.sizes.unsqueeze(2)  # [B, H, 1, Kc]
    exact = got.block_mask.cpu()
    row = oracle.queries.sizes > 0  # [B, H, Qc]
    area = (exact * sizes).sum(-1)
    assert torch.equal(got.row_area.cpu().long()[row], area[row])
    assert got.exact_pairs.item() == (area * oracle.queries.sizes).sum().item()
    occupied = (sizes > 0).expand_as(exact)
    assert not (exact & ~occupied)[row].any()
    floor = 2 * oracle.scores.log_mass - sizes.clamp(min=1).log() + math.log(ERROR_FLOOR)
    error = oracle.scores.log_error.masked_fill(oracle.scores.log_error < floor, -1e3)
    if plan.routing == "threshold":
        row_mass = oracle.scores.log_mass.logsumexp(-1, keepdim=True)
        log_rho = oracle.scores.log_error - 2 * row_mass - sizes.clamp(min=1).log()
        margin = log_rho - math.log(plan.threshold)
        assert exact[(margin > SCORE_TOLERANCE) & row.unsqueeze(-1) & occupied].all()
        assert not exact[(margin < -SCORE_TOLERANCE) & row.unsqueeze(-1)].any()
        return
    if plan.routing == "top_p":
        bounds = []
        for shift in (-1e-4, 1e-4):
            near = AttentionPlan(routing="top_p", top_p=plan.top_p + shift)
            bounds.append(reference.route(oracle.scores, oracle.queries, oracle.keys, near))
        least, most = ((b * sizes).sum(-1)[row] for b in bounds)
        assert (area[row] >= least).all()
        assert (area[row] <= most).all()
        return
    score = (error - sizes.clamp(min=1).log()).masked_fill(~occupied, -math.inf)
    worst = score.masked_fill(~exact, math.inf).amin(-1, keepdim=True)
    left_out = score.masked_fill(exact, -math.inf).amax(-1, keepdim=True)
    assert (left_out <= worst + SCORE_TOLERANCE)[row].all()
    budget = torch.ceil(plan.density * sizes.sum(-1).double())  # [B, H, 1]
    assert (area >= budget)[row].all()
    last_taken = (exact & (score <= worst + SCORE_TOLERANCE)) * sizes
    before = area - last_taken.amax(-1)
    assert ((before < budget) | (area == 0))[row].all()
    assert (area == 0)[row].all() or plan.density > 0


def check_case(form: Form, dim: int, dtype: torch.dtype, compensation: str, case: Case) -> None:
    q, k, v = random_qkv(
        case.seed, case.batch, case.heads, case.tokens, dim, dtype, form.device, case.layout
    )
    mask = None
    if case.mask is not None:
        kv_shape = (case.batch, case.heads[1])
        mask = random_mask(case.seed, case.mask, kv_shape, case.tokens[1], form.device)
    plan = case.plan(compensation)
    kinds = random_kinds(case.seed, mask, case.batch, case.tokens, case.exact, form.device)
    got = form(q, k, v, plan, kinds=kinds, scale=case.scale, return_lse=True)
    assert got.out.dtype == dtype
    assert got.out.stride() == torch.empty_like(q, device="meta").stride()
    check_clusters(got.queries, q, kinds.queries)
    check_clusters(got.keys, k, kinds.keys)
    oracle = Oracle.of(form, q, k, v, plan, case.scale or dim**-0.5, got)
    check_route(oracle, got)
    check_output(oracle, got)


def check_output(oracle: Oracle, got: Result) -> None:
    """Check output and log-sum-exp against the definition with the block mask of the result."""
    dtype = got.out.dtype
    out, lse = oracle.attend(got.block_mask.cpu())
    near_out, near_lse = oracle.attend_stored_in(got.block_mask.cpu(), dtype)
    ulp = torch.finfo(dtype).eps
    assert_within_rounding(got.out, out, near_out, 2 * ulp if dtype == F32 else ulp / 2)
    # In the log-sum-exp only proxy keys are rounded, and few of them have much weight.
    assert_within_rounding(got.lse, lse, near_lse, torch.finfo(F32).eps + ulp / 32)


@given(case=cases(33, 97, 150))
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(
    ("dim", "dtype"), [(32, F32), (64, BF16), (72, F16), (128, F32), (192, BF16)], ids=str
)
def test_cpu_equals_the_definition_on_its_own_blocks(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(CPU, dim, dtype, compensation, case)


@needs_interpreter
@given(case=cases(17, 45, 70))
@settings(max_examples=3, phases=[Phase.generate])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(
    ("dim", "dtype"), [(40, F16), (64, F32), (80, F32), (128, F16), (160, F16)], ids=str
)
def test_interpreted_kernels_equal_the_definition_on_their_own_blocks(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(INTERPRETER, dim, dtype, compensation, case)


@pytest.mark.gpu
@given(case=cases(257, 515, 1031))
@settings(max_examples=4, phases=[Phase.generate])  # a shrunk example would compile again
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [*((dim, BF16) for dim in HEAD_DIMS), (40, F16), (128, F16), (80, F32), (256, F32)],
    ids=str,
)
def test_cuda_kernels_equal_the_definition_on_their_own_blocks(
    dim: int, dtype: torch.dtype, compensation: str, case: Case
) -> None:
    check_case(CUDA, dim, dtype, compensation, case)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["density", "threshold"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_cuda_rows_of_many_tiles_equal_the_definition(
    dim: int, compensation: str, routing: str
) -> None:
    case = Case(
        seed=3, batch=1, heads=(2, 1), tokens=(2503, 4999), layout="bshd", exact=(0.05, 0.03),
        mask=None, clusters=(9, 37), routing=routing, density=0.4, scale=None,
    )  # fmt: skip
    check_case(CUDA, dim, BF16, compensation, case)


@pytest.mark.gpu
@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_cuda_calls_are_bit_equal_whatever_memory_held_before(dim: int, compensation: str) -> None:
    q, k, v = random_qkv(0, 1, (2, 2), (515, 771), dim, BF16, "cuda")
    plan = AttentionPlan(
        density=0.3, compensation=compensation, q_clusters=3, k_clusters=11, first_iterations=2
    )
    first = None
    for _ in range(8):
        torch.cuda.empty_cache()
        poison = [torch.full((n,), math.nan, device="cuda") for n in (2**12, 2**16, 2**20) * 8]
        del poison
        got = CUDA(q, k, v, plan, return_lse=True)
        found = (got.out, got.lse, got.queries.labels, got.keys.labels, got.block_mask)
        first = first or [t.clone() for t in found]
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(INTERPRETER, id="interpreter", marks=needs_interpreter),
        pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_query_clusters_are_those_of_the_definition_with_the_same_tile(form: Form) -> None:
    from svg_ear_compile.kernels.gpu.launch import HOPPER, launch_config

    q, k, v = random_qkv(1, 1, (2, 2), (403, 403), 64, F32, form.device)
    plan = AttentionPlan(q_clusters=5, k_clusters=4, first_iterations=1, cluster_metric="euclidean")
    tile = launch_config(64, q.element_size(), HOPPER).query_tile
    wanted = reference.sparse_attention(q, k, v, plan, query_tile=tile)
    assert not torch.equal(
        wanted.queries.labels, reference.sparse_attention(q, k, v, plan).queries.labels
    )
    found = form(q, k, v, plan)
    assert torch.equal(found.queries.labels.long(), wanted.queries.labels)
    assert torch.equal(found.block_mask, wanted.block_mask)
    torch.testing.assert_close(found.out, wanted.out, rtol=1e-4, atol=1e-5)
