"""`tune`: a budget from measurements of one model, instead of one density for all of it.

Each layer is made sparse alone, at a few densities, and what that does to the model's output is
measured on calibration inputs. With the times of the cost model a knapsack picks one choice for
each layer and phase. The result is then run against one density for all at the same time, and kept
only if it is better.
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

from svg_ear_compile.capture import CapturedCall, ModelCall, capture_attention
from svg_ear_compile.checkpoint import Checkpoint
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import knapsack
from svg_ear_compile.cost_model.allotment import Allotment, Layers, Wish
from svg_ear_compile.cost_model.budget import DENSE, Budget, Choice, Performance, Point
from svg_ear_compile.cost_model.error import Measurement, fit_curve
from svg_ear_compile.cost_model.margin import KEPT_BY, unseen_error
from svg_ear_compile.deciding import calibration_of
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.ranks import rank, ranks, share_largest
from svg_ear_compile.trial_runs import TrialRuns
from svg_ear_compile.tuning_plan import Cost, Trial, TuningSettings, kinds_of, schedule_of, sites_of

_ROUNDS = 3  # corrections of a solution by what it was measured to do


def tune(
    model: nn.Module,
    calls: Sequence[ModelCall],
    *,
    target_speedup: float | None = None,
    max_error: float | None = None,
    density: float | None = None,
    settings: TuningSettings | None = None,
    checkpoint: Path | None = None,
    journal: Path | None = None,
    on_cost: Callable[[Cost], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Budget:
    """Measure a model and make a budget for one wish.

    Under torch.distributed the measurements are shared by all ranks of the default group (any
    backend that exchanges CPU tensors, e.g. gloo); every rank returns the same budget.

    Args:
        model: in evaluation mode, on its device; its parameters are not touched.
        calls: inputs of forwards as a pipeline makes them, at timesteps spread over the sparse part
            of the denoising; a few clips each.
        target_speedup: of one sparse forward over Inductor's, above 1.
        max_error: largest relative RMS error of the model's output in one forward, of other inputs
            in 19 of 20 cases.
        density: mean share of the attention area computed exactly.
        settings: see `TuningSettings`.
        checkpoint: file of finished measurements, formerly `journal`; an interrupted tuning is
            resumed from it.
        on_cost: hears what it will cost before measuring starts.
        on_progress: hears what is being done, how much of it is done, and of how much.

    Returns:
        The budget; its `outcome` is ``"uniform"`` where tuning was not better than one density.

    Raises:
        ValueError: not exactly one wish is given or it is out of range, the model has no attention
            that could be sparse, or the wish cannot be met; the message names the best that can.
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    if journal is not None:
        warnings.warn("journal is called checkpoint now", DeprecationWarning, stacklevel=2)
        checkpoint = checkpoint or journal
    wish = Wish.of(target_speedup, max_error, density)
    if not calls:
        raise ValueError("tune needs at least one call of the model")
    with torch.no_grad():
        work = _Tuning(model, calls, settings or TuningSettings(), wish, on_progress)
        try:
            return work.run(checkpoint, on_cost)
        finally:
            work.runs.close()


