"""`tune`: a budget from measurements of one model, instead of one density for all of it.

Each layer is made sparse alone, at a few densities, and what that does to the model's output is
measured on calibration inputs. With the times of the cost model a knapsack picks one choice for
each layer and phase. The result is then run against one density for all at the same time, and kept
only if it is better.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from svg_ear_compile.backend import svg_ear
from svg_ear_compile.binding import Binding, bind
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import knapsack
from svg_ear_compile.cost_model.budget import (
    DENSE,
    Budget,
    Choice,
    Outcome,
    Point,
    Schedule,
)
from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.error import ErrorCurve, Measurement, fit_curve, together
from svg_ear_compile.cost_model.latency import call_ms, ms_per_exact_share
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.cost_model.threshold import routing_threshold
from svg_ear_compile.deciding import calibration_of
from svg_ear_compile.explain import explain
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.journal import Journal
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings
from svg_ear_compile.watching import SeenCall, watch

log = logging.getLogger(__name__)

_Layers = Mapping[str, tuple[Choice, ...]]

SAFETY = 1.1
"""A budget for ``max_error`` is held to this much less on the calibration inputs, for inputs that
were never seen."""

_ROUNDS = 3  # corrections of a solution by what it was measured to do
_FRONTIER = 12
_REPEATS = 5  # of a timing, fewer where forwards are slow
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class ModelCall:
    """The inputs of one forward of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TuningSettings:
    """What is tried, and for which schedule.

    Attributes:
        densities: tried in each layer, each in (0, 1); dense is always a choice.
        cluster_sizes: mean queries and keys per cluster that are tried, None for the default sizes.
        forms: compensation forms that are tried.
        phases: parts into which the timesteps of the calls are cut, each with choices of its own.
        dense_steps: leading denoising steps that stay dense.
        dense_from: timestep from which the last steps stay dense, None for never.
        thresholds: route sparse layers by the threshold that follows from their multiplier.
        timestep, ascending: see `bind`.
        compiler: ``"inductor"``, or ``"eager"`` for a quick look whose times are not the real ones.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    cluster_sizes: tuple[tuple[int, int] | None, ...] = (None,)
    forms: tuple[Compensation, ...] = ("first_order",)
    phases: int = 1
    dense_steps: int = 0
    dense_from: float | None = None
    thresholds: bool = False
    timestep: str | None = None
    ascending: bool = False
    compiler: Literal["inductor", "eager"] = "inductor"

    def __post_init__(self) -> None:
        if not self.densities or not all(0.0 < d < 1.0 for d in self.densities):
            raise ValueError(f"densities must be in (0, 1), got {self.densities!r}")
        if self.phases < 1 or self.dense_steps < 0:
            raise ValueError("phases must be at least 1 and dense_steps not negative")
        if not self.cluster_sizes or not self.forms:
            raise ValueError("cluster_sizes and forms must not be empty")


@dataclass(frozen=True)
class Cost:
    """What a tuning will take, said before it starts.

    Attributes:
        forwards: of the model that are still to be measured, on all ranks together.
        finished: that an earlier run has measured.
        seconds: expected, on this many `ranks`.
        ranks: processes that share the work.
    """

    forwards: int
    finished: int
    seconds: float
    ranks: int


@dataclass(frozen=True)
class _Trial:
    """One measurement: one layer sparse in one call."""

    layer: str
    choice: Choice
    call: int

    @property
    def key(self) -> str:
        choice = self.choice
        clusters = f"{choice.q_clusters}/{choice.k_clusters}"
        return f"{self.layer} {choice.density:g} {clusters} {choice.compensation} {self.call}"


def tune(
    model: nn.Module,
    calls: Sequence[ModelCall],
    *,
    target_speedup: float | None = None,
    max_error: float | None = None,
    density: float | None = None,
    settings: TuningSettings | None = None,
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
        max_error: largest relative RMS error of the model's output in one forward.
        density: mean share of the attention area computed exactly.
        settings: see `TuningSettings`.
        journal: file that keeps finished measurements, so that an interrupted tuning goes on.
        on_cost: hears what it will cost before measuring starts.
        on_progress: hears what is being done, how much of it is done, and of how much.

    Returns:
        The budget; its `verdict` is ``"uniform"`` where tuning was not better than one density.

    Raises:
        ValueError: not exactly one wish is given or it is out of range, the model has no attention
            that could be sparse, or the wish cannot be met; the message names the best that can.
        ImportError: scipy, part of the extra ``tune``, is missing.
    """
    wish = _Wish.of(target_speedup=target_speedup, max_error=max_error, density=density)
    if not calls:
        raise ValueError("tune needs at least one call of the model")
    with torch.no_grad():
        work = _Tuning(model, calls, settings or TuningSettings(), wish, on_progress)
        try:
            return work.run(journal, on_cost)
        finally:
            work.binding.unbind()


