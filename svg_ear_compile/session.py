"""`bind`: gives models a session, which knows their layers, denoising steps and earlier clusters.

A compiled graph names its attention calls, but does not know the denoising step. A graph shared by
all blocks (regional compilation) does not know the layer either: the operator gets a parameter of
the layer, and the session knows the module of each parameter. The denoising step is read from the
model's own timestep argument, which holds for guidance branches, several experts and skipped steps.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import nn

from svg_ear_compile.bound_call import BoundCall, warn_of_bypass
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.early_steps import EARLY_FACTOR
from svg_ear_compile.generation import Generation, entered_generation
from svg_ear_compile.generation_state import Held
from svg_ear_compile.given_models import check_module
from svg_ear_compile.guidance import Guidance, Layout
from svg_ear_compile.keywords import answers_unknown_keywords
from svg_ear_compile.layer_plans import GivenBudget, LayerPlans
from svg_ear_compile.layers import BoundModel, LayerReport, inner_of
from svg_ear_compile.named_tokens import TokenFunction

log = logging.getLogger(__name__)

MAX_GENERATIONS = 8
"""Largest number of generations of a session: each holds device memory of its own."""

DEFAULT = "default"
"""Name of the generation of forwards that run while no generation is entered."""

_OPEN: WeakSet[Session] = WeakSet()


class Session:
    """Bound models and their generations; made by `bind`, a context manager too.

    A forward belongs to the generation that is entered, see `generation`, else to the default one.
    A generation belongs to the thread that started it. A forward in another thread is refused,
    unless its timestep jumps back to noise and so starts a new generation in that thread.
    """

    def __init__(
        self,
        models: tuple[nn.Module, ...],
        *,
        dense_steps: int,
        dense_above_timestep: float | None,
        dense_layers: int,
        steps: int | None,
        early_factor: float,
        budget: GivenBudget | None,
        timestep: str | None,
        ascending: bool,
        guidance: Guidance,
        latents: str | None,
        exact_tokens: TokenFunction | None,
        chunked: bool,
    ) -> None:
        _check_models(models)
        self._models = [BoundModel(m, timestep, latents, exact_tokens) for m in models]
        self._plans = LayerPlans(
            self._models,
            dense_steps=dense_steps,
            dense_above_timestep=dense_above_timestep,
            dense_layers=dense_layers,
            steps=steps,
            early_factor=early_factor,
            budget=budget,
            ascending=ascending,
            chunked=chunked,
        )
        self._guidance = guidance
        self._generations: dict[str, Generation] = {}
        self._calls = [BoundCall(self, index, module) for index, module in enumerate(models)]
        for call in self._calls:
            call.module._compiled_call_impl = call
        _OPEN.add(self)

    def generation(self, name: str) -> Generation:
        """The generation of this name, a context manager; created if it does not exist.

            with session.generation("left"):
                left = pipe(prompt)

        Several live side by side, each with its own clock, memory and captured graphs.

        Raises:
            TypeError: the name is no string.
            ValueError: there are `MAX_GENERATIONS` already.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a generation must be a string, got {name!r}")
        if name not in self._generations:
            if len(self._generations) >= MAX_GENERATIONS:
                raise ValueError(
                    f"this session has {MAX_GENERATIONS} generations already "
                    f"({', '.join(self._generations)}): end one with session.end(name)"
                )
            self._generations[name] = Generation(name, self._models, self._plans, self._guidance)
        return self._generations[name]

    def end(self, name: str) -> None:
        """Drop the generation of this name, if it exists, and free its memory."""
        generation = self._generations.pop(name, None)
        if generation is not None:
            generation.clear_cache()

    @property
    def generations(self) -> tuple[str, ...]:
        """Names of all generations."""
        return tuple(self._generations)

    @property
    def entered(self) -> Generation | None:
        """The generation that is entered here, None if none is."""
        return entered_generation(self._plans)

    def _current(self) -> Generation:
        return self.entered or self.generation(DEFAULT)

    def use(self, budget: str | Path | Budget | Sequence[str | Path | Budget]) -> None:
        """Use tuned budgets from now on, one for each bound model; all generations restart.

        Raises:
            ValueError: a budget is for another model or its file is broken, or models and budgets
                differ in number.
            TypeError: a budget is neither a `Budget` nor a path.
        """
        self._plans.use(budget)
        for generation in self._generations.values():
            generation.reset()

    @property
    def step(self) -> int | None:
        """Index of the denoising step of the current generation, None before the first."""
        return self._current().step

    @property
    def chunk(self) -> int:
        """Index of the chunk of the video in the current generation, see `bind`."""
        return self._current().chunk

    def timestep_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: int = 0
    ) -> float:
        """The timestep among the arguments of a forward of a bound model.

        Raises:
            ValueError: it is missing or empty.
        """
        timestep, _ = self._models[model].read(args, kwargs, self._plans.ascending)
        if timestep is None:
            raise ValueError("the timestep of an empty batch says nothing")
        return timestep

    def later(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], fraction: float, model: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a later step of the same generation, to measure a warm forward.

        The timestep moves by `fraction` of itself, towards the video; nothing else changes.
        """
        sign = -1.0 if self._plans.ascending else 1.0
        return self._models[model].later(args, kwargs, sign * fraction)

    def reset(self) -> None:
        """End the current generation and drop its clusters: the next forward starts a new one."""
        self._current().reset()

    def clear_cache(self) -> None:
        """Free the device memory of all generations, captured graphs included; each restarts."""
        for generation in self._generations.values():
            generation.clear_cache()

    def close(self) -> None:
        """Release the models, which are then as before, and free all device memory."""
        for call in self._calls:
            call.restore()
        self._calls.clear()
        _OPEN.discard(self)
        self.clear_cache()
        self._generations.clear()

    def unbind(self) -> None:
        """The former name of `close`."""
        warnings.warn("unbind is called close now", DeprecationWarning, stacklevel=2)
        self.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            for generation in self._generations.values():
                generation.drop()
        self.close()

    def report(self) -> list[LayerReport]:
        """The layers seen in the current generation, by model and order; waits for the device.

        Warns of models that bypass the session because they were compiled after `bind`.
        """
        for call in self._calls:
            if call.is_bypassed:
                warn_of_bypass(call.module)
        return self._current().report()

    def held(self) -> list[Held]:
        """Device memory held, by generation and use.

        Centroids and block masks are held for each attention call and guidance branch (at most
        `guidance.MAX_BRANCHES`). Latents are copies from which guidance branches are detected.
        Captured graphs hold at most `captured_graphs.MOST_HELD` bytes in each generation.
        """
        return [held for generation in self._generations.values() for held in generation.held()]

    def memory_bytes(self) -> int:
        """Device memory held by all generations, in bytes; see `held`."""
        return sum(held.nbytes for held in self.held())


def warn_of_bypassed() -> None:
    """Warn of each model that was compiled in place after it was bound, once."""
    for session in list(_OPEN):
        for call in session._calls:
            if call.is_bypassed and not call.warned:
                call.warned = True
                warn_of_bypass(call.module)


def _check_models(models: tuple[nn.Module, ...]) -> None:
    if not models:
        raise ValueError("bind needs at least one model")
    for module in models:
        name = type(check_module("bind", module)).__name__
        if isinstance(module._compiled_call_impl, BoundCall):
            raise ValueError(f"this {name} is bound already: close its session first")
        if any(inner_of(call.module) is inner_of(module) for s in _OPEN for call in s._calls):
            raise ValueError(
                f"this {type(inner_of(module)).__name__} is bound already, once as the model and "
                "once as the result of torch.compile: close that session first"
            )
    if len({id(inner_of(module)) for module in models}) < len(models):
        raise ValueError("bind got the same model twice")


@answers_unknown_keywords(
    options_go='torch.compile(model, backend="svg_ear", options={{{!r}: ...}})'
)
def bind(
    *models: nn.Module,
    dense_steps: int = 0,
    dense_above_timestep: float | None = None,
    dense_layers: int = 0,
    steps: int | None = None,
    early_factor: float = EARLY_FACTOR,
    budget: GivenBudget | None = None,
    timestep: str | None = None,
    ascending: bool = False,
    guidance: Layout | None = None,
    branches: int | None = None,
    latents: str | None = None,
    exact_tokens: TokenFunction | None = None,
    chunked: bool = False,
) -> Session:
    """Give models a session: layers with plans of their own, clusters reused between steps.

    Bind the object that is called: the result of ``torch.compile(model)``, or the model if its
    blocks are compiled or after ``model.compile()``. A model that is bound and then compiled
    bypasses its session, which warns. Bind after weights are loaded, adapters added and offloading
    set up: layers whose parameters are created later are told by the order of execution only.

    A generation starts when the timestep jumps back to noise, when the shape of a video or its
    device changes, after an error inside a forward, and by `Session.reset`, which has to come
    between two generations of a single step. A change of batch size, as when guidance is switched
    off, does not start one. All clusters are dropped at the start, so the same seed gives the same
    bits. Generations that take turns need names, see `Session.generation`.

    The timestep is the noisiest value of the timestep argument: the largest, or the smallest of
    ascending ones. A forward of an empty batch belongs to no generation. Steps whose timesteps are
    equal when the model gets them (rounded to bfloat16, for example) count as one step. Reading the
    timestep and comparing latents costs one wait for the device in each forward.

    Guidance branches of a video have equal latents. The first is the reference branch; the others
    reuse its clusters and block mask, unless the option ``shared_branches`` is off. Other videos at
    that timestep or in that batch are clustered separately.

    Args:
        models: models that take turns in one generation, such as Wan 2.2's two experts.
        dense_steps: leading denoising steps with dense attention.
        dense_above_timestep: attention is dense at every timestep noisier than this one.
        dense_layers: leading layers, in order of execution, with dense attention.
        steps: denoising steps of a generation (of a chunk, of chunked models). None if the model
            is called by a loop whose number of steps is not known: then all have one density.
        early_factor: density of the first eighth of these steps over that of later ones, in
            [1, 100]; the second eighth has the mean of both. The mean over all steps stays the
            density of the plan. Early steps decide most of the picture. None exceeds 0.5, unless
            the mean does. Leading dense steps take their place, and a tuned budget that is given
            here is followed as it is. Steps past the last one have the later density.
        budget: a tuned budget, which gives density, clusters, compensation and schedule: a `Budget`
            or its file; for several models a list of one each. Or a dict from layer path
            or `fnmatch` pattern to density, in which a path takes precedence over patterns, and the
            first matching pattern over others. These densities replace the plan's, so a plan with
            top-p or threshold routing heeds only density 1.
        timestep: name of the timestep argument of forward, by default one of `TIMESTEP_NAMES`.
        ascending: the timestep rises from noise to video, as in Mochi.
        guidance: layout of the guidance branches. ``"batched"``: along the batch, the first branch
            of all videos, then the next. ``"sequential"``: forwards that follow each other at one
            timestep. By default both are detected by comparing latents.
        branches: number of branches of a declared layout, 2 by default.
        latents: name of the argument that holds the noisy video. By default the first argument of
            `guidance.LATENT_NAMES`, else the first with a floating-point tensor of three
            dimensions or more, which a warning names if there are several.
        exact_tokens: a function from the arguments of a forward, by name, to the tokens that are
            exact in it, called once in each forward: see `named_tokens.TokenFunction`. A sequence
            that they do not fit goes by its graph.
        chunked: the model makes a video chunk by chunk and attends to cached keys. A timestep that
            jumps back to noise starts a chunk, not a generation; `Session.reset` starts one. So
            does, at one timestep, a forward of other latents with no more new keys than tokens.
            By default a chunk is told from a generation by a cache that has grown, so this is
            needed only where the cache has reached its full length and rolls.

    Raises:
        ValueError: the forward has no such timestep or latents; the budget names no module, has a
            density outside [0, 1], is for another model, or its file is broken; a count is
            negative; a model is given twice or is bound already.
        TypeError: one of the models is not a module, or an argument is of the wrong type.
    """
    return Session(
        models,
        dense_steps=dense_steps,
        dense_above_timestep=dense_above_timestep,
        dense_layers=dense_layers,
        steps=steps,
        early_factor=early_factor,
        budget=budget,
        timestep=timestep,
        ascending=ascending,
        guidance=Guidance(guidance, branches),
        latents=latents,
        exact_tokens=exact_tokens,
        chunked=chunked,
    )
