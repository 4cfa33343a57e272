"""`tune`: a budget from measurements of one model, instead of one density for all layers.

Each layer is made sparse alone, at a few densities, and the error of the model's output is measured
on calibration inputs. From these errors and the times of the cost model a knapsack picks one choice
for each layer and phase. The result is compared with one density for all layers at the same time,
and kept only if it is better. Longer than 400 lines: one procedure, whose parts share its state.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from svg_ear_compile.capture import ModelCall, check_calls
from svg_ear_compile.checkpoint import Checkpoint
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import json_record, knapsack
from svg_ear_compile.cost_model.allocation import Allocation, AllocationProblem, Objective
from svg_ear_compile.cost_model.budget import DENSE, Budget, Choice, Performance, Point
from svg_ear_compile.cost_model.error import Measurement, fit_curve
from svg_ear_compile.cost_model.margin import KEPT_BY, unseen_error
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.given_models import check_module
from svg_ear_compile.kernels.checked import InvalidTypeError, shown
from svg_ear_compile.policy import calibration_of
from svg_ear_compile.ranks import all_reduce_max, rank, ranks
from svg_ear_compile.trial_runs import TrialRuns
from svg_ear_compile.tuning_plan import Cost, Trial, TuningSettings, kinds_of, schedule_of, sites_of
from svg_ear_compile.tuning_remarks import on_error, on_time

_ROUNDS = 3  # of solving, measuring the solution and correcting the limit


def tune(
    model: nn.Module,
    calls: Sequence[ModelCall],
    *,
    target_speedup: float | None = None,
    max_error: float | None = None,
    density: float | None = None,
    settings: TuningSettings | None = None,
    checkpoint: str | Path | None = None,
    journal: str | Path | None = None,
    on_cost: Callable[[Cost], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Budget:
    """Measure a model and make a budget for one objective.

    Exactly one of `target_speedup`, `max_error` and `density` has to be given. Under
    torch.distributed the ranks of the default group divide the measurements among them (any backend
    that exchanges CPU tensors, e.g. gloo). Every rank returns the same budget.

    Args:
        model: the model in evaluation mode, on its device; its parameters are not changed.
        calls: inputs of forwards as a pipeline makes them, at timesteps spread over the sparse part
            of the denoising, with a few clips for each timestep.
        target_speedup: speed-up of one sparse forward over a forward compiled by Inductor, above 1.
        max_error: largest relative RMS error of the model's output in one forward, which 19 of 20
            forwards on other inputs shall keep.
        density: mean fraction of the attention area computed exactly, in (0, 1).
        settings: see `TuningSettings`.
        checkpoint: file of finished measurements (formerly `journal`), from which tuning resumes.
        on_cost: called with the expected cost before measuring starts.
        on_progress: called with the name of the current part, the number of finished steps, and the
            number of all steps of that part.

    Returns:
        The budget. Its `outcome` is ``"uniform"`` where tuning was not better than one density.

    Raises:
        ValueError: not exactly one objective is given, or it is out of range; the model has no
            attention that could be sparse; or the objective cannot be reached, in which case the
            message names the best possible value.
        TypeError: the model is no module, the calls are no `ModelCall`, or a number is none.
        OSError: the checkpoint cannot be written.
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    if journal is not None:
        warnings.warn("journal is called checkpoint now", DeprecationWarning, stacklevel=2)
        checkpoint = checkpoint or journal
    objective = Objective.of(target_speedup, max_error, density)
    check_module("tune", model)
    check_calls(calls)
    if settings is not None and not isinstance(settings, TuningSettings):
        raise InvalidTypeError(f"settings must be TuningSettings, got {shown(settings)}")
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        json_record.check_writable(checkpoint)
    with torch.no_grad():
        work = _Tuning(model, calls, settings or TuningSettings(), objective, on_progress)
        try:
            return work.run(checkpoint, on_cost)
        finally:
            work.runs.close()


