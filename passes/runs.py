"""Runs of equal values: a sequence of very many tokens as a few numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
Runs = tuple[tuple[T, int], ...]
"""Values and how often each is repeated, one after the other; neighbours differ, none is empty."""


def merged(runs: Iterable[tuple[T, int]]) -> Runs[T]:
    """The same sequence in as few runs as possible."""
    filled = (run for run in runs if run[1])
    groups = itertools.groupby(filled, key=lambda run: run[0])
    return tuple((value, sum(count for _, count in group)) for value, group in groups)


def length(runs: Runs[T]) -> int:
    """Number of values."""
    return sum(count for _, count in runs)


def sliced(runs: Runs[T], start: int | None, stop: int | None, step: int | None = None) -> Runs[T]:
    """What the slice of the sequence holds."""
    taken, found, before = range(*slice(start, stop, step).indices(length(runs))), [], 0
    for value, count in runs:
        inside = taken[_first(taken, before) : _first(taken, before + count)]
        found.append((value, len(inside)))
        before += count
    return merged(found)


def _first(taken: range, place: int) -> int:
    """How many of ascending places come before one."""
    return max(0, -((taken.start - place) // taken.step))


def written(runs: Runs[T], start: int | None, stop: int | None, what: Runs[T]) -> Runs[T] | None:
    """The sequence with another one in place of a slice; None if that is not as long."""
    first, last, _ = slice(start, stop).indices(length(runs))
    if length(what) != max(0, last - first):
        return None
    return merged((*sliced(runs, 0, first), *what, *sliced(runs, first + length(what), None)))


def rolled(runs: Runs[T], shift: int) -> Runs[T]:
    """The sequence rolled by a number of places."""
    end = -shift % length(runs) if runs else 0
    return merged((*sliced(runs, end, None), *sliced(runs, 0, end)))


def side_by_side(one: Runs[T], other: Runs[U]) -> Iterator[tuple[T, U, int]]:
    """Both values of each place of two sequences of one length, in runs."""
    ends = sorted({*_ends(one), *_ends(other)})
    for start, stop in itertools.pairwise([0, *ends]):
        ((first, count),), ((second, _),) = sliced(one, start, stop), sliced(other, start, stop)
        yield first, second, count


def _ends(runs: Runs[T]) -> Iterator[int]:
    return itertools.accumulate(count for _, count in runs)
