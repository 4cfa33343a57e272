"""Chunks of a video: what is remembered of cached keys from one chunk to the next.

A model that makes a video chunk by chunk runs all denoising steps for each chunk, maybe a single
one. The tokens of the chunk are new in each step; the keys of finished chunks stay in its cache. So
a generation of such a model has two clocks: the chunk, and the denoising step inside of it. That a
forward goes on with a video shows in the values beside its cached keys, which keep their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from svg_ear_compile.kernels.call import CallRequest
from svg_ear_compile.kernels.kept_clusters import continuation, identities_of
from svg_ear_compile.memory import Memory

if TYPE_CHECKING:
    from svg_ear_compile.generation_state import Forward, State

Place = tuple[int, str, tuple[str, int, int]]
"""Position of a model, path of a layer, and site, forward and place of a memory of that layer."""


@dataclass
class LastChunk:
    """What a chunk leaves to the next one.

    Attributes:
        number: index of the chunk in its generation.
        is_declared: whether the next forwards are known to be of the same video. Otherwise their
            cached keys have to show it, see `goes_on`.
        memories: memories of cached keys.
        proven: guidance branches, each by model, forward and place, that go on with the video.
    """

    number: int
    is_declared: bool
    memories: dict[Place, Memory]
    proven: set[tuple[int, int, int]] = field(default_factory=set)

    @staticmethod
    def of(ended: State, is_declared: bool, first: int, is_proven: bool) -> LastChunk | None:
        """What a chunk has left, None if it has no cached keys.

        Args:
            ended: the state in which it has ended.
            is_declared: see there.
            first: index among the forwards of its last step that the first forward of the next
                chunk follows.
            is_proven: the keys of that forward have turned out to be those of its follower.
        """
        memories = {
            (model, path, (site, index - first, place)): memory.next_chunk()
            for (model, path), layer in ended.layers.items()
            for (site, index, place), memory in layer.memories.items()
            if memory.identities is not None and index >= first
        }
        proven = {(place[0], 0, 0) for place in memories if is_proven}
        return LastChunk(ended.chunk, is_declared, memories, proven) if memories else None

    def take(self, place: Place, request: CallRequest, rows: slice) -> Memory | None:
        """The memory for the first call of a layer in the next chunk, None if there is none.

        If the call shows that another generation has started, all memories are dropped. The first
        layer of a guidance branch shows it for all: their caches are written together.

        Args:
            place: of the memory.
            request: the call.
            rows: part of its batch that the memory is of.
        """
        memory = self.memories.pop(place, None) if request.cached_keys else None
        if memory is None or self.is_declared:
            return memory
        branch = (place[0], *place[2][1:])
        if branch not in self.proven and not goes_on(memory, request, rows):
            self.memories.clear()
            return None
        self.proven.add(branch)
        return memory


def goes_on(memory: Memory, request: CallRequest, rows: slice, may_roll: bool = False) -> bool:
    """Whether a call has the cached keys of a memory, and its own tokens beside them.

    The keys have grown, by at most as many as there are queries. Besides, the keys of the chunk
    before may have been written again when it was finished. Waits for the device.

    Args:
        memory: of an earlier call.
        request: the later call.
        rows: part of its batch that the memory is of.
        may_roll: as many keys may be gone as are new.
    """
    held = memory.identities
    if held is None or request.values is None or held.device != request.device:
        return False
    values, queries = request.values, request.q_shape[2]
    if held.shape[0] != values.shape[0]:
        values = values[rows]
    if held.shape[0] != values.shape[0]:
        return False
    known, new, gone = continuation(held, identities_of(values))
    if known == 0:
        return False
    if may_roll:
        return 0 < new <= queries
    return 0 < new - gone <= queries and gone <= queries


def index_before(
    memories: Mapping[tuple[str, int, int], Memory],
    forward: Forward,
    request: CallRequest,
    may_roll: bool,
) -> int | None:
    """Index of the forward that a forward goes on from as the next chunk does; None of no one.

    A timestep that does not jump back to noise says nothing of it: chunks of a single denoising
    step all have one timestep. What has other latents at the timestep of the step before is another
    guidance branch, another video, or the next chunk. An ordinary next step is not looked at.

    Args:
        memories: memories of a layer, see `generation_state.Layer`.
        forward: the forward, which is no follower of another guidance branch.
        request: its first call with cached keys.
        may_roll: the keys may be as many as before.
    """
    for (site, index, place), memory in memories.items():
        if (site, place) != (request.name, 0) or memory.identities is None:
            continue
        is_other = index < forward.index
        has_grown = index == forward.index and memory.identities.shape[1] < request.k_shape[2]
        rows = forward.rows(request, place)
        if (is_other or has_grown) and goes_on(memory, request, rows, may_roll and is_other):
            return index
    return None
