"""The device profile that times are predicted with: calibrated, recorded, or a prior."""

from __future__ import annotations

from dataclasses import replace

from svg_ear_compile.cost_model.calibration import Calibration, cache_folder, read, warn_of_skipped
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.hardware import Hardware
from svg_ear_compile.cost_model.prior import RECORDED, prior


def load(device: Device, hardware: Hardware | None = None) -> Calibration:
    """The profile of a device: calibrated here, else recorded on such a device, else a prior.

    A file that cannot be used is skipped; the log says why, once.

    Args:
        device: the device.
        hardware: what it says of itself, for the prior.
    """
    try:
        cached = cache_folder() / f"{device.key}.json"
    except RuntimeError as error:
        warn_of_skipped(str(error))
    else:
        found = read(cached, with_checksum=True)
        if found is not None and found.device == device:
            return found
    return not_calibrated(device, hardware)


def not_calibrated(device: Device, hardware: Hardware | None = None) -> Calibration:
    """The profile of a device as if it had never been calibrated here; arguments as in `load`."""
    for path in sorted(RECORDED.glob("*.json")):
        found = read(path, with_checksum=False)
        if found is not None and found.device.name == device.name:
            return replace(found, origin="recorded")
    return prior(device, hardware)
