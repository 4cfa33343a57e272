"""What a generation knows while it runs: its layers, its clocks, the forward that is running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from svg_ear_compile.chunks import LastChunk
from svg_ear_compile.clock import Clock
from svg_ear_compile.early_steps import EarlySteps
from svg_ear_compile.guidance import Branches, Latents
from svg_ear_compile.kernels.call import CallRequest
from svg_ear_compile.layers import Identity
from svg_ear_compile.memory import Memory
from svg_ear_compile.named_tokens import NamedTokens


@dataclass
class Layer:
    """One layer in the current generation, or in the current chunk of its video.

    Attributes:
        identity, index: see `LayerReport`.
        memories: by site, index of the forward at its step, position of the branch in the batch.
        branches: these indices and positions.
        last_sparse: memory of the last sparse call.
    """

    identity: Identity = "order"
    index: int = 0
    memories: dict[tuple[str, int, int], Memory] = field(default_factory=dict)
    branches: set[tuple[int, int]] = field(default_factory=set)
    last_sparse: Memory | None = None


@dataclass
class State:
    """State that is dropped when a new generation starts.

    All but the memories of cached keys is dropped when a chunk of the same video starts, too.

    Attributes:
        clock: counts denoising steps.
        branches: guidance branches.
        latents: kind of the latents, by model.
        layers: layers by model and path.
        dense_steps: steps that were dense, as the schedule asks.
        ascending: whether timesteps rise from noise to video; None before the first forward.
        thread: identifier of the thread that started the generation.
        chunk: index of the chunk.
        last_chunk: what the chunk before has left.
    """

    clock: Clock
    branches: Branches
    latents: dict[int, tuple[object, ...]] = field(default_factory=dict)
    layers: dict[tuple[int, str], Layer] = field(default_factory=dict)
    dense_steps: set[int] = field(default_factory=set)
    ascending: bool | None = None
    thread: int | None = None
    chunk: int = 0
    last_chunk: LastChunk | None = None


@dataclass(frozen=True)
class Announced:
    """What a call of a pipeline says before it runs; by default what is known without one.

    Attributes:
        steps: number of its denoising steps, None if the call does not tell.
        dense_steps: leading dense steps, if more than the session has; None without `steps`.
        videos: least number of different videos in a batch. They may start from equal latents, and
            are no guidance branches of each other.
        rises: says at the first forward whether the timesteps rise from noise to video, if the
            session does not.
    """

    steps: int | None = None
    dense_steps: int | None = None
    videos: int = 1
    rises: Callable[[], bool] = lambda: False


@dataclass
class Forward:
    """The forward that is running.

    Attributes:
        model: position of the model among the bound models.
        index: index among the forwards of this model at this timestep.
        timestep: timestep of the forward.
        dense: True if all its attention is dense.
        reference: index of the forward that is its reference branch; None if it is one itself.
        in_batch: guidance branches along its batch.
        latents: its latents.
        thread: identifier of the thread that runs it.
        early: early steps of its generation, None if it has none.
        calls: number of calls so far, by site.
        times: the same by layer path and site.
        order: layer path to position in the order of execution.
        has_met_cache: it has made a call with cached keys.
        named: exact tokens that a function named in it, None for those that the graph shows.
    """

    model: int
    index: int
    timestep: float
    dense: bool
    reference: int | None
    in_batch: int
    latents: Latents
    thread: int
    early: EarlySteps | None
    calls: Counter[str] = field(default_factory=Counter)
    times: Counter[tuple[str, str]] = field(default_factory=Counter)
    order: dict[str, int] = field(default_factory=dict)
    has_met_cache: bool = False
    named: NamedTokens | None = None

    def rows(self, request: CallRequest, place: int) -> slice:
        """The part of a call's batch that a guidance branch along it is."""
        batch = request.q_shape[0] // self.branches_along(request)
        return slice(place * batch, (place + 1) * batch)

    def branches_along(self, request: CallRequest) -> int:
        """Number of guidance branches along the batch of a call.

        A call whose batch holds frames (folded into it) has none.
        """
        return self.in_batch if request.q_shape[0] == self.latents.batch else 1


@dataclass(frozen=True)
class Held:
    """Device memory that a session holds.

    Attributes:
        generation: name of the generation that holds it.
        what: ``"centroids and block masks"``, ``"latents"`` or ``"captured graphs"``.
        nbytes: size in bytes.
    """

    generation: str
    what: str
    nbytes: int
