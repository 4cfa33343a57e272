"""Attention calls at run time: request, call, and the source that answers requests by calls.

A compiled graph names its attention calls and their plans. Centroids and block masks to reuse are
known only while the model runs, to the *source* of its calls (a session, for example). The operator
sends a request to the active source, carries out the calls that the source answers, and returns
each result to the source. Without a source a call runs as compiled, and nothing is kept.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Blocks, Result
from svg_ear_compile.kernels.kept_clusters import CachedKeys
from svg_ear_compile.kernels.plan import AttentionPlan

if TYPE_CHECKING:
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

_SAFE = "".join(c for c in string.printable if c.isprintable() and c not in '"%?\\')


class Part(NamedTuple):
    """A chunk of the queries of a call of the operator, and the keys that it sees.

    Attributes:
        number: of the chunk.
        queries, keys: their places in the call.
        whole: N_q and N_k of the call.
    """

    number: int
    queries: slice
    keys: slice
    whole: tuple[int, int]


def quoted(name: str) -> str:
    """A name of a layer as an argument of the operator.

    Inductor's C++ wrapper writes it between double quotes as it is.
    """
    return quote(name, safe=_SAFE, errors="surrogatepass")


@functools.lru_cache(maxsize=4096)
def unquoted(name: str) -> str:
    """The name that `quoted` wrote."""
    return unquote(name, errors="surrogatepass")


@dataclass(frozen=True, eq=False)
class CallRequest:
    """Description of one call of the operator, for the source.

    Attributes:
        layer: parameter or buffer of the layer that attends; its identity tells layers apart.
        layer_owner: path of the module that holds `layer`, relative to the compiled module.
        site: name of the call in its graph.
        plan: the plan that the call was compiled with.
        q_shape: (B, H, N_q, D). k_shape: (B, H_kv, N_k, D).
        clustered: numbers of clustered queries and keys per head, see `TokenKinds`.
        device: of q, k and v.
        dense_only: the call is dense whatever its plan, because it is too short or its mask is not
            padding.
        only_kept: the call is dense unless clusters of its keys are kept or reused, because
            clustering all keys would take longer than attention.
        cached_keys: the queries are new tokens, the keys those of a cache and of the new tokens.
        values: (B, H_kv, N_k, D) beside cached keys, by which these are known again; else None.
        part: the chunk of queries that the shapes are those of; None for a whole call.
    """

    layer: Tensor | None
    layer_owner: str
    site: str
    plan: AttentionPlan
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    clustered: tuple[int, int]
    device: torch.device
    dense_only: bool = False
    only_kept: bool = False
    cached_keys: bool = False
    values: Tensor | None = None
    part: Part | None = None

    @property
    def name(self) -> str:
        """Name of the call, or of the chunk of its queries."""
        return self.site if self.part is None else f"{self.site}, chunk {self.part.number}"


class ExactTokens(NamedTuple):
    """Tokens of a call that are always exact.

    Attributes:
        queries: (B|1, N_q) bool, None where all are clustered. keys: (B|1, N_k) bool, likewise.
        clustered: numbers of the other queries and keys, see `TokenKinds`.
    """

    queries: Tensor | None
    keys: Tensor | None
    clustered: tuple[int, int]

    def of_part(self, part: Part) -> ExactTokens:
        """The exact tokens of a chunk; its number of other tokens is at most the one given."""
        places = (part.queries, part.keys)
        fewest = [min(n, p.stop - p.start) for n, p in zip(self.clustered, places, strict=True)]
        queries = None if self.queries is None else self.queries[:, part.queries]
        keys = None if self.keys is None else self.keys[:, part.keys]
        return ExactTokens(queries, keys, (fewest[0], fewest[1]))


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Instructions for a call, or for a part of its batch.

    Attributes:
        plan: clusters, routing and compensation.
        rows: the part of the batch that the call covers, None for all of it.
        centroids: (B, H, Qc, D) of the queries and (B, H_kv, Kc, D) of the keys, from which k-means
            starts; None for a cold call.
        blocks: clusters and block mask to reuse, which belong to `centroids`; None recomputes them.
        captured: captured graphs that may serve the call, or None. They serve no cached keys.
        cache: how the keys are clustered if they are cached, else None.
        exact: the tokens that are always exact, instead of those that the graph names, or None.
    """

    plan: AttentionPlan
    rows: slice | None = None
    centroids: tuple[Tensor, Tensor] | None = None
    blocks: Blocks | None = None
    captured: CapturedGraphs | None = None
    cache: CachedKeys | None = None
    exact: ExactTokens | None = None


class CallSource(Protocol):
    """Answers the requests of all attention calls that are made while it is active."""

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """The calls for a request; their rows together are its batch.

        The next call is drawn after the previous one has finished. A dense call covers the whole
        batch.
        """
        ...

    def finished(self, call: AttentionCall, result: Result) -> None:
        """Take the result of a sparse call of `calls`; the source may keep its tensors."""
        ...


class Unbound:
    """The source outside of all sessions: calls run as compiled and cold, results are dropped."""

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """See `CallSource`."""
        yield AttentionCall(request.plan)

    def finished(self, call: AttentionCall, result: Result) -> None:
        """See `CallSource`."""


UNBOUND = Unbound()
# A context variable and not a thread-local: each coroutine keeps its own source.
_SOURCE: ContextVar[CallSource] = ContextVar("svg_ear_call_source", default=UNBOUND)


def active_source() -> CallSource:
    """The innermost active source, `UNBOUND` if there is none."""
    return _SOURCE.get()


@contextmanager
def calls_from(source: CallSource) -> Iterator[None]:
    """Make `source` the active source inside the with block."""
    token = _SOURCE.set(source)
    try:
        yield
    finally:
        _SOURCE.reset(token)
