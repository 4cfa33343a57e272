"""A call over several chunks of queries as one call for each chunk.

Each chunk attends to the keys that it sees, a slice of all keys, some of them maybe left out as
padding is. Chunks that are long enough are sparse. The clusters of the keys go from one chunk to
the next as they do in a cache: the keys that a chunk sees for the first time get clusters of their
own, the others keep theirs, so no key is clustered again for every chunk that sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svg_ear_compile.kernels.call import AttentionCall, CallRequest, ExactTokens, Part
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.dense import dense_attention, empty_lse
from svg_ear_compile.kernels.kept_clusters import CachedKeys, KeptClusters
from svg_ear_compile.kernels.query_chunks import QueryChunk
from svg_ear_compile.kernels.source_calls import Terms, sparse_calls


def attention_by_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[QueryChunk],
    requests: Sequence[CallRequest],
    chunk_keys: Tensor,
    exact: ExactTokens,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, see `op.attention`.

    Args:
        q, k, v: see there.
        chunks: chunks of all queries.
        requests: `request_of` each.
        chunk_keys: (B|1, H_kv|1, R, N_k) bool, the keys that each of these chunks sees.
        exact: of the whole call.
        terms: see `source_calls.Terms`.
    """
    out, lse = torch.empty_like(q), empty_lse(q, terms.return_lse)
    clusters = _ClustersSoFar()
    for number, (chunk, asked) in enumerate(zip(chunks, requests, strict=True)):
        here = q[:, :, chunk.queries]
        keys, values = k[:, :, chunk.keys], v[:, :, chunk.keys]
        mask = None if chunk.sees_all else chunk_keys[:, :, number : number + 1, chunk.keys]
        assert asked.part is not None
        clusters.next_chunk(chunk.new, asked.clustered)
        sparse = sparse_calls(
            here, keys, values, mask, exact.of_part(asked.part), asked, terms, clusters
        )
        found = sparse or dense_attention(here, keys, values, mask, terms.scale, terms.return_lse)
        out[:, :, chunk.queries].copy_(found[0])
        if terms.return_lse:
            lse[:, :, chunk.queries].copy_(found[1])
    return out, lse


def request_of(chunk: QueryChunk, number: int, request: CallRequest) -> CallRequest:
    """The request for one chunk of a call; it is dense if the chunk is too short."""
    queries, keys = (part.stop - part.start for part in (chunk.queries, chunk.keys))
    clustered = min(request.clustered[0], queries), min(request.clustered[1], keys)
    return replace(
        request,
        part=Part(number, chunk.queries, chunk.keys, (request.q_shape[2], request.k_shape[2])),
        q_shape=(*request.q_shape[:2], queries, request.q_shape[3]),
        k_shape=(*request.k_shape[:2], keys, request.k_shape[3]),
        clustered=clustered,
        dense_only=min(clustered) < max(1, request.plan.min_chunk_tokens),
        only_kept=False,
        cached_keys=False,
        values=None,
    )


class _ClustersSoFar:
    """The clusters of the keys that the last chunk saw, for each part of the batch."""

    def __init__(self) -> None:
        self._new, self._clustered = 0, (0, 0)
        self._found: dict[tuple[int, int] | None, KeptClusters] = {}

    def next_chunk(self, new: int, clustered: tuple[int, int]) -> None:
        """Go on to a chunk that sees so many keys for the first time; see `TokenKinds`."""
        self._new, self._clustered = new, clustered

    def before(self, call: AttentionCall) -> AttentionCall:
        """See `source_calls.KeptInCall`.

        All keys are labelled again, from the kept centroids: the metric follows the queries, and
        there are no later steps in which old keys would have their turn.
        """
        if call.blocks is not None or call.centroids is not None or call.plan.max_drift == 0.0:
            return call
        kept = self._found.get(_place(call))
        clustered = self._clustered if call.exact is None else call.exact.clustered
        if kept is not None and kept.centroids.shape[2] > call.plan.clusters(*clustered)[1]:
            kept = None
        grows = self._new > 0
        return replace(call, cache=CachedKeys(kept, self._new, grows, 0, labels_all=True))

    def after(self, call: AttentionCall, result: Result) -> Result:
        """See `source_calls.KeptInCall`."""
        self._found.pop(_place(call), None)
        if result.identities is not None:
            labels, centroids = result.keys.labels, result.keys.centroids
            self._found[_place(call)] = KeptClusters(
                result.identities, labels, centroids.to(result.out.dtype)
            )
        return replace(result, identities=None, excess=None)


def _place(call: AttentionCall) -> tuple[int, int] | None:
    return None if call.rows is None else (call.rows.start, call.rows.stop)
