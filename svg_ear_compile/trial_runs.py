"""Trial runs of a model under different budgets: error against dense outputs, milliseconds."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from svg_ear_compile.backend import compile_graph
from svg_ear_compile.capture import CapturedCall, ModelCall, capture_attention
from svg_ear_compile.cost_model.allocation import Allocation
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.session import bind
from svg_ear_compile.settings import Settings

REPEATS = 5  # of a timing, fewer where forwards are slow
PATIENCE_S = 60.0  # for one timing

# Every call that could be sparse is put under the session's control, however short.
_OPTIONS: dict[str, Any] = {"density": 0.5, "min_tokens": 1}


class TrialRuns:
    """A compiled and bound model, its calls, and their dense outputs.

    Args:
        model: the model, not compiled.
        calls: inputs of forwards.
        compiler: ``"inductor"`` or ``"eager"``.
        timestep, ascending: see `bind`.

    Attributes:
        references: dense output of each call.
        compile_seconds: seconds of the first forward, which compiles the model.
        variation: largest relative difference between the times of one setting in `times`.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[ModelCall],
        compiler: Literal["inductor", "eager"],
        timestep: str | None,
        ascending: bool,
    ) -> None:
        self._model = model
        self.calls = list(calls)
        self.references: list[Tensor] = []
        self.compile_seconds, self.variation = 0.0, 0.0
        self._compiled, self._plain = _compiled(model, compiler)
        self._session = bind(self._compiled, timestep=timestep, ascending=ascending)
        self.timesteps = [self._session.timestep_of(call.args, call.kwargs) for call in calls]
        leaves = tree_leaves((calls[0].args, dict(calls[0].kwargs)))
        self.device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))

    def close(self) -> None:
        """Release the model, which is then as it was before."""
        self._session.close()

    def measure_references(self, dense: Budget, on_call: Callable[[int], None]) -> float:
        """Store the dense outputs of all calls; returns the seconds of a forward once compiled."""
        self._session.use(dense)
        began = time.perf_counter()
        self._output(0)
        self.compile_seconds = time.perf_counter() - began
        seconds = []
        for call in range(len(self.calls)):
            began = time.perf_counter()
            self.references.append(self._output(call))
            seconds.append(time.perf_counter() - began)
            on_call(call)
        return statistics.median(seconds)

    def error(self, budget: Budget, call: int) -> float:
        """Relative RMS error of the model's output in one call under a budget, with cold clusters.

        Raises:
            ValueError: the error is not finite.
        """
        self._session.use(budget)
        reference = self.references[call]
        found = float((self._output(call) - reference).norm() / reference.norm())
        if not math.isfinite(found):
            raise ValueError(f"the output of call {call} is not finite, or zero where it is dense")
        return found

    def errors(self, budget: Budget) -> list[float]:
        """`error` of every call."""
        return [self.error(budget, call) for call in range(len(self.calls))]

    def times(
        self, candidates: Mapping[str, Budget | None], first: Sequence[int]
    ) -> dict[str, float]:
        """Milliseconds of one warm forward under each budget, the mean over phases.

        The candidates are timed in turns, so that other work on the machine slows all alike.

        Args:
            candidates: name to budget; None for the model compiled without sparse attention.
            first: for each phase the index of one of its calls.

        Returns:
            Name to milliseconds.
        """
        samples: dict[tuple[str, int], list[float]] = {}
        began = time.perf_counter()
        for turn in range(REPEATS):
            if turn > 1 and time.perf_counter() - began > PATIENCE_S:
                break
            for name, budget in candidates.items():
                for phase, call in enumerate(first):
                    found = self._timed(budget, phase, self.calls[call])
                    # The first turn compiles, on a GPU also kernels for other shapes.
                    if turn:
                        samples.setdefault((name, phase), []).append(found)
        # As `Clock.ms`: on a CPU other processes only ever add time.
        pick = statistics.median if self.device.type == "cuda" else min
        spreads = [max(found) / min(found) - 1 for found in samples.values()]
        self.variation = max([self.variation, *spreads])
        return {
            name: statistics.fmean(pick(samples[name, phase]) for phase in range(len(first)))
            for name in candidates
        }

    @staticmethod
    def times_seconds(candidates: int, phases: int, each: float) -> float:
        """Seconds that `times` takes if a forward takes `each` seconds."""
        turn = 3 * candidates * phases * each
        turns = 2
        while turns < REPEATS and turns * turn <= PATIENCE_S:
            turns += 1
        return turns * turn

    def seconds(self, budget: Budget, call: int) -> float:
        """Seconds of one forward under a budget, with cold clusters, once kernels are compiled."""
        self.error(budget, call)
        began = time.perf_counter()
        self.error(budget, call)
        return time.perf_counter() - began

    def attention_errors(
        self, allocation: Allocation, first: Sequence[int]
    ) -> dict[tuple[str, int], tuple[float, float]]:
        """Error of the attention output of every sparse layer in every phase.

        Args:
            allocation: layer path to one choice for each phase.
            first: for each phase the index of one of its calls.

        Returns:
            (layer, phase) to relative error and mean squared row norm of the attention output.
        """
        found: dict[tuple[str, int], tuple[float, float]] = {}
        for phase, index in enumerate(first):

            def see(seen: CapturedCall, phase: int = phase) -> None:
                choice = allocation[seen.layer][phase]
                if choice.density < 1.0:
                    error = seen.error(seen.sparse(choice.plan(AttentionPlan())))
                    square = float(seen.out.float().square().sum(-1).mean())
                    found[seen.layer, phase] = (error, square)

            call = self.calls[index]
            capture_attention(self._model, call.args, call.kwargs, see)
        return found

    def _timed(self, budget: Budget | None, phase: int, call: ModelCall) -> float:
        """Milliseconds of one forward of a phase.

        Runs three forwards: one with cold clusters, one that recomputes clusters, one that reuses
        them. Returns the mean of the last two, see `latency.REUSED_FRACTION`.
        """
        model = self._plain
        if budget is not None:
            model = self._compiled
            # Later timesteps may belong to the next phase: all phases get the same choices.
            layers = {layer: (c[phase],) * len(c) for layer, c in budget.layers.items()}
            self._session.use(dataclasses.replace(budget, layers=layers))
        found = []
        for turn in range(3):
            args, kwargs = self._session.later(call.args, call.kwargs, 0.01 * turn)
            self._synchronize()
            began = time.perf_counter()
            model(*args, **kwargs)
            self._synchronize()
            found.append(1e3 * (time.perf_counter() - began))
        return statistics.fmean(found[1:])

    def _output(self, call: int) -> Tensor:
        """(elements,) float32, all floating-point tensors of the output of a call, concatenated."""
        self._session.reset()
        output = self._compiled(*self.calls[call].args, **self.calls[call].kwargs)
        leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
        return torch.cat([leaf.float().flatten() for leaf in leaves])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _compiled(model: nn.Module, compiler: str) -> tuple[Any, Any]:
    """The model compiled with every site under the session's control, and without any site."""
    settings = Settings.parse(_OPTIONS)
    if compiler == "inductor":
        return (
            torch.compile(model, backend=functools.partial(compile_graph, settings=settings)),
            torch.compile(model, backend="inductor"),
        )

    def rewritten(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        rewrite_graph(gm, settings)
        return gm.forward

    return torch.compile(model, backend=rewritten), torch.compile(model, backend="eager")
