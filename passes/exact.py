"""Which queries and keys of an attention call are always exact: text, audio, conditioning.

The video is the stream with a clip's dimensions, or the one with most queries. Tokens of other
inputs are exact, and so are learned tokens and conditions that became tokens. Other clips (frames
of history, reference frames), cached keys and filling are clustered with the video.
"""

from __future__ import annotations

import re

from svg_ear_compile.passes.exact_places import NOTHING_EXACT, ExactTokens
from svg_ear_compile.passes.site import Call, Operand
from svg_ear_compile.passes.streams import Streams
from svg_ear_compile.passes.symbolic import Size, hint, hints_of
from svg_ear_compile.passes.traced_tokens import traced_count
from svg_ear_compile.passes.vectors import (
    FILLED,
    OPTION,
    Cut,
    Part,
    Placed,
    Stream,
    TokenCount,
    Vector,
    index_nodes,
    leaves,
    nodes_of,
)

Spans = tuple[tuple[int | None, int | None], ...]
"""Start and stop of slices of tokens."""


def exact_tokens(streams: Streams, call: Call) -> ExactTokens:
    """The exact tokens of a call, as far as the graph shows them."""
    queries, keys = (
        streams.along(x.node, x.dims.index("n")) if "n" in x.dims else None
        for x in (call.q, call.k)
    )
    if queries is None:
        return ExactTokens(untold=_untold(streams.possible(call.q.node)))
    video = _video(queries, keys)
    if video is None:
        return NOTHING_EXACT
    found = {part.stream for part in leaves(queries)}
    in_one_piece = len(found) == 1 and not video.pixels
    if keys is not None:
        of_keys = {part.stream for part in leaves(keys)}
        if found.isdisjoint(of_keys):  # they come into the graph apart: nothing shows what is video
            return ExactTokens(in_one_piece=True)
        found |= of_keys
    exact = frozenset(s for s in found if _is_exact(s, video))
    queries, keys = (
        v if v is not None and any(p.stream in exact and p.count != 0 for p in leaves(v)) else None
        for v in (queries, keys)
    )
    vectors = [v for v in (queries, keys) if v is not None]
    found_nodes = [n for v in vectors for n in nodes_of(v)]
    if not vectors:
        return ExactTokens(in_one_piece=in_one_piece)
    names = ", ".join(sorted({_name(stream) for stream in exact}))
    if any(n.graph is not call.node.graph for n in found_nodes):
        return ExactTokens(untold=names)
    if any(streams.flow.is_written_after_use(n) for v in vectors for n in index_nodes(v)):
        return ExactTokens(untold=names)  # they would be read where the attention is
    guessed = any(stream.kind == "unrotated" for stream in exact)
    return ExactTokens(queries, keys, exact, names, guessed)


def _untold(streams: frozenset[Stream]) -> str:
    """Names of the streams that are not the video's, of tokens whose places are not known."""
    inputs = {stream.source for stream in streams if stream.source is not None}
    clips = {stream.source for stream in streams if stream.pixels}
    others = {s for s in streams if s.source is not None and s.source not in clips}
    return ", ".join(sorted({_name(s) for s in others})) if len(inputs) > 1 else ""


def _video(queries: Vector, keys: Vector | None) -> Stream | None:
    """The stream of the video: the largest of the keys, of a cache's keys only if all are."""
    tokens = queries if keys is None else keys
    parts = [part for part in leaves(tokens) if part.stream.source is not None]
    if any(part.stream.projected for part in leaves(queries)):
        parts = [part for part in parts if part.stream.projected]

    def size(stream: Stream) -> tuple[bool, int]:
        count = traced_count(tokens, lambda other: other.source is stream.source)
        if count is None:  # cut or taken by index: as many as there were before
            same = [part.count for part in parts if part.stream.source is stream.source]
            count = sum((c if isinstance(c, int) else c.traced) or 0 for c in same)
            # One token may have been spread over many places.
            shape = hints_of(stream.source) if stream.source is not None else ()
            count = min(count, max((n or count for n in shape), default=count))
        return stream.pixels, count

    return max((part.stream for part in parts), key=size, default=None)


def _is_exact(stream: Stream, video: Stream) -> bool:
    if stream.source is None:
        return stream.kind not in ("filled", "stored")
    if stream.source is video.source or stream.pixels:
        return False
    return stream.projected or not video.projected  # what no projection has read is a cache


def _name(stream: Stream) -> str:
    """What a stream is called in a report."""
    if stream.source is None:
        return {
            "learned": "learned tokens",
            "other": "conditions",
            "unrotated": "tokens without positions",
            "option": "exact_tokens",
        }[stream.kind]
    name = re.sub(r"^[Ll]_+|_+$", "", stream.source.name)
    return name.removeprefix("self_").removeprefix("kwargs_")


def given_tokens(call: Call, spans: Spans, length: int | None = None) -> ExactTokens | None:
    """The tokens that an option names by slices; None if these do not fit the call.

    Slices are of the keys; queries have the same if they are as many. They fit if each lies inside
    of the sequence, as it was traced, and they leave a token to cluster.

    Args:
        length: number of keys of the only calls that they fit, None for any.
    """
    if "n" not in call.q.dims or "n" not in call.k.dims:
        return None
    if length not in (None, hint(_tokens(call.k)[0])):
        return None
    vectors: list[Vector | None] = []
    (q_tokens, q_dim), (k_tokens, k_dim) = (_tokens(x) for x in (call.q, call.k))
    for operand, tokens, dim in ((call.q, q_tokens, q_dim), (call.k, k_tokens, k_dim)):
        if operand is call.q and hint(q_tokens) != hint(k_tokens):
            vectors.append(None)
            continue
        count = tokens if isinstance(tokens, int) else TokenCount(operand.node, dim)
        vector: Vector = Part(count, FILLED)
        for start, stop in spans:
            what = Cut(Part(count, OPTION), start, stop, None, None)
            if not fits(start, stop, hint(tokens)):
                return None
            vector = Placed(vector, (start, stop), what)
        vectors.append(vector)
    found = ExactTokens(vectors[0], vectors[1], frozenset({OPTION}), "exact_tokens")
    return found if found.counts[1] != hint(k_tokens) else None


def _tokens(operand: Operand) -> tuple[Size, int]:
    dim = operand.dims.index("n")
    return operand.node.meta["example_value"].shape[dim], dim


def fits(start: int | None, stop: int | None, tokens: int | None) -> bool:
    """True if a slice takes tokens of so many and none beyond, or if their number is not known."""
    if tokens is None:
        return True
    first, last = start or 0, tokens if stop is None else stop
    first, last = (tokens + bound if bound < 0 else bound for bound in (first, last))
    return 0 <= first < last <= tokens
