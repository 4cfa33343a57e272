"""The plan of each layer at each denoising step: dense steps, dense layers, budget."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from svg_ear_compile.clock import is_noisier
from svg_ear_compile.cost_model.budget import Budget, Choice
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.layers import BoundModel, Identity

log = logging.getLogger(__name__)


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
        budget: Mapping[str, float] | Budget | Sequence[Budget] | None,
        ascending: bool,
    ) -> None:
        for name, count in (("dense_steps", dense_steps), ("dense_layers", dense_layers)):
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"{name} must be an integer, got {count!r}")
            if count < 0:
                raise ValueError(f"{name} must not be negative, got {count!r}")
        self._models = models
        self._dense_steps = dense_steps
        self._dense_above_timestep = dense_above_timestep
        self._dense_layers = dense_layers
        self._declared_ascending = ascending
        self._tuned: list[Budget] = []
        self._budget: dict[str, float] = {}
        self._densities: dict[str, float | None] = {}
        self._warned: set[str] = set()
        if isinstance(budget, Mapping) or budget is None:
            self._budget = _checked_budget(budget or {}, models)
        else:
            self.use(budget)

    def use(self, budget: Budget | Sequence[Budget]) -> None:
        """Follow tuned budgets, one for each bound model; see `Session.use`."""
        budgets = [budget] if isinstance(budget, Budget) else list(budget)
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

    def is_dense_step(self, model: int, step: int, timestep: float) -> bool:
        """Whether all attention of a model is dense at a step; see `bind` for the rules."""
        bound = self._dense_above_timestep
        leading = self._tuned[model].schedule.dense_steps if self._tuned else 0
        return step < max(leading, self._dense_steps) or (
            bound is not None and is_noisier(timestep, bound, self.ascending)
        )

    def plan(
        self,
        compiled: AttentionPlan,
        model: int,
        path: str,
        identity: Identity,
        index: int,
        timestep: float,
    ) -> AttentionPlan:
        """The plan of a layer at a sparse step.

        Args:
            compiled: the plan that the call was compiled with.
            model, path, identity, index: see `LayerReport`.
            timestep: timestep of the step.
        """
        if index < self._dense_layers:
            return at_density(compiled, 1.0)
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

    def _warn(self, path: str, reason: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            log.warning("the budget has no entry for %s: %s", path, reason)


@lru_cache(maxsize=1024)
def _chosen(plan: AttentionPlan, choice: Choice) -> AttentionPlan:
    return choice.plan(plan)


@lru_cache(maxsize=1024)
def at_density(plan: AttentionPlan, density: float) -> AttentionPlan:
    """The plan with another density."""
    return dataclasses.replace(plan, density=density)


def _checked_budget(budget: Mapping[str, float], models: Sequence[BoundModel]) -> dict[str, float]:
    paths = sorted({path for model in models for path in model.paths})
    for pattern, density in budget.items():
        if not isinstance(density, (int, float)):
            raise TypeError(f"the budget of {pattern!r} must be a number, got {density!r}")
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"the budget of {pattern!r} must be in [0, 1], got {density!r}")
        if pattern not in paths and not any(fnmatchcase(path, pattern) for path in paths):
            (nearest,) = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            raise ValueError(
                f"the budget names {pattern!r}, which matches no module; nearest: {nearest!r}"
            )
    return dict(budget)
