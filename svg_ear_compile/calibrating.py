"""`calibrate`: measures a device and saves its calibration for later compilations."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from svg_ear_compile.cost_model import calibrate as measuring
from svg_ear_compile.cost_model import calibration as keeping
from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.disturbance import disturbance_of
from svg_ear_compile.kernels.device_guard import on_device
from svg_ear_compile.policy import calibration_of

log = logging.getLogger(__name__)


def calibrate(
    device: torch.device | str,
    *,
    quick: bool = False,
    on_sample: Callable[[str, float], None] | None = None,
) -> Calibration:
    """Measure a device in half a minute and save the calibration in the user's cache.

    Warns if other work ran on the device meanwhile, as far as the measurements show it.

    Args:
        device: CUDA device or CPU; no other work should run on it.
        quick: measure for 8 seconds only, and correct what is assumed of the device, or recorded on
            another of its name. The profile is less certain.
        on_sample: called with the name of each measurement and the fraction of the time used.

    Returns:
        The calibration.

    Raises:
        ValueError: there is no such device here, or there are no kernels for it.
        OSError: the cache cannot be written; raised before the measurements start.
        ImportError: scipy, part of the extra ``tune``, is missing; `quick` needs none.
    """
    keeping.file_of(describe(device))
    with on_device(torch.device(device)):
        found = measuring.calibrate(device, quick=quick, on_sample=on_sample)
    keeping.save(found)
    calibration_of.cache_clear()
    disturbance = disturbance_of(found)
    if disturbance is not None:
        log.warning(
            "the device was busy while it was measured: %s. Calibrate again when nothing else runs",
            disturbance,
        )
    return found
