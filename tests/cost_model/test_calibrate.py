"""Calibrating a device: within its time, on simulated devices, on this CPU and on a GPU."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from calibrations import DEVICE, h200, sample_of
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.priors import prior_of
from svg_ear_compile.cost_model import calibrate as measuring
from svg_ear_compile.cost_model import calibration as keeping
from svg_ear_compile.cost_model import device_profile, measure
from svg_ear_compile.cost_model.calibrate import (
    QUICK_SECONDS,
    QUICK_UNCERTAINTY,
    SECONDS,
    WORKLOADS,
    Workload,
    calibrate,
    within_time,
)
from svg_ear_compile.cost_model.calibration import Calibration, Roofs, Sample
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.fit import compare, plan_of, shape_of
from svg_ear_compile.cost_model.measure import by_stage
from svg_ear_compile.cost_model.stages import STAGES, AttentionShape
from svg_ear_compile.cost_model.timing import patient
from svg_ear_compile.kernels.plan import AttentionPlan

BASE = dataclasses.replace(prior_of("A100 80 GB"), device=DEVICE)
TRUTH = dataclasses.replace(h200(), device=DEVICE)
FIRST = WORKLOADS["cuda"].classes[0]


class Simulated:
    """A device that takes the times of `TRUTH`, and a clock of its own.

    Args:
        compilation: seconds to compile the kernels of one form.
        compiled: head dims whose kernels are compiled already.
        overhead: seconds of a measurement whose calls take no time.
        slower: times as long as `TRUTH` that all calls take.
        busy_after: seconds after which all other work takes ten times as long.
    """

    def __init__(
        self,
        compilation: float = 1.0,
        overhead: float = 0.8,
        slower: float = 1.0,
        busy_after: float = 1e9,
        compiled: tuple[int, ...] = (),
    ) -> None:
        self.clock = 0.0
        self._compiled = compiled
        self._compilation, self._overhead, self._slower = compilation, overhead, slower
        self._busy_after = busy_after
        self._length = 0

    def run(self, quick: bool = False) -> Calibration:
        return within_time(
            self, WORKLOADS["cuda"], BASE, DEVICE, quick=quick, now=lambda: self.clock
        )

    def _spend(self, seconds: float) -> None:
        self.clock += seconds * (10.0 if self.clock > self._busy_after else 1.0)

    def compile(self, dtype: str, head_dim: int, plans: Iterable[AttentionPlan]) -> None:
        if head_dim not in self._compiled:
            self._spend(self._compilation * len(list(plans)))

    def roofs(self, dtypes: Iterable[str]) -> Roofs:
        rates = {name: TRUTH.roofs.flops[name] for name in dtypes}
        self._spend(0.3 * len(rates))
        return dataclasses.replace(TRUTH.roofs, flops=rates)

    def host_ms(self, dtype: str, head_dim: int) -> float:
        self._spend(0.2)
        return TRUTH.host_ms

    def sample(
        self, dtype: str, head_dim: int, tokens: int, plan: AttentionPlan, fitted: bool
    ) -> Sample:
        shape = AttentionShape(1, 8, 8, tokens, tokens, head_dim, dtype)
        found = sample_of(TRUTH, shape, plan, fitted)
        found = dataclasses.replace(
            found,
            dense_ms=found.dense_ms * self._slower,
            op_ms=found.op_ms * self._slower,
            stages_ms={name: ms * self._slower for name, ms in found.stages_ms.items()},
        )
        self._spend(self._overhead + 20 * found.op_ms / 1e3)
        if tokens != self._length:
            self._spend(self._overhead + 20 * found.dense_ms / 1e3)
        self._length = tokens
        return found


def is_exact(found: Calibration, head_dim: int) -> bool:
    """Whether the device is predicted as it is, in a class."""
    shape = AttentionShape(1, 24, 24, 70_000, 70_000, head_dim, "bfloat16")
    one = sample_of(TRUTH, shape, AttentionPlan(density=0.15))
    (compared,) = compare(found, [one])
    return abs(compared.op_error) < 0.02 and compared.dense_ms == pytest.approx(one.dense_ms)


def test_an_idle_device_is_measured_whole() -> None:
    found = Simulated().run()
    assert found.seconds <= SECONDS
    assert found.origin == "calibrated"
    assert found.uncertainty == 0.0
    assert {sample.head_dim for sample in found.samples} == {128, 64}
    assert sum(not sample.fitted for sample in found.samples) >= 4
    assert is_exact(found, 128)
    assert is_exact(found, 64)
    keeping.check(found)


def test_a_slow_compiler_leaves_the_second_class_out_and_scales_its_prior() -> None:
    found = Simulated(compilation=9.0).run()
    assert found.seconds <= SECONDS
    assert {sample.head_dim for sample in found.samples} == {128}
    assert is_exact(found, 128)
    (guess,) = compare(
        found, [s for s in TRUTH.samples if s.head_dim == 64 and s.tokens == 28672][:1]
    )
    assert abs(guess.op_error) < 0.3
    assert abs(guess.dense_ms / guess.sample.dense_ms - 1) < 0.3


def test_a_second_class_that_alone_has_to_be_compiled_is_left_in_time() -> None:
    found = Simulated(compilation=9.0, compiled=(128,)).run()
    assert found.seconds <= SECONDS + 9.0  # one form at most
    assert {sample.head_dim for sample in found.samples} == {128}
    assert is_exact(found, 128)


def test_what_the_fit_needs_is_measured_however_long_it_takes() -> None:
    for device in (Simulated(compilation=40.0), Simulated(slower=100.0), Simulated(busy_after=3.0)):
        found = device.run()
        assert found.seconds > SECONDS
        assert len(found.samples) == 6
        assert all(sample.fitted for sample in found.samples)


def test_a_class_that_was_begun_and_not_ended_is_scaled() -> None:
    whole = Simulated().run()
    device = Simulated(busy_after=19.0)
    found = device.run()
    counts = [sum(s.head_dim == 64 and s.fitted for s in each.samples) for each in (whole, found)]
    assert 0 < counts[1] < 6 <= counts[0]
    assert is_exact(found, 128)
    assert not is_exact(found, 64)
    assert found.stages["bfloat16/64"].keys() == whole.stages["bfloat16/64"].keys()


def test_a_quick_calibration_scales_the_prior() -> None:
    found = Simulated().run(quick=True)
    assert found.seconds <= QUICK_SECONDS
    assert [sample.tokens for sample in found.samples] == [16384, 40960, 28672]
    assert {sample.compensation for sample in found.samples} == {"gaussian"}
    assert found.uncertainty == QUICK_UNCERTAINTY
    assert found.basis == "calibrated on this machine, uncertain by 25%"
    assert found.stages.keys() == BASE.stages.keys()
    # The rates of the other dtypes keep their proportion.
    assert found.roofs.flops["bfloat16"] == TRUTH.roofs.flops["bfloat16"]
    assert found.roofs.flops["float32"] / BASE.roofs.flops["float32"] == pytest.approx(
        TRUTH.roofs.flops["bfloat16"] / BASE.roofs.flops["bfloat16"]
    )
    keeping.check(found)


@pytest.mark.parametrize(
    ("uncertainty", "then"), [(None, QUICK_UNCERTAINTY), (1.0, QUICK_UNCERTAINTY), (0.0, 0.0)]
)
def test_a_quick_calibration_makes_no_profile_less_certain(
    uncertainty: float | None, then: float
) -> None:
    base = dataclasses.replace(BASE, uncertainty=uncertainty)
    found = within_time(Simulated(), WORKLOADS["cuda"], base, DEVICE, quick=True, now=lambda: 0.0)
    assert found.uncertainty == then


@given(st.booleans(), st.floats(0.0, 30.0), st.floats(0.0, 3.0), st.floats(0.1, 50.0))
def test_no_measurement_is_begun_that_does_not_end_in_time(
    quick: bool, compilation: float, overhead: float, slower: float
) -> None:
    found = Simulated(compilation, overhead, slower).run(quick)
    needed = 1 if quick else 6
    assert len(found.samples) >= needed
    assert found.seconds <= (QUICK_SECONDS if quick else SECONDS) or len(found.samples) == needed


def test_a_long_call_is_repeated_less_often_and_twice_at_least() -> None:
    assert patient(5, 0.01) == 5
    assert patient(5, 0.5) == 3
    assert patient(40, 60.0) == 2


@pytest.mark.parametrize("quick", [False, True])
def test_this_cpu_is_measured_and_predicted(
    quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = Workload((("float32", 32),), (64, 130, 200, 270), 100, 1, 256, 1 << 22, ("float32",))
    monkeypatch.setitem(measuring.WORKLOADS, "cpu", small)
    monkeypatch.setattr(measuring, "SECONDS", 1.0)
    monkeypatch.setattr(measuring, "QUICK_SECONDS", 0.5)
    heard: list[str] = []
    found = calibrate("cpu", quick=quick, on_sample=lambda what, share: heard.append(what))
    assert found.device == describe(torch.device("cpu"))
    assert found.origin == "calibrated"
    assert found.roofs.flops["float32"] > 0
    assert heard[:2] == ["kernels are compiled", "roofs"]
    assert len(found.samples) >= (1 if quick else 6)
    for sample in found.samples:
        assert tuple(sample.stages_ms) == STAGES["cpu"]
        assert sample.stages_ms["sparse"] > 0
    # Other work on the machine moves times by factors; an order of magnitude is a broken formula.
    ratios = [each.op_ms / each.sample.op_ms for each in compare(found, found.samples)]
    assert 0.1 < statistics.median(ratios) < 10
    keeping.save(found)
    assert device_profile.load(found.device) == found


def test_renamed_kernels_are_noticed() -> None:
    spent = dict.fromkeys(measure.STAGE_OF_KERNEL, 1.0) | {"sort": 2.0}
    found = by_stage(spent, measure.STAGE_OF_KERNEL)
    assert found["cluster"] == 2.0
    assert sum(found.values()) == pytest.approx(sum(spent.values()))
    with pytest.raises(RuntimeError, match="no kernel of the stages score"):
        by_stage({k: ms for k, ms in spent.items() if k != "score_kernel"} | {"new": 1.0},
                 measure.STAGE_OF_KERNEL)  # fmt: skip


def test_every_kernel_with_a_stage_exists() -> None:
    gpu = Path(measure.__file__).parents[1] / "kernels" / "gpu"
    source = "".join(path.read_text() for path in gpu.glob("*.py"))
    assert all(f"def {kernel}(" in source for kernel in measure.STAGE_OF_KERNEL)


def test_a_sample_says_what_was_measured() -> None:
    q, k, v = torch.randn(3, 2, 3, 207, 32)
    sample = measure.measure(q, k, v, AttentionPlan(density=0.3), 1.5, text=7)
    shape = shape_of(sample)
    assert shape == AttentionShape(2, 3, 3, 207, 207, 32, "float32", 7)
    assert plan_of(sample).clusters(200, 200) == AttentionPlan().clusters(200, 200)
    assert sample.dense_ms == 1.5
    assert sample.op_ms > 0


def test_there_is_no_calibration_for_other_devices() -> None:
    with pytest.raises(ValueError, match="'meta'"):
        calibrate("meta")


@pytest.mark.gpu
def test_a_gpu_is_calibrated_within_half_a_minute_and_quickly_within_eight_seconds() -> None:
    """The quick one comes second: kernels that were never compiled here take longer than it."""
    for quick, seconds, median, worst in ((False, 30, 0.1, 0.25), (True, 8, 0.25, 0.25)):
        found = calibrate("cuda", quick=quick)
        assert found.seconds <= seconds
        tested = [c for c in compare(found, found.samples) if not c.sample.fitted]
        errors = sorted(abs(c.op_error) for c in tested)
        assert errors[len(errors) // 2] < median
        assert errors[-1] < worst
