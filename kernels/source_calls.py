"""Carries out the calls by which the active source answers a request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, ExactTokens, active_source
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.dense import empty_lse
from svg_ear_compile.kernels.kinds import TokenKinds, token_kinds


class Terms(NamedTuple):
    """Arguments that all parts of a call have in common; see `op.attention`."""

    scale: float
    return_lse: bool


class KeptInCall(Protocol):
    """Gives clusters from one part of a call of the operator to the next."""

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call as it is to be carried out."""
        ...

    def after(self, call: AttentionCall, result: Result) -> Result:
        """What the source may know of its result."""
        ...


def sparse_calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    exact: ExactTokens,
    request: CallRequest,
    terms: Terms,
    kept: KeptInCall | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp of the calls of the active source; None for a dense call.

    Args:
        q, k, v: see `op.attention`.
        key_mask: (B|1, H_kv|1, 1, N_k) bool, True takes part; or None.
        exact: the tokens that are always exact, unless the source says others.
        request, terms: see there.
        kept: see `KeptInCall`; None for a call of one part.
    """
    source = active_source()
    kinds: TokenKinds | None = None
    parts: tuple[Tensor, Tensor] | None = None
    for call in source.calls(request):
        clusters_all = call.cache is None and call.blocks is None
        if call.plan.is_dense or request.dense_only or (request.only_kept and clusters_all):
            return None
        if kept is not None:
            call = kept.before(call)
        kinds = kinds or token_kinds(key_mask, *(call.exact or exact))
        rows = slice(None) if call.rows is None else call.rows
        attend: Callable[..., Result] = registry.sparse_attention
        if call.cache is not None:
            attend = partial(attend, cache=call.cache)
        elif call.captured is not None:
            attend = call.captured.sparse_attention
        result = attend(
            q[rows], k[rows], v[rows], call.plan, kinds=kinds.of_rows(rows), scale=terms.scale,
            centroids=call.centroids, blocks=call.blocks, return_lse=terms.return_lse,
        )  # fmt: skip
        source.finished(call, result if kept is None else kept.after(call, result))
        if call.rows is None:
            return result.out, result.lse
        if parts is None:
            parts = torch.empty_like(q), empty_lse(q, terms.return_lse)
        parts[0][rows].copy_(result.out)
        if terms.return_lse:
            parts[1][rows].copy_(result.lse)
    return parts
