"""Predicted times: how they change with their arguments, and the decisions made with them."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from calibrations import DEVICE, even
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.cost_model.latency import (
    LONGEST,
    NON_ATTENTION_OVERHEAD,
    Start,
    attention_allowance,
    break_even_tokens,
    call_ms,
    dense_ms,
    fewest_cached_keys,
    most_keys_per_query,
    ms_per_unit_density,
    non_attention_ms,
    pays,
    sparse_ms,
)
from svg_ear_compile.cost_model.stages import STAGES, AttentionShape, sparse_amounts
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

SHAPE = AttentionShape(1, 8, 8, 32760, 32760, 128, "bfloat16")
KINDS = st.sampled_from(["cuda", "cpu"])

shapes = st.builds(
    lambda batch, kv_heads, groups, tokens, text, dim, dtype: AttentionShape(
        batch, kv_heads * groups, kv_heads, tokens + text, tokens + text, dim, dtype, text
    ),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 200_000),
    st.integers(0, 513),
    st.sampled_from([40, 64, 72, 128, 256]),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)
plans = st.builds(
    AttentionPlan,
    density=st.floats(0, 0.99),
    compensation=st.sampled_from(get_args(Compensation)),
    q_clusters=st.none() | st.integers(1, 700),
    k_clusters=st.none() | st.integers(1, 1500),
)


def total(shape: AttentionShape, plan: AttentionPlan, kind: str = "cuda") -> float:
    return sparse_ms(shape, plan, even(kind)).total


@given(shapes, plans, KINDS)
def test_every_stage_takes_time_and_the_sum_is_the_call(
    shape: AttentionShape, plan: AttentionPlan, kind: str
) -> None:
    times = sparse_ms(shape, plan, even(kind))
    assert tuple(times.stages) == STAGES[kind]
    assert all(ms > 0 for stage, ms in times.stages.items() if stage != "correction")
    if kind == "cuda":
        assert (times.stages["correction"] > 0) == (plan.compensation == "gaussian")
    assert times.total == pytest.approx(sum(times.stages.values()))


@given(shapes, plans, KINDS, st.floats(0, 0.99))
def test_more_exact_blocks_never_take_less_time(
    shape: AttentionShape, plan: AttentionPlan, kind: str, other: float
) -> None:
    low, high = sorted([plan.density, other])
    less, more = (dataclasses.replace(plan, density=d) for d in (low, high))
    # On a CPU an exact block saves its proxy token, so only blocks of many keys take longer.
    keys = shape.k_tokens - shape.text
    if kind == "cpu" and plan.clusters(1, keys)[1] * 2 > keys:
        return
    assert total(shape, less, kind) <= total(shape, more, kind) * (1 + 1e-9)


@given(shapes, plans, KINDS)
def test_more_rounds_batches_and_heads_take_longer(
    shape: AttentionShape, plan: AttentionPlan, kind: str
) -> None:
    calibration = even(kind)
    starts: tuple[Start, ...] = ("reused", "warm", "cold")
    reused, warm, cold = (sparse_ms(shape, plan, calibration, s).total for s in starts)
    assert reused < warm < cold
    assert reused < call_ms(shape, plan, calibration) < warm
    recomputed = dataclasses.replace(plan, max_drift=0.0)
    assert call_ms(shape, recomputed, calibration) == warm
    twice = dataclasses.replace(shape, batch=2 * shape.batch)
    assert total(shape, plan, kind) < total(twice, plan, kind)
    assert dense_ms(shape, calibration) < dense_ms(twice, calibration)


@given(shapes)
def test_attending_to_everything_is_never_less_work_than_dense_attention(
    shape: AttentionShape,
) -> None:
    calibration = even(slower=1.0)
    plan = AttentionPlan(density=0.999999)
    attend = sparse_ms(shape, plan, calibration).stages["attend"]
    operations = calibration.roofs.flops.get(shape.dtype, 50.0)
    flops = sparse_amounts(shape, plan, DEVICE)["attend"].flops
    assert attend >= flops / operations / 1e9
    # Text queries and text keys are dense in both.
    assert flops >= 4 * shape.batch * shape.heads * shape.q_tokens * shape.k_tokens * (
        shape.head_dim * 0.99
    )


def test_a_call_takes_as_long_as_the_host_needs_to_issue_it() -> None:
    tiny = SHAPE.with_tokens(64)
    assert sparse_ms(tiny, AttentionPlan(), even(host_ms=3.0)).total == 3.0


@pytest.mark.parametrize("density", [0.05, 0.2, 0.4])
def test_break_even_is_where_the_plan_begins_to_pay(density: float) -> None:
    plan, calibration = (
        AttentionPlan(density=density, q_clusters=100, k_clusters=300),
        even("cuda", 1.5),
    )
    tokens = break_even_tokens(SHAPE, plan, calibration)
    assert tokens is not None
    assert pays(SHAPE.with_tokens(tokens), plan, calibration)
    assert not pays(SHAPE.with_tokens(tokens - 1), plan, calibration)


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_more_keys_than_the_ratio_do_not_pay(density: float) -> None:
    plan, calibration = AttentionPlan(density=density), even("cuda", 1.5)
    ratio = most_keys_per_query(SHAPE, plan, calibration)
    assert ratio > 1
    for keys, fits in ((ratio, True), (ratio + 2, False)):
        queries = round(LONGEST / keys)
        shape = dataclasses.replace(SHAPE, q_tokens=queries, k_tokens=LONGEST)
        assert pays(shape, plan, calibration) == fits


@pytest.mark.parametrize("queries", [6000, 9000])
def test_cached_keys_pay_from_fewer_keys_on_than_keys_that_are_clustered(queries: int) -> None:
    plan, calibration = AttentionPlan(density=0.2), even("cuda", 1.5)
    shape = dataclasses.replace(SHAPE, q_tokens=queries)
    fewest = fewest_cached_keys(shape, plan, calibration)
    assert fewest is not None
    for keys, fits in ((fewest, True), (fewest - 1, False)):
        assert pays(dataclasses.replace(shape, k_tokens=keys), plan, calibration, "kept") == fits
    shape = dataclasses.replace(shape, k_tokens=max(fewest, 6 * queries))
    by_start = [sparse_ms(shape, plan, calibration, s).total for s in ("reused", "kept", "warm")]
    assert by_start == sorted(by_start)
    assert by_start[1] < by_start[2]


def test_exact_keys_cost_less_than_exact_queries() -> None:
    plan, calibration = AttentionPlan(density=0.2), even("cuda", 1.5)
    alike = dataclasses.replace(SHAPE, text=2000)
    assert alike.clustered == (30760, 30760)
    of_keys = dataclasses.replace(alike, exact_queries=0)
    assert of_keys.clustered == (32760, 30760)
    assert sparse_ms(of_keys, plan, calibration).total < sparse_ms(alike, plan, calibration).total


def test_nothing_pays_on_a_device_whose_sparse_kernels_are_hopeless() -> None:
    assert break_even_tokens(SHAPE, AttentionPlan(), even(slower=50.0)) is None
    assert break_even_tokens(SHAPE, AttentionPlan(density=1.0), even()) is None


def test_the_tiles_are_those_of_the_device_that_is_predicted_for() -> None:
    """Query tiles of Hopper are longer, so that the same clusters leave more of a tile empty."""
    plan = AttentionPlan(q_clusters=2000)
    rows = {
        arch: sparse_amounts(SHAPE, plan, dataclasses.replace(DEVICE, architecture=arch))
        for arch in ("sm_90", "sm_80", "gfx942")
    }
    assert rows["sm_80"] == rows["gfx942"]
    assert rows["sm_80"]["attend"] != rows["sm_90"]["attend"]


@given(st.floats(0.1, 1e3), st.floats(0, 1e3), st.floats(1, 4))
def test_an_allowance_gives_the_speed_up_that_it_was_asked_for(
    attention: float, rest: float, target: float
) -> None:
    left = attention_allowance(attention, rest, target)
    assert (attention + rest) / (left + rest) == pytest.approx(target)


def test_the_rest_of_a_model_takes_its_products_and_its_bytes() -> None:
    calibration = even()
    alone = non_attention_ms(5e12, 0, "bfloat16", calibration)
    assert alone == pytest.approx(10.0 * NON_ATTENTION_OVERHEAD)
    assert non_attention_ms(5e12, 1e9, "bfloat16", calibration) == pytest.approx(alone + 0.5)


@given(plans.filter(lambda plan: plan.k_clusters is None or plan.k_clusters > 50))
def test_a_unit_of_exact_area_costs_what_a_dense_call_of_the_kernel_would(
    plan: AttentionPlan,
) -> None:
    found = ms_per_unit_density(SHAPE, plan, even(slower=2.0))
    assert 0.5 * dense_ms(SHAPE, even()) < found < 8 * dense_ms(SHAPE, even())
