"""Calls of short videos as CUDA graphs.

The host takes 2 to 6 ms to issue the two hundred kernels of a call, more than the device needs for
them up to about 40,000 tokens of 12 heads. The second call of a kind is recorded after it has run,
and those that follow are one launch. Inputs are copied in and results out, so that nothing of one
replay is needed after it: recordings of one stream share their tensors and their workspace, and a
budget with choices of many kinds takes no more memory than one.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_with_path

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.clusters import Blocks, Clusters, Result
from svg_ear_compile.kernels.gpu.attention import WORKSPACE_FLOOR
from svg_ear_compile.kernels.plan import AttentionPlan

MOST_BYTES = 128 << 20
"""Bytes of q up to which calls are recorded: beyond, the device takes longer than the host."""

MOST_HELD = 2 << 30
"""Bytes that recordings may hold together: inputs, outputs and workspace."""

STALE_CALLS = 2000
"""A recording that so many calls of any kind have passed over makes room for another. Sooner would
be worse than none: a budget has layers of many kinds, which would take turns in being recorded."""

MOST_SEEN = 256
"""Kinds of calls that are remembered as having been made."""

_Arguments = tuple[
    Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, Blocks | None, Tensor | None
]
"""Tensors of a call: q, k, v, centroids, blocks and mask."""

_RECORDINGS: OrderedDict[Hashable, _Recording] = OrderedDict()
_SEEN: OrderedDict[Hashable, None] = OrderedDict()
_NUMBER = itertools.count()
_LOCK = threading.Lock()


@dataclass
class _Workspace:
    """Memory between the stages, for the recordings of one stream.

    Attributes:
        pool: handle of the graphs' memory.
        side: stream that they are captured on: memory is only used again by the stream that it was
            made for.
        nbytes: of that memory.
    """

    pool: Any  # opaque to everybody but PyTorch
    side: torch.cuda.Stream
    nbytes: int = 0


@dataclass
class _Recording:
    """A graph, what it reads, writes and works in, and the number of its last call."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    workspace: _Workspace
    used: int


# Both live as long as a recording that uses them.
_WORKSPACES: WeakValueDictionary[Hashable, _Workspace] = WeakValueDictionary()
_TENSORS: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()


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
    """`attention.sparse_attention` as a graph where that is worth while.

    Bit by bit, unless rows start between multiples of 16 bytes: those of the copies never do.
    """

    def call(arguments: _Arguments) -> Result:
        q, k, v, centroids, blocks, mask = arguments
        return registry.sparse_attention(
            q, k, v, plan, attn_mask=mask, scale=scale, text=text, centroids=centroids,
            blocks=blocks, return_lse=return_lse,
        )  # fmt: skip

    arguments = (q, k, v, centroids, blocks, attn_mask)
    if not _is_worth_while(q):
        return call(arguments)
    given = _tensors(arguments)
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
            return _result([t.clone() for t in recording.outputs])
        result = call(arguments)
        if key not in _SEEN:  # once is no reason to record
            _SEEN[key] = None
            while len(_SEEN) > MOST_SEEN:
                _SEEN.popitem(last=False)
            return result
        # As if nothing were shared yet, with the tables and what else is between the stages.
        tensors = sum(t.numel() * t.element_size() for t in (*given, *_parts(result)))
        between = max((q.numel() + k.numel()) * q.element_size(), WORKSPACE_FLOOR)
        nbytes = tensors + between
        if not has_room(nbytes, number) or torch.cuda.mem_get_info(q.device)[0] < 2 * nbytes:
            return result
        _RECORDINGS[key] = _recorded(call, arguments, result, number)
    return result


def _recorded(
    call: Callable[[_Arguments], Result], arguments: _Arguments, result: Result, number: int
) -> _Recording:
    """A recording of a call that has run just now with these arguments and this result."""
    device = result.out.device
    stream = torch.cuda.current_stream(device)
    place = (device, stream.cuda_stream)

    def shared(role: Hashable, like: Tensor) -> Tensor:
        """The tensor of this role, shape and dtype that all recordings of the stream use."""
        key = (place, role, like.shape, like.stride(), like.dtype)
        tensor = _TENSORS.get(key)
        if tensor is None:
            tensor = _TENSORS[key] = torch.empty_like(like)
        return tensor

    own = tree_map_with_path(
        lambda path, leaf: None if leaf is None else shared(path, leaf), arguments
    )
    outputs = [shared(role, part) for role, part in enumerate(_parts(result))]
    workspace = _WORKSPACES.get(place)
    if workspace is None:
        workspace = _Workspace(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))
        _WORKSPACES[place] = workspace
    graph, side = torch.cuda.CUDAGraph(), workspace.side
    before = torch.cuda.memory_reserved(device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        graph.capture_begin(workspace.pool, capture_error_mode="thread_local")
        try:
            for mine, new in zip(outputs, _parts(call(own)), strict=True):
                mine.copy_(new)
        finally:
            graph.capture_end()
    stream.wait_stream(side)
    workspace.nbytes += max(torch.cuda.memory_reserved(device) - before, 0)
    return _Recording(graph, _tensors(own), outputs, workspace, number)


def forget() -> None:
    """Drop all recordings and their memory."""
    with _LOCK:
        _RECORDINGS.clear()
        _SEEN.clear()


def held_bytes() -> int:
    """Bytes that all recordings hold together."""
    recordings = _RECORDINGS.values()
    tensors = {id(t): t for r in recordings for t in (*r.inputs, *r.outputs)}
    workspaces = {id(r.workspace): r.workspace for r in recordings}
    return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(
        w.nbytes for w in workspaces.values()
    )


def has_room(nbytes: int, number: int) -> bool:
    """Whether so many bytes more may be held at that call; drops what is stale to make room."""
    while held_bytes() + nbytes > MOST_HELD:
        oldest = next(iter(_RECORDINGS), None)
        if oldest is None or number - _RECORDINGS[oldest].used < STALE_CALLS:
            return False
        del _RECORDINGS[oldest]
    return True


def _tensors(arguments: _Arguments) -> list[Tensor]:
    """What a call reads, in one order."""
    q, k, v, centroids, blocks, mask = arguments
    return [t for t in (q, k, v, *(centroids or ()), *(blocks or ()), mask) if t is not None]


def _is_worth_while(q: Tensor) -> bool:
    return (
        q.is_cuda
        and torch.version.hip is None  # graphs were never run there
        and not triton.knobs.runtime.interpret
        and q.numel() * q.element_size() <= MOST_BYTES
        and not torch.cuda.is_current_stream_capturing()
    )


def _parts(result: Result) -> list[Tensor]:
    """The tensors of a result, in one order."""
    return [
        result.out, result.lse, *result.queries, *result.keys, result.block_mask, result.row_area
    ]  # fmt: skip


def _result(parts: Sequence[Tensor]) -> Result:
    """What `_parts` took apart."""
    out, lse, *clusters, exact, row_area = parts
    return Result(out, lse, Clusters(*clusters[:3]), Clusters(*clusters[3:]), exact, row_area)
