"""The error bound for unseen inputs: how it changes, and how often it is kept."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.cost_model.margin import KEPT_BY, USUAL_SPREAD, unseen_error

errors = st.floats(1e-4, 1.0)


@given(st.lists(errors, min_size=1, max_size=6), st.floats(0.1, 10.0))
def test_the_bound_is_above_the_mean_and_scales_with_the_errors(
    seen: list[float], factor: float
) -> None:
    bound = unseen_error([seen])
    assert bound > math.exp(sum(map(math.log, seen)) / len(seen))
    assert unseen_error([[factor * e for e in seen]]) == pytest.approx(factor * bound)


def test_more_clips_and_less_spread_lower_the_bound() -> None:
    bounds = [unseen_error([[0.1] * clips]) for clips in (1, 2, 4, 16)]
    assert bounds == sorted(bounds, reverse=True)
    assert unseen_error([[0.05, 0.2]]) > unseen_error([[0.1, 0.1]])
    assert unseen_error([[0.1] * 200]) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(("clips", "student"), [(1, 1.943), (5, 1.812), (15, 1.725)])
def test_it_is_the_end_of_a_prediction_interval(clips: int, student: float) -> None:
    """Student's t from a table, at six degrees of freedom and one more for each further clip."""
    freedom = 5 + clips
    spread = USUAL_SPREAD * math.sqrt(6 / freedom)
    expected = 0.1 * math.exp(student * spread * math.sqrt(1 + 1 / clips))
    assert unseen_error([[0.1] * clips]) == pytest.approx(expected, rel=1e-3)


def test_the_worst_timestep_decides_and_dense_ones_say_nothing() -> None:
    assert unseen_error([[0.1, 0.1], [0.01, 0.01]]) > 0.1
    assert unseen_error([[0.1, 0.1], [0.01, 0.01]]) == unseen_error([[0.01, 0.01], [0.1, 0.1]])
    assert unseen_error([[0.1], [0.0]]) == unseen_error([[0.1]])
    assert unseen_error([[0.0], []]) == 0.0


@pytest.mark.parametrize("clips", [1, 3, 10])
@pytest.mark.parametrize("spread", [0.5 * USUAL_SPREAD, USUAL_SPREAD])
def test_unseen_inputs_keep_it(clips: int, spread: float) -> None:
    draw = random.Random(clips)
    kept = 0
    for _ in range(2000):
        *seen, unseen = (math.exp(draw.gauss(0.0, spread)) for _ in range(clips + 1))
        kept += unseen <= unseen_error([seen])
    assert kept >= (KEPT_BY - 0.01) * 2000
