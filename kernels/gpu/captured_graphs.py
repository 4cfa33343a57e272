"""Calls of short videos as captured CUDA graphs.

The host takes 2 to 6 ms to issue the two hundred kernels of a call, more than the device needs for
them up to about 40,000 tokens of 12 heads. The second call of a kind is captured after it has run,
and those that follow are one launch. Inputs are copied in and results out, so that nothing of one
replay is needed after it: the graphs of one stream share their tensors and their workspace, and a
budget with choices of many kinds takes no more memory than one.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map_with_path

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.clusters import Blocks, Clusters, Result, stratified_jitter
from svg_ear_compile.kernels.gpu.attention import WORKSPACE_FLOOR
from svg_ear_compile.kernels.plan import AttentionPlan

log = logging.getLogger(__name__)

MOST_BYTES = 128 << 20
"""Bytes of q up to which calls are captured: beyond, the device takes longer than the host."""

MOST_HELD = 2 << 30
"""Bytes that the graphs of one `CapturedGraphs` may hold: inputs, outputs and workspace."""

STALE_CALLS = 2000
"""A graph that so many calls of any kind have passed over makes room for another. Sooner would be
worse than none: a budget has layers of many kinds, which would take turns in being captured."""

MOST_SEEN = 256
"""Kinds of calls that are remembered as having been made."""

_Arguments = tuple[
    Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, Blocks | None, Tensor | None
]
"""Tensors of a call: q, k, v, centroids, blocks and mask."""


@dataclass
class _Workspace:
    """Memory between the stages, for the graphs of one stream.

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
class _Captured:
    """A graph and everything that it reads, writes and works in.

    Attributes:
        graph: what is replayed.
        inputs, outputs: tensors that a call's are copied into and out of.
        constants: further tensors that the graph reads.
        workspace: see `_Workspace`.
        used: number of its last call.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    constants: list[Tensor]
    workspace: _Workspace
    used: int


@dataclass(eq=False)
class CapturedGraphs:
    """Captured graphs with one owner, whose calls come one at a time.

    The owner holds this object and with it all memory of the graphs; `clear` gives it back.
    """

    _graphs: OrderedDict[Hashable, _Captured] = field(default_factory=OrderedDict)
    # Kinds that were called once, and those that there was no memory to capture.
    _seen: OrderedDict[Hashable, None] = field(default_factory=OrderedDict)
    _refused: set[Hashable] = field(default_factory=set)
    _number: itertools.count[int] = field(default_factory=itertools.count)
    # Both live as long as a graph that uses them.
    _workspaces: WeakValueDictionary[Hashable, _Workspace] = field(
        default_factory=WeakValueDictionary
    )
    _tensors: WeakValueDictionary[Hashable, Tensor] = field(default_factory=WeakValueDictionary)

    def sparse_attention(
        self,
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
        """`registry.sparse_attention` as a graph where that is worth while.

        Bit by bit, unless rows start between multiples of 16 bytes: those of the copies never do.
        The device of q is the current one.
        """

        def call(arguments: _Arguments) -> Result:
            q, k, v, centroids, blocks, mask = arguments
            return registry.sparse_attention(
                q, k, v, plan, attn_mask=mask, scale=scale, text=text, centroids=centroids,
                blocks=blocks, return_lse=return_lse,
            )  # fmt: skip

        arguments = (q, k, v, centroids, blocks, attn_mask)
        if not is_worth_while(q):
            return call(arguments)
        given = _tensors_of(arguments)
        stream = torch.cuda.current_stream(q.device)
        starts = (centroids is None, blocks is None)
        settings = (plan, scale, text, return_lse, *starts, q.device, stream.cuda_stream)
        kind = (settings, tuple((t.shape, t.stride(), t.dtype) for t in given))
        number = next(self._number)
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            captured = self._graphs.get(kind)
            if captured is not None:
                self._graphs.move_to_end(kind)
                captured.used = number
                for mine, new in zip(captured.inputs, given, strict=True):
                    mine.copy_(new)
                captured.graph.replay()
                return _result([t.clone() for t in captured.outputs])
            result = call(arguments)
            if self._is_due(kind, arguments, result, number):
                # The starting centroids of a cold call are drawn with these.
                drawn = plan.clusters(*(x.shape[2] - sum(text) for x in (q, k)))
                constants = [] if centroids else [
                    stratified_jitter(count, plan.seed, q.device) for count in drawn
                ]  # fmt: skip
                try:
                    self._graphs[kind] = self._capture(call, arguments, result, constants, number)
                except torch.cuda.OutOfMemoryError as error:
                    self._refused.add(kind)
                    log.warning(
                        "no memory to capture the graph of a call of %d tokens: it goes on "
                        "without (%s)", q.shape[2], str(error).partition(".")[0],
                    )  # fmt: skip
        return result

    def _is_due(self, kind: Hashable, arguments: _Arguments, result: Result, number: int) -> bool:
        """Whether a call that has just run is to be captured: not its first, and there is room."""
        if kind in self._refused:
            return False
        if kind not in self._seen:  # once is no reason
            self._seen[kind] = None
            while len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return False
        q, k = arguments[:2]
        # As if nothing were shared yet, with the tables and what else is between the stages.
        tensors = sum(map(_nbytes, (*_tensors_of(arguments), *_parts(result))))
        nbytes = tensors + max(_nbytes(q) + _nbytes(k), WORKSPACE_FLOOR)
        free, _ = torch.cuda.mem_get_info(q.device)
        return self.has_room(nbytes, number) and free >= 2 * nbytes

    def _capture(
        self,
        call: Callable[[_Arguments], Result],
        arguments: _Arguments,
        result: Result,
        constants: list[Tensor],
        number: int,
    ) -> _Captured:
        """The graph of a call that has run just now with these arguments and this result.

        Raises:
            torch.cuda.OutOfMemoryError: there is no memory for it.
        """
        device = result.out.device
        stream = torch.cuda.current_stream(device)
        place = (device, stream.cuda_stream)

        def shared(role: Hashable, like: Tensor) -> Tensor:
            """The tensor of this role, shape and dtype that all graphs of the stream use."""
            key = (place, role, like.shape, like.stride(), like.dtype)
            tensor = self._tensors.get(key)
            if tensor is None:
                tensor = self._tensors[key] = torch.empty_like(like)
            return tensor

        own = tree_map_with_path(
            lambda path, leaf: None if leaf is None else shared(path, leaf), arguments
        )
        outputs = [shared(role, part) for role, part in enumerate(_parts(result))]
        workspace = self._workspaces.get(place)
        if workspace is None:
            workspace = _Workspace(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))
            self._workspaces[place] = workspace
        graph, side = torch.cuda.CUDAGraph(), workspace.side
        before = torch.cuda.memory_reserved(device)
        side.wait_stream(stream)
        out_of_memory = False
        try:
            with torch.cuda.stream(side):
                graph.capture_begin(workspace.pool, capture_error_mode="thread_local")
                try:
                    for mine, new in zip(outputs, _parts(call(own)), strict=True):
                        mine.copy_(new)
                except torch.cuda.OutOfMemoryError:
                    out_of_memory = True
                    raise
                finally:
                    _end_capture(graph, out_of_memory)
        finally:
            stream.wait_stream(side)
        workspace.nbytes += max(torch.cuda.memory_reserved(device) - before, 0)
        return _Captured(graph, _tensors_of(own), outputs, constants, workspace, number)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()
        self._refused.clear()

    @property
    def count(self) -> int:
        """Graphs held."""
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that all graphs hold together."""
        graphs = self._graphs.values()
        tensors = {id(t): t for g in graphs for t in (*g.inputs, *g.outputs, *g.constants)}
        workspaces = {id(g.workspace): g.workspace for g in graphs}
        return sum(map(_nbytes, tensors.values())) + sum(w.nbytes for w in workspaces.values())

    def has_room(self, nbytes: int, number: int) -> bool:
        """Whether so many bytes more may be held at that call; drops stale graphs for it."""
        while self.nbytes + nbytes > MOST_HELD:
            oldest = next(iter(self._graphs), None)
            if oldest is None or number - self._graphs[oldest].used < STALE_CALLS:
                return False
            del self._graphs[oldest]
        return True


def _end_capture(graph: torch.cuda.CUDAGraph, out_of_memory: bool) -> None:
    """End a capture; one that ran out of memory may have been invalidated by that."""
    try:
        graph.capture_end()
    except RuntimeError:
        if not out_of_memory:
            raise


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors_of(arguments: _Arguments) -> list[Tensor]:
    """What a call reads, in one order."""
    q, k, v, centroids, blocks, mask = arguments
    return [t for t in (q, k, v, *(centroids or ()), *(blocks or ()), mask) if t is not None]


def is_worth_while(q: Tensor) -> bool:
    """Whether calls with such queries are captured at all."""
    return (
        q.is_cuda
        and torch.version.hip is None  # graphs were never run there
        and not triton.knobs.runtime.interpret
        and _nbytes(q) <= MOST_BYTES
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
