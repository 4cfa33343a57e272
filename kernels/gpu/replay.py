"""Calls of short videos as CUDA graphs.

The host takes 2 to 6 ms to issue the two hundred kernels of a call, more than the device needs for
them up to about 40,000 tokens of 12 heads. The second call of a kind is recorded after it has run,
and those that follow are one launch. A recording has memory of its own: inputs are copied in,
results out.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_only

from svg_ear_compile.kernels.gpu import attention
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Blocks, Clusters, Result

MOST_BYTES = 128 << 20
"""Bytes of q up to which calls are recorded: beyond, the device takes longer than the host."""

MOST_HELD = 2 << 30
"""Bytes that recordings may hold together: each keeps its inputs, output and workspace."""

STALE_CALLS = 2000
"""A recording that so many calls of any kind have passed over makes room for another. Sooner would
be worse than none: a budget has layers of many kinds, which would take turns in being recorded."""

MOST_SEEN = 256
"""Kinds of calls that are remembered as having been made."""

_RECORDINGS: OrderedDict[Hashable, _Recording] = OrderedDict()
_SEEN: OrderedDict[Hashable, None] = OrderedDict()
_NUMBER = itertools.count()
_LOCK = threading.Lock()


@dataclass
class _Recording:
    """A graph, the tensors that it reads and writes, bytes, and the number of its last call."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Result
    nbytes: int
    used: int


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    text: tuple[int, int] = (0, 0),
    centroids: tuple[Tensor, Tensor] | None = None,
    blocks: Blocks | None = None,
    return_lse: bool = False,
) -> Result:
    """`attention.sparse_attention`, bit by bit, as a graph where that is worth while."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        centroids: tuple[Tensor, Tensor] | None,
        blocks: Blocks | None,
        mask: Tensor | None,
    ) -> Result:
        return attention.sparse_attention(
            q, k, v, plan, attn_mask=mask, scale=scale, text=text, centroids=centroids,
            blocks=blocks, return_lse=return_lse,
        )  # fmt: skip

    if not _is_worth_while(q):
        return call(q, k, v, centroids, blocks, attn_mask)
    arguments = (q, k, v, centroids, blocks, attn_mask)
    given = _tensors(*arguments)
    stream = torch.cuda.current_stream(q.device)
    starts = (centroids is None, blocks is None)
    settings = (plan, scale, text, return_lse, *starts, q.device, stream.cuda_stream)
    key = (settings, tuple((t.shape, t.stride(), t.dtype) for t in given))
    # Tensors made in inference mode could not be written outside of it.
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        number = next(_NUMBER)
        recording = _RECORDINGS.get(key)
        if recording is not None:
            _RECORDINGS.move_to_end(key)
            recording.used = number
            for mine, new in zip(recording.inputs, given, strict=True):
                mine.copy_(new)
            recording.graph.replay()
            return _copied(recording.result)
        result = call(*arguments)
        if key not in _SEEN:  # once is no reason to record
            _SEEN[key] = None
            while len(_SEEN) > MOST_SEEN:
                _SEEN.popitem(last=False)
            return result
        # Inputs and output, and as much again for tables and what is between the stages.
        nbytes = 4 * (q.numel() + k.numel()) * q.element_size()
        if not has_room(nbytes, number) or torch.cuda.mem_get_info(q.device)[0] < 2 * nbytes:
            return result
        own = tree_map_only(Tensor, torch.empty_like, arguments)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(q.device)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                recorded = call(*own)
            finally:
                graph.capture_end()
        stream.wait_stream(side)
        _RECORDINGS[key] = _Recording(graph, _tensors(*own), recorded, nbytes, number)
    return result


def forget() -> None:
    """Drop all recordings and their memory."""
    with _LOCK:
        _RECORDINGS.clear()
        _SEEN.clear()


def has_room(nbytes: int, number: int) -> bool:
    """Whether so many bytes more may be held at that call; drops what is stale to make room."""
    while sum(r.nbytes for r in _RECORDINGS.values()) + nbytes > MOST_HELD:
        oldest = next(iter(_RECORDINGS), None)
        if oldest is None or number - _RECORDINGS[oldest].used < STALE_CALLS:
            return False
        del _RECORDINGS[oldest]
    return True


def _tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: tuple[Tensor, Tensor] | None,
    blocks: Blocks | None,
    mask: Tensor | None,
) -> list[Tensor]:
    """What a call reads, in one order."""
    return [t for t in (q, k, v, *(centroids or ()), *(blocks or ()), mask) if t is not None]


def _is_worth_while(q: Tensor) -> bool:
    return (
        q.is_cuda
        and torch.version.hip is None  # graphs were never run there
        and not triton.knobs.runtime.interpret
        and q.numel() * q.element_size() <= MOST_BYTES
        and not torch.cuda.is_current_stream_capturing()
    )


def _copied(result: Result) -> Result:
    return Result(
        result.out.clone(),
        result.lse.clone(),
        Clusters(*(t.clone() for t in result.queries)),
        Clusters(*(t.clone() for t in result.keys)),
        result.exact.clone(),
        result.row_area.clone(),
    )
