"""Error curves, the default curve, and the run-time estimate."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.cost_model import default_error
from svg_ear_compile.cost_model.default_error import attention_error, model_error
from svg_ear_compile.cost_model.error import Measurement, fit_curve, together
from svg_ear_compile.cost_model.residual import residual, spread
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.kernels.reference import Clusters

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"

measurements = st.lists(
    st.builds(Measurement, st.sampled_from([0.03, 0.1, 0.2, 0.5]), st.floats(1e-6, 2.0)),
    min_size=1,
    max_size=20,
)


@given(measurements, st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_a_curve_falls_to_nothing_at_density_one(
    found: list[Measurement], densities: list[float]
) -> None:
    curve = fit_curve(found)
    errors = [curve.at(d) for d in sorted(densities)]
    assert all(a >= b - 1e-12 for a, b in pairwise(errors))
    assert curve.at(1.0) == 0.0
    assert all(math.isfinite(e) and e >= 0 for e in errors)


@given(measurements)
def test_smoothing_stays_within_what_was_measured(found: list[Measurement]) -> None:
    curve = fit_curve(found)
    low, high = min(m.error for m in found), max(m.error for m in found)
    assert all(low * (1 - 1e-9) <= e <= high * (1 + 1e-9) for e in curve.errors)


def test_measurements_that_fall_already_are_kept() -> None:
    curve = fit_curve([Measurement(d, 0.1 / d) for d in (0.1, 0.2, 0.4)])
    assert curve.errors == pytest.approx((1.0, 0.5, 0.25))
    assert curve.at(0.3) == pytest.approx(0.375)


def test_repeats_are_averaged_as_factors() -> None:
    curve = fit_curve([Measurement(0.1, e) for e in (0.1, 0.4)])
    assert curve.errors == pytest.approx((0.2,))


def test_a_curve_needs_a_measurement() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit_curve([])


@given(st.lists(st.floats(0, 1), max_size=6))
def test_errors_add_in_squares(errors: list[float]) -> None:
    assert together(errors) ** 2 == pytest.approx(sum(e * e for e in errors))
    assert together([*errors, 0.5]) >= max([*errors, 0.5])


@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(8, 512), st.floats(8, 512),
    st.sampled_from(get_args(Compensation)),
)  # fmt: skip
def test_the_default_error_falls_with_density_and_with_finer_clusters(
    first: float, second: float, q_size: float, k_size: float, form: str
) -> None:
    low, high = sorted((first, second))

    def at(density: float, q: float = q_size, k: float = k_size) -> float:
        return attention_error(density, q, k, form)  # type: ignore[arg-type]

    assert at(low) >= at(high)
    assert at(low, q_size / 2) <= at(low)
    assert at(low, q_size, k_size / 2) <= at(low)
    assert at(1.0) == 0.0
    assert at(low) <= 1.0


def test_the_default_curve_is_the_recorded_one() -> None:
    law = json.loads((RESULTS / "local_error.json").read_text())["law"]
    for form, known in default_error._LAWS.items():
        fitted = (law[form][k] for k in (
            "intercept", "density", "queries_per_cluster", "keys_per_cluster"
        ))  # fmt: skip
        mine = (known.intercept, known.density, known.queries, known.keys)
        assert mine == pytest.approx(tuple(fitted), abs=0.01)
    share = json.loads((RESULTS / "sensitivity.json").read_text())["median_share"]
    assert pytest.approx(share, rel=0.1) == default_error.MODEL_SHARE
    assert model_error(0.2, AttentionPlan(), 4096, 4096) == pytest.approx(
        default_error.MODEL_SHARE * attention_error(0.2, 128, 64, "gaussian")
    )


def scattered(place: Tensor, noise: float) -> Tensor:
    """(1, 2, N, 32) tokens around 8 places, `noise` away from them."""
    centers = torch.randn(1, 2, 8, 32)
    return centers.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, 32)) + noise * torch.randn(
        1, 2, place.shape[2], 32
    )


@given(st.integers(0, 99), st.sampled_from(get_args(Compensation)))
def test_the_estimate_is_nothing_where_compensation_is_exact(seed: int, form: Compensation) -> None:
    torch.manual_seed(seed)
    places = [torch.randint(8, (1, 2, 61)) for _ in range(2)]

    def estimate(q_noise: float, k_noise: float, v_noise: float, exact: bool = False) -> float:
        q = scattered(places[0], q_noise)
        k, v = (scattered(places[1], noise) for noise in (k_noise, v_noise))
        queries, keys = (
            Clusters(place, *reference.cluster_means(x, place, 8))
            for place, x in zip(places, (q, k), strict=True)
        )
        taken = torch.full((1, 2, 8, 8), exact)
        return float(residual(q, k, v, queries, keys, taken, form, 32**-0.5).max())

    assert estimate(1.0, 1.0, 1.0) > 1e-2
    assert estimate(1.0, 1.0, 1.0, exact=True) == 0.0
    # Keys of a block that coincide, or its values; with tables of their own its queries.
    assert estimate(1.0, 0.0, 1.0) < 1e-5
    assert estimate(1.0, 1.0, 0.0) < 1e-5
    own_tables = AttentionPlan(compensation=form).has_own_tables
    assert (estimate(0.0, 1.0, 1.0) < 1e-5) == own_tables


@given(st.integers(0, 99))
def test_the_estimate_falls_with_density_as_the_error_does(seed: int) -> None:
    torch.manual_seed(seed)
    place = torch.randint(8, (1, 2, 240))
    q, k, v = (scattered(place, 1.0) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    estimates, errors = [], []
    for density in (0.05, 0.3, 0.8):
        plan = AttentionPlan(density=density, q_clusters=12, k_clusters=30)
        found = reference.sparse_attention(q, k, v, plan)
        estimates.append(
            float(
                residual(
                    q, k, v, found.queries, found.keys, found.exact, "first_order", 32**-0.5
                ).mean()
            )
        )
        errors.append(float((found.out - dense).norm() / dense.norm()))
    assert estimates == sorted(estimates, reverse=True)
    assert errors[0] > errors[-1]


def test_spread_is_the_distance_from_the_mean() -> None:
    x = torch.tensor([[[[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [9.0, 9.0]]]])
    labels = torch.tensor([[[0, 0, 1, 3]]])  # the last is padding: C + 1
    found = Clusters(labels, torch.zeros(1, 1, 2, 2), torch.tensor([[[2, 1]]]))
    torch.testing.assert_close(spread(x, found), torch.tensor([[[1.0, 0.0]]]))
