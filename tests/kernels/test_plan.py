"""The plan: its text form, its checks, its cluster counts."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

PLANS = st.builds(
    AttentionPlan,
    density=st.floats(0, 1),
    routing=st.sampled_from(("density", "top_p", "threshold")),
    top_p=st.floats(0, 1),
    threshold=st.floats(0, 10),
    compensation=st.sampled_from(get_args(Compensation)),
    q_clusters=st.none() | st.integers(1, 500),
    k_clusters=st.none() | st.integers(1, 500),
    warm_iterations=st.integers(1, 9),
    seed=st.integers(0, 99),
)


@given(plan=PLANS)
def test_text_form_round_trips(plan: AttentionPlan) -> None:
    assert AttentionPlan.decode(plan.encode()) == plan
    assert not {'"', "\\", "\n"} & set(plan.encode())  # it goes into C++ as it is


def test_default_plan_is_an_empty_object() -> None:
    assert AttentionPlan().encode() == "{}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("density", -0.1),
        ("density", 1.1),
        ("density", float("nan")),
        ("top_p", 2.0),
        ("min_block_ratio", -1.0),
        ("threshold", float("inf")),
        ("routing", "best"),
        ("compensation", "none"),
        ("q_clusters", 0),
        ("k_clusters", -3),
        ("first_iterations", 0),
        ("warm_iterations", 0),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        AttentionPlan(**{field: value})


@pytest.mark.parametrize("form", ["first_order", "second_order"])
def test_a_form_that_is_gone_names_what_replaced_it(form: str) -> None:
    with pytest.raises(ValueError, match=f'"{form}" was replaced by "gaussian"'):
        AttentionPlan(compensation=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ['{"densty": 0.1}', "[]", "3"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan must be a JSON object"):
        AttentionPlan.decode(text)


@given(plan=PLANS, q_tokens=st.integers(1, 100_000), k_tokens=st.integers(1, 100_000))
def test_never_more_clusters_than_tokens(plan: AttentionPlan, q_tokens: int, k_tokens: int) -> None:
    q_clusters, k_clusters = plan.clusters(q_tokens, k_tokens)
    assert 1 <= q_clusters <= q_tokens
    assert 1 <= k_clusters <= k_tokens
    if plan.q_clusters is not None:
        assert q_clusters == min(plan.q_clusters, q_tokens)


@pytest.mark.parametrize(
    ("tokens", "q_clusters"),
    [(1, 1), (2304, 18), (32768, 256), (32769, 256), (65536, 256), (75600, 296), (118800, 465)],
)
def test_query_clusters_of_128_queries_up_to_256_and_of_256_beyond(
    tokens: int, q_clusters: int
) -> None:
    assert AttentionPlan().clusters(tokens, tokens)[0] == q_clusters