@dataclass(frozen=True)
class _Wish:
    name: Literal["target_speedup", "max_error", "density"]
    value: float

    @classmethod
    def of(cls, **given: float | None) -> _Wish:
        wishes = {name: value for name, value in given.items() if value is not None}
        if len(wishes) != 1:
            raise ValueError(f"give one of {', '.join(given)}; got {', '.join(wishes) or 'none'}")
        ((name, value),) = wishes.items()
        low, high = {"target_speedup": (1.0, math.inf), "density": (0.0, 1.0)}.get(
            name, (0.0, math.inf)
        )
        if not low < value < high:
            raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
        return cls(name, float(value))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"


class _Tuning:
    """One tuning under way."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[ModelCall],
        settings: TuningSettings,
        wish: _Wish,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        inner = getattr(model, "_orig_mod", model)
        self.settings, self.wish, self.calls = settings, wish, list(calls)
        self.progress = on_progress or (lambda what, done, total: None)
        self.sites = _sites(inner, calls[0])
        self.layers = list(dict.fromkeys(layer for layer, _ in self.sites))
        self.tokens = self.sites[0][1].k_tokens
        self.device = _device_of(calls[0])
        calibration = calibration_of(self.device)
        if calibration is None:
            raise ValueError(f"there are no kernels for {self.device}")
        self.calibration: Calibration = calibration
        self.fingerprint = fingerprint_of(inner)
        self.compiled, self.plain = _compiled(inner, settings.compiler)
        self.binding: Binding = bind(
            self.compiled, timestep=settings.timestep, ascending=settings.ascending
        )
        self.timesteps = [self.binding.timestep_of(call.args, call.kwargs) for call in calls]
        self.schedule = _schedule(self.timesteps, settings)
        # Steps that are dense by schedule are for generations: here each call is what is tried.
        self.trial_schedule = dataclasses.replace(self.schedule, dense_steps=0, dense_from=None)
        self.phase_of = [self.schedule.phase(t) for t in self.timesteps]
        if None in self.phase_of:
            raise ValueError(
                f"a call lies in the part from {settings.dense_from:g} that stays dense"
            )
        self.references: list[Tensor] = []
        self.curves: dict[tuple[str, int, Choice], ErrorCurve] = {}
        self.saving = 1.0
        self.plain_ms = 0.0

    # -- running -----------------------------------------------------------------------------

    def budget(self, layers: _Layers, **fields: Any) -> Budget:
        every = {layer: layers.get(layer, (DENSE,) * self.schedule.phases) for layer in self.layers}
        return Budget(
            version=budgets.VERSION,
            fingerprint=self.fingerprint,
            tokens=self.tokens,
            device=self.calibration.device,
            wish=str(self.wish),
            verdict=fields.pop("verdict", "tuned"),
            schedule=fields.pop("schedule", self.trial_schedule),
            layers=every,
            **fields,
        )

    def at_density(self, density: float) -> Choice:
        """A density with the clusters and the form that are tried first."""
        q_clusters, k_clusters, form = self._candidates()[0]
        return Choice(density, q_clusters, k_clusters, form)

    def uniform(self, choice: Choice) -> dict[str, tuple[Choice, ...]]:
        return dict.fromkeys(self.layers, (choice,) * self.schedule.phases)

    def output(self, call: int) -> Tensor:
        """(elements,) float32 output of a call under the budget in use, clustered afresh."""
        self.binding.reset()
        return _flat(self.compiled(*self.calls[call].args, **self.calls[call].kwargs))

    def errors(self, layers: _Layers) -> list[float]:
        """Relative RMS error of every call under a budget."""
        self.binding.use(self.budget(layers))
        return [self.error(call) for call in range(len(self.calls))]

    def error(self, call: int) -> float:
        reference = self.references[call]
        error = float((self.output(call) - reference).norm() / reference.norm())
        if not math.isfinite(error):
            raise ValueError(
                f"the output of call {call} is not finite, or its dense output is zero"
            )
        return error

    def times(self, candidates: Mapping[str, _Layers | None]) -> dict[str, float]:
        """Milliseconds of one warm forward under each budget, None for plain Inductor; mean over
        phases. Taken in turns, so that what else the machine does falls on all alike."""
        samples: dict[tuple[str, int], list[float]] = {}
        began = time.perf_counter()
        for turn in range(_REPEATS):
            if turn > 1 and time.perf_counter() - began > _PATIENCE_S:
                break
            for name, layers in candidates.items():
                for phase in range(self.schedule.phases):
                    found = self._timed(phase, layers)
                    # The first turn compiles, on a GPU kernels of other shapes too.
                    if turn:
                        samples.setdefault((name, phase), []).extend(found)
        # As in the calibration: on a CPU whatever else runs there only ever adds.
        pick = statistics.median if self.device.type == "cuda" else min
        return {
            name: statistics.fmean(
                pick(samples[name, phase]) for phase in range(self.schedule.phases)
            )
            for name in candidates
        }

    def _timed(self, phase: int, layers: _Layers | None) -> list[float]:
        """Milliseconds of two forwards of a phase, after one that clusters afresh."""
        model = self.plain
        if layers is not None:
            model = self.compiled
            # Later timesteps may belong to the next phase: all phases get this one's choices.
            alike = {layer: (c[phase],) * len(c) for layer, c in layers.items()}
            self.binding.use(self.budget(alike))
        call = self.calls[self.phase_of.index(phase)]
        found = []
        for turn in range(3):
            args, kwargs = self.binding.later(call.args, call.kwargs, 0.01 * turn)
            _synchronize(self.device)
            began = time.perf_counter()
            model(*args, **kwargs)
            _synchronize(self.device)
            found.append(1e3 * (time.perf_counter() - began))
        return found[1:]

    # -- measuring ---------------------------------------------------------------------------

    def run(self, journal: Path | None, on_cost: Callable[[Cost], None] | None) -> Budget:
        seconds = self._measure_references()
        trials = list(self._trials())
        errors = self._measure(trials, journal, seconds, on_cost)
        self._fit(trials, errors)
        # Times are one machine's: rank 0 decides, the others hear of it, refusals included.
        found: list[Budget | ValueError | None] = [None]
        if _rank() == 0:
            try:
                found[0] = self._settle()
            except ValueError as error:
                found[0] = error
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        (settled,) = found
        if isinstance(settled, ValueError):
            raise settled
        assert settled is not None
        return settled

    def _measure_references(self) -> float:
        """Dense outputs of all calls; returns the seconds of one forward."""
        self.binding.use(self.budget({}))
        self.output(0)  # compiles
        seconds = []
        for call in range(len(self.calls)):
            began = time.perf_counter()
            self.references.append(self.output(call))
            seconds.append(time.perf_counter() - began)
            self.progress("dense outputs", call + 1, len(self.calls))
        return statistics.median(seconds)

    def _candidates(self) -> list[tuple[int | None, int | None, Compensation]]:
        found = []
        video = self.tokens - self.sites[0][1].text
        for sizes in self.settings.cluster_sizes:
            counts = (None, None) if sizes is None else tuple(math.ceil(video / s) for s in sizes)
            found += [(*counts, form) for form in self.settings.forms]
        return found

    def _trials(self) -> Iterator[_Trial]:
        for layer in self.layers:
            for q_clusters, k_clusters, form in self._candidates():
                for density in self.settings.densities:
                    choice = Choice(density, q_clusters, k_clusters, form)
                    for call in range(len(self.calls)):
                        yield _Trial(layer, choice, call)

    def _measure(
        self,
        trials: list[_Trial],
        journal: Path | None,
        seconds: float,
        on_cost: Callable[[Cost], None] | None,
    ) -> list[float]:
        rank, ranks = _rank(), _ranks()
        # What the inputs were shows in the dense outputs: measurements of others are not resumed.
        inputs = [f"{float(r.double().norm()):.4e}" for r in self.references]
        kernels = self.calibration.device.kernels
        facts = [dataclasses.asdict(self.fingerprint), self.tokens, kernels, inputs]
        with Journal(journal, facts, rank) as notes:
            # -1 is unknown. All ranks agree on what is known before any of them writes.
            known = [notes.finished.get(trial.key, -1.0) for trial in trials]
            found = torch.tensor(known, dtype=torch.float64)
            _share(found)
            wanted = [at for at, error in enumerate(found.tolist()) if error < 0]
            seconds = len(wanted) * seconds / ranks
            if on_cost is not None and rank == 0:
                on_cost(Cost(len(wanted), len(trials) - len(wanted), seconds, ranks))
            mine = wanted[rank::ranks]
            for done, at in enumerate(mine, 1):
                trial = trials[at]
                self.binding.use(self.budget({trial.layer: (trial.choice,) * self.schedule.phases}))
                found[at] = self.error(trial.call)
                notes.add(trial.key, float(found[at]))
                self.progress("one layer sparse", done, len(mine))
        _share(found)
        return [float(error) for error in found]

    def _fit(self, trials: list[_Trial], errors: list[float]) -> None:
        grouped: dict[tuple[str, int, Choice], list[Measurement]] = {}
        for trial, error in zip(trials, errors, strict=True):
            phase = self.phase_of[trial.call]
            assert phase is not None
            kind = dataclasses.replace(trial.choice, density=0.0)
            measured = Measurement(trial.choice.density, error)
            grouped.setdefault((trial.layer, phase, kind), []).append(measured)
        self.curves = {key: fit_curve(measured) for key, measured in grouped.items()}

    # -- solving -----------------------------------------------------------------------------

    def attention_ms(self, layers: _Layers) -> float:
        """Predicted milliseconds of all attention in one forward, mean over phases."""
        return statistics.fmean(
            self.layer_ms(layer, layers[layer][phase])
            for phase in range(self.schedule.phases)
            for layer in self.layers
        ) * len(self.layers)

    def layer_ms(self, layer: str, choice: Choice) -> float:
        plan = choice.plan(AttentionPlan())
        return sum(
            call_ms(shape, plan, self.calibration) for name, shape in self.sites if name == layer
        )

    def layer_area(self, layer: str) -> float:
        """Share of the whole attention area that is this layer's."""

        def area(shape: AttentionShape) -> int:
            return shape.batch * shape.heads * shape.q_tokens * shape.k_tokens

        mine = sum(area(shape) for name, shape in self.sites if name == layer)
        return mine / sum(area(shape) for _, shape in self.sites)

    def whole_ms(self, attention: float) -> float:
        """Milliseconds of a forward whose attention is predicted to take that long: what Inductor
        was measured to take, less the predicted saving times its measured share."""
        return self.plain_ms - self.saving * (self.dense_attention_ms - attention)

    @property
    def dense_attention_ms(self) -> float:
        return self.attention_ms(self.uniform(DENSE))

    def curve_error(self, layer: str, phase: int, choice: Choice) -> float:
        if choice.density >= 1.0:
            return 0.0
        kind = dataclasses.replace(choice, density=0.0, threshold=None)
        return self.curves[layer, phase, kind].at(choice.density)

    def predicted_error(self, layers: _Layers) -> float:
        """Largest over the phases."""
        return max(
            together(self.curve_error(layer, p, layers[layer][p]) for layer in self.layers)
            for p in range(self.schedule.phases)
        )

    def options(self) -> list[Choice]:
        """Dense, the measured choices, and densities between them."""
        grid = sorted(self.settings.densities)
        between = [
            math.sqrt(a * b) for a, b in zip(grid, [*grid[1:], 1.0], strict=True) if b <= 1.0
        ]
        densities = sorted({*grid, *(round(d, 3) for d in between)})
        return [DENSE] + [
            Choice(d, q, k, form) for q, k, form in self._candidates() for d in densities
        ]

    def solve(self, allowed: float) -> _Layers:
        """The best layers for what the wish allows: milliseconds of attention, share of the area,
        or error.

        Raises:
            knapsack.UnreachableError: nothing keeps to it.
        """
        options, phases = self.options(), self.schedule.phases
        slots = [(layer, phase) for phase in range(phases) for layer in self.layers]

        def cost(layer: str, choice: Choice) -> float:
            if self.wish.name == "density":
                return choice.density * self.layer_area(layer) / phases
            return self.layer_ms(layer, choice) / phases

        costs = {
            (layer, choice): cost(layer, choice) for layer in self.layers for choice in options
        }

        def group(layer: str, phase: int) -> list[knapsack.Option]:
            pairs = [(costs[layer, c], self.curve_error(layer, phase, c) ** 2) for c in options]
            if self.wish.name == "max_error":
                return [knapsack.Option(loss, ms) for ms, loss in pairs]
            return [knapsack.Option(ms, loss) for ms, loss in pairs]

        if self.wish.name == "max_error":  # each forward for itself
            chosen = {
                (layer, phase): options[at]
                for phase in range(phases)
                for layer, at in zip(
                    self.layers,
                    knapsack.solve_exactly([group(x, phase) for x in self.layers], allowed**2),
                    strict=True,
                )
            }
        else:
            taken = knapsack.solve_exactly([group(*slot) for slot in slots], allowed)
            chosen = {slot: options[at] for slot, at in zip(slots, taken, strict=True)}
        return {
            layer: tuple(chosen[layer, phase] for phase in range(phases)) for layer in self.layers
        }

    # -- deciding ----------------------------------------------------------------------------

    def _settle(self) -> Budget:
        """Solve, correct by what is measured, compare with uniform, keep the better."""
        self._measure_saving()
        layers, errors = self._corrected()
        tuned_rms = _rms(errors)
        uniform = self._uniform_like(layers)
        both = self.times({"tuned": layers, "uniform": self.uniform(uniform), "plain": None})
        uniform_errors = self.errors(self.uniform(uniform))
        outcome = self._outcome(errors, both["tuned"], both["plain"], layers)
        other = self._outcome(uniform_errors, both["uniform"], both["plain"], self.uniform(uniform))
        keep = tuned_rms <= _rms(uniform_errors) or both["uniform"] > 1.02 * both["tuned"]
        note = (
            f"on the calibration inputs one density for all ({uniform.density:.3f}) has "
            f"{_rms(uniform_errors):.3g} of error at {both['uniform']:.4g} ms, "
            f"the tuned one {tuned_rms:.3g} at {both['tuned']:.4g} ms"
        )
        if not keep:
            note = f"tuning was not better, so one density is kept: {note}"
            layers, outcome = self.uniform(uniform), other
        attention = self.attention_ms(layers)
        predicted = Outcome(
            self.predicted_error(layers),
            self.whole_ms(attention),
            self.plain_ms / self.whole_ms(attention),
            self._density(layers),
        )
        if self.settings.thresholds and keep:
            layers = self._with_thresholds(layers)
        return self.budget(
            layers,
            schedule=self.schedule,
            verdict="tuned" if keep else "uniform",
            predicted=predicted,
            measured=outcome,
            uniform=other,
            frontier=tuple(self._frontier()),
            note=note,
        )

    def _measure_saving(self) -> None:
        """What a forward takes, and how much of a predicted saving it really gains: the sparsest
        budget's."""
        sparsest = self.uniform(self.at_density(min(self.settings.densities)))
        measured = self.times({"plain": None, "sparse": sparsest})
        self.plain_ms = measured["plain"]
        predicted = self.dense_attention_ms - self.attention_ms(sparsest)
        gained = self.plain_ms - measured["sparse"]
        # A saving too small to be told from noise says nothing of its share.
        if abs(predicted) > 0.03 * self.plain_ms and gained > 0:
            self.saving = min(max(gained / predicted, 0.2), 2.0)
        self.progress("time of a forward", 1, 1)

    def _corrected(self) -> tuple[_Layers, list[float]]:
        """Solve for the wish, measure, and solve again for what was missed."""
        if self.wish.name == "target_speedup":
            return self._at_speedup(self.plain_ms / self.wish.value)
        if self.wish.name == "max_error":
            return self._within_error(self.wish.value / SAFETY)
        layers = self._solved(self.wish.value)
        return layers, self.errors(layers)

    def _at_speedup(self, wanted: float) -> tuple[_Layers, list[float]]:
        """The budget whose measured milliseconds come nearest to `wanted`."""
        allowed = self.dense_attention_ms - (self.plain_ms - wanted) / self.saving
        tried: list[tuple[float, _Layers]] = []
        for turn in range(_ROUNDS):
            try:
                layers = self.solve(allowed)
            except knapsack.UnreachableError as error:
                # Asked for once more than there is: the sparsest has to show what it can do.
                layers = self.solve(error.least * (1 + 1e-9))
            late = self.times({"tuned": layers})["tuned"] - wanted
            tried.append((abs(late), layers))
            self.progress("whole budgets", turn + 1, _ROUNDS)
            if -0.02 * wanted < late < 0.01 * wanted:
                break
            allowed -= late / self.saving
        missed, layers = min(tried, key=lambda pair: pair[0])
        if late > 0 and missed > 0.05 * wanted:
            best = self.plain_ms / (wanted + missed)
            raise ValueError(
                f"{self.wish} cannot be reached at the densities tried: the best is {best:.2f}x"
            )
        return layers, self.errors(layers)

    def _within_error(self, limit: float) -> tuple[_Layers, list[float]]:
        """The budget of least time whose measured error is within the limit."""
        kept: _Layers = self.uniform(DENSE)
        errors = [0.0] * len(self.calls)
        allowed = limit
        for turn in range(_ROUNDS):
            layers = self.solve(allowed)
            found = self.errors(layers)
            self.progress("whole budgets", turn + 1, _ROUNDS)
            if max(found) <= limit and self.attention_ms(layers) <= self.attention_ms(kept):
                kept, errors = layers, found
            # Errors of layers do not add up exactly: the sum is corrected by what was seen.
            ratio = max(found) / limit
            if 0.93 < ratio <= 1.0 or ratio == 0.0:
                break
            allowed /= max(ratio, 0.5) * 1.02
        return kept, errors

    def _solved(self, allowed: float) -> _Layers:
        try:
            return self.solve(allowed)
        except knapsack.UnreachableError as error:
            raise ValueError(
                f"{self.wish} cannot be reached at the densities tried: the least is "
                f"{error.least:.3g}"
            ) from error

    def _uniform_like(self, layers: _Layers) -> Choice:
        """One density for all, with the same predicted time (or area, if that was wished)."""
        if self.wish.name == "density":
            return self.at_density(self._density(layers))
        wanted = self.attention_ms(layers)
        low, high = 0.0, 0.999
        for _ in range(40):
            middle = (low + high) / 2
            if self.attention_ms(self.uniform(self.at_density(middle))) <= wanted:
                low = middle
            else:
                high = middle
        return self.at_density(round(low, 4))

    def _density(self, layers: _Layers) -> float:
        return sum(
            self.layer_area(layer) * statistics.fmean(c.density for c in layers[layer])
            for layer in self.layers
        )

    def _outcome(
        self,
        errors: list[float],
        ms: float,
        plain: float,
        layers: _Layers,
    ) -> Outcome:
        return Outcome(max(errors), ms, plain / ms, self._density(layers))

    def _frontier(self) -> Iterator[Point]:
        """Other budgets from the sparsest to dense, as predicted."""
        if self.wish.name == "max_error":
            sparsest = self.uniform(self.at_density(min(self.settings.densities)))
            most = self.predicted_error(sparsest)
            steps = [most * (i / _FRONTIER) ** 2 for i in range(_FRONTIER + 1)]
        elif self.wish.name == "density":
            least = min(self.settings.densities)
            steps = [least * (1 / least) ** (i / _FRONTIER) for i in range(1, _FRONTIER + 1)]
        else:
            cheapest = sum(
                min(self.layer_ms(layer, c) for c in self.options()) for layer in self.layers
            )
            dense = self.dense_attention_ms
            steps = [cheapest + (dense - cheapest) * i / _FRONTIER for i in range(1, _FRONTIER + 1)]
        for allowed in steps:
            layers = self.solve(allowed)
            yield Point(self.whole_ms(self.attention_ms(layers)), self.predicted_error(layers))

    def _with_thresholds(self, layers: _Layers) -> dict[str, tuple[Choice, ...]]:
        """Each sparse choice with the routing threshold that follows from its multiplier."""
        seen: dict[tuple[str, int], tuple[float, float]] = {}
        for phase in range(self.schedule.phases):
            call = self.calls[self.phase_of.index(phase)]

            def see(found: SeenCall, phase: int = phase) -> None:
                choice = layers[found.layer][phase]
                if choice.density < 1.0:
                    error = found.error(found.sparse(choice.plan(AttentionPlan())))
                    seen[found.layer, phase] = (error, float(found.out.float().square().mean()))

            watch(self.plain, call.args, call.kwargs, see)
        multiplier = self._multiplier(layers)

        def routed(layer: str, phase: int, choice: Choice) -> Choice:
            if choice.density >= 1.0:
                return choice
            error, square = seen[layer, phase]
            shape = next(shape for name, shape in self.sites if name == layer)
            slope = ms_per_exact_share(shape, choice.plan(AttentionPlan()), self.calibration)
            sensitivity = (self.curve_error(layer, phase, choice) / error) ** 2
            row = square * shape.head_dim
            found = routing_threshold(multiplier, slope, sensitivity, row, shape)
            return dataclasses.replace(choice, threshold=found)

        return {
            layer: tuple(routed(layer, phase, choice) for phase, choice in enumerate(choices))
            for layer, choices in layers.items()
        }

    def _multiplier(self, layers: _Layers) -> float:
        """Squared error that one more millisecond of a forward saves at the best budget of the
        same time."""
        options = self.options()
        groups = [
            [
                knapsack.Option(self.layer_ms(layer, c), self.curve_error(layer, phase, c) ** 2)
                for c in options
            ]
            for phase in range(self.schedule.phases)
            for layer in self.layers
        ]
        time = self.attention_ms(layers) * self.schedule.phases
        return knapsack.evaluate(groups, [0] * len(groups), time).multiplier


