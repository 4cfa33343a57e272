"""A calibration on a busy machine is told by the calls that do not fit the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrations import h200

from svg_ear_compile import calibrating
from svg_ear_compile.cost_model import calibration as keeping
from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.disturbance import disturbance_of
from svg_ear_compile.cost_model.fit import compare, fit
from svg_ear_compile.policy import calibration_of, profile_of


@pytest.fixture(scope="module")
def idle() -> Calibration:
    """What was measured on an idle H200."""
    return h200()


def slowed(idle: Calibration, factors: dict[int, float]) -> Calibration:
    """The same measurements with some calls slower, and the fit to all of them."""
    samples = tuple(
        replace(
            sample,
            op_ms=sample.op_ms * factors.get(at, 1.0),
            stages_ms={s: ms * factors.get(at, 1.0) for s, ms in sample.stages_ms.items()},
        )
        for at, sample in enumerate(idle.samples)
    )
    return replace(idle, samples=samples, stages=fit(samples, idle.roofs, idle.device))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration_of.cache_clear()
    yield
    calibration_of.cache_clear()


def test_an_idle_device_shows_no_disturbance(idle: Calibration) -> None:
    assert disturbance_of(idle) is None
    assert disturbance_of(slowed(idle, dict.fromkeys(range(len(idle.samples)), 1.5))) is None


@pytest.mark.parametrize("factors", [{3: 60.0}, {0: 4.0, 7: 5.0, 20: 60.0}])
def test_calls_that_took_far_too_long_are_counted(
    factors: dict[int, float], idle: Calibration
) -> None:
    busy = slowed(idle, factors)
    found = disturbance_of(busy)
    assert found is not None
    assert (found.calls, found.measured) == (len(factors), len(idle.samples))
    worst = max(factors, key=lambda at: factors[at])
    assert found.worst[0] == busy.samples[worst].op_ms
    assert f"{len(factors)} of {len(idle.samples)} measured calls do not fit" in str(found)
    # The outliers do not spoil the fit for the others.
    others = [c for at, c in enumerate(compare(busy, busy.samples)) if at not in factors]
    assert all(0.5 < each.op_ms / each.sample.op_ms < 2 for each in others)


@pytest.mark.usefixtures("cache")
def test_a_busy_calibration_is_reported_and_remembered(
    idle: Calibration, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = describe("cpu")
    one_stage = {"sparse": keeping.Efficiency(1, 1, 1), "dense": keeping.Efficiency(1, 1, 1)}
    samples = [replace(s, dtype="float32", stages_ms={"sparse": s.op_ms}) for s in idle.samples]
    quiet = replace(
        idle, device=here, origin="calibrated", stages={"float32/128": one_stage}, samples=()
    )
    fitted = tuple(
        replace(c.sample, op_ms=c.op_ms, dense_ms=c.dense_ms) for c in compare(quiet, samples)
    )
    busy = replace(fitted[0], op_ms=100 * fitted[0].op_ms)
    for samples_now, calls in ((fitted, 0), ((busy, *fitted[1:]), 1)):
        found = replace(quiet, samples=samples_now)
        monkeypatch.setattr(calibrating.measuring, "calibrate", lambda *a, f=found, **k: f)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "svg_ear_compile"):
            calibrating.calibrate("cpu")
        profile = profile_of(torch.device("cpu"))
        assert profile is not None
        if calls == 0:
            assert (caplog.text, profile.improved_by) == ("", None)
            assert profile.basis == "calibrated on this machine"
        else:
            assert "1 of 32 measured calls do not fit the others" in caplog.text
            assert "when nothing else runs" in caplog.text
            assert profile.improved_by == "svg-ear calibrate --device cpu"
            assert profile.basis == "calibrated on this machine while it was busy"
