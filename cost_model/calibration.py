"""Calibration of a device: its roofs, and how many times longer each stage takes.

A calibration is a versioned JSON file, or the prior of a device that was never measured
(`prior.py`). `calibrate.py` does the measurements, `device_profile.py` finds the calibration of a
device.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, field
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
from svg_ear_compile.kernels.plan import Compensation

log = logging.getLogger(__name__)

VERSION = 6
Origin = Literal["calibrated", "recorded", "prior"]

# Ranges wide enough for any device: a value outside cannot have been measured.
Rate = Annotated[float, Range(1e-6, 1e9)]
Milliseconds = Annotated[float, Range(0.0, 1e9)]
Times = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True)
class Roofs:
    """Highest measured rates of a device.

    Attributes:
        flops: TFLOP/s of a large matrix product, by dtype.
        bandwidth: GB/s of a large copy, reads and writes counted.
        launch_ms: milliseconds from the launch of one small operator to the launch of the next.
    """

    flops: dict[str, Rate]
    bandwidth: Rate
    launch_ms: Milliseconds


@dataclass(frozen=True)
class Efficiency:
    """Factors by which a stage is slower than the roofs: for operations, bytes and launches."""

    flops: Times
    bytes: Times
    launches: Times


@dataclass(frozen=True)
class Sample:
    """One measured attention call, for the plot of predicted against measured time.

    Attributes:
        batch, heads, tokens, text, head_dim, dtype: shape of the call, as in `AttentionShape`; keys
            have as many heads as queries.
        density, compensation, q_clusters, k_clusters: fields of its plan.
        dense_ms: milliseconds of dense attention.
        op_ms: milliseconds of the whole sparse call.
        stages_ms: milliseconds by stage.
        fitted: True if the efficiencies were fitted to this sample; the other samples test the fit.
    """

    tokens: Size
    heads: Size
    head_dim: Size
    dtype: str
    density: Fraction
    compensation: Compensation
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
    """Device profile from which times are predicted.

    Attributes:
        version: version of the file format, see `VERSION`.
        origin: ``"calibrated"`` on this machine, ``"recorded"`` on another device of that name, or
            ``"prior"``: not measured at all.
        device: the device and software that the profile holds for.
        roofs: see `Roofs`.
        host_ms: milliseconds that the host needs to issue a short call, the least that any call
            takes. Longer calls need more host time, and device time exceeds it.
        stages: call class (``"dtype/head_dim"``) to stage name to efficiency; the stage ``"dense"``
            is dense attention.
        seconds: duration of the calibration.
        samples: the measured calls.
        uncertainty: share by which a sparse call may take longer than predicted while dense
            attention does not; 0 where all coefficients were measured. None if the times of the
            device are unknown: nothing can be decided from them.
    """

    version: Count
    origin: Origin
    device: Device
    roofs: Roofs
    host_ms: Milliseconds
    stages: dict[str, dict[str, Efficiency]]
    seconds: NotNegative = 0.0
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    uncertainty: Times | None = 0.0

    @property
    def basis(self) -> str:
        """Origin of the times, as words for a report."""
        if self.uncertainty is None:
            return f"unknown: nothing was measured on {self.device.architecture or 'such a GPU'}"
        where = f" for {self.device.architecture}" if self.device.architecture else ""
        words = {
            "calibrated": "calibrated on this machine",
            "recorded": f"recorded on {self.device.name}",
            "prior": f"prior{where}, not calibrated",
        }[self.origin]
        return words + (f", uncertain by {self.uncertainty:.0%}" if self.uncertainty else "")

    def stage_ms(self, stage: str, amount: Amount, dtype: str, head_dim: int) -> float:
        """Predicted milliseconds of one stage.

        The operations, bytes and launches of `amount` are divided by the roofs and multiplied by
        the stage's efficiencies.
        """
        found = self.stages[self.nearest_class(dtype, head_dim)][stage]
        flops, moved, launched = ideal_ms(amount, self.roofs, dtype)
        return found.flops * flops + found.bytes * moved + found.launches * launched

    def nearest_class(self, dtype: str, head_dim: int) -> str:
        """The call class that serves a call: by element size, then by head dim, then by dtype."""

        def distance(name: str) -> tuple[bool, float, bool]:
            other, dim = name.split("/")
            return (
                ELEMENT_SIZES[other] != ELEMENT_SIZES[dtype],
                abs(math.log(int(dim) / head_dim)),
                other != dtype,
            )

        return min(self.stages, key=distance)


def ideal_ms(amount: Amount, roofs: Roofs, dtype: str) -> tuple[float, float, float]:
    """Milliseconds that the operations, bytes and launches of `amount` take at the roofs."""
    rate = roofs.flops.get(dtype, min(roofs.flops.values()))
    return (
        amount.flops / rate / 1e9,
        amount.bytes / roofs.bandwidth / 1e6,
        amount.launches * roofs.launch_ms,
    )


def check(calibration: Calibration) -> Calibration:
    """Return the calibration if it is valid.

    Raises:
        ValueError: the format version differs, a field has the wrong type or is out of range, or a
            stage is missing, or dense attention takes no time; the message names the fault.
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
            raise InvalidValueError(f"stages has {shown(name)}, which is no call class")
        for stage in (*STAGES[calibration.device.kind], "dense"):
            if stage not in stages:
                raise InvalidValueError(f"stages[{shown(name)}] has no {stage!r}")
        dense = stages["dense"]
        if dense.flops + dense.bytes + dense.launches == 0.0:
            raise InvalidValueError(f"stages[{shown(name)}]: dense attention takes no time")
    return calibration


def cache_folder() -> Path:
    """Folder of the user's calibrations; it need not exist.

    Raises:
        RuntimeError: the user has no home folder, as in a container under a bare user number.
    """
    # The XDG specification has relative paths ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (
        (Path(base) if os.path.isabs(base) else Path.home() / ".cache")
        / "svg_ear_compile"
        / "calibrations"
    )


def file_of(device: Device) -> Path:
    """Path of the file that `save` writes; creates its folder, readable by the user alone.

    Raises:
        OSError: the file cannot be written.
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
    """Write a calibration to the cache with a checksum; returns the path of the file.

    Raises:
        OSError: the cache cannot be written.
        ValueError: see `check`.
    """
    data = asdict(check(calibration))
    path = file_of(calibration.device)
    json_record.write(path, {**data, "checksum": _checksum(data)})
    return path


def read(path: Path, with_checksum: bool) -> Calibration | None:
    """The calibration in a file of `save`; None if there is none or it cannot be used.

    Args:
        with_checksum: the checksum has to match. Recorded files may be edited and need none.
    """
    try:
        with json_record.naming(path):
            data = json_record.parse(json_record.read_bytes(path))
            found_sum = data.pop("checksum", None) if isinstance(data, dict) else None
            found = check(json_record.decode(Calibration, data))
            if with_checksum and found_sum != _checksum(data):
                raise InvalidValueError("its checksum does not match: the file was changed")
            return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warn_of_skipped(str(error))
        return None


def _checksum(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@functools.cache
def warn_of_skipped(problem: str) -> None:
    """Log why a file is not used, once per process."""
    log.warning("calibration skipped: %s", printable(problem))
