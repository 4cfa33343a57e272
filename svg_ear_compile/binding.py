"""`bind`: tells the operator which layer runs, at which denoising step, and what it remembers.

A compiled graph names its attention calls but cannot know these. A graph shared by all blocks
(regional compilation) does not even know the layer: the operator gets a parameter of the layer, and
the binding knows where each parameter lives. The denoising step is read from the model's own
timestep argument, so it survives guidance branches, several experts and skipped steps.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model.budget import Budget, Choice
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.kernels import state
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.state import Call, Memory

log = logging.getLogger(__name__)

Identity = Literal["parameter", "order"]

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")
"""Names under which the forward of a model is searched for its timestep, in this order."""

# Conditional, unconditional and a few perturbed ones. A model called at one timestep over and over
# (a benchmark loop) must not fill the device with the memory of branches that never come back.
MAX_BRANCHES = 8

_Inputs = tuple[tuple[torch.Size, torch.device], ...]


@dataclass(frozen=True)
class LayerReport:
    """What a binding knows of one layer in the current generation.

    Attributes:
        model: position of the model among the arguments of `bind`.
        path: module path of the layer in its model.
        identity: ``"parameter"`` where a parameter told the layer, ``"order"`` where only the order
            of execution did.
        branches: guidance branches seen.
        density: density that the last sparse call reached, None if every call was dense.
        taken_over: share of the sparse calls that took clusters and exact blocks over, from the
            step before or from another guidance branch; None if every call was dense.
        index: position in the order of first execution within the model's last forward.
    """

    model: int
    path: str
    identity: Identity
    branches: int
    density: float | None
    taken_over: float | None
    index: int


@dataclass
class _Layer:
    identity: Identity = "order"
    index: int = 0
    branches: set[int] = field(default_factory=set)
    # By site, forward at its step, and place among the branches that one forward carries.
    memories: dict[tuple[str, int, int], Memory] = field(default_factory=dict)
    last_sparse: Memory | None = None

    @property
    def taken_over(self) -> float | None:
        """Share of the sparse calls that made no blocks of their own, None before the first."""
        calls = sum(memory.calls for memory in self.memories.values())
        return sum(m.taken_over for m in self.memories.values()) / calls if calls else None


@dataclass
class _Generation:
    """One clock and everything remembered under it; a new generation is a new object."""

    timestep: float | None = None
    step: int = -1
    forwards: Counter[int] = field(default_factory=Counter)  # by model, at this timestep
    inputs: dict[tuple[int, int], _Inputs] = field(default_factory=dict)  # by model and branch
    latents: dict[int, Tensor | None] = field(default_factory=dict)  # of the first branch, by model
    layers: dict[tuple[int, str], _Layer] = field(default_factory=dict)  # by model and path

    def branch(self, model: int, timestep: float) -> int:
        """Guidance branch of a forward of this model at this timestep, at most `MAX_BRANCHES`."""
        return min(self.forwards[model], MAX_BRANCHES) if timestep == self.timestep else 0

    def takes(self, model: int, timestep: float, inputs: _Inputs) -> bool:
        """Whether such inputs are those of this generation."""
        # The latents, which come first, are alike in all branches; texts may differ in length.
        latents = self.inputs.get((model, 0), inputs)[:1]
        known = self.inputs.get((model, self.branch(model, timestep)), inputs)
        return inputs == known and inputs[:1] == latents


@dataclass
class _Forward:
    """The forward under way."""

    model: int
    branch: int
    timestep: float
    dense: bool
    led: bool  # by the first branch, whose latents it has
    stacked: int  # branches along its batch
    batch: int  # of its latents
    calls: Counter[str] = field(default_factory=Counter)  # by site
    order: dict[str, int] = field(default_factory=dict)  # layer path to position


class _BoundModel:
    """One bound model: its parameters, module paths and timestep argument."""

    def __init__(self, module: nn.Module, timestep: str | None) -> None:
        inner = module._orig_mod if isinstance(module, OptimizedModule) else module
        self.module = module
        self.paths = {_clean(path): None for path, _ in inner.named_modules()}
        self.owners = WeakTensorKeyDictionary()
        for name, parameter in inner.named_parameters():
            self.owners[parameter] = _clean(name.rpartition(".")[0])
        self.ordered: dict[tuple[str, int], str] = {}
        self.signature = inspect.signature(inner.forward)
        self.timestep = self._find_timestep(type(inner).__name__, timestep)

    def _find_timestep(self, model: str, wanted: str | None) -> str:
        parameters = self.signature.parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in TIMESTEP_NAMES if wanted is None else (wanted,):
            if name in parameters or (name == wanted and takes_any):
                return name
        sought = f"none of {TIMESTEP_NAMES}" if wanted is None else f"no {wanted!r}"
        raise ValueError(
            f"the forward of {model} has {sought} among its arguments {tuple(parameters)}; "
            "name its timestep argument with bind(..., timestep=...)"
        )

    def read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float, _Inputs, Tensor | None]:
        """Timestep (waits for its device), shape and device of each other tensor input, latents.

        The latents are the first of those inputs.
        """
        given = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        value = given.pop(self.timestep, kwargs.get(self.timestep))
        if value is None:
            raise ValueError(
                f"a bound {type(self.module).__name__} was called without {self.timestep!r}"
            )
        timestep = float(value.max() if isinstance(value, Tensor) else value)
        leaves = tree_leaves(given)
        tensors = [x for x in leaves if isinstance(x, Tensor) and x is not value]
        facts = tuple((t.shape, t.device) for t in tensors)
        return timestep, facts, tensors[0] if tensors else None

    def later(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], share: float
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments whose timestep lies a share of itself, at least one unit, further down."""
        bound = self.signature.bind_partial(*args, **kwargs)
        given = bound.arguments
        if self.timestep not in given:  # taken by **kwargs
            (given,) = (v for v in given.values() if isinstance(v, dict) and self.timestep in v)
        value = given[self.timestep]
        integral = isinstance(value, int) or (
            isinstance(value, Tensor) and not value.is_floating_point()
        )
        given[self.timestep] = value - round(100 * share) if integral else value * (1 - share)
        return bound.args, bound.kwargs

    def locate(self, layer: Tensor | None, site: str, call: int) -> tuple[str, Identity]:
        """Path of the layer that makes the `call`-th call of `site` in a forward."""
        bare = _clean(site.partition("#")[0])
        owner = None if layer is None else self.owners.get(layer)
        if owner is not None:
            path = self.ordered[site, call] = _layer_path(owner, bare, self.paths)
            return path, "parameter"
        if (site, call) in self.ordered:
            return self.ordered[site, call], "order"
        return (bare if call == 0 and bare in self.paths else f"{site}@{call}"), "order"


