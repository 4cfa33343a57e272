"""The exact tokens of one call: how many, where, and where they come from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from svg_ear_compile.passes.runs import Runs
from svg_ear_compile.passes.traced_tokens import traced_count, traced_runs
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
            "" if vector is None else _spans(vector, traced_runs(vector, self.is_exact), self)
            for vector in (self.queries, self.keys)
        )
        return queries, keys


NOTHING_EXACT = ExactTokens()


def _spans(vector: Vector, runs: Runs[bool] | None, exact: ExactTokens) -> str:
    count = traced_count(vector, exact.is_exact)
    if runs is None:
        return "an unknown number" if count is None else f"{count} by index"
    found = _true_spans(runs)
    if len(found) > _MOST_SPANS:
        return f"{count} in {len(found)} spans"
    return ", ".join(f"{start}:{stop}" for start, stop in found)


def _true_spans(runs: Runs[bool]) -> list[tuple[int, int]]:
    """Start and stop of every run of True."""
    stops = itertools.accumulate(count for _, count in runs)
    return [(stop - n, stop) for (held, n), stop in zip(runs, stops, strict=True) if held]
