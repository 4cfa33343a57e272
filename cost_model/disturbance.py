"""Signs in a calibration that other work ran on the device while it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.fit import compare

MOST_APART = 2.0
"""Largest ratio of a measured time and the fitted one on an idle device. On the H200 the largest is
1.22; a machine that is busy for a part of the time moves single measurements by factors."""


@dataclass(frozen=True)
class Disturbance:
    """Measured calls that do not fit the others.

    Attributes:
        calls: number of these calls.
        measured: number of all calls.
        worst: (measured, fitted) milliseconds of the call that is furthest off.
    """

    calls: int
    measured: int
    worst: tuple[float, float]

    def __str__(self) -> str:
        measured, fitted = self.worst
        return (
            f"{self.calls} of {self.measured} measured calls do not fit the others (worst: "
            f"{measured:,.3g} ms, where the others let expect {fitted:,.3g})"
        )


def disturbance_of(calibration: Calibration) -> Disturbance | None:
    """The measured calls that are off by more than `MOST_APART` times; None if there are none.

    The fit is of relative errors: a few calls that took far too long hardly move it.
    """
    off = []
    for each in compare(calibration, calibration.samples):
        pairs = ((each.sample.op_ms, each.op_ms), (each.sample.dense_ms, each.dense_ms))
        ratio, worst = max((_ratio(*pair), pair) for pair in pairs)
        if ratio > MOST_APART:
            off.append((ratio, worst))
    if not off:
        return None
    return Disturbance(len(off), len(calibration.samples), max(off)[1])


def _ratio(measured: float, fitted: float) -> float:
    least, most = sorted((measured, fitted))
    return most / least if least > 0 else float("inf")