class Binding:
    """Bound models that share one generation clock; made by `bind`, a context manager too.

    It decides every attention call made during a forward of its models. Not for use by several
    threads at once.
    """

    def __init__(
        self,
        models: tuple[nn.Module, ...],
        *,
        dense_steps: int,
        dense_above_timestep: float | None,
        dense_layers: int,
        budget: Mapping[str, float] | Budget | Sequence[Budget] | None,
        timestep: str | None,
        ascending: bool,
    ) -> None:
        for name, count in (("dense_steps", dense_steps), ("dense_layers", dense_layers)):
            if count < 0:
                raise ValueError(f"{name} must not be negative, got {count!r}")
        _check_models(models)
        self._models = [_BoundModel(module, timestep) for module in models]
        self._tuned: list[Budget] = []
        self._budget: dict[str, float] = {}
        if isinstance(budget, Mapping) or budget is None:
            self._budget = _checked_budget(budget or {}, self._models)
        else:
            self.use(budget)
        self._densities: dict[str, float | None] = {}
        self._dense_steps = dense_steps
        self._dense_above_timestep = dense_above_timestep
        self._dense_layers = dense_layers
        self._ascending = ascending or any(b.schedule.ascending for b in self._tuned)
        self._lone_steps = 0
        self._strangers: set[str] = set()
        self._generation = _Generation()
        self._forward: _Forward | None = None
        for index, module in enumerate(models):
            module._compiled_call_impl = _BoundCall(self, index, module)

    def use(self, budget: Budget | Sequence[Budget]) -> None:
        """Follow tuned budgets from the next generation on, one for each bound model.

        Raises:
            ValueError: a budget is for another model, or there is not one for each.
        """
        budgets = [budget] if isinstance(budget, Budget) else list(budget)
        if len(budgets) != len(self._models):
            raise ValueError(
                f"{len(self._models)} models are bound, but {len(budgets)} budgets given"
            )
        for each, model in zip(budgets, self._models, strict=True):
            each.check_model(fingerprint_of(model.module))
        self._tuned = budgets
        self.reset()

    @property
    def step(self) -> int | None:
        """Index of the current denoising step in its generation, None before the first."""
        return None if self._generation.timestep is None else self._generation.step

    def timestep_of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: int = 0
    ) -> float:
        """The timestep that a bound model is given by such arguments."""
        return self._models[model].read(args, dict(kwargs))[0]

    def later(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], share: float, model: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as of a later step of the same generation, to measure a warm forward.

        The timestep moves by `share` of itself, towards the video; nothing else changes.
        """
        sign = -1.0 if self._ascending else 1.0
        return self._models[model].later(args, kwargs, sign * share)

    def reset(self) -> None:
        """Forget everything: the next forward starts a new generation."""
        self._generation = _Generation()

    def unbind(self) -> None:
        """Give the models back as they were and forget everything; the report stays empty."""
        for model in self._models:
            bound = model.module.__dict__.get("_compiled_call_impl")
            # A model compiled in place after it was bound has a call of its own by now.
            if isinstance(bound, _BoundCall) and bound.binding is self:
                bound.restore()
        self.reset()

    def __enter__(self) -> Binding:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unbind()

    def report(self) -> list[LayerReport]:
        """The layers seen in the current generation, by model and order; waits for the device.

        Empty where the models were bound before they were compiled: see `bind`.
        """
        reports = (
            LayerReport(
                model,
                path,
                layer.identity,
                len(layer.branches),
                None if layer.last_sparse is None else layer.last_sparse.density,
                layer.taken_over,
                layer.index,
            )
            for (model, path), layer in self._generation.layers.items()
        )
        return sorted(reports, key=lambda layer: (layer.model, layer.index))

    def memory_bytes(self) -> int:
        """Device memory held for later steps, in bytes.

        At most one `Memory` per attention call of a model and guidance branch (`MAX_BRANCHES`), all
        dropped when the next generation starts.
        """
        layers = self._generation.layers.values()
        return sum(memory.nbytes() for layer in layers for memory in layer.memories.values())

    @contextmanager
    def running(self, model: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Decide the attention calls of one forward of `model` inside the with block."""
        outer = self._forward
        self._forward = self._begin(model, *self._models[model].read(args, kwargs))
        try:
            with state.active(self):
                yield
        except BaseException:
            # What an interrupted forward leaves behind is no step of any generation.
            self.reset()
            raise
        finally:
            self._forward = outer

    def _begin(
        self, model: int, timestep: float, inputs: _Inputs, latents: Tensor | None
    ) -> _Forward:
        """Move the clock on to a forward."""
        last = self._generation.timestep
        if last is not None and self._noisier(timestep, last):
            self._warn_of_direction()
            self.reset()
        elif not self._generation.takes(model, timestep, inputs):
            self.reset()
        generation = self._generation
        branch = generation.branch(model, timestep)
        if timestep != generation.timestep:
            generation.timestep = timestep
            generation.step += 1
            generation.forwards.clear()
        generation.forwards[model] += 1
        if branch < MAX_BRANCHES:
            generation.inputs.setdefault((model, branch), inputs)
        if branch == 0:
            generation.latents[model] = latents
        bound = self._dense_above_timestep
        leading = self._tuned[model].schedule.dense_steps if self._tuned else 0
        dense = generation.step < max(leading, self._dense_steps)
        dense = dense or (bound is not None and self._noisier(timestep, bound))
        # Dense forwards share nothing: they need not wait for a comparison.
        led = not dense and branch > 0 and _equal(latents, generation.latents.get(model))
        stacked = 1 if dense else _stacked(latents)
        batch = latents.shape[0] if latents is not None and latents.dim() else 1
        return _Forward(model, branch, timestep, dense, led, stacked, batch)

    def _noisier(self, timestep: float, other: float) -> bool:
        return timestep < other if self._ascending else timestep > other

    def _warn_of_direction(self) -> None:
        self._lone_steps = self._lone_steps + 1 if self._generation.step == 0 else 0
        if self._lone_steps == 3:
            log.warning(
                "four generations of one step in a row: does the timestep of this model run from "
                "noise to video the other way? Then bind it with ascending=%s",
                not self._ascending,
            )

    def _warn_of_stranger(self, path: str) -> None:
        if path not in self._strangers:
            self._strangers.add(path)
            log.warning(
                "the budget knows nothing of %s: it keeps what the compiler's options say", path
            )

    def resolve(self, layer: Tensor | None, site: str, plan: AttentionPlan) -> Call:
        """The call of `site` in the layer that owns `layer`, in the forward under way."""
        forward = self._forward
        assert forward is not None, "a binding is active only during a forward"
        path, identity = self._models[forward.model].locate(layer, site, forward.calls[site])
        forward.calls[site] += 1
        known = self._generation.layers.setdefault((forward.model, path), _Layer())
        known.identity = identity
        known.index = forward.order.setdefault(path, len(forward.order))
        known.branches.add(forward.branch)
        memory = known.memories.get((site, forward.branch, 0))
        if forward.dense or known.index < self._dense_layers:
            plan = _at_density(plan, 1.0)
        else:
            plan = self._budgeted(plan, path, forward)
        if plan.is_dense or forward.branch == MAX_BRANCHES:
            return Call(plan, memory)
        if memory is None:
            memory = known.memories[site, forward.branch, 0] = Memory()
        known.last_sparse = memory
        if not plan.shared_branches:
            return Call(plan, memory)
        leader = known.memories.get((site, 0, 0)) if forward.led else None
        others = ((site, forward.branch, place) for place in range(1, forward.stacked))
        stacked = tuple(known.memories.setdefault(other, Memory()) for other in others)
        return Call(plan, memory, leader, stacked, forward.batch)

    def _budgeted(self, plan: AttentionPlan, path: str, forward: _Forward) -> AttentionPlan:
        """The plan that the budget gives this layer, `plan` where it says nothing of it."""
        if self._tuned:
            choice = self._tuned[forward.model].choice(path, forward.timestep)
            if choice is None:
                self._warn_of_stranger(path)
                return plan
            return _chosen(plan, choice)
        if path not in self._densities:
            # Its own entry, else the first that matches.
            matching = (d for pattern, d in self._budget.items() if fnmatchcase(path, pattern))
            self._densities[path] = self._budget.get(path, next(matching, None))
        density = self._densities[path]
        return plan if density is None else _at_density(plan, density)