class _Tuning:
    """The state of one tuning run.

    `saving` is the measured saving of a forward over the predicted one, `plain_ms` the milliseconds
    of a forward compiled by Inductor alone; `_measure_saving` sets both.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[ModelCall],
        settings: TuningSettings,
        objective: Objective,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.settings, self.objective = settings, objective
        self.progress = on_progress or (lambda what, done, total: None)
        self.sites = sites_of(self.model, calls[0])
        self.layers = tuple(dict.fromkeys(layer for layer, _ in self.sites))
        self.tokens = self.sites[0][1].k_tokens
        self.kinds = kinds_of(self.sites[0][1], settings)
        self.fingerprint = fingerprint_of(self.model)
        self.runs = TrialRuns(
            self.model, calls, settings.compiler, settings.timestep, settings.ascending
        )
        calibration = calibration_of(self.runs.device)
        if calibration is None:
            raise ValueError(f"there are no kernels for {self.runs.device}")
        self.calibration = calibration
        self.schedule = schedule_of(self.runs.timesteps, settings)
        phases = [self.schedule.phase(timestep) for timestep in self.runs.timesteps]
        self.phase_of = [phase for phase in phases if phase is not None]
        if len(self.phase_of) < len(phases):
            raise ValueError(
                f"a call lies in the part from {settings.dense_from} on, which stays dense"
            )
        self.first = [self.phase_of.index(phase) for phase in range(self.schedule.phases)]
        self.saving, self.plain_ms = 1.0, 0.0

    def budget(self, allocation: Allocation) -> Budget:
        """A budget for a trial. Layers without a choice are dense; no step is dense as a whole."""
        dense = (DENSE,) * self.schedule.phases
        return Budget(
            version=budgets.VERSION,
            fingerprint=self.fingerprint,
            tokens=self.tokens,
            device=self.calibration.device,
            objective=str(self.objective),
            outcome="tuned",
            schedule=dataclasses.replace(self.schedule, dense_steps=0, dense_from=None),
            layers={layer: allocation.get(layer, dense) for layer in self.layers},
        )

    def run(self, checkpoint: Path | None, on_cost: Callable[[Cost], None] | None) -> Budget:
        """Measure on all ranks, and make the budget on rank 0."""
        trials = list(self._trials())
        problem = self._fitted(trials, self._measure(trials, checkpoint, on_cost))
        # Times differ between machines, so rank 0 decides; it sends the budget, or its error.
        found: list[Budget | ValueError | None] = [None]
        if rank() == 0:
            try:
                found[0] = self._settle(problem)
            except ValueError as error:
                found[0] = error
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        (settled,) = found
        if isinstance(settled, ValueError):
            raise settled
        assert settled is not None
        return settled

    def _trials(self) -> Iterator[Trial]:
        for layer in self.layers:
            for kind in self.kinds:
                for density in self.settings.densities:
                    for call in range(len(self.runs.calls)):
                        yield Trial(layer, dataclasses.replace(kind, density=density), call)

    def _measure(
        self, trials: list[Trial], checkpoint: Path | None, on_cost: Callable[[Cost], None] | None
    ) -> list[float]:
        own, count, calls = rank(), ranks(), len(self.runs.calls)
        each = self.runs.measure_references(
            self.budget({}), lambda call: self.progress("dense outputs", call + 1, calls)
        )
        # The norms of the dense outputs identify the inputs to which the measurements belong.
        inputs = [f"{float(r.double().norm()):.4e}" for r in self.runs.references]
        kernels = self.calibration.device.kernels
        facts = [dataclasses.asdict(self.fingerprint), self.tokens, kernels, inputs]
        with Checkpoint(checkpoint, facts, own) as notes:
            # -1 means not measured. All ranks agree on what is measured before any of them writes.
            known = [notes.finished.get(trial.key, -1.0) for trial in trials]
            found = torch.tensor(known, dtype=torch.float64)
            all_reduce_max(found)
            wanted = [at for at, error in enumerate(found.tolist()) if error < 0]
            if on_cost is not None and own == 0:
                if wanted:  # a sparse forward of few tokens takes longer than a dense one
                    first = trials[wanted[0]]
                    each = max(each, self.runs.seconds(self._alone(first), first.call))
                seconds = len(wanted) * each / count
                done = len(trials) - len(wanted)
                on_cost(Cost(len(wanted), done, seconds, count, self._settling_seconds(each)))
            mine = wanted[own::count]
            for done, at in enumerate(mine, 1):
                trial = trials[at]
                found[at] = self.runs.error(self._alone(trial), trial.call)
                notes.add(trial.key, float(found[at]))
                self.progress("one layer sparse", done, len(mine))
        all_reduce_max(found)
        return [float(error) for error in found]

    def _alone(self, trial: Trial) -> Budget:
        return self.budget({trial.layer: (trial.choice,) * self.schedule.phases})

    def _settling_seconds(self, each: float) -> float:
        """Seconds of `_settle`, at most, if a forward takes `each`."""
        calls, phases = len(self.runs.calls), self.schedule.phases

        def timed(candidates: int) -> float:
            return self.runs.times_seconds(candidates, phases, each)

        searched = {"target_speedup": _ROUNDS * timed(1), "max_error": _ROUNDS * calls * each}
        # The plain model is compiled, too. Errors of the tuned budget and of one density for all.
        seconds = self.runs.compile_seconds + timed(2) + 2 * timed(3) + 2 * calls * each
        seconds += searched.get(self.objective.name, 0.0)
        if self.settings.thresholds:
            seconds += (phases + calls) * each + timed(1)
        return seconds

    def _fitted(self, trials: list[Trial], errors: list[float]) -> AllocationProblem:
        grouped: dict[tuple[str, int, Choice], list[Measurement]] = {}
        for trial, error in zip(trials, errors, strict=True):
            kind = dataclasses.replace(trial.choice, density=0.0)
            key = (trial.layer, self.phase_of[trial.call], kind)
            grouped.setdefault(key, []).append(Measurement(trial.choice.density, error))
        return AllocationProblem(
            sites=self.sites,
            phases=self.schedule.phases,
            kinds=self.kinds,
            densities=tuple(sorted(self.settings.densities)),
            curves={key: fit_curve(measured) for key, measured in grouped.items()},
            calibration=self.calibration,
        )

    def _settle(self, problem: AllocationProblem) -> Budget:
        """Solve, correct the solution by measurements, compare it with one density for all."""
        self._measure_saving(problem)
        allocation, errors = self._solved(problem)
        uniform, ms = self._uniform_like(problem, allocation)
        uniform_errors = self.runs.errors(self.budget(uniform))
        tried = (("tuned", allocation, errors), ("uniform", uniform, uniform_errors))
        measured = {
            name: Performance(max(e), ms[name], ms["plain"] / ms[name], problem.density(each))
            for name, each, e in tried
        }
        better = _rms(errors) <= _rms(uniform_errors)
        note = (
            f"on the calibration inputs one density for all ({problem.density(uniform):.3f}) has "
            f"{_rms(uniform_errors):.3g} of error at {ms['uniform']:.4g} ms, "
            f"the tuned one {_rms(errors):.3g} at {ms['tuned']:.4g} ms"
        )
        if self.objective.name == "max_error":
            # One density may have less error in the mean and yet exceed the limit.
            better = better or self._unseen(uniform_errors) > self.objective.value
            note += (
                f"; from {len(errors)} calls, {KEPT_BY:.0%} of unseen forwards are expected within "
                f"{self._unseen(errors if better else uniform_errors):.3g}"
            )
        if not better:
            note = f"tuning was not better, so one density is kept: {note}"
            allocation = uniform
        remarks = on_error(errors, uniform_errors)
        whole = self._whole_ms(problem, allocation)
        predicted = Performance(
            problem.error(allocation), whole, self.plain_ms / whole, problem.density(allocation)
        )
        frontier = tuple(
            Point(self._whole_ms(problem, each), problem.error(each))
            for each in problem.frontier(self.objective)
        )
        outcome = measured["tuned" if better else "uniform"]
        if self.settings.thresholds and better:
            allocation = problem.thresholds(
                allocation, self.runs.attention_errors(allocation, self.first)
            )
            # With thresholds the area depends on the data, so error and time are measured again.
            routed = self.runs.errors(self.budget(allocation))
            again = self._times(tuned=allocation)["tuned"]
            outcome = Performance(max(routed), again, ms["plain"] / again)
            note += f"; routed by threshold {_rms(routed):.3g} at {again:.4g} ms"
        assert outcome.ms is not None
        remarks = on_time(outcome.ms, ms["plain"], self.runs.variation) + remarks
        return dataclasses.replace(
            self.budget(allocation),
            schedule=self.schedule,
            outcome="tuned" if better else "uniform",
            predicted=predicted,
            measured=outcome,
            uniform=measured["uniform"],
            frontier=frontier,
            note="; ".join([*remarks, note]),
        )

    def _uniform_like(
        self, problem: AllocationProblem, allocation: Allocation
    ) -> tuple[Allocation, dict[str, float]]:
        """One density for all layers, to compare an allocation with, and milliseconds of a forward.

        The uniform allocation takes the same time, or has the same density if that is the
        objective. The milliseconds are of ``tuned``, ``uniform`` and ``plain`` (Inductor alone).
        """
        if self.objective.name == "density":
            uniform = problem.uniform(problem.density(allocation))
            return uniform, self._times(tuned=allocation, uniform=uniform, plain=None)
        wanted = problem.attention_ms(allocation)
        uniform = problem.uniform(problem.density_at(wanted))
        ms = self._times(tuned=allocation, uniform=uniform, plain=None)
        # Equal predicted times are not quite equal in fact: correct once by the measured times.
        off = ms["tuned"] - ms["uniform"]
        if abs(off) > 0.01 * ms["tuned"]:
            wanted = problem.attention_ms(uniform) + off / self.saving
            uniform = problem.uniform(problem.density_at(wanted))
            ms = self._times(tuned=allocation, uniform=uniform, plain=None)
        return uniform, ms

    def _times(self, **candidates: Allocation | None) -> dict[str, float]:
        tried = {name: x if x is None else self.budget(x) for name, x in candidates.items()}
        return self.runs.times(tried, self.first)

    def _measure_saving(self, problem: AllocationProblem) -> None:
        """Measure a forward of Inductor alone and of the sparsest budget; sets `saving`."""
        sparsest = problem.uniform(problem.densities[0])
        ms = self._times(plain=None, sparse=sparsest)
        self.plain_ms = ms["plain"]
        predicted = problem.dense_ms - problem.attention_ms(sparsest)
        gained = self.plain_ms - ms["sparse"]
        # A saving that is small against noise would give no useful ratio.
        if abs(predicted) > 0.03 * self.plain_ms and gained > 0:
            self.saving = min(max(gained / predicted, 0.2), 2.0)
        self.progress("time of a forward", 1, 1)

    def _whole_ms(self, problem: AllocationProblem, allocation: Allocation) -> float:
        """Predicted milliseconds of a forward.

        The measured time of Inductor alone minus the predicted saving times `saving`.
        """
        saved = problem.dense_ms - problem.attention_ms(allocation)
        # Times of a device that was never calibrated are off by factors: no forward takes nothing.
        return max(self.plain_ms - self.saving * saved, 0.01 * self.plain_ms)

    def _solved(self, problem: AllocationProblem) -> tuple[Allocation, list[float]]:
        """A measured allocation for the objective, and its error in every call."""
        if self.objective.name == "target_speedup":
            return self._at_speedup(problem, self.plain_ms / self.objective.value)
        if self.objective.name == "max_error":
            return self._within_error(problem, self.objective.value)
        try:
            allocation = problem.solve(self.objective, self.objective.value)
        except knapsack.UnreachableError as error:
            raise ValueError(
                f"{self.objective} cannot be reached at the densities tried: the least is "
                f"{error.least:.3g}"
            ) from error
        return allocation, self.runs.errors(self.budget(allocation))

    def _at_speedup(
        self, problem: AllocationProblem, wanted: float
    ) -> tuple[Allocation, list[float]]:
        """The allocation whose forward is measured to take the milliseconds nearest to `wanted`."""
        allowed = problem.dense_ms - (self.plain_ms - wanted) / self.saving
        tried: list[tuple[float, Allocation]] = []
        for turn in range(_ROUNDS):
            try:
                allocation = problem.solve(self.objective, allowed)
            except knapsack.UnreachableError as error:
                # The prediction says that it cannot be reached: measure the fastest allocation.
                allocation = problem.solve(self.objective, error.least * (1 + 1e-9))
            late = self._times(tuned=allocation)["tuned"] - wanted
            tried.append((late, allocation))
            self.progress("whole budgets", turn + 1, _ROUNDS)
            if -0.02 * wanted < late < 0.01 * wanted:
                break
            allowed -= late / self.saving
        late, allocation = min(tried, key=lambda pair: abs(pair[0]))
        if late > 0.05 * wanted:
            best = self.plain_ms / (wanted + late)
            raise ValueError(
                f"{self.objective} cannot be reached at the densities tried: "
                f"the best is {best:.2f}x"
            )
        return allocation, self.runs.errors(self.budget(allocation))

    def _within_error(
        self, problem: AllocationProblem, limit: float
    ) -> tuple[Allocation, list[float]]:
        """The allocation of least time whose error on unseen inputs is bounded by the limit."""
        kept: Allocation = problem.same(DENSE)
        errors = [0.0] * len(self.runs.calls)
        allowed = limit / self._unseen([1.0] * len(errors))
        for turn in range(_ROUNDS):
            allocation = problem.solve(self.objective, allowed)
            found = self.runs.errors(self.budget(allocation))
            self.progress("whole budgets", turn + 1, _ROUNDS)
            faster = problem.attention_ms(allocation) <= problem.attention_ms(kept)
            bound = self._unseen(found)
            if bound <= limit and faster:
                kept, errors = allocation, found
            # Squared errors of layers do not add up exactly: correct by the measured error.
            ratio = bound / limit
            if 0.93 < ratio <= 1.0 or ratio == 0.0:
                break
            allowed /= max(ratio, 0.5) * 1.02
        return kept, errors

    def _unseen(self, errors: Sequence[float]) -> float:
        """Bound of the error on unseen inputs: `unseen_error`, and at least every measured error.

        Calls at the same timestep count as different clips. Calls of one clip at different
        timesteps are too similar to count as different inputs.
        """
        by_timestep: dict[float, list[float]] = {}
        for timestep, error in zip(self.runs.timesteps, errors, strict=True):
            by_timestep.setdefault(timestep, []).append(error)
        return max(*errors, unseen_error(list(by_timestep.values())))


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(error * error for error in errors))
