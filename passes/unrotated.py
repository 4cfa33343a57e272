"""A guess at text in one sequence: tokens that get no positions where the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.fx import Node

from svg_ear_compile.passes.operation import REARRANGEMENTS, operation
from svg_ear_compile.passes.symbolic import hint, shape_of
from svg_ear_compile.passes.token_states import Mixed
from svg_ear_compile.passes.vectors import UNROTATED, Part, joined

if TYPE_CHECKING:
    from svg_ear_compile.passes.streams import Streams


def put_back_bare(streams: Streams, nodes: Sequence[Node], dim: int) -> Mixed | None:
    """Tokens put back as they were beside others that were rotated: a guess at text."""
    bare = [operation(part) in REARRANGEMENTS for part in nodes]
    if all(bare) or not any(bare) or operation(nodes[0]) == "cat":
        return None
    sizes = [hint((shape_of(part) or (0,) * (dim + 1))[dim]) for part in nodes]
    known = [size for size in sizes if size is not None]
    small = sum(s for s, b in zip(known, bare, strict=False) if b)
    if len(known) < len(sizes) or 2 * small >= sum(known):
        return None
    parts = []
    for part, is_bare in zip(nodes, bare, strict=True):
        vector = streams.along(part, dim)
        if not isinstance(vector, Part):
            return None
        parts.append(replace(vector, stream=UNROTATED) if is_bare else vector)
    return Mixed(dim, joined(parts))


def rotated_from_a_place(streams: Streams, base: Node, dim: int, where: object) -> Mixed | None:
    """Tokens of one stream that get positions from some place on: a guess at text."""
    shape = shape_of(base) or ()
    whole = hint(shape[dim])
    if dim in (0, len(shape) - 1) or whole is None or not isinstance(where, slice):
        return None
    start, stop = where.start or 0, whole if where.stop is None else where.stop
    if not (isinstance(start, int) and isinstance(stop, int)) or where.step not in (None, 1):
        return None
    start, stop, _ = slice(start, stop).indices(whole)
    if not whole > stop - start > whole / 2:
        return None
    vector = streams.along(base, dim)
    if not isinstance(vector, Part):
        return None
    rotated = replace(vector, count=stop - start)
    return Mixed(dim, joined([Part(start, UNROTATED), rotated, Part(whole - stop, UNROTATED)]))