class _BoundCall:
    """Stands in for the call of a module, around whatever compiled call it has.

    `nn.Module.__call__` goes through `_compiled_call_impl` before hooks and forward, in eager
    modules and in what `torch.compile` returns alike. Unlike a forward hook it can guard against
    a KeyboardInterrupt, and it is never traced with the module's own graph.
    """

    def __init__(self, binding: Binding, model: int, module: nn.Module) -> None:
        self.binding = binding
        self.model = model
        self.module = module
        self.compiled = module._compiled_call_impl
        self.call: Callable[..., Any] = self.compiled or module._call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Bound first and compiled afterwards: nothing of the binding belongs into the graph.
        if torch.compiler.is_compiling():
            return self.call(*args, **kwargs)
        with self.binding.running(self.model, args, kwargs):
            return self.call(*args, **kwargs)

    def restore(self) -> None:
        if self.compiled is None:
            del self.module._compiled_call_impl
        else:
            self.module._compiled_call_impl = self.compiled


def _equal(latents: Tensor | None, others: Tensor | None) -> bool:
    """Whether two forwards are about one video; waits for the device."""
    if latents is None or others is None or latents.device != others.device:
        return False
    return torch.equal(latents, others)


def _stacked(latents: Tensor | None) -> int:
    """Guidance branches along the batch: parts of it that are one video; waits for the device."""
    if latents is None or latents.dim() == 0 or latents.shape[0] < 2:
        return 1
    for count in (2, 3):
        first, *others = latents.chunk(count)
        if latents.shape[0] % count == 0 and all(torch.equal(first, other) for other in others):
            return count
    return 1


