"""The plan of each layer at each denoising step: dense steps, dense layers, budget."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from svg_ear_compile.clock import is_noisier
from svg_ear_compile.cost_model.budget import Budget, Choice
from svg_ear_compile.early_steps import EarlyFactor, EarlySteps
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.kernels.checked import Count, Fraction, InvalidTypeError, Size, checked, shown
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.layers import BoundModel, Identity
from svg_ear_compile.settings import usable_budget

log = logging.getLogger(__name__)

GivenBudget = Mapping[str, float] | str | Path | Budget | Sequence[str | Path | Budget]
"""What `bind` takes as a budget."""


class LayerPlans:
    """The plans of all layers of the bound models; see `bind` for the arguments.

    Raises:
        TypeError: a count or a density has the wrong type.
        ValueError: see `bind`.
    """

    def __init__(
        self,
        models: Sequence[BoundModel],
        *,
        dense_steps: int,
        dense_above_timestep: float | None,
        dense_layers: int,
        steps: int | None,
        early_factor: float,
        budget: GivenBudget | None,
        ascending: bool,
        chunked: bool,
    ) -> None:
        self._models = models
        self._dense_steps = checked("dense_steps", dense_steps, Count)
        self._dense_above_timestep = checked(
            "dense_above_timestep", dense_above_timestep, float | None
        )
        self._dense_layers = checked("dense_layers", dense_layers, Count)
        self._steps = checked("steps", steps, Size | None)
        self._early_factor = checked("early_factor", early_factor, EarlyFactor)
        self._declared_ascending = checked("ascending", ascending, bool)
        self.chunked = checked("chunked", chunked, bool)
        self._tuned: list[Budget] = []
        self._budget: dict[str, float] = {}
        self._densities: dict[str, float | None] = {}
        self._warned: set[str] = set()
        self._heard: dict[int, set[str]] = {}
        if isinstance(budget, Mapping):
            self._budget = _checked_budget(budget, models)
        elif budget is not None:
            self.use(budget)

    def use(self, budget: str | Path | Budget | Sequence[str | Path | Budget]) -> None:
        """Follow tuned budgets, one for each bound model; see `Session.use`."""
        if not isinstance(budget, (str, Path, Budget, Sequence)):
            raise InvalidTypeError(
                "budget must be a Budget, its file, a list of them or a dict from layer to "
                f"density, got {shown(budget)}; one density for all layers is an option of "
                "torch.compile"
            )
        given = [budget] if isinstance(budget, (str, Path, Budget)) else budget
        budgets = [usable_budget(each) for each in given]
        if len(budgets) != len(self._models):
            raise ValueError(
                f"{len(self._models)} models are bound, but {len(budgets)} budgets given"
            )
        for each, model in zip(budgets, self._models, strict=True):
            each.check_model(fingerprint_of(model.module))
        self._tuned = budgets

    @property
    def ascending(self) -> bool:
        """Whether timesteps rise from noise to video, by declaration or by the budget in use."""
        return self._declared_ascending or any(b.schedule.ascending for b in self._tuned)

    def is_dense_step(self, model: int, step: int, timestep: float, ascending: bool) -> bool:
        """Whether all attention of a model is dense at a step; see `bind` for the rules."""
        bound = self._dense_above_timestep
        leading = self._tuned[model].schedule.dense_steps if self._tuned else 0
        return step < max(leading, self._dense_steps) or (
            bound is not None and is_noisier(timestep, bound, ascending)
        )

    def early_steps(self, announced: int | None, dense_steps: int | None) -> EarlySteps | None:
        """The early steps of a generation; None if there are none.

        They need the number of steps. Leading dense steps take their place, and a tuned budget is
        followed as it is, since its error was measured at its own densities.

        Args:
            announced: number of steps that a call of a pipeline says; None if it says none.
            dense_steps: leading dense steps of that call.
        """
        steps = announced or self._steps
        is_dense_first = dense_steps or self._dense_steps or self._dense_above_timestep is not None
        if self._tuned or not steps or is_dense_first:
            return None
        return EarlySteps(steps, self._early_factor)

    def plan(
        self,
        compiled: AttentionPlan,
        model: int,
        path: str,
        identity: Identity,
        index: int,
        timestep: float,
        step: int,
        early: EarlySteps | None,
    ) -> AttentionPlan:
        """The plan of a layer at a sparse step.

        Args:
            compiled: the plan that the call was compiled with.
            model, path, identity, index: see `LayerReport`.
            timestep, step: timestep and index of the step.
            early: see `early_steps`; not for a routing that has no density to spread, nor for the
                density of a tuned budget in the options of torch.compile.
        """
        if index < self._dense_layers:
            return at_density(compiled, 1.0)
        plan = self._of_layer(compiled, model, path, identity, timestep)
        if early is None or plan.is_tuned or plan.routing != "density":
            return plan
        return at_density(plan, early.density(plan.density, step))

    def _of_layer(
        self,
        compiled: AttentionPlan,
        model: int,
        path: str,
        identity: Identity,
        timestep: float,
    ) -> AttentionPlan:
        """The plan of a layer, whatever the step."""
        if self._tuned:
            choice = self._tuned[model].choice(path, timestep)
            if choice is None:
                self._warn(path, "it keeps the plan of the options of torch.compile")
                return compiled
            return _chosen(compiled, choice)
        if path not in self._densities:
            # An entry of this path, else the first pattern that matches.
            matching = (d for pattern, d in self._budget.items() if fnmatchcase(path, pattern))
            self._densities[path] = self._budget.get(path, next(matching, None))
        density = self._densities[path]
        if density is None:
            if self._budget and identity == "order" and path not in self._models[model].paths:
                self._warn(path, "only the order of execution tells this layer apart")
            return compiled
        return at_density(compiled, density)

    def heard(self, model: int, paths: Collection[str]) -> None:
        """Warn, after the first forward of a model, of patterns that match no sparse attention.

        Args:
            model: see `LayerReport`.
            paths: layers of the model whose calls reach the session.
        """
        self._heard[model] = set(paths)
        if not all(path in self._models[model].paths for path in paths):
            return  # layers without a path of their own: `plan` warns of them
        for pattern in self._budget:
            owners = {
                at
                for at, owner in enumerate(self._models)
                if any(fnmatchcase(path, pattern) for path in owner.paths)
            }
            reached = [path for at in owners for path in self._heard.get(at, ())]
            if owners <= self._heard.keys() and not any(
                fnmatchcase(path, pattern) for path in reached
            ):
                near = difflib.get_close_matches(pattern, sorted(paths), n=1, cutoff=0.0)
                self._warn_once(
                    f"the budget's {pattern!r} matches no attention that can be sparse"
                    + (f"; nearest: {near[0]!r}" if near else "")
                )

    def ended(self, steps: int, dense_steps: int, announced: int | None) -> None:
        """Warn, at the end of a generation, if the schedule has left it no sparse step.

        Args:
            steps: number of its denoising steps.
            dense_steps: number of those that were dense by the schedule.
            announced: leading dense steps that were checked against the number of steps before the
                generation began; None if that number was not known.
        """
        if steps == 0 or dense_steps < steps:
            return
        leading = max([self._dense_steps, *(b.schedule.dense_steps for b in self._tuned)])
        if leading >= steps and announced is None:
            why = f"dense_steps is {leading}"
        elif self._dense_above_timestep is not None and max(leading, announced or 0) < steps:
            why = f"dense_above_timestep is {self._dense_above_timestep:g}"
        else:
            return
        self._warn_once(f"no step of a generation of {steps} steps was sparse: {why}")

    def _warn(self, path: str, reason: str) -> None:
        self._warn_once(f"the budget has no entry for {path}: {reason}")

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)


@lru_cache(maxsize=1024)
def _chosen(plan: AttentionPlan, choice: Choice) -> AttentionPlan:
    return choice.plan(plan)


@lru_cache(maxsize=1024)
def at_density(plan: AttentionPlan, density: float) -> AttentionPlan:
    """The plan with another density."""
    return dataclasses.replace(plan, density=density)


def _checked_budget(budget: Mapping[str, float], models: Sequence[BoundModel]) -> dict[str, float]:
    paths = sorted({path for model in models for path in model.paths})
    densities = {}
    for pattern, density in budget.items():
        if not isinstance(pattern, str):
            raise InvalidTypeError(f"the budget names layers by strings, got {shown(pattern)}")
        densities[pattern] = checked(f"the budget of {shown(pattern)}", density, Fraction)
        if pattern not in paths and not any(fnmatchcase(path, pattern) for path in paths):
            (nearest,) = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            raise ValueError(
                f"the budget names {pattern!r}, which matches no module; nearest: {nearest!r}"
            )
    return densities
