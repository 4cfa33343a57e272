"""Coefficients of a device profile from measured calls: fitted, or those of a prior scaled."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from svg_ear_compile.cost_model.calibration import (
    Calibration,
    Efficiency,
    Roofs,
    Sample,
    ideal_ms,
)
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.latency import dense_ms, sparse_ms
from svg_ear_compile.cost_model.stages import (
    STAGES,
    Amount,
    AttentionShape,
    dense_amount,
    sparse_amounts,
)
from svg_ear_compile.kernels.plan import AttentionPlan


def fit(
    samples: Sequence[Sample], roofs: Roofs, device: Device
) -> dict[str, dict[str, Efficiency]]:
    """Coefficients of every stage and of dense attention, by class of call.

    Non-negative least squares on relative errors. The error of a stage is taken relative to the
    time of the stage plus a small part of the time of the call, so that stages of very short times
    do not dominate the fit.

    Args:
        samples: samples with `Sample.fitted`; others are left out.
        roofs: roofs of the same device.
        device: the device.

    Returns:
        Class to stage to coefficients; classes without samples are missing.
    """
    classes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.fitted:
            classes.setdefault(f"{sample.dtype}/{sample.head_dim}", []).append(sample)
    return {
        name: {
            stage: _fit_stage(stage, found, roofs, device)
            for stage in (*STAGES[device.kind], "dense")
        }
        for name, found in classes.items()
    }


def _fit_stage(stage: str, samples: Sequence[Sample], roofs: Roofs, device: Device) -> Efficiency:
    import numpy as np
    from scipy.optimize import nnls

    rows, wanted = [], []
    for sample in samples:
        amount, measured = _stage_of(sample, stage, device)
        against = measured if stage == "dense" else measured + 0.02 * sample.op_ms
        if measured == 0.0:
            continue  # this sample did not run the stage
        rows.append([x / against for x in ideal_ms(amount, roofs, sample.dtype)])
        wanted.append(measured / against)
    if not rows:
        return Efficiency(0.0, 0.0, 0.0)
    found, _ = nnls(np.array(rows), np.array(wanted))
    return Efficiency(*map(float, found))


def _stage_of(sample: Sample, stage: str, device: Device) -> tuple[Amount, float]:
    """Work and measured milliseconds of a stage of a sample."""
    shape = shape_of(sample)
    if stage == "dense":
        return dense_amount(shape), sample.dense_ms
    return sparse_amounts(shape, plan_of(sample), device)[stage], sample.stages_ms[stage]


def scale(
    base: Calibration, samples: Sequence[Sample], roofs: Roofs
) -> dict[str, dict[str, Efficiency]]:
    """Coefficients of a profile, each stage's in the proportion in which it was measured.

    A class without samples is scaled like those that have some.

    Args:
        base: the profile to scale.
        samples: at least one measured call; all of them count.
        roofs: measured roofs, to which the result refers.
    """
    factors: dict[str, dict[str, list[float]]] = {name: {} for name in base.stages}
    everywhere: dict[str, list[float]] = {}
    for sample in samples:
        name = base.nearest_class(sample.dtype, sample.head_dim)
        for stage in (*STAGES[base.device.kind], "dense"):
            amount, measured = _stage_of(sample, stage, base.device)
            expected = base.stage_ms(stage, amount, sample.dtype, sample.head_dim)
            if measured and expected:
                factors[name].setdefault(stage, []).append(measured / expected)
                everywhere.setdefault(stage, []).append(measured / expected)
    common = set(roofs.flops) & set(base.roofs.flops)
    flops = statistics.median(roofs.flops[dtype] / base.roofs.flops[dtype] for dtype in common)
    moved = roofs.bandwidth / base.roofs.bandwidth
    launched = base.roofs.launch_ms / roofs.launch_ms
    scaled: dict[str, dict[str, Efficiency]] = {}
    for name, stages in base.stages.items():
        scaled[name] = {}
        for stage, one in stages.items():
            found = factors[name].get(stage) or everywhere.get(stage) or [1.0]
            times = statistics.median(found)
            scaled[name][stage] = Efficiency(
                one.flops * times * flops,
                one.bytes * times * moved,
                one.launches * times * launched,
            )
    return scaled


def shape_of(sample: Sample) -> AttentionShape:
    """The shape that a sample was measured at."""
    return AttentionShape(
        sample.batch,
        sample.heads,
        sample.heads,
        sample.tokens,
        sample.tokens,
        sample.head_dim,
        sample.dtype,
        sample.text,
    )


def plan_of(sample: Sample) -> AttentionPlan:
    """The plan that a sample was measured with."""
    return AttentionPlan(
        density=sample.density,
        compensation=sample.compensation,
        q_clusters=sample.q_clusters,
        k_clusters=sample.k_clusters,
    )


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured milliseconds of one sample: the sparse call and dense attention."""

    sample: Sample
    op_ms: float
    dense_ms: float

    @property
    def op_error(self) -> float:
        """Relative error of the sparse call's prediction."""
        return self.op_ms / self.sample.op_ms - 1


def compare(calibration: Calibration, samples: Iterable[Sample]) -> list[Comparison]:
    """Predictions for samples that were measured on the device of the calibration."""
    return [
        Comparison(
            sample,
            sparse_ms(shape_of(sample), plan_of(sample), calibration).total,
            dense_ms(shape_of(sample), calibration),
        )
        for sample in samples
    ]
