"""One stream of generations: its clock, its guidance branches, and the memories of its layers.

A generation is the source of all attention calls made during a forward of its models.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from svg_ear_compile.chunks import LastChunk, index_before
from svg_ear_compile.clock import Clock, RestartWatch, is_noisier
from svg_ear_compile.early_steps import EarlySteps
from svg_ear_compile.generation_state import Announced, Forward, Held, Layer, State
from svg_ear_compile.guidance import MAX_BRANCHES, Branches, Guidance, Latents
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.layer_plans import LayerPlans, at_density
from svg_ear_compile.layers import BoundModel, LayerReport
from svg_ear_compile.memory import Memory, RememberedCall, calls_by_branch

if TYPE_CHECKING:
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

_ENTERED: ContextVar[tuple[Generation, ...]] = ContextVar("svg_ear_generations", default=())


class Generation:
    """A named stream of generations; made by `Session.generation`, a context manager.

    Forwards inside the with block belong to this generation. In a generator function, enter it
    around each forward and not around a ``yield``: code that runs between two resumptions of the
    function would be inside the with block, too.
    """

    def __init__(
        self, name: str, models: Sequence[BoundModel], plans: LayerPlans, guidance: Guidance
    ) -> None:
        self.name = name
        self._models = models
        self._plans = plans
        self._guidance = guidance
        self._restarts = RestartWatch()
        self._captured: CapturedGraphs | None = None
        self._running = threading.RLock()
        self._forward: Forward | None = None
        self._call: Announced | None = None  # of a pipeline, inside which no other video starts
        self._state = self._fresh()

    def _fresh(self) -> State:
        return State(Clock(), Branches(self._guidance, self._announced.videos))

    @property
    def _announced(self) -> Announced:
        return self._call or Announced()

    def __enter__(self) -> Generation:
        entered = _ENTERED.get()
        other = next((g for g in entered if g._plans is self._plans and g is not self), None)
        if other is not None:
            raise RuntimeError(
                f"generation {other.name!r} is entered: leave it before {self.name!r} is. In a "
                "generator function, enter a generation around each forward"
            )
        _ENTERED.set((*entered, self))
        return self

    def __exit__(self, *error: object) -> None:
        entered = list(_ENTERED.get())
        entered.remove(self)
        _ENTERED.set(tuple(entered))

    @property
    def step(self) -> int | None:
        """Index of the current denoising step, None before the first."""
        clock = self._state.clock
        return None if clock.timestep is None else clock.step

    @property
    def chunk(self) -> int:
        """Index of the current chunk of the video, 0 before the timestep first jumped back."""
        return self._state.chunk

    @property
    def models_run(self) -> frozenset[int]:
        """Positions of the bound models that have run so far."""
        return frozenset(self._state.latents)

    @property
    def dense_steps(self) -> int:
        """Number of denoising steps so far with dense attention, as the schedule asks."""
        return len(self._state.dense_steps)

    @property
    def early_steps(self) -> EarlySteps | None:
        """The early steps of this generation, None if it has none."""
        return self._plans.early_steps(self._announced.steps, self._announced.dense_steps)

    @contextmanager
    def call(self, said: Announced) -> Iterator[None]:
        """One call of a pipeline: it starts anew, and nothing of it is left when it ends.

        The layers are read again: adapters may have been added since the last call.
        """
        for model in self._models:
            model.read_layers()
        self.reset()
        outer, self._call = self._call, said
        self.drop()
        try:
            yield
            self.reset()
        finally:
            self._call = outer
            self.drop()

    def reset(self) -> None:
        """Drop all clusters and the clock: the next forward starts a new generation."""
        self._plans.ended(self._state.clock.step + 1, self.dense_steps, self._announced.dense_steps)
        self.drop()

    def _start_again(self, first: int = 0, is_proven: bool = False) -> None:
        """Start a generation, or a chunk of the same video if the cached keys turn out to be.

        Args:
            first: index among the forwards of the last step that the first forward follows.
            is_proven: the keys have turned out to be those of that forward.
        """
        last = self._state
        self.reset()
        is_declared = self._plans.chunked or self._call is not None
        if is_declared:
            self._state.chunk = last.chunk + 1
        self._state.last_chunk = LastChunk.of(last, is_declared, first, is_proven)

    def drop(self) -> None:
        """`reset` of a generation that was interrupted, which says nothing about its schedule."""
        self._state = self._fresh()

    def clear_cache(self) -> None:
        """Free all device memory: `reset`, and drop the captured graphs."""
        self.reset()
        if self._captured is not None:
            self._captured.clear()
        self._captured = None

    def held(self) -> list[Held]:
        """Device memory held, by use."""
        memories = [m for layer in self._state.layers.values() for m in layer.memories.values()]
        if self._state.last_chunk is not None:
            memories += self._state.last_chunk.memories.values()
        latents = self._state.branches.references.values()
        return [
            Held(self.name, "centroids and block masks", sum(m.nbytes() for m in memories)),
            Held(self.name, "latents", sum(kept.nbytes() for kept in latents)),
            Held(self.name, "captured graphs", self._captured.nbytes if self._captured else 0),
        ]

    def memory_bytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(held.nbytes for held in self.held())

    def report(self) -> list[LayerReport]:
        """The layers seen in the current generation, by model and order; waits for the device."""
        reports = []
        for (model, path), layer in self._state.layers.items():
            memories = layer.memories.values()
            reports.append(
                LayerReport(
                    model,
                    path,
                    layer.identity,
                    layer.index,
                    len(layer.branches),
                    None if layer.last_sparse is None else layer.last_sparse.density,
                    sum(memory.cold for memory in memories),
                    sum(memory.recomputed for memory in memories),
                    sum(memory.reused for memory in memories),
                    sum(memory.kept for memory in memories),
                )
            )
        return sorted(reports, key=lambda layer: (layer.model, layer.index))

    @contextmanager
    def running(
        self, model: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[Collection[str] | None]:
        """Act as the source of attention calls while one forward of a model runs.

        Returns:
            In the with statement, the layers that have made calls so far. None for an empty batch,
            which is no step of any video.

        Raises:
            RuntimeError: another thread runs a forward, or another thread started the generation.
            ValueError: the timestep or the declared latents are missing, or the function
                `exact_tokens` raises or names tokens that no attention has.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                f"generation {self.name!r} runs a forward in another thread: let each thread have "
                "one of its own, with session.generation(name)"
            )
        outer = self._forward
        try:
            timestep, latents = self._models[model].read(args, kwargs, self._ascending())
            if timestep is None or not latents.batch:
                yield None
                return
            named = self._models[model].named_tokens(args, kwargs)
            self._forward = self._begin(model, timestep, latents)
            self._forward.named = named
            try:
                with calls_from(self):
                    yield self._forward.order.keys()
                if named is not None:
                    named.check_taken()
            except BaseException:
                # An interrupted forward has recomputed the clusters of some layers only.
                self.drop()
                raise
        finally:
            self._forward = outer
            self._running.release()

    def _ascending(self) -> bool:
        """Whether timesteps rise from noise to video."""
        if self._state.ascending is None:
            self._state.ascending = self._plans.ascending or self._announced.rises()
        return self._state.ascending

    def _begin(self, model: int, timestep: float, latents: Latents) -> Forward:
        """Advance the clock to a forward and find its guidance branches."""
        thread, ascending = threading.get_ident(), self._ascending()
        state = self._state
        last = state.clock.timestep
        if last is not None and is_noisier(timestep, last, ascending):
            self._restarts.restarted(state.clock, timestep, ascending)
            if state.thread == thread:
                self._start_again()
            else:
                self.reset()
        elif state.thread not in (None, thread):
            raise RuntimeError(
                f"generation {self.name!r} was started by another thread: let each thread have one "
                "of its own, with session.generation(name), or end it with reset()"
            )
        elif state.latents.get(model, latents.kind) != latents.kind:
            self.reset()
        return self._enter(model, timestep, latents)

    def _enter(self, model: int, timestep: float, latents: Latents) -> Forward:
        """Count a forward that has begun."""
        thread, ascending, state = threading.get_ident(), self._ascending(), self._state
        state.thread = thread
        state.latents[model] = latents.kind
        if timestep != state.clock.timestep:
            state.branches.next_step()
        index = state.clock.tick(model, timestep)
        dense = state.clock.step < (self._announced.dense_steps or 0) or self._plans.is_dense_step(
            model, state.clock.step, timestep, ascending
        )
        if dense:
            state.dense_steps.add(state.clock.step)
        in_batch, reference = state.branches.place(model, index, latents, dense)
        return Forward(
            model, index, timestep, dense, reference, in_batch, latents, thread,
            self.early_steps,
        )  # fmt: skip

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """See `kernels.call.CallSource`."""
        forward = self._forward
        if forward is None or forward.thread != threading.get_ident():
            raise RuntimeError(
                f"generation {self.name!r} runs in another thread than this attention call"
            )
        is_first = request.part is None or request.part.number == 0
        forward.calls[request.site] += is_first
        path, identity = self._models[forward.model].locate(
            request.layer, request.layer_owner, request.site, forward.calls[request.site] - 1
        )
        # A block that is compiled by itself and called again attends to other tokens.
        forward.times[path, request.site] += is_first
        if (time := forward.times[path, request.site]) > 1:
            request = replace(request, site=f"{request.site}, call {time}")
        if request.cached_keys and not forward.has_met_cache:
            forward.has_met_cache = True
            if not forward.dense:
                forward = self._forward = self._in_its_chunk(forward, path, request)
        layer = self._state.layers.setdefault((forward.model, path), Layer())
        layer.identity = identity
        layer.index = forward.order.setdefault(path, len(forward.order))
        places = forward.branches_along(request)
        exact = None if forward.named is None else forward.named.of(request)
        is_short = exact is not None and request.plan.is_dense_for(
            *exact.clustered, keeps_clusters=request.cached_keys
        )
        if request.dense_only or forward.dense or is_short:
            plan = at_density(request.plan, 1.0)
        else:
            plan = self._plans.plan(
                request.plan, forward.model, path, identity, layer.index, forward.timestep,
                self._state.clock.step, forward.early,
            )  # fmt: skip
        keys = [(request.name, forward.index, place) for place in range(places)]
        layer.branches.update((min(forward.index, MAX_BRANCHES), place) for place in range(places))
        if plan.is_dense:
            for memory in (layer.memories[key] for key in keys if key in layer.memories):
                memory.skip()
            yield AttentionCall(plan)
        elif forward.index >= MAX_BRANCHES:
            yield RememberedCall(plan, captured=self._graphs(request.device), exact=exact)
        else:
            if not plan.shared_branches:
                keys = keys[:1]
            for key in keys:
                if key not in layer.memories:
                    layer.memories[key] = self._first_memory(forward, path, key, request)
            memories = [layer.memories[key] for key in keys]
            if request.only_kept and any(memory.is_hopeless for memory in memories):
                yield AttentionCall(at_density(plan, 1.0))
                return
            layer.last_sparse = memories[0]
            step = self._state.clock.step
            reference = None
            if plan.shared_branches and forward.reference is not None:
                reference = layer.memories.get((request.name, forward.reference, 0))
                if reference is not None and reference.step != step:
                    reference = None  # the reference forward skipped this layer (feature caches)
            for memory in memories:
                memory.step = step
            yield from calls_by_branch(
                request, plan, memories, reference, self._graphs(request.device), exact
            )

    def _in_its_chunk(self, forward: Forward, path: str, request: CallRequest) -> Forward:
        """The forward, entered again where its cached keys show that it starts a chunk."""
        layer = self._state.layers.get((forward.model, path))
        if layer is None or forward.reference is not None:
            return forward
        index = index_before(layer.memories, forward, request, self._plans.chunked)
        if index is None:
            return forward
        self._start_again(index, is_proven=True)
        entered = self._enter(forward.model, forward.timestep, forward.latents)
        return replace(
            entered, calls=forward.calls, times=forward.times, order=forward.order,
            named=forward.named, has_met_cache=True,
        )  # fmt: skip

    def _first_memory(
        self, forward: Forward, path: str, key: tuple[str, int, int], request: CallRequest
    ) -> Memory:
        """The memory of a layer that makes its first sparse call in this chunk."""
        last = self._state.last_chunk
        memory = None
        if last is not None:
            rows = forward.rows(request, key[2])
            memory = last.take((forward.model, path, key), request, rows)
        if last is None or memory is None:
            return Memory()
        self._state.chunk = last.number + 1
        return memory

    def finished(self, call: AttentionCall, result: Result) -> None:
        """See `kernels.call.CallSource`."""
        assert isinstance(call, RememberedCall)
        call.finished(result)

    def _graphs(self, device: torch.device) -> CapturedGraphs | None:
        """The captured graphs of this generation; None without a GPU."""
        if device.type == "cuda" and self._captured is None:
            from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

            self._captured = CapturedGraphs()
        return self._captured


def entered_generation(plans: LayerPlans) -> Generation | None:
    """The generation of the session with these plans that is entered here, or None."""
    return next((g for g in reversed(_ENTERED.get()) if g._plans is plans), None)
