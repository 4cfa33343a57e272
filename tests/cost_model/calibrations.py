"""Calibrations that tests predict with, and samples of devices that keep to a calibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.calibration import VERSION, Calibration, Efficiency, Roofs, Sample
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.latency import dense_ms, sparse_ms
from svg_ear_compile.cost_model.stages import STAGES, AttentionShape
from svg_ear_compile.kernels.plan import AttentionPlan

_H200 = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "calibration.json"
DEVICE = Device("cuda", "Test GPU", "2.13.0", "3.9.0", "0a1b2c3d", "sm_90")


def h200() -> Calibration:
    """A calibration of an idle H200."""
    return json_record.read(Calibration, _H200)


def even(kind: str = "cuda", slower: float = 2.0, host_ms: float = 0.0) -> Calibration:
    """A calibration of dense attention at the roofs, and sparse stages `slower` times as long."""
    stages = {stage: Efficiency(slower, slower, 1.0) for stage in STAGES[kind]}
    return Calibration(
        VERSION,
        "calibrated",
        dataclasses.replace(DEVICE, kind=kind, name="Test"),
        Roofs({"bfloat16": 500.0, "float32": 50.0}, 2000.0, 0.005),
        host_ms,
        {"bfloat16/128": {**stages, "dense": Efficiency(1.0, 1.0, 1.0)}},
    )


def sample_of(
    truth: Calibration, shape: AttentionShape, plan: AttentionPlan, fitted: bool = True
) -> Sample:
    """The sample that an idle device of that profile gives."""
    times, tokens = sparse_ms(shape, plan, truth), shape.q_tokens
    return Sample(
        tokens, shape.heads, shape.head_dim, shape.dtype, plan.density, plan.compensation,
        *plan.clusters(tokens, tokens), dense_ms(shape, truth), times.total, times.stages, fitted,
    )  # fmt: skip
