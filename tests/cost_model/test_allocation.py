"""Allocations over layers and phases, on error curves that are known."""

from __future__ import annotations

import dataclasses

import pytest
from calibrations import even
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.cost_model.allocation import AllocationProblem, Objective
from svg_ear_compile.cost_model.budget import DENSE, Choice
from svg_ear_compile.cost_model.error import ErrorCurve
from svg_ear_compile.cost_model.knapsack import UnreachableError
from svg_ear_compile.cost_model.stages import AttentionShape

DENSITIES = (0.05, 0.1, 0.3)
KIND = Choice(0.0)


def problem(weights: list[list[float]]) -> AllocationProblem:
    """A problem of layers by phases, with errors in proportion to `weight / density`."""
    shape = AttentionShape(1, 4, 4, 32760, 32760, 128, "bfloat16")
    layers = [f"blocks.{i}" for i in range(len(weights))]
    curves = {
        (layer, phase, KIND): ErrorCurve(DENSITIES, tuple(w * 0.01 / d for d in DENSITIES))
        for layer, by_phase in zip(layers, weights, strict=True)
        for phase, w in enumerate(by_phase)
    }
    return AllocationProblem(
        tuple((layer, shape) for layer in layers), len(weights[0]), (KIND,), DENSITIES, curves,
        even(slower=1.3),
    )  # fmt: skip


models = (
    st.integers(1, 2)
    .flatmap(
        lambda phases: st.lists(
            st.lists(st.floats(0.01, 3), min_size=phases, max_size=phases), min_size=1, max_size=5
        )
    )
    .map(problem)
)


@given(models, st.floats(0.06, 0.9))
def test_a_density_is_kept_and_no_worse_than_uniform(
    known: AllocationProblem, density: float
) -> None:
    found = known.solve(Objective("density", density), density)
    assert known.density(found) <= density + 1e-9
    # A uniform allocation at a measured density is among the choices, so it is not better.
    offered = max(c.density for c in known.options if c.density <= density)
    squares = [sum(
        known.layer_error(layer, p, layers[layer][p]) ** 2
        for layer in known.layers for p in range(known.phases)
    ) for layers in (found, known.uniform(offered))]  # fmt: skip
    assert squares[0] <= squares[1] + 1e-12


@given(models, st.floats(0.05, 0.99))
def test_time_is_kept(known: AllocationProblem, fraction: float) -> None:
    least = min(known.attention_ms(known.uniform(d)) for d in DENSITIES)
    allowed = least + fraction * (known.dense_ms - least)
    found = known.solve(Objective("target_speedup", 2.0), allowed)
    assert known.attention_ms(found) <= allowed + 1e-9


@given(models, st.floats(1e-4, 1.0))
def test_an_error_is_kept_in_every_phase_and_dense_always_can(
    known: AllocationProblem, limit: float
) -> None:
    found = known.solve(Objective("max_error", limit), limit)
    assert known.error(found) <= limit * (1 + 1e-6)
    assert known.attention_ms(found) <= known.dense_ms + 1e-9
    assert known.error(known.same(DENSE)) == 0.0


def test_the_layer_that_matters_more_gets_more() -> None:
    known = problem([[0.1], [1.0], [3.0]])
    found = known.solve(Objective("density", 0.2), 0.2)
    given_out = [found[layer][0].density for layer in known.layers]
    assert given_out == sorted(given_out)
    assert given_out[0] < given_out[-1]


@given(models, st.floats(0.06, 0.95))
def test_the_density_of_a_time_takes_that_time(known: AllocationProblem, density: float) -> None:
    wanted = known.attention_ms(known.uniform(density))
    assert known.density_at(wanted) == pytest.approx(density, abs=1e-6)


@pytest.mark.parametrize("name", ["target_speedup", "max_error", "density"])
def test_the_frontier_falls_from_sparse_to_dense(name: str) -> None:
    known = problem([[0.1, 0.3], [1.0, 0.2], [2.0, 2.0]])
    objective = Objective(name, 1.5 if name == "target_speedup" else 0.5)  # type: ignore[arg-type]
    points = [(known.attention_ms(each), known.error(each)) for each in known.frontier(objective)]
    assert len(set(points)) > 6
    by_time = sorted(points)
    if name == "target_speedup":
        assert by_time[-1][1] == 0.0
        assert by_time[0][1] == max(error for _, error in points)


def test_what_cannot_be_reached_is_refused_in_its_own_unit() -> None:
    known = problem([[1.0], [1.0]])
    with pytest.raises(UnreachableError) as caught:
        known.solve(Objective("density", 0.01), 0.01)
    assert caught.value.least == pytest.approx(0.05)


def test_thresholds_rise_where_exact_area_is_worth_less() -> None:
    known = problem([[0.1], [1.0]])
    found = known.uniform(0.1)
    seen = {(layer, 0): (0.2, 5.0) for layer in known.layers}
    routed = known.thresholds(found, seen)
    low, high = (routed[layer][0].threshold for layer in known.layers)
    # Ten times the error of the output for the same attention error: a hundredth of the threshold.
    assert low == pytest.approx(100 * high)
    assert known.thresholds(known.same(DENSE), {}) == known.same(DENSE)
    assert dataclasses.replace(routed["blocks.0"][0], threshold=None) == found["blocks.0"][0]
