"""Kinds of the tokens of one attention call: clustered, always exact, or padding.

A key that is always exact is computed for every query, and a query that is always exact attends to
every key: text, audio and conditioning are such tokens. They may lie anywhere in the sequence,
because every implementation sorts tokens by label. Padding gets no weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PADDING, CLUSTERED, EXACT = 0, 1, 2


class TokenKinds(NamedTuple):
    """Kinds of the queries and of the keys of a call.

    Attributes:
        queries: (B|1, H|1, N_q) uint8, `CLUSTERED` or `EXACT`; None where all are clustered.
        keys: (B|1, H_kv|1, N_k) uint8, `PADDING`, `CLUSTERED` or `EXACT`; None as above.
        clustered: numbers of clustered queries and keys for which clusters are counted; None counts
            every token. They need not be right: with too large a number clusters are smaller.
    """

    queries: Tensor | None = None
    keys: Tensor | None = None
    clustered: tuple[int, int] | None = None

    def counts(self, q_tokens: int, k_tokens: int) -> tuple[int, int]:
        """Numbers of clustered queries and keys among so many tokens."""
        return (q_tokens, k_tokens) if self.clustered is None else self.clustered

    def of_rows(self, rows: slice) -> TokenKinds:
        """Kinds of a part of the batch."""
        queries, keys = (
            kinds if kinds is None or kinds.shape[0] == 1 else kinds[rows]
            for kinds in (self.queries, self.keys)
        )
        return TokenKinds(queries, keys, self.clustered)


ALL_CLUSTERED = TokenKinds()


def token_kinds(
    attn_mask: Tensor | None = None,
    exact_queries: Tensor | None = None,
    exact_keys: Tensor | None = None,
    clustered: tuple[int, int] | None = None,
) -> TokenKinds:
    """Kinds by a mask and by the tokens that are always exact; padding is padding in any case.

    Args:
        attn_mask: (B|1, H_kv|1, 1, N_k) bool key-padding mask, True for keys that take part.
        exact_queries: (B|1, N_q) bool, True for queries that attend to every key.
        exact_keys: (B|1, N_k) bool, True for keys that are exact for every query.
        clustered: see `TokenKinds`.
    """
    queries = None if exact_queries is None else _kinds(exact_queries)
    keys = None if exact_keys is None else _kinds(exact_keys)
    if attn_mask is not None:
        takes_part = attn_mask[:, :, 0, :]
        keys = takes_part.to(torch.uint8) if keys is None else keys * takes_part
    return TokenKinds(queries, keys, clustered)


def _kinds(exact: Tensor) -> Tensor:
    """(B|1, 1, N) kinds of tokens without padding."""
    return (exact.to(torch.uint8) + CLUSTERED).unsqueeze(1)


def exact_at_ends(q: Tensor, k: Tensor, before: int, after: int) -> TokenKinds:
    """Kinds of queries (.., N_q, D) and keys (.., N_k, D) whose first and last tokens are exact.

    Args:
        q, k: the sequences.
        before, after: numbers of exact tokens at the start and at the end of both.
    """
    if before + after == 0:
        return ALL_CLUSTERED
    places = (torch.arange(x.shape[-2], device=x.device) for x in (q, k))
    queries, keys = (
        ((place < before) | (place >= len(place) - after)).unsqueeze(0) for place in places
    )
    counts = [max(x.shape[-2] - before - after, 0) for x in (q, k)]
    return token_kinds(None, queries, keys, (counts[0], counts[1]))
