"""Calibration of a device within a time: what teaches most is measured first.

The coefficients of a stage need six calls of a class (dtype, head dim). They are fitted to these
and to what else there was time for, and tested on calls that were not fitted. A quick calibration
measures two calls and scales the coefficients of a prior.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from svg_ear_compile.cost_model.calibration import VERSION, Calibration, Roofs, Sample
from svg_ear_compile.cost_model.device import Device, describe
from svg_ear_compile.cost_model.device_profile import not_calibrated
from svg_ear_compile.cost_model.fit import fit, scale
from svg_ear_compile.cost_model.hardware import hardware_of
from svg_ear_compile.cost_model.measure import DeviceUnderTest
from svg_ear_compile.kernels.plan import AttentionPlan

SECONDS, QUICK_SECONDS = 30.0, 8.0
"""Time that a calibration may take, and a quick one. Kernels that were never compiled on this
machine are compiled in this time."""

QUICK_UNCERTAINTY = 0.25
"""Of a quick calibration. The calls that were measured on the H200, predicted from the prior of any
other GPU scaled by two of them, take up to 10 % longer than predicted, from 16,384 tokens on, with
the default clusters and with the head dim of the two, 128. With head dim 64, of which a quick
calibration measures nothing, they take up to 40 % longer."""


_CALLS = 40
"""Sparse and dense calls in the measurement of one sample, about: to warm up, to keep a GPU busy,
to time, by each backend and under the profiler."""


@dataclass(frozen=True)
class Workload:
    """What is measured on one kind of device.

    Attributes:
        classes: dtype and head dim of the calls, in order of importance.
        tokens: a short, a middle, a long and a very long call.
        held_out: tokens of the calls that test the fit.
        heads, roof_side, copied: see `DeviceUnderTest`.
        dtypes: of the roofs, the most important first.
    """

    classes: tuple[tuple[str, int], ...]
    tokens: tuple[int, int, int, int]
    held_out: int
    heads: int
    roof_side: int
    copied: int
    dtypes: tuple[str, ...]


WORKLOADS = {
    "cuda": Workload(
        classes=(("bfloat16", 128), ("bfloat16", 64)),
        tokens=(4096, 16384, 40960, 98304),
        held_out=28672,
        heads=8,
        roof_side=8192,
        copied=1 << 30,
        dtypes=("bfloat16", "float16", "float32"),
    ),
    "cpu": Workload(
        classes=(("float32", 64), ("float32", 128)),
        tokens=(1024, 2560, 5120, 8192),
        held_out=3600,
        heads=2,
        roof_side=2048,
        copied=1 << 27,
        dtypes=("float32",),
    ),
}

_GAUSSIAN = AttentionPlan(density=0.1)
_CENTROID = AttentionPlan(density=0.2, compensation="centroid")
# Index of the length, plan, cluster size as a multiple of the default size. The first six determine
# every coefficient: fitted to them alone, a calibration of the H200 predicts its other calls within
# 10 % (tests/cost_model/test_fit.py). Calls of one length follow each other, because each length
# has its own tensors and its own dense attention.
_NEEDED = (
    (1, _GAUSSIAN, 1.0),
    (1, _GAUSSIAN, 0.4),
    (1, _GAUSSIAN, 2.0),
    (0, _GAUSSIAN, 0.4),
    (2, _CENTROID, 1.0),
    (2, _GAUSSIAN, 1.0),
)
# Without it, a fit to calls of 40,960 tokens has promised a third too much at 300,000. Of the first
# class it comes before all of the second: where kernels are compiled first, little time is left.
_VERY_LONG = (3, _GAUSSIAN, 1.0)
_MORE = (
    (2, _GAUSSIAN, 2.0),
    (2, _GAUSSIAN, 0.4),
    (1, _CENTROID, 1.0),
    (0, _GAUSSIAN, 1.0),
    (0, _CENTROID, 1.0),
    (0, _GAUSSIAN, 2.0),
)
_QUICK = ((1, _GAUSSIAN, 1.0), (2, _GAUSSIAN, 1.0))
# Calls that test the fit have another length, other densities and other cluster sizes.
_HELD_OUT = (
    (AttentionPlan(density=0.15), 1.0),
    (AttentionPlan(density=0.25, compensation="centroid"), 1.0),
    (AttentionPlan(density=0.15), 1.5),
    (AttentionPlan(density=0.15), 0.6),
)


@dataclass(frozen=True)
class Case:
    """A call to measure.

    Attributes:
        dtype, head_dim, tokens, plan: shape and plan of the call.
        fitted: see `Sample`.
        needed: whether its class cannot be fitted without it.
    """

    dtype: str
    head_dim: int
    tokens: int
    plan: AttentionPlan
    fitted: bool
    needed: bool

    @property
    def call_class(self) -> tuple[str, int]:
        """dtype and head dim."""
        return self.dtype, self.head_dim

    def __str__(self) -> str:
        return f"{self.dtype}, head dim {self.head_dim}, {self.tokens} tokens"


class Measurements(Protocol):
    """A device on which calls are measured; see `DeviceUnderTest`."""

    def compile(self, dtype: str, head_dim: int, plans: Iterable[AttentionPlan]) -> None: ...

    def roofs(self, dtypes: Iterable[str]) -> Roofs: ...

    def host_ms(self, dtype: str, head_dim: int) -> float: ...

    def sample(
        self, dtype: str, head_dim: int, tokens: int, plan: AttentionPlan, fitted: bool
    ) -> Sample: ...


def calibrate(
    device: torch.device | str,
    *,
    quick: bool = False,
    on_sample: Callable[[str, float], None] | None = None,
) -> Calibration:
    """Measure a device.

    Args:
        device: CUDA or CPU.
        quick: take `QUICK_SECONDS`, not `SECONDS`: scale the coefficients of the prior, or of the
            record of another device of this name.
        on_sample: gets the description of each measurement, and the fraction of the time that has
            passed.

    Raises:
        ValueError: there are no kernels for this kind of device.
        ImportError: scipy, part of the extra ``tune``, is missing; a quick calibration needs none.
    """
    if not quick:
        importlib.import_module("scipy.optimize")  # `fit` needs it: fail before time is spent
    device = torch.device(device)
    facts, workload = describe(device), WORKLOADS[device.type]
    measured = DeviceUnderTest(device, workload.heads, workload.roof_side, workload.copied)
    base = not_calibrated(facts, hardware_of(device))
    return within_time(measured, workload, base, facts, quick=quick, on_sample=on_sample)


def within_time(
    measured: Measurements,
    workload: Workload,
    base: Calibration,
    facts: Device,
    *,
    quick: bool = False,
    on_sample: Callable[[str, float], None] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """`calibrate` for given measurements, prior and clock.

    A measurement is begun only if it is expected to end in time. Those that the first class needs
    are made in any case; a quick calibration needs one.
    """
    watch = _Watch(QUICK_SECONDS if quick else SECONDS, now, on_sample)
    first = workload.classes[0]
    watch.say("kernels are compiled")
    cases = cases_of(workload, quick)
    measured.compile(*first, _forms(cases, first))
    watch.compilation = watch.passed
    watch.say("roofs")
    dtypes = workload.dtypes[:1] if quick else workload.dtypes
    roofs = measured.roofs(dtypes)
    host_ms = measured.host_ms(*first)
    begun, refused = {first}, set[tuple[str, int]]()
    missing = Counter(case.call_class for case in cases if case.needed)
    samples: list[Sample] = []
    for case in cases:
        if case.call_class in refused:
            continue
        if case.call_class not in begun:
            needed = [c for c in cases if c.needed and c.call_class == case.call_class]
            if not watch.has_time_for_all(needed, watch.compilation):
                refused.add(case.call_class)
                continue
            begun.add(case.call_class)
            watch.say(f"{case}: kernels are compiled")
            for form in _forms(cases, case.call_class):
                measured.compile(*case.call_class, [form])
                # The kernels of the first class may have been compiled long ago, these not.
                if not watch.has_time_for_all(needed):
                    refused.add(case.call_class)
                    break
            if case.call_class in refused:
                continue
        indispensable = case.needed and case.call_class == first
        if not (indispensable or watch.has_time_for(case.tokens)):
            continue
        watch.say(str(case))
        began = watch.passed
        sample = measured.sample(*case.call_class, case.tokens, case.plan, case.fitted)
        watch.note(sample, watch.passed - began)
        samples.append(sample)
        missing[case.call_class] -= case.needed
    stages = scale(base, [sample for sample in samples if sample.fitted], roofs)
    if quick:
        rates = {
            dtype: rate * roofs.flops[dtypes[0]] / base.roofs.flops[dtypes[0]]
            for dtype, rate in base.roofs.flops.items()
        }
        roofs = replace(roofs, flops=rates)
    else:
        complete = [s for s in samples if not missing[s.dtype, s.head_dim]]
        stages |= fit(complete, roofs, facts)
    return Calibration(
        VERSION, "calibrated", facts, roofs, host_ms, stages, watch.passed, tuple(samples),
        _least(QUICK_UNCERTAINTY, base.uncertainty) if quick else 0.0,
    )  # fmt: skip


def _least(ours: float, of_base: float | None) -> float:
    """The uncertainty of a scaled profile: measuring makes none less certain."""
    return ours if of_base is None else min(ours, of_base)


class _Watch:
    """The time of a calibration: what has passed, and what a measurement is expected to take."""

    def __init__(
        self,
        seconds: float,
        now: Callable[[], float],
        on_sample: Callable[[str, float], None] | None,
    ) -> None:
        self._seconds, self._now, self._on_sample = seconds, now, on_sample
        self._began = now()
        self.compilation = 0.0  # seconds for the kernels of a class
        # Seconds of the longest measurement, and milliseconds of its two calls, by tokens.
        self._longest: dict[int, tuple[float, float]] = {}

    @property
    def passed(self) -> float:
        """Seconds since the calibration began."""
        return self._now() - self._began

    def say(self, what: str) -> None:
        """Report what is done next."""
        if self._on_sample is not None:
            self._on_sample(what, min(self.passed / self._seconds, 1.0))

    def note(self, sample: Sample, seconds: float) -> None:
        """Remember how long the measurement of a sample took."""
        took = seconds, sample.dense_ms + sample.op_ms
        self._longest[sample.tokens] = max(took, self._longest.get(sample.tokens, (0.0, 0.0)))

    def has_time_for(self, tokens: int) -> bool:
        """Whether a call of so many tokens is expected to be measured in time."""
        return self.passed + self._expected(tokens) <= self._seconds

    def has_time_for_all(self, cases: Iterable[Case], compilation: float = 0.0) -> bool:
        """Whether these are expected to be measured in time, after seconds of compilation."""
        measuring = sum(self._expected(case.tokens) for case in cases)
        return self.passed + compilation + measuring <= self._seconds

    def _expected(self, tokens: int) -> float:
        """Seconds as of the longest measurement of the nearest length."""
        if not self._longest:
            return 0.0
        nearest = min(self._longest, key=lambda other: abs(other - tokens))
        seconds, calls_ms = self._longest[nearest]
        growth = max(1.0, tokens / nearest) ** 2 - 1.0
        return seconds + _CALLS * calls_ms * growth / 1e3


def cases_of(workload: Workload, quick: bool = False) -> list[Case]:
    """All calls of a calibration, those that teach most first.

    A quick one has a middle call, which the scaling needs, a long one, and one to test the scaling.
    """
    if quick:
        first = workload.classes[0]
        return [
            *_fitted(workload, *first, _QUICK[:1], True),
            *_fitted(workload, *first, _QUICK[1:], False),
            _held_out(workload, *first, *_HELD_OUT[0]),
        ]
    groups: list[list[Case]] = [[], [], []]
    for call_class in workload.classes:
        groups[0] += _fitted(workload, *call_class, _NEEDED, True)
        groups[0] += [_held_out(workload, *call_class, *each) for each in _HELD_OUT[:2]]
        when = 0 if call_class == workload.classes[0] else 1
        groups[when] += _fitted(workload, *call_class, [_VERY_LONG], False)
        groups[1] += _fitted(workload, *call_class, _MORE, False)
        groups[2] += [_held_out(workload, *call_class, *each) for each in _HELD_OUT[2:]]
    return [case for group in groups for case in group]


def _fitted(
    workload: Workload,
    dtype: str,
    head_dim: int,
    calls: Iterable[tuple[int, AttentionPlan, float]],
    needed: bool,
) -> list[Case]:
    found = []
    for at, plan, size in calls:
        tokens = workload.tokens[at]
        found.append(Case(dtype, head_dim, tokens, _sized(plan, tokens, size), True, needed))
    return found


def _held_out(
    workload: Workload, dtype: str, head_dim: int, plan: AttentionPlan, size: float
) -> Case:
    tokens = workload.held_out
    return Case(dtype, head_dim, tokens, _sized(plan, tokens, size), False, False)


def _sized(plan: AttentionPlan, tokens: int, size: float) -> AttentionPlan:
    """The plan with clusters `size` times as large as by default."""
    q_clusters, k_clusters = (
        max(1, round(count / size)) for count in plan.clusters(tokens, tokens)
    )
    return replace(plan, q_clusters=q_clusters, k_clusters=k_clusters)


def _forms(cases: Iterable[Case], call_class: tuple[str, int]) -> list[AttentionPlan]:
    """A plan of each compensation form that is measured in a class: they compile other kernels."""
    forms = {case.plan.compensation for case in cases if case.call_class == call_class}
    return [AttentionPlan(compensation=form) for form in sorted(forms)]
