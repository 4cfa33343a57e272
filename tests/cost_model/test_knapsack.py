"""The knapsack: solutions against brute force, bounds against the best solution."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svg_ear_compile.cost_model.knapsack import (
    Option,
    UnreachableError,
    hull,
    multiplier,
    solve,
)

amounts = st.integers(0, 40).map(float) | st.floats(0.001, 50)
options = st.builds(Option, cost=amounts, loss=amounts)
problems = st.lists(st.lists(options, min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(groups: list[list[Option]], budget: float) -> float:
    """Least loss within the budget."""
    choices = itertools.product(*groups)
    return min(sum(o.loss for o in c) for c in choices if sum(o.cost for o in c) <= budget)


def reachable(groups: list[list[Option]], fraction: float) -> float:
    """A budget between the least and the most that the groups can cost."""
    least, most = (sum(f(o.cost for o in group) for group in groups) for f in (min, max))
    return least + fraction * (most - least) + 1e-9 * most


def loss_of(groups: list[list[Option]], chosen: tuple[int, ...]) -> float:
    return sum(group[i].loss for group, i in zip(groups, chosen, strict=True))


def bound_at(groups: list[list[Option]], budget: float, saved: float) -> float:
    """No choice within the budget has a smaller loss, whatever a unit of budget saves."""
    return sum(min(o.loss + saved * o.cost for o in group) for group in groups) - saved * budget


@settings(max_examples=60)
@given(problems, st.floats(0, 1))
def test_it_keeps_the_budget_and_stays_near_brute_force(
    groups: list[list[Option]], fraction: float
) -> None:
    budget = reachable(groups, fraction)
    best, chosen = brute_force(groups, budget), solve(groups, budget)
    assert math.fsum(group[i].cost for group, i in zip(groups, chosen, strict=True)) <= budget
    loss, bound = loss_of(groups, chosen), bound_at(groups, budget, multiplier(groups, budget))
    assert bound - 1e-6 * (1 + best) <= best <= loss + 1e-6
    # At most one group has another option than in the relaxed optimum.
    assert loss - bound <= max(max(o.loss for o in group) for group in groups) + 1e-6


@given(problems)
def test_a_budget_below_the_cheapest_choice_is_refused_and_named(
    groups: list[list[Option]],
) -> None:
    least = sum(min(o.cost for o in group) for group in groups)
    with pytest.raises(UnreachableError) as caught:
        solve(groups, least - 1.0)
    assert caught.value.least == pytest.approx(least)
    assert f"the least is {caught.value.least:g}" in str(caught.value)


@given(problems)
def test_with_room_for_everything_every_group_takes_its_least_loss(
    groups: list[list[Option]],
) -> None:
    budget = sum(max(o.cost for o in group) for group in groups) * 1.01 + 1.0
    least = sum(min(o.loss for o in group) for group in groups)
    assert loss_of(groups, solve(groups, budget)) == pytest.approx(least, abs=1e-6)
    assert multiplier(groups, budget) == 0.0


@given(problems, st.floats(0, 1), st.floats(0, 50))
def test_no_other_multiplier_has_a_larger_bound(
    groups: list[list[Option]], fraction: float, other: float
) -> None:
    budget = reachable(groups, fraction)
    best = bound_at(groups, budget, multiplier(groups, budget))
    assert bound_at(groups, budget, other) <= best + 1e-6 * (1 + best)


@given(st.lists(options, min_size=1, max_size=9), st.floats(0.001, 100))
def test_the_hull_holds_the_choice_of_every_multiplier(
    group: list[Option], multiplier: float
) -> None:
    kept = hull(group)
    best = min(o.loss + multiplier * o.cost for o in group)
    assert min(group[i].loss + multiplier * group[i].cost for i in kept) == pytest.approx(best)
    costs, losses = [group[i].cost for i in kept], [group[i].loss for i in kept]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)


def test_what_the_multiplier_leaves_is_spent() -> None:
    groups = [
        [Option(1, 10), Option(4, 0)],
        [Option(1, 8), Option(3, 1)],
        [Option(0, 1), Option(1, 0.9)],
    ]
    # 7 / 2 goes before 10 / 3, which then does not fit; 0.1 / 1 does.
    assert solve(groups, 5.0) == (0, 1, 1)


def test_what_is_left_buys_the_best_loss_per_cost() -> None:
    """The best slope of all does not fit, and only one of the others does."""
    large = [Option(0, 100), Option(50, 0)]
    little, much = ([Option(0, loss), Option(5, 0)] for loss in (3, 6))
    assert solve([large, little, much], 5.0) == (0, 0, 1)
    assert solve([much, large, little], 5.0) == (1, 0, 0)


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one option"):
        solve([[]], 1.0)
