"""Which tokens of a vector come from given streams, for the lengths that were traced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.fx import Node

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


def traced_places(vector: Vector, holds: Callable[[Stream], bool]) -> np.ndarray | None:
    """For the traced lengths, whether the stream of each token holds; None where that is unknown.

    Args:
        vector: N tokens.
        holds: which streams are asked for.

    Returns:
        (N,) bool.
    """
    if isinstance(vector, Part):
        count = vector.count if isinstance(vector.count, int) else vector.count.traced
        return None if count is None else np.full(count, holds(vector.stream))
    if isinstance(vector, Joined):
        parts = [traced_places(part, holds) for part in vector.parts]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if isinstance(vector, Placed):
        into, what = traced_places(vector.into, holds), traced_places(vector.what, holds)
        if into is None or what is None:
            return None
        if len({*into.tolist(), *what.tolist()}) <= 1:  # wherever it is placed
            return into
        where = None if isinstance(vector.at, Node) else _slice(*vector.at, None)
        if where is None or len(into[where]) != len(what):
            return None
        into[where] = what
        return into
    alike = one_answer(vector, holds)
    if isinstance(vector, (Cut, Taken)) and alike is not None and vector.count is not None:
        count = hint(size_of(vector))
        return None if count is None else np.full(count, alike)
    if isinstance(vector, Chosen):  # where they are the same, the mask does not matter
        one, other = traced_places(vector.one, holds), traced_places(vector.other, holds)
        same = one is not None and other is not None and np.array_equal(one, other)
        return one if same else None
    inside = traced_places(vector.of, holds)
    if inside is None:
        return None
    if isinstance(vector, Flipped):
        return inside[::-1].copy()
    if isinstance(vector, Rolled):
        return np.roll(inside, vector.shift) if isinstance(vector.shift, int) else None
    if isinstance(vector, Cut):
        where = _slice(vector.start, vector.stop, vector.step)
        return None if where is None else inside[where].copy()
    return None


def _slice(start: int | Node | None, stop: int | Node | None, step: int | None) -> slice | None:
    bounds = [_traced_bound(bound) for bound in (start, stop)]
    return None if "unknown" in bounds else slice(bounds[0], bounds[1], step)


def _traced_bound(bound: int | Node | None) -> int | str | None:
    if not isinstance(bound, Node):
        return bound
    found = hint(bound.meta.get("example_value"))
    return "unknown" if found is None else found


def traced_count(vector: Vector, holds: Callable[[Stream], bool]) -> int | None:
    """Number of tokens whose stream holds, for the traced lengths; None where that is unknown.

    What is written by index counts as written to places of its own.
    """
    places = traced_places(vector, holds)
    if places is not None:
        return int(places.sum())
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
