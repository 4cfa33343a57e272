"""Captured CUDA graphs of attention calls, for short videos.

The host takes 1 to 1.5 ms to issue the 16 to 25 kernels of a warm call. Up to about 10,000 tokens
of 24 heads, the device needs less time. Calls with equal shapes and settings are of one kind.
The second call of a kind is captured after it has run; later calls replay the graph by one launch.
Inputs are copied into tensors of the graph and results out of them, so nothing of a replay is
needed after it. The graphs of one stream therefore share tensors and workspace, and a budget with
choices of many kinds takes no more memory than a budget of one kind.
"""

from __future__ import annotations

import itertools
import logging
import os
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
from svg_ear_compile.kernels.clusters import (
    Blocks,
    Clusters,
    Result,
    samples_of_a_cold_start,
    strata,
    stratified_places,
)
from svg_ear_compile.kernels.gpu.attention import WORKSPACE_FLOOR
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, TokenKinds
from svg_ear_compile.kernels.plan import AttentionPlan

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 20
"""Largest q in bytes whose calls are captured: beyond, the device is slower than the host."""

MOST_HELD = 2 << 30
"""Largest number of bytes that one `CapturedGraphs` may hold: inputs, outputs and workspace."""

STALE_CALLS = 2000
"""A graph that was not replayed during so many calls may be dropped for another one. With a smaller
number, layers of different kinds would replace each other's graphs again and again."""

MOST_SEEN = 256
"""Largest number of kinds that are remembered after their first call."""

_Arguments = tuple[
    Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, Blocks | None, Tensor | None,
    Tensor | None,
]  # fmt: skip
"""Tensor arguments of a call: q, k, v, centroids, blocks, kinds of queries and kinds of keys."""


@dataclass
class _Workspace:
    """Memory for intermediate results, shared by the graphs of one stream.

    Attributes:
        pool: handle of the memory pool of the graphs.
        side: stream on which all of them are captured, because PyTorch reuses memory only on the
            stream for which it was allocated.
        nbytes: size of the pool in bytes.
    """

    pool: Any  # opaque to everybody but PyTorch
    side: torch.cuda.Stream
    nbytes: int = 0


