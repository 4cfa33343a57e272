"""How one attention call is carried out, and who says so.

A compiled graph names its attention calls and their plans. What a call starts from is known only
while the model runs: whoever runs it is the *source* of its calls (a session, for example). The
operator asks the source that is active, carries out what it answers, and hands each result back.
Without a source a call is pure: it runs as compiled and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Blocks, Result
from svg_ear_compile.kernels.plan import AttentionPlan

if TYPE_CHECKING:
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs


@dataclass(frozen=True, eq=False)
class CallRequest:
    """What the operator tells a source of the call at hand.

    Attributes:
        layer: parameter or buffer of the layer that attends; its identity tells layers apart.
        layer_owner: path of the module that `layer` belongs to, relative to what was compiled.
        site: name of the call in its graph.
        plan: the plan that the call was compiled with.
        q_shape: (B, H, N_q, D). k_shape: (B, H_kv, N_k, D).
        text: text tokens at the start and the end of both sequences.
        device: of q, k and v.
        dense_only: the call can only be dense, whatever its plan: it is too short, or its mask is
            no padding.
    """

    layer: Tensor | None
    layer_owner: str
    site: str
    plan: AttentionPlan
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    text: tuple[int, int]
    device: torch.device
    dense_only: bool = False

    @property
    def video_tokens(self) -> tuple[int, int]:
        """Queries and keys that are clustered, per head."""
        return self.q_shape[2] - sum(self.text), self.k_shape[2] - sum(self.text)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """How a call, or a part of its batch, is carried out.

    Attributes:
        plan: clusters, routing and compensation.
        rows: the part of the batch that the call covers, None for all of it.
        centroids: (B, H, Qc, D) of the queries and (B, H_kv, Kc, D) of the keys that k-means starts
            from, or None: cold.
        blocks: clusters and block mask to reuse, with their `centroids`, or None: recomputed.
        captured: graphs that the call may be captured into and replayed from, or None.
    """

    plan: AttentionPlan
    rows: slice | None = None
    centroids: tuple[Tensor, Tensor] | None = None
    blocks: Blocks | None = None
    captured: CapturedGraphs | None = None


class CallSource(Protocol):
    """Says how the attention calls are carried out that are made while it is active."""

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """The calls that `request` is carried out as; together their rows are its batch.

        Each is asked for after the one before has finished. A dense one covers the whole batch.
        """
        ...

    def finished(self, call: AttentionCall, result: Result) -> None:
        """Hear what a sparse call of `calls` gave; its tensors are the source's to keep."""
        ...


class Unbound:
    """The source of calls that nobody runs: as compiled, from nothing, leaving nothing."""

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """See `CallSource`."""
        yield AttentionCall(request.plan)

    def finished(self, call: AttentionCall, result: Result) -> None:
        """See `CallSource`."""


UNBOUND = Unbound()
# A context variable, not a thread's: a coroutine that is suspended takes its source along.
_SOURCE: ContextVar[CallSource] = ContextVar("svg_ear_call_source", default=UNBOUND)


def active_source() -> CallSource:
    """The innermost source that is active here, `UNBOUND` outside of all."""
    return _SOURCE.get()


@contextmanager
def calls_from(source: CallSource) -> Iterator[None]:
    """Let `source` say how the attention calls inside the with block are carried out."""
    token = _SOURCE.set(source)
    try:
        yield
    finally:
        _SOURCE.reset(token)
