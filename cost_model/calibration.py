"""What a device was measured to do: roofs, and how far each stage stays below them.

Kept as versioned JSON: measured on this machine (the user's cache folder), recorded for a known GPU
(`recorded/`, part of the package), or a conservative guess that says so. `calibrate` measures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.stages import ELEMENT_SIZES, STAGES, Amount
from svg_ear_compile.kernels.checked import (
    Count,
    Fraction,
    InvalidValueError,
    NotNegative,
    Range,
    Size,
    printable,
    shown,
)

log = logging.getLogger(__name__)

VERSION = 6
RECORDED = Path(__file__).with_name("recorded")
Origin = Literal["measured", "recorded", "guess"]

# Wide enough for any device; what lies outside is no measurement.
Rate = Annotated[float, Range(1e-6, 1e9)]
Milliseconds = Annotated[float, Range(0.0, 1e9)]
Times = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True)
class Roofs:
    """What the device does at best.

    Attributes:
        flops: TFLOP/s of a large matrix product by dtype.
        bandwidth: GB/s of a large copy, reads and writes counted.
        launch_ms: milliseconds from one small operator to the next.
    """

    flops: dict[str, Rate]
    bandwidth: Rate
    launch_ms: Milliseconds


@dataclass(frozen=True)
class Efficiency:
    """How many times what the roofs allow a stage takes: for operations, bytes and launches."""

    flops: Times
    bytes: Times
    launches: Times


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

    tokens: Size
    heads: Size
    head_dim: Size
    dtype: str
    density: Fraction
    compensation: str
    q_clusters: Size
    k_clusters: Size
    dense_ms: Milliseconds
    op_ms: Milliseconds
    stages_ms: dict[str, Milliseconds]
    fitted: bool
    batch: Size = 1
    text: Count = 0


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

    version: Count
    origin: Origin
    device: Device
    roofs: Roofs
    host_ms: Milliseconds
    stages: dict[str, dict[str, Efficiency]]
    seconds: NotNegative = 0.0
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


def check(calibration: Calibration) -> Calibration:
    """The calibration itself if times can be predicted with it.

    Raises:
        ValueError: its format is another one, a field is of the wrong type or out of its range, or
            a stage is missing or takes no time; the message says which.
    """
    if calibration.version != VERSION:
        raise InvalidValueError(
            f"its format has version {shown(calibration.version)}; this package reads {VERSION}"
        )
    json_record.check(calibration)
    if not calibration.roofs.flops or not calibration.stages:
        raise InvalidValueError("roofs.flops or stages is empty")
    for name, stages in calibration.stages.items():
        dtype, _, dim = name.partition("/")
        if dtype not in ELEMENT_SIZES or not re.fullmatch("[1-9][0-9]{0,3}", dim):
            raise InvalidValueError(f"stages has {shown(name)}, which is no class of call")
        for stage in (*STAGES[calibration.device.kind], "dense"):
            if stage not in stages:
                raise InvalidValueError(f"stages[{shown(name)}] has no {stage!r}")
        dense = stages["dense"]
        if dense.flops + dense.bytes + dense.launches == 0.0:
            raise InvalidValueError(f"stages[{shown(name)}]: dense attention takes no time")
    return calibration


def cache_folder() -> Path:
    """The user's folder of calibrations; it need not exist.

    Raises:
        RuntimeError: the user has no home, as in a container under a bare user number.
    """
    # The standard of these folders has relative ones ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (
        (Path(base) if os.path.isabs(base) else Path.home() / ".cache")
        / "svg_ear_compile"
        / "calibrations"
    )


def file_of(device: Device) -> Path:
    """The file that `save` writes, in a folder that is made for the user alone if need be.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        folder = cache_folder()
    except RuntimeError as error:
        raise FileNotFoundError(f"no cache folder: {error}; set XDG_CACHE_HOME") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{device.key}.json"
    json_record.check_writable(path)
    return path


def save(calibration: Calibration) -> Path:
    """Put a calibration into the cache, with a seal that damage breaks; returns its file.

    Raises:
        OSError: the cache cannot be written.
        ValueError: see `check`.
    """
    data = asdict(check(calibration))
    path = file_of(calibration.device)
    json_record.write(path, {**data, "seal": _seal(data)})
    return path


def load(device: Device) -> Calibration:
    """The best that is known of a device: measured here, recorded elsewhere, or a guess.

    A file that cannot be used is reported in the log, once, and passed over.
    """
    try:
        cached = cache_folder() / f"{device.key}.json"
    except RuntimeError as error:
        _passed_over(str(error))
    else:
        found = _read(cached, sealed=True)
        if found is not None and found.device == device:
            return found
    for path in sorted(RECORDED.glob("*.json")):
        found = _read(path, sealed=False)
        if found is not None and found.device.name == device.name:
            return replace(found, origin="recorded")
    return guess(device)


def _read(path: Path, sealed: bool) -> Calibration | None:
    """What `save` wrote, or None; a copy of it that a person may have edited needs no seal."""
    try:
        with json_record.naming(path):
            data = json_record.parse(json_record.read_bytes(path))
            seal = data.pop("seal", None) if isinstance(data, dict) else None
            found = check(json_record.decode(Calibration, data))
            if sealed and seal != _seal(data):
                raise InvalidValueError("its seal is broken: the file is not as it was written")
            return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _passed_over(str(error))
        return None


def _seal(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@functools.cache
def _passed_over(problem: str) -> None:
    log.warning("calibration passed over: %s", printable(problem))


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
