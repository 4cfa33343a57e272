"""The exact tokens of one call: how many, where, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svg_ear_compile.passes.traced_tokens import traced_count, traced_places
from svg_ear_compile.passes.vectors import Stream, Vector

_MOST_SPANS = 3


@dataclass(frozen=True)
class ExactTokens:
    """The tokens of a call that are always exact.

    Attributes:
        queries, keys: streams of the tokens, None where all are clustered.
        streams: the streams whose tokens are exact.
        origin: where they come from, in words; "" where there are none.
        guessed: the graph does not prove it.
        in_one_piece: all tokens come from one input of the graph, which is no clip, or queries and
            keys from one each: what was joined before does not show.
        untold: names of streams whose tokens would be exact, were their places known.
    """

    queries: Vector | None = None
    keys: Vector | None = None
    streams: frozenset[Stream] = frozenset()
    origin: str = ""
    guessed: bool = False
    in_one_piece: bool = False
    untold: str = ""

    def is_exact(self, stream: Stream) -> bool:
        """True if tokens of this stream are exact."""
        return stream in self.streams

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Numbers of exact queries and keys while tracing, None where not known."""
        queries, keys = (
            0 if vector is None else traced_count(vector, self.is_exact)
            for vector in (self.queries, self.keys)
        )
        return queries, keys

    @property
    def spans(self) -> tuple[str, str]:
        """Places of exact queries and keys while tracing, as "0:9, 201:205"; "" for none."""
        queries, keys = (
            "" if vector is None else _spans(vector, traced_places(vector, self.is_exact), self)
            for vector in (self.queries, self.keys)
        )
        return queries, keys


NOTHING_EXACT = ExactTokens()


def _spans(vector: Vector, places: np.ndarray | None, exact: ExactTokens) -> str:
    count = traced_count(vector, exact.is_exact)
    if places is None:
        return "an unknown number" if count is None else f"{count} by index"
    found = spans_of(places)
    if len(found) > _MOST_SPANS:
        return f"{count} in {len(found)} spans"
    return ", ".join(f"{start}:{stop}" for start, stop in found)


def spans_of(places: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of every run of True in places (N,) bool."""
    edges = np.flatnonzero(np.diff(places.astype(np.int8), prepend=0, append=0))
    return [(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]