@dataclass
class _Captured:
    """A captured graph with the tensors that it uses.

    Attributes:
        graph: the CUDA graph.
        inputs: tensors into which the arguments of a call are copied.
        outputs: tensors from which the result of a call is copied.
        constants: further tensors that the graph reads.
        workspace: see `_Workspace`.
        used: number of the last call that replayed the graph.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    constants: list[Tensor]
    workspace: _Workspace
    used: int


@dataclass(eq=False)
class CapturedGraphs:
    """Captured graphs of one owner, which makes one call at a time.

    This object holds all memory of the graphs; `clear` frees it.
    """

    _graphs: OrderedDict[Hashable, _Captured] = field(default_factory=OrderedDict)
    # Kinds that were called once, and kinds whose capture ran out of memory.
    _seen: OrderedDict[Hashable, None] = field(default_factory=OrderedDict)
    _refused: set[Hashable] = field(default_factory=set)
    _number: itertools.count[int] = field(default_factory=itertools.count)
    # Workspaces and tensors live as long as a graph that uses them.
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
        kinds: TokenKinds = ALL_CLUSTERED,
        scale: float | None = None,
        centroids: tuple[Tensor, Tensor] | None = None,
        blocks: Blocks | None = None,
        return_lse: bool = False,
    ) -> Result:
        """`registry.sparse_attention`, replayed from a captured graph where that saves time.

        The result is equal bit by bit, unless rows of q, k or v are not aligned to 16 bytes; rows
        of the copies always are. The device of q has to be the current one.
        """

        def call(arguments: _Arguments) -> Result:
            q, k, v, centroids, blocks, of_queries, of_keys = arguments
            return registry.sparse_attention(
                q, k, v, plan, kinds=TokenKinds(of_queries, of_keys, kinds.clustered), scale=scale,
                centroids=centroids, blocks=blocks, return_lse=return_lse,
            )  # fmt: skip

        arguments = (q, k, v, centroids, blocks, kinds.queries, kinds.keys)
        if not is_worth_while(q):
            return call(arguments)
        given = _tensors_of(arguments)
        stream = torch.cuda.current_stream(q.device)
        starts = (centroids is None, blocks is None)
        given_kinds = (kinds.clustered, kinds.queries is None, kinds.keys is None)
        settings = (plan, scale, *given_kinds, return_lse, *starts, q.device, stream.cuda_stream)
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
                constants = []
                # The tokens of a cold start are drawn with these: with one of each two, by whether
                # there are kinds.
                if not centroids:
                    clusters = plan.clusters(*kinds.counts(q.shape[2], k.shape[2]))
                    for n, drawn in zip((q.shape[2], k.shape[2]), clusters, strict=True):
                        for count, of in samples_of_a_cold_start(n, drawn, plan.first_iterations):
                            constants.append(strata(count, plan.seed, q.device))
                            constants.append(stratified_places(count, of, plan.seed, q.device))
                try:
                    self._graphs[kind] = self._capture(call, arguments, result, constants, number)
                except torch.cuda.OutOfMemoryError as error:
                    self._refused.add(kind)
                    log.warning(
                        "no memory to capture the graph of a call of %d tokens: such calls run "
                        "without one (%s)", q.shape[2], str(error).partition(".")[0],
                    )  # fmt: skip
        return result

    def _is_due(self, kind: Hashable, arguments: _Arguments, result: Result, number: int) -> bool:
        """Whether to capture a call that has just run: a later one of its kind, with room left."""
        if kind in self._refused:
            return False
        if kind not in self._seen:  # the first call of its kind
            self._seen[kind] = None
            while len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return False
        q, k = arguments[:2]
        # An upper bound: as if no tensor were shared yet.
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
        """Capture the graph of a call that has just run with these arguments and this result.

        Raises:
            torch.cuda.OutOfMemoryError: the device has no memory for it.
        """
        device = result.out.device
        stream = torch.cuda.current_stream(device)
        place = (device, stream.cuda_stream)

        def shared(role: Hashable, like: Tensor) -> Tensor:
            """The tensor of this role, shape and dtype, shared by all graphs of the stream."""
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
        """Number of graphs held."""
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Device memory held by all graphs, in bytes."""
        graphs = self._graphs.values()
        tensors = {id(t): t for g in graphs for t in (*g.inputs, *g.outputs, *g.constants)}
        workspaces = {id(g.workspace): g.workspace for g in graphs}
        return sum(map(_nbytes, tensors.values())) + sum(w.nbytes for w in workspaces.values())

    def has_room(self, nbytes: int, number: int) -> bool:
        """Whether `nbytes` more may be held at call `number`; drops stale graphs to make room."""
        while self.nbytes + nbytes > MOST_HELD:
            oldest = next(iter(self._graphs), None)
            if oldest is None or number - self._graphs[oldest].used < STALE_CALLS:
                return False
            del self._graphs[oldest]
        return True


def _end_capture(graph: torch.cuda.CUDAGraph, out_of_memory: bool) -> None:
    """End a capture; running out of memory may have invalidated it."""
    try:
        graph.capture_end()
    except RuntimeError:
        if not out_of_memory:
            raise


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors_of(arguments: _Arguments) -> list[Tensor]:
    """The tensors that a call reads, in a fixed order."""
    q, k, v, centroids, blocks, *kinds = arguments
    return [t for t in (q, k, v, *(centroids or ()), *(blocks or ()), *kinds) if t is not None]


def is_worth_while(q: Tensor) -> bool:
    """Whether calls with these queries are captured at all."""
    return (
        q.is_cuda
        # Without the caching allocator a capture would have to call cudaMalloc, which it may not.
        and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "0") == "0"
        and torch.version.hip is None  # graphs were never run there
        and not triton.knobs.runtime.interpret
        and _nbytes(q) <= MOST_BYTES
        and not torch.cuda.is_current_stream_capturing()
    )


def _parts(result: Result) -> list[Tensor]:
    """The tensors of a result, in a fixed order."""
    return [
        result.out, result.lse, *result.queries, *result.keys, result.block_mask, result.row_area
    ]  # fmt: skip


def _result(parts: Sequence[Tensor]) -> Result:
    """The result whose tensors `_parts` gave."""
    out, lse, *clusters, exact, row_area = parts
    return Result(out, lse, Clusters(*clusters[:3]), Clusters(*clusters[3:]), exact, row_area)
