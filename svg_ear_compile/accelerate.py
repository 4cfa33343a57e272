"""`accelerate`: one call that compiles and binds the denoising models of a pipeline."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import nn
from torch._dynamo.utils import counters

from svg_ear_compile.accelerated_report import AccelerationReport, ModelReport
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.early_steps import EARLY_FACTOR
from svg_ear_compile.generation import Generation
from svg_ear_compile.generation_state import Announced
from svg_ear_compile.guidance import Layout
from svg_ear_compile.in_place import CompiledInPlace, has_repeated_blocks, is_compiled
from svg_ear_compile.kernels.checked import printable, shown
from svg_ear_compile.keywords import answers_unknown_keywords
from svg_ear_compile.offloading import moves_each_layer
from svg_ear_compile.pipeline_calls import (
    CallWatch,
    PipelineCall,
    denoisers,
    models_of,
    timesteps_rise,
)
from svg_ear_compile.session import DEFAULT, Session, bind
from svg_ear_compile.settings import Settings, by_name
from svg_ear_compile.user_frame import level_of_user

_OneBudget = str | Path | Budget

_ACCELERATED: WeakSet[nn.Module] = WeakSet()


class Accelerated:
    """An accelerated pipeline or module; made by `accelerate`, a context manager too.

    Attributes:
        session: the session of its models.
        models: its denoising models by name.
    """

    def __init__(
        self,
        target: Any,
        models: Mapping[str, nn.Module],
        compiled: CompiledInPlace,
        session: Session,
        dense_steps: float,
        ascending: bool | None,
    ) -> None:
        self.session = session
        self.models = dict(models)
        self._target = target
        self._name = type(target).__name__
        self._compiled = compiled
        self._dense_steps = dense_steps
        self._ascending = ascending
        self._calls = 0
        self._last: AccelerationReport | None = None
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._detached = False
        self._warn_of_offloading()
        self._watch = None if isinstance(target, nn.Module) else CallWatch(target, self._during)
        _ACCELERATED.update(self.models.values())

    def __repr__(self) -> str:
        state = "detached" if self._detached else ", ".join(self.models)
        return f"<Accelerated {self._name}: {state}>"

    def report(self) -> AccelerationReport:
        """What the last finished call of the pipeline did; a module's generation up to now."""
        if self._watch is not None and self._last is not None:
            return self._last
        return self._report(self.session.entered or self.session.generation(DEFAULT))

    def detach(self) -> None:
        """Give back the pipeline and its models as they were, and free all device memory."""
        if self._detached:
            return
        self._detached = True
        if self._watch is not None:
            self._watch.stop()
        self.session.close()
        self._compiled.undo()
        _ACCELERATED.difference_update(self.models.values())

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @contextmanager
    def _during(self, call: PipelineCall) -> Iterator[None]:
        """One call of the pipeline: it is a generation, and its memory is freed at its end."""
        self._warn_of_changes()
        dense_steps = self._dense_steps_of(call)
        with self._generation() as generation:
            said = Announced(call.steps, dense_steps, call.videos, self._rises)
            with generation.call(said):
                graphs, started = _graphs_compiled(), time.perf_counter()
                yield
                # The report waits for the device, so that the seconds are those of the whole call.
                report = self._report(generation)
                seconds = time.perf_counter() - started
            with self._lock:
                self._calls += 1
                compiled = _graphs_compiled() > graphs
                self._last = replace(report, calls=self._calls, seconds=seconds, compiled=compiled)

    @contextmanager
    def _generation(self) -> Iterator[Generation]:
        """A generation that no other call runs in; the one that is entered, if there is one."""
        if self.session.entered is not None:
            yield self.session.entered
            return
        with self._lock:
            names = itertools.chain((DEFAULT,), (f"call {n}" for n in itertools.count(2)))
            name = next(name for name in names if name not in self._running)
            generation = self.session.generation(name)
            self._running.add(name)
        try:
            with generation:
                yield generation
        finally:
            self._running.discard(name)

    def _dense_steps_of(self, call: PipelineCall) -> int | None:
        """Leading dense steps of a call, None if it does not tell its number of steps."""
        if call.steps is None:
            if isinstance(self._dense_steps, float):
                raise ValueError(
                    f"dense_steps={self._dense_steps} is a fraction, but this call of "
                    f"{self._name} does not tell its number of steps: give a number of steps"
                )
            return None
        count = self._dense_steps
        if isinstance(count, float):
            count = round(count * call.steps)
        if 0 < call.steps <= count:
            self._warn(
                f"dense_steps={self._dense_steps} leaves none of the {call.steps} steps of this "
                "call sparse"
            )
        return count

    def _rises(self) -> bool:
        return self._ascending is None and timesteps_rise(self._target)

    def _warn_of_changes(self) -> None:
        """Warn of what was done to the pipeline since, and keeps it from running sparse."""
        held = models_of(self._target)
        for name, model in self.models.items():
            if held.get(name) is not model:
                self._warn(
                    f"the {name} of this {self._name} was replaced after accelerate: what stands "
                    "in its place runs as it is. Call detach() and accelerate the pipeline again"
                )
        if not self._compiled.blocks_are_intact:
            self._warn(
                f"blocks of this {self._name} were compiled again after accelerate, and run as "
                "compiled then. Call detach() and accelerate the pipeline again"
            )
        self._warn_of_offloading()

    def _warn_of_offloading(self) -> None:
        for name, model in self.models.items():
            if moves_each_layer(model):
                self._warn(
                    f"the layers of {name} are moved between devices one by one (sequential or "
                    "leaf-level offloading), which breaks its compiled graphs at every layer: "
                    "attention runs sparse, all else hardly faster than without compilation. "
                    "enable_model_cpu_offload() and block-level group offloading keep them whole"
                )

    def _warn(self, sentence: str) -> None:
        """Warn once."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=level_of_user())

    def _report(self, generation: Generation) -> AccelerationReport:
        layers = generation.report()
        models = tuple(
            ModelReport(
                name,
                type(model).__name__,
                has_repeated_blocks(model),
                index in generation.models_run,
                tuple(layer for layer in layers if layer.model == index),
            )
            for index, (name, model) in enumerate(self.models.items())
        )
        steps = 0 if generation.step is None else generation.step + 1
        return AccelerationReport(
            0, None, False, steps, generation.dense_steps, generation.early_steps, models,
            tuple(generation.held()),
        )  # fmt: skip


@answers_unknown_keywords(options_go="accelerate(pipe, options={{{!r}: ...}})")
def accelerate(
    target: Any,
    *,
    density: float | None = None,
    target_speedup: float | None = None,
    budget: _OneBudget | Sequence[_OneBudget] | Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
    dense_steps: int | float = 0,
    dense_above_timestep: float | None = None,
    dense_layers: int = 0,
    early_factor: float = EARLY_FACTOR,
    timestep: str | None = None,
    ascending: bool | None = None,
    guidance: Layout | None = None,
    branches: int | None = None,
    latents: str | None = None,
) -> Accelerated:
    """Make a pipeline's denoising models run sparse; the pipeline is called as before.

    For example::

        handle = svg_ear_compile.accelerate(pipe, density=0.2)
        video = pipe("a red fox in the snow").frames[0]
        print(handle.report())
        handle.detach()

    Finds every model that is called with a timestep, compiles its repeated blocks where its class
    names them and the whole model otherwise, in place, and binds all of them to one session. Each
    call of the pipeline is one generation: its number of steps and of videos are read from its
    arguments, and what the session remembers is freed at its end. Calls in several threads get
    generations of their own.

    Adapters may be added and offloading may be set up before or after.

    Args:
        target: a pipeline of diffusers, another object that is called and holds its models as
            attributes, or a module.
        density, target_speedup, budget: objective, at most one of them: see `Settings`. A budget
            may also be a list, one for each model, or the dict that `bind` takes.
        options: further options of the backend, see `Settings.parse`; ``exact_tokens`` may also be
            a function, see `bind`.
        dense_steps: leading denoising steps with dense attention: a number of steps, or a fraction
            in [0, 1) of the steps of each call.
        ascending: whether the timestep rises from noise to video, as in Mochi. By default the
            pipeline's scheduler says in each call; of a module, the timestep falls.
        early_factor: density of the first eighth of the steps of each call over that of later ones,
            see `bind`. A module does not know its number of steps: all have one density.
        dense_above_timestep, dense_layers, timestep, guidance, branches, latents: see `bind`.

    Returns:
        The handle, which keeps a report of the last call and gives everything back.

    Raises:
        ValueError: there is no denoising model, one is compiled or accelerated already, or an
            argument is out of range.
        TypeError: an argument is of the wrong type.
    """
    models = _found(target, timestep)
    _check_dense_steps(dense_steps, target)
    bound_budget, chosen = _budgets(budget, len(models))
    given = _options(density, target_speedup, options)
    is_function = callable(given.get("exact_tokens"))
    exact_tokens = given.pop("exact_tokens") if is_function else None
    every = [{**given, **({} if b is None else {"budget": b})} for b in chosen]
    for each in every:
        Settings.parse(each)
    how = [{"backend": "svg_ear", "options": each} for each in every]
    compiled = CompiledInPlace(models.values(), how)
    try:
        session = bind(
            *models.values(),
            dense_steps=0 if isinstance(dense_steps, float) else dense_steps,
            dense_above_timestep=dense_above_timestep,
            dense_layers=dense_layers,
            early_factor=early_factor,
            budget=bound_budget,
            timestep=timestep,
            ascending=False if ascending is None else ascending,
            guidance=guidance,
            branches=branches,
            latents=latents,
            exact_tokens=exact_tokens,
        )
        try:
            return Accelerated(target, models, compiled, session, dense_steps, ascending)
        except BaseException:
            session.close()
            raise
    except BaseException:
        compiled.undo()
        raise


def _found(target: Any, timestep: str | None) -> dict[str, nn.Module]:
    """The denoising models of a pipeline, or the module itself, none of them compiled."""
    name = type(target).__name__
    if isinstance(target, nn.Module):
        models = {name: target}
    else:
        if isinstance(target, type) or not callable(target):
            raise TypeError(f"accelerate takes one pipeline or module, got {_described(target)}")
        models = denoisers(target, timestep)
    if not models:
        sought = "a timestep" if timestep is None else repr(timestep)
        raise ValueError(
            f"this {name} holds no denoising model: none of its modules is called with {sought}. "
            "Give accelerate the module itself, or name its timestep argument with timestep=..."
        )
    for part, model in models.items():
        where = f"this {name}" if model is target else f"the {part} of this {name}"
        if model in _ACCELERATED:
            raise ValueError(
                f"{where} is accelerated already: call detach() of its handle first. Another "
                "pipeline that holds it runs sparse as it is"
            )
        if is_compiled(model):
            raise ValueError(
                f"{where} is compiled or bound already: accelerate does both, give it the model as "
                "it was loaded"
            )
    return models


def _described(target: object) -> str:
    if isinstance(target, type):
        return f"the class {printable(target.__name__)}: give an object of it"
    return shown(target)


def _check_dense_steps(dense_steps: object, target: object) -> None:
    if not isinstance(dense_steps, float):
        return  # `bind` checks a number of steps
    if not 0 <= dense_steps < 1:
        raise ValueError(
            f"dense_steps is a number of steps, or a fraction in [0, 1), got {dense_steps!r}"
        )
    if isinstance(target, nn.Module):
        raise ValueError(
            f"dense_steps={dense_steps} is a fraction of the steps of a pipeline's call, which a "
            "module does not know: give a number of steps"
        )


def _budgets(budget: Any, models: int) -> tuple[Any, list[Budget | None]]:
    """What `bind` gets as its budget, and the budget in the options of each model."""
    if budget is None or isinstance(budget, Mapping):
        return budget, [None] * models
    each = list(budget) if isinstance(budget, (list, tuple)) else [budget]
    loaded = [Settings.parse({"budget": one}).budget for one in each]
    if len(loaded) != models:
        raise ValueError(f"{models} denoising models need as many budgets, got {len(loaded)}")
    return loaded, list(loaded)


def _options(
    density: float | None, target_speedup: float | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    given = by_name(options)
    for name, value in (("density", density), ("target_speedup", target_speedup)):
        if value is not None:
            if name in given:
                raise ValueError(f"{name} is given twice: as an argument and in options")
            given[name] = value
    if "budget" in given:
        raise ValueError(
            "give the budget as an argument, not in options: the session needs it, too"
        )
    return given


def _graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])
