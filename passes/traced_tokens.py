"""Which tokens of a vector come from given streams, for the lengths that were traced."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from svg_ear_compile.passes.runs import Runs, merged, rolled, sliced, written
from svg_ear_compile.passes.symbolic import hint
from svg_ear_compile.passes.vectors import (
    Chosen,
    Cut,
    Flipped,
    Joined,
    Part,
    Placed,
    Rolled,
    Stream,
    Taken,
    Vector,
    one_answer,
    size_of,
    writes_over,
)


def traced_runs(vector: Vector, holds: Callable[[Stream], bool]) -> Runs[bool] | None:
    """For the traced lengths, whether the stream of each token holds; None where that is unknown.

    Args:
        vector: N tokens.
        holds: which streams are asked for.
    """
    if isinstance(vector, Part):
        count = vector.count if isinstance(vector.count, int) else vector.count.traced
        return None if count is None else merged([(holds(vector.stream), count)])
    if isinstance(vector, Joined):
        parts = [traced_runs(part, holds) for part in vector.parts]
        known = [part for part in parts if part is not None]
        return merged(run for part in known for run in part) if len(known) == len(parts) else None
    if isinstance(vector, Placed):
        into, what = traced_runs(vector.into, holds), traced_runs(vector.what, holds)
        if into is None or what is None:
            return None
        if len({held for held, _ in (*into, *what)}) <= 1:  # wherever it is placed
            return into
        bounds = None if isinstance(vector.at, Node) else _bounds(*vector.at)
        return None if bounds is None else written(into, *bounds, what)
    alike = one_answer(vector, holds)
    if isinstance(vector, (Cut, Taken)) and alike is not None and vector.count is not None:
        count = hint(size_of(vector))
        return None if count is None else merged([(alike, count)])
    if isinstance(vector, Chosen):  # where they are the same, the mask does not matter
        one, other = traced_runs(vector.one, holds), traced_runs(vector.other, holds)
        return one if one == other else None
    inside = traced_runs(vector.of, holds)
    if inside is None:
        return None
    if isinstance(vector, Flipped):
        return inside[::-1]
    if isinstance(vector, Rolled):
        return rolled(inside, vector.shift) if isinstance(vector.shift, int) else None
    if isinstance(vector, Cut):
        bounds = _bounds(vector.start, vector.stop)
        return None if bounds is None else sliced(inside, *bounds, vector.step)
    return None


def _bounds(
    start: int | Node | None, stop: int | Node | None
) -> tuple[int | None, int | None] | None:
    """Bounds of a slice for the traced lengths; None where one is unknown."""
    first, last = _traced_bound(start), _traced_bound(stop)
    return None if isinstance(first, str) or isinstance(last, str) else (first, last)


def _traced_bound(bound: int | Node | None) -> int | str | None:
    if not isinstance(bound, Node):
        return bound
    found = hint(bound.meta.get("example_value"))
    return "unknown" if found is None else found


def traced_count(vector: Vector, holds: Callable[[Stream], bool]) -> int | None:
    """Number of tokens whose stream holds, for the traced lengths; None where that is unknown.

    What is written by index counts as written to places of its own.
    """
    runs = traced_runs(vector, holds)
    if runs is not None:
        return sum(count for held, count in runs if held)
    if isinstance(vector, Placed):
        counts = [_traced_count_left(vector, holds), traced_count(vector.what, holds)]
    elif isinstance(vector, Joined):
        counts = [traced_count(part, holds) for part in vector.parts]
    elif isinstance(vector, (Flipped, Rolled)):
        counts = [traced_count(vector.of, holds)]
    else:
        return None
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _traced_count_left(vector: Placed, holds: Callable[[Stream], bool]) -> int | None:
    """Number of tokens whose stream holds that are left of a vector that another is written to."""
    count = traced_count(vector.into, holds)
    if count is None or not writes_over(vector) or count == 0:
        return count
    written = hint(size_of(vector.what))
    if written is None or written > count or one_answer(vector.into, holds) is None:
        return None
    return count - written
