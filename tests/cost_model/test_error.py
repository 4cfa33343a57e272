"""Error curves, and the default curve."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.cost_model import default_error
from svg_ear_compile.cost_model.default_error import attention_error, model_error
from svg_ear_compile.cost_model.error import Measurement, fit_curve, together
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

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
    sensitivity = json.loads((RESULTS / "sensitivity.json").read_text())["median_sensitivity"]
    assert pytest.approx(sensitivity, rel=0.1) == default_error.MODEL_ERROR_RATIO
    assert model_error(0.2, AttentionPlan(), 4096, 4096) == pytest.approx(
        default_error.MODEL_ERROR_RATIO * attention_error(0.2, 128, 64, "gaussian")
    )