@lru_cache(maxsize=1024)
def _chosen(plan: AttentionPlan, choice: Choice) -> AttentionPlan:
    return choice.plan(plan)


@lru_cache(maxsize=1024)
def _at_density(plan: AttentionPlan, density: float) -> AttentionPlan:
    return dataclasses.replace(plan, density=density)


def _clean(path: str) -> str:
    """A module path as it is without compiled blocks in it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _layer_path(owner: str, site: str, paths: Container[str]) -> str:
    """Path of the layer of `site`, from the path of a module that owns a parameter of it.

    `site` is relative to what was compiled, the model or one of its blocks. The attention may be in
    a module of its own beside the projection: both are then in the module that it is named in.
    """
    parts, named = owner.split("."), site.split(".")
    for end in range(len(parts), len(named) - 1, -1):
        if parts[end - len(named) : end] == named:
            return ".".join(parts[:end])
    for end in range(len(parts) if site else -1, -1, -1):  # a block may be the layer itself
        path = [*parts[:end], *named]
        if ".".join(path) in paths and parts[: len(path) - 1] == path[:-1]:
            return ".".join(path)
    return ".".join(parts[:-1])


def _check_models(models: tuple[nn.Module, ...]) -> None:
    if not models:
        raise ValueError("bind needs at least one model")
    for module in models:
        if not isinstance(module, nn.Module):
            raise TypeError(f"bind takes modules, got {type(module).__name__}")
        if isinstance(module._compiled_call_impl, _BoundCall):
            raise ValueError(f"this {type(module).__name__} is bound already: unbind it first")
    if len({id(getattr(module, "_orig_mod", module)) for module in models}) < len(models):
        raise ValueError("bind got the same model twice")


def _checked_budget(budget: Mapping[str, float], models: list[_BoundModel]) -> dict[str, float]:
    paths = list(dict.fromkeys(path for model in models for path in model.paths))
    for pattern, density in budget.items():
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"the budget of {pattern!r} must be in [0, 1], got {density!r}")
        if pattern not in paths and not any(fnmatchcase(path, pattern) for path in paths):
            (nearest,) = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            raise ValueError(
                f"the budget names {pattern!r}, which matches no module; nearest: {nearest!r}"
            )
    return dict(budget)


def bind(
    *models: nn.Module,
    dense_steps: int = 0,
    dense_above_timestep: float | None = None,
    dense_layers: int = 0,
    budget: Mapping[str, float] | str | Path | Budget | Sequence[Budget] | None = None,
    timestep: str | None = None,
    ascending: bool = False,
) -> Binding:
    """Let models know their layers, their denoising step and what they remember from the last one.

    Bind what is called: the result of ``torch.compile(model)``, or the model whose blocks are
    compiled, or after ``model.compile()``. A model that is bound and then compiled runs unbound.
    Bind after weights are loaded, adapters added and offloading set up: parameters made later are
    told apart by the order of execution only.

    A generation starts when the timestep jumps back to noise, when the shape or device of a tensor
    input changes, after an error inside a forward, and by `Binding.reset`, which two generations of
    a single step need between them. All memory is dropped then, so the same seed gives the same
    bits. The timestep is the largest value of the timestep argument; reading it, and comparing the
    latents of guidance branches, costs one wait for the device per forward. Steps whose timesteps
    are equal as the model gets them (rounded to bfloat16, say) count as one.

    Guidance branches are forwards at one timestep, or parts of one batch, whose latents (the first
    tensor input) are equal. The first of them leads: the others take over its clusters and exact
    blocks, unless the option ``shared_branches`` is off. Other videos at that timestep or in that
    batch are clustered by themselves.

    Args:
        models: models that take turns in one generation, such as Wan 2.2's two experts.
        dense_steps: leading denoising steps with dense attention.
        dense_above_timestep: dense wherever the timestep is noisier than this one.
        dense_layers: leading layers, in order of execution, with dense attention.
        budget: layer path or `fnmatch` pattern to density; a path goes before patterns, and of
            those the first that matches counts. Replaces the plan's density, so a plan routed by
            top-p or threshold heeds only 1. Or a tuned budget (a `Budget` or its file; for several
            models one `Budget` each), which also gives clusters, form and schedule.
        timestep: name of the timestep argument of forward, by default one of `TIMESTEP_NAMES`.
        ascending: the timestep rises from noise to video, as in Mochi.

    Raises:
        ValueError: forward has no timestep, the budget names no module or a density outside of
            [0, 1], its file is broken or is for another model, a count is negative, or a model is
            given twice or bound already.
        TypeError: one of the models is not a module.
    """
    if isinstance(budget, (str, Path)):
        budget = budgets.load(Path(budget))
    return Binding(
        models,
        dense_steps=dense_steps,
        dense_above_timestep=dense_above_timestep,
        dense_layers=dense_layers,
        budget=budget,
        timestep=timestep,
        ascending=ascending,
    )
