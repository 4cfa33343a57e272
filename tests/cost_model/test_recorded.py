"""The recorded profile is the attention record's, and predicts what it was not fitted to."""

from __future__ import annotations

import json
import statistics

import pytest
from calibrations import h200

from benchmarks.attention.profile import HELD_OUT, RESULTS, UNCERTAINTY, calls_of, profile_of
from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.latency import Start, dense_ms, sparse_ms
from svg_ear_compile.cost_model.prior import RECORDED

RECORD = json.loads((RESULTS / "attention.json").read_text())
PROFILE = json_record.read(Calibration, RECORDED / "nvidia-h200.json")


def test_the_recorded_profile_is_made_from_the_attention_record() -> None:
    made = profile_of(RECORD, h200())
    assert made.samples == PROFILE.samples
    assert made.roofs == PROFILE.roofs
    for group, stages in made.stages.items():
        for stage, wanted in stages.items():
            found = PROFILE.stages[group][stage]
            for name in ("flops", "bytes", "launches"):
                assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-6)


def test_no_cold_call_is_promised_more_than_the_uncertainty_allows() -> None:
    """The reason for a small uncertainty where the chip is the one that was measured."""
    compared = 0
    for row in calls_of(RECORD):
        promised = sparse_ms(row.shape, row.plan, PROFILE, "cold").total
        had = row.dense_ms / row.call_ms["cold"]
        assert dense_ms(row.shape, PROFILE) / promised < (1 + UNCERTAINTY) * had
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("start", ["cold", "warm", "reused"])
def test_calls_that_were_not_fitted_are_predicted(start: Start) -> None:
    errors = []
    for row in calls_of(RECORD):
        if start != "warm" or not row.by_default or row.name in HELD_OUT:
            predicted = sparse_ms(row.shape, row.plan, PROFILE, start).total
            errors.append(abs(predicted / row.call_ms[start] - 1.0))
            assert dense_ms(row.shape, PROFILE) == pytest.approx(row.dense_ms, rel=0.1)
    assert len(errors) > 24
    assert statistics.median(errors) < 0.1
    assert max(errors) < 0.25
