"""What a device was measured to do: roofs, and how far each stage stays below them.

Kept as versioned JSON: measured on this machine (the user's cache folder), recorded for a known GPU
(`recorded/`, part of the package), or a conservative guess that says so. `calibrate` measures.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.stages import ELEMENT_SIZES, Amount

log = logging.getLogger(__name__)

VERSION = 6
RECORDED = Path(__file__).with_name("recorded")
Origin = Literal["measured", "recorded", "guess"]


@dataclass(frozen=True)
class Roofs:
    """What the device does at best.

    Attributes:
        flops: TFLOP/s of a large matrix product by dtype.
        bandwidth: GB/s of a large copy, reads and writes counted.
        launch_ms: milliseconds from one small operator to the next.
    """

    flops: dict[str, float]
    bandwidth: float
    launch_ms: float


@dataclass(frozen=True)
class Efficiency:
    """How many times what the roofs allow a stage takes: for operations, bytes and launches."""

    flops: float
    bytes: float
    launches: float


@dataclass(frozen=True)
class Sample:
    """One measured call, for the plot of predicted against measured time.

    Attributes:
        batch, heads, tokens, text, head_dim, dtype: of the call, as in `AttentionShape`; as many
            heads of keys as of queries.
        density, compensation, q_clusters, k_clusters: of its plan.
        dense_ms, op_ms: milliseconds of dense attention and of the whole sparse call.
        stages_ms: milliseconds by stage.
        fitted: whether the coefficients were fitted to it; the others test them.
    """

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    density: float
    compensation: str
    q_clusters: int
    k_clusters: int
    dense_ms: float
    op_ms: float
    stages_ms: dict[str, float]
    fitted: bool
    batch: int = 1
    text: int = 0


@dataclass(frozen=True)
class Calibration:
    """Times of one device.

    Attributes:
        version: of this format.
        origin: ``"measured"`` here, ``"recorded"`` on such a device, or a ``"guess"``.
        device: what it holds for.
        roofs: see `Roofs`.
        host_ms: milliseconds in which a short call can be issued; one that has less work takes that
            long. Long calls take the host longer, and the device longer still.
        stages: class of call (``"dtype/head_dim"``) to stage, ``"dense"`` among them.
        seconds: what measuring took.
        samples: what was measured.
    """

    version: int
    origin: Origin
    device: Device
    roofs: Roofs
    host_ms: float
    stages: dict[str, dict[str, Efficiency]]
    seconds: float = 0.0
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @property
    def basis(self) -> str:
        """Where the times come from, in words for people."""
        return {
            "measured": "calibrated on this machine",
            "recorded": f"recorded on {self.device.name}",
            "guess": "guess: not calibrated",
        }[self.origin]

    def stage_ms(self, stage: str, amount: Amount, dtype: str, head_dim: int) -> float:
        """Milliseconds of one stage: operations, bytes and launches over the roofs, each times its
        measured efficiency."""
        found = self.stages[self._class(dtype, head_dim)][stage]
        flops, moved, launched = ideal_ms(amount, self.roofs, dtype)
        return found.flops * flops + found.bytes * moved + found.launches * launched

    def _class(self, dtype: str, head_dim: int) -> str:
        """The class that was measured nearest: element size first, then head dim, then dtype."""

        def distance(name: str) -> tuple[bool, float, bool]:
            other, dim = name.split("/")
            return (
                ELEMENT_SIZES[other] != ELEMENT_SIZES[dtype],
                abs(math.log(int(dim) / head_dim)),
                other != dtype,
            )

        return min(self.stages, key=distance)


def ideal_ms(amount: Amount, roofs: Roofs, dtype: str) -> tuple[float, float, float]:
    """Milliseconds of an amount of work at the roofs: operations, bytes, launches."""
    rate = roofs.flops.get(dtype, min(roofs.flops.values()))
    return (
        amount.flops / rate / 1e9,
        amount.bytes / roofs.bandwidth / 1e6,
        amount.launches * roofs.launch_ms,
    )


def cache_folder() -> Path:
    """The user's folder of calibrations; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "svg_ear_compile" / "calibrations"


def save(calibration: Calibration) -> Path:
    """Put a calibration into the cache, closed to other users; returns its file."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    path = folder / f"{calibration.device.key}.json"
    json_record.write(path, calibration)
    return path


def load(device: Device) -> Calibration:
    """The best that is known of a device: measured here, recorded elsewhere, or a guess.

    A file that cannot be used is reported in the log and passed over.
    """
    cached = cache_folder() / f"{device.key}.json"
    if cached.exists():
        found = _read(cached)
        if found is not None and found.device == device:
            return found
    for path in sorted(RECORDED.glob("*.json")):
        found = _read(path)
        if found is not None and found.device.name == device.name:
            return replace(found, origin="recorded")
    return guess(device)


def _read(path: Path) -> Calibration | None:
    try:
        found = json_record.read(Calibration, path)
    except (OSError, ValueError) as error:
        log.warning("calibration passed over: %s", error)
        return None
    if found.version == VERSION:
        return found
    log.warning("calibration passed over: %s has version %s, not %s", path, found.version, VERSION)
    return None


# Conservative on purpose: an early sparse site that turns out slower is worse than a late one. The
# ratios are rounded up from stage times seen with early kernels on one GPU (benchmarks/NOTES.md)
# and on a two-core CPU; the roofs are those of an older data-centre GPU and a small CPU. With them
# the default at density 0.2, cold, breaks even near 45,000 tokens of 128 channels on a GPU, near
# 37,000 on Hopper (an H200 is 1.5 times as fast as dense at 32,760), and near 14,000 on a CPU.
_GUESSES = {
    "cuda": (
        Roofs({"bfloat16": 250.0, "float16": 250.0, "float32": 15.0}, 1500.0, 0.006),
        2.0,
        {
            "dense": Efficiency(1.4, 1.0, 1.0),
            "cluster": Efficiency(3.0, 4.0, 2.0),
            "score": Efficiency(16.0, 3.0, 1.0),
            "route": Efficiency(1.0, 4.0, 1.0),
            "attend": Efficiency(3.0, 1.5, 1.0),
            "correction": Efficiency(1.0, 2.0, 0.5),
        },
    ),
    "cpu": (
        Roofs({"bfloat16": 0.06, "float16": 0.06, "float32": 0.06}, 20.0, 0.004),
        0.0,
        {
            "dense": Efficiency(1.0, 1.0, 1.0),
            "sparse": Efficiency(3.0, 8.0, 3.0),
        },
    ),
}


def guess(device: Device) -> Calibration:
    """A calibration of a device that was never measured."""
    roofs, host_ms, efficiencies = _GUESSES[device.kind]
    return Calibration(VERSION, "guess", device, roofs, host_ms, {"bfloat16/128": efficiencies})