class _Tuning:
    """One tuning under way."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[ModelCall],
        settings: TuningSettings,
        wish: Wish,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.settings, self.wish = settings, wish
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

    def budget(self, layers: Layers) -> Budget:
        """A budget to be tried: layers that are not named are dense, and no step is."""
        dense = (DENSE,) * self.schedule.phases
        return Budget(
            version=budgets.VERSION,
            fingerprint=self.fingerprint,
            tokens=self.tokens,
            device=self.calibration.device,
            objective=str(self.wish),
            outcome="tuned",
            schedule=dataclasses.replace(self.schedule, dense_steps=0, dense_from=None),
            layers={layer: layers.get(layer, dense) for layer in self.layers},
        )

    def run(self, checkpoint: Path | None, on_cost: Callable[[Cost], None] | None) -> Budget:
        """Measure on all ranks, decide on the first."""
        trials = list(self._trials())
        allotment = self._fitted(trials, self._measure(trials, checkpoint, on_cost))
        # Times are one machine's: rank 0 decides, the others hear of it, refusals included.
        found: list[Budget | ValueError | None] = [None]
        if rank() == 0:
            try:
                found[0] = self._settle(allotment)
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
        # What the inputs were shows in the dense outputs: measurements of others are not resumed.
        inputs = [f"{float(r.double().norm()):.4e}" for r in self.runs.references]
        kernels = self.calibration.device.kernels
        facts = [dataclasses.asdict(self.fingerprint), self.tokens, kernels, inputs]
        with Checkpoint(checkpoint, facts, own) as notes:
            # -1 is unknown. All ranks agree on what is known before any of them writes.
            known = [notes.finished.get(trial.key, -1.0) for trial in trials]
            found = torch.tensor(known, dtype=torch.float64)
            share_largest(found)
            wanted = [at for at, error in enumerate(found.tolist()) if error < 0]
            if on_cost is not None and own == 0:
                seconds = len(wanted) * each / count
                on_cost(Cost(len(wanted), len(trials) - len(wanted), seconds, count))
            mine = wanted[own::count]
            for done, at in enumerate(mine, 1):
                trial = trials[at]
                alone = self.budget({trial.layer: (trial.choice,) * self.schedule.phases})
                found[at] = self.runs.error(alone, trial.call)
                notes.add(trial.key, float(found[at]))
                self.progress("one layer sparse", done, len(mine))
        share_largest(found)
        return [float(error) for error in found]

    def _fitted(self, trials: list[Trial], errors: list[float]) -> Allotment:
        grouped: dict[tuple[str, int, Choice], list[Measurement]] = {}
        for trial, error in zip(trials, errors, strict=True):
            kind = dataclasses.replace(trial.choice, density=0.0)
            key = (trial.layer, self.phase_of[trial.call], kind)
            grouped.setdefault(key, []).append(Measurement(trial.choice.density, error))
        return Allotment(
            sites=self.sites,
            phases=self.schedule.phases,
            kinds=self.kinds,
            densities=tuple(sorted(self.settings.densities)),
            curves={key: fit_curve(measured) for key, measured in grouped.items()},
            calibration=self.calibration,
        )

    def _settle(self, allotment: Allotment) -> Budget:
        """Solve, correct by what is measured, compare with uniform, keep the better."""
        self._measure_saving(allotment)
        layers, errors = self._solved(allotment)
        uniform, ms = self._uniform_like(allotment, layers)
        uniform_errors = self.runs.errors(self.budget(uniform))
        measured = {
            name: Performance(max(e), ms[name], ms["plain"] / ms[name], allotment.density(each))
            for name, each, e in (("tuned", layers, errors), ("uniform", uniform, uniform_errors))
        }
        better = _rms(errors) <= _rms(uniform_errors)
        note = (
            f"on the calibration inputs one density for all ({allotment.density(uniform):.3f}) has "
            f"{_rms(uniform_errors):.3g} of error at {ms['uniform']:.4g} ms, "
            f"the tuned one {_rms(errors):.3g} at {ms['tuned']:.4g} ms"
        )
        if self.wish.name == "max_error":
            # One density may be better on the whole and break it.
            better = better or self._unseen(uniform_errors) > self.wish.value
            note += (
                f"; from {len(errors)} calls, {KEPT_BY:.0%} of unseen forwards are expected within "
                f"{self._unseen(errors if better else uniform_errors):.3g}"
            )
        if not better:
            note = f"tuning was not better, so one density is kept: {note}"
            layers = uniform
        whole = self._whole_ms(allotment, layers)
        predicted = Performance(
            allotment.error(layers), whole, self.plain_ms / whole, allotment.density(layers)
        )
        frontier = tuple(
            Point(self._whole_ms(allotment, each), allotment.error(each))
            for each in allotment.frontier(self.wish)
        )
        outcome = measured["tuned" if better else "uniform"]
        if self.settings.thresholds and better:
            layers = allotment.thresholds(layers, self._attention_errors(layers))
            # The area follows from the data now, so error and time are measured once more.
            routed = self.runs.errors(self.budget(layers))
            again = self._times(tuned=layers)["tuned"]
            outcome = Performance(max(routed), again, ms["plain"] / again)
            note += f"; routed by threshold {_rms(routed):.3g} at {again:.4g} ms"
        return dataclasses.replace(
            self.budget(layers),
            schedule=self.schedule,
            outcome="tuned" if better else "uniform",
            predicted=predicted,
            measured=outcome,
            uniform=measured["uniform"],
            frontier=frontier,
            note=note,
        )

    def _uniform_like(
        self, allotment: Allotment, layers: Layers
    ) -> tuple[Layers, dict[str, float]]:
        """One density for all at the same time, or the same density if that is the wish, and the
        milliseconds of a forward of both and of the compiler alone."""
        if self.wish.name == "density":
            uniform = allotment.uniform(allotment.density(layers))
            return uniform, self._times(tuned=layers, uniform=uniform, plain=None)
        wanted = allotment.attention_ms(layers)
        uniform = allotment.uniform(allotment.density_at(wanted))
        ms = self._times(tuned=layers, uniform=uniform, plain=None)
        # The same predicted time is not quite the same time: once more, by what was measured.
        off = ms["tuned"] - ms["uniform"]
        if abs(off) > 0.01 * ms["tuned"]:
            wanted = allotment.attention_ms(uniform) + off / self.saving
            uniform = allotment.uniform(allotment.density_at(wanted))
            ms = self._times(tuned=layers, uniform=uniform, plain=None)
        return uniform, ms

    def _times(self, **candidates: Layers | None) -> dict[str, float]:
        tried = {name: x if x is None else self.budget(x) for name, x in candidates.items()}
        return self.runs.times(tried, self.first)

    def _measure_saving(self, allotment: Allotment) -> None:
        """What a forward takes, and how much of a predicted saving it really gains: the sparsest
        budget's."""
        sparsest = allotment.uniform(allotment.densities[0])
        ms = self._times(plain=None, sparse=sparsest)
        self.plain_ms = ms["plain"]
        predicted = allotment.dense_ms - allotment.attention_ms(sparsest)
        gained = self.plain_ms - ms["sparse"]
        # A saving too small to be told from noise says nothing of its share.
        if abs(predicted) > 0.03 * self.plain_ms and gained > 0:
            self.saving = min(max(gained / predicted, 0.2), 2.0)
        self.progress("time of a forward", 1, 1)

    def _whole_ms(self, allotment: Allotment, layers: Layers) -> float:
        """Milliseconds of a forward: what the compiler alone was measured to take, less the saving
        that is predicted, times the share of it that a forward was seen to gain."""
        saved = allotment.dense_ms - allotment.attention_ms(layers)
        # Times of a device that was never calibrated are off by factors: no forward takes nothing.
        return max(self.plain_ms - self.saving * saved, 0.01 * self.plain_ms)

    def _solved(self, allotment: Allotment) -> tuple[Layers, list[float]]:
        """A solution for the wish and its error in every call, corrected by what was measured."""
        if self.wish.name == "target_speedup":
            return self._at_speedup(allotment, self.plain_ms / self.wish.value)
        if self.wish.name == "max_error":
            return self._within_error(allotment, self.wish.value)
        try:
            layers = allotment.solve(self.wish, self.wish.value)
        except knapsack.UnreachableError as error:
            raise ValueError(
                f"{self.wish} cannot be reached at the densities tried: the least is "
                f"{error.least:.3g}"
            ) from error
        return layers, self.runs.errors(self.budget(layers))

    def _at_speedup(self, allotment: Allotment, wanted: float) -> tuple[Layers, list[float]]:
        """The solution whose measured milliseconds come nearest to `wanted`."""
        allowed = allotment.dense_ms - (self.plain_ms - wanted) / self.saving
        tried: list[tuple[float, Layers]] = []
        for turn in range(_ROUNDS):
            try:
                layers = allotment.solve(self.wish, allowed)
            except knapsack.UnreachableError as error:
                # More is asked for than is predicted: the fastest has to show what it can do.
                layers = allotment.solve(self.wish, error.least * (1 + 1e-9))
            late = self._times(tuned=layers)["tuned"] - wanted
            tried.append((late, layers))
            self.progress("whole budgets", turn + 1, _ROUNDS)
            if -0.02 * wanted < late < 0.01 * wanted:
                break
            allowed -= late / self.saving
        late, layers = min(tried, key=lambda pair: abs(pair[0]))
        if late > 0.05 * wanted:
            best = self.plain_ms / (wanted + late)
            raise ValueError(
                f"{self.wish} cannot be reached at the densities tried: the best is {best:.2f}x"
            )
        return layers, self.runs.errors(self.budget(layers))

    def _within_error(self, allotment: Allotment, limit: float) -> tuple[Layers, list[float]]:
        """The solution of least time whose error is within the limit, as far as the measured errors
        say of inputs that were never seen."""
        kept: Layers = allotment.alike(DENSE)
        errors = [0.0] * len(self.runs.calls)
        allowed = limit / self._unseen([1.0] * len(errors))
        for turn in range(_ROUNDS):
            layers = allotment.solve(self.wish, allowed)
            found = self.runs.errors(self.budget(layers))
            self.progress("whole budgets", turn + 1, _ROUNDS)
            faster = allotment.attention_ms(layers) <= allotment.attention_ms(kept)
            bound = self._unseen(found)
            if bound <= limit and faster:
                kept, errors = layers, found
            # Errors of layers do not add up exactly: the sum is corrected by what was seen.
            ratio = bound / limit
            if 0.93 < ratio <= 1.0 or ratio == 0.0:
                break
            allowed /= max(ratio, 0.5) * 1.02
        return kept, errors

    def _unseen(self, errors: Sequence[float]) -> float:
        """The largest error of a call, or `unseen_error` by timestep, which is larger as a rule.

        Calls at one timestep are of different clips; those of one clip are too much alike to count
        as several.
        """
        by_timestep: dict[float, list[float]] = {}
        for timestep, error in zip(self.runs.timesteps, errors, strict=True):
            by_timestep.setdefault(timestep, []).append(error)
        return max(*errors, unseen_error(list(by_timestep.values())))

    def _attention_errors(self, layers: Layers) -> dict[tuple[str, int], tuple[float, float]]:
        """(layer, phase) to relative error and mean squared row of the attention output."""
        found: dict[tuple[str, int], tuple[float, float]] = {}
        for phase, first in enumerate(self.first):

            def see(seen: CapturedCall, phase: int = phase) -> None:
                choice = layers[seen.layer][phase]
                if choice.density < 1.0:
                    error = seen.error(seen.sparse(choice.plan(AttentionPlan())))
                    square = float(seen.out.float().square().sum(-1).mean())
                    found[seen.layer, phase] = (error, square)

            call = self.runs.calls[first]
            capture_attention(self.model, call.args, call.kwargs, see)
        return found


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(error * error for error in errors))
