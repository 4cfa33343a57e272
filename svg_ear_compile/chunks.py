"""Chunks of a video: what is remembered of cached keys from one chunk to the next.

A model that makes a video chunk by chunk runs all denoising steps for each chunk. The tokens of the
chunk are new in each step; the keys of finished chunks stay in its cache. So a generation of such a
model has two clocks: the chunk, and the denoising step inside of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from svg_ear_compile.kernels.call import CallRequest
from svg_ear_compile.memory import Memory

Place = tuple[int, str, tuple[str, int, int]]
"""Position of a model, path of a layer, and site, forward and place of a memory of that layer."""


@dataclass
class LastChunk:
    """What a chunk leaves to the next one.

    Attributes:
        number: index of the chunk in its generation.
        is_declared: whether the next forwards are known to be of the same video. Otherwise they are
            if their cached keys have grown.
        memories: memories of cached keys.
    """

    number: int
    is_declared: bool
    memories: dict[Place, Memory]

    def take(self, place: Place, request: CallRequest) -> Memory | None:
        """The memory for the first call of a layer in the next chunk, None if there is none.

        If the call shows that another generation has started, all memories are dropped.
        """
        memory = self.memories.pop(place, None) if request.cached_keys else None
        if memory is not None and not self.is_declared and not _has_grown(memory, request):
            self.memories.clear()
            return None
        return memory


def _has_grown(memory: Memory, request: CallRequest) -> bool:
    """Whether the keys of a call are those of the memory, and at most its queries beside them."""
    assert memory.identities is not None
    grown = request.k_shape[2] - memory.identities.shape[1]
    return 0 < grown <= request.q_shape[2] and memory.identities.device == request.device