def _sites(model: nn.Module, call: ModelCall) -> list[tuple[str, AttentionShape]]:
    """Layer and shape of every attention call that could be sparse."""
    options = {"density": 0.5, "min_tokens": 1}
    found = explain(model, *call.args, options=options, **call.kwargs)
    sites = []
    for site in found.sites:
        if site.plan is not None:
            batch, heads, q_tokens, k_tokens, dim = (size or 0 for size in site.shape)
            shape = AttentionShape(
                batch,
                heads,
                site.kv_heads or heads,
                q_tokens,
                k_tokens,
                dim,
                site.dtype,
                sum(site.text),
            )
            sites.append((site.layer, shape))
    if not sites:
        raise ValueError("no attention of the model could be sparse; `explain` says why")
    return sites


def _device_of(call: ModelCall) -> torch.device:
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    return next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))


def _compiled(model: nn.Module, compiler: str) -> tuple[Any, Any]:
    """The model with every site under the binding's control, and as the compiler alone has it."""
    options: dict[str, Any] = {"density": 0.5, "min_tokens": 1}
    if compiler == "inductor":
        return (
            torch.compile(model, backend=svg_ear, options=options),
            torch.compile(model, backend="inductor"),
        )
    settings = Settings.parse(options)

    def rewritten(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        rewrite_graph(gm, settings)
        return gm.forward

    return torch.compile(model, backend=rewritten), torch.compile(model, backend="eager")


def _schedule(timesteps: Sequence[float], settings: TuningSettings) -> Schedule:
    """Cut the timesteps of the calls into phases of equal numbers of them."""
    ordered = sorted(set(timesteps), reverse=not settings.ascending)
    if len(ordered) < settings.phases:
        raise ValueError(
            f"{settings.phases} phases need calls at as many timesteps; there are {len(ordered)}"
        )
    cuts = [round(i * len(ordered) / settings.phases) for i in range(1, settings.phases)]
    starts = tuple((ordered[cut - 1] + ordered[cut]) / 2 for cut in cuts)
    return Schedule(settings.dense_steps, starts, settings.dense_from, settings.ascending)


def _flat(output: Any) -> Tensor:
    """All floating-point tensors of an output as one (elements,) float32."""
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.cat([leaf.float().flatten() for leaf in leaves])


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(error * error for error in errors))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _share(found: Tensor) -> None:
    """Give every rank the largest of what the ranks hold in each place."""
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def record_calls(
    model: nn.Module, run: Callable[[], object], *, keep: Callable[[int], bool] = lambda index: True
) -> list[ModelCall]:
    """The inputs of a model's forwards while something else runs it, e.g. a diffusers pipeline.

        calls = record_calls(pipe.transformer, lambda: pipe(prompt), keep=lambda i: i % 10 == 5)

    Args:
        model: its own `forward` is left alone.
        run: calls the model.
        keep: which forwards are kept, by their number.
    """
    calls: list[ModelCall] = []
    seen = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if keep(seen):
            copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            calls.append(ModelCall(*copied))
        seen += 1

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls
