"""Profiles of devices that were never measured: rates of the datasheet, efficiencies of an H200.

A stage that was measured on the H200 takes a multiple of the time that its operations or bytes
need at the H200's datasheet rates. Up to 1 the roof limits the stage, and another GPU takes the
time of its own roof. What exceeds 1 passes in the multiprocessors, with everything that is neither
a matrix product nor a byte of memory: it is scaled by their number and clock alone. So are bytes
from the cache, which the multiprocessors read.
"""

from __future__ import annotations

import functools
from pathlib import Path

from svg_ear_compile.cost_model.calibration import (
    VERSION,
    Calibration,
    Efficiency,
    Roofs,
    read,
)
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.hardware import Hardware, Rated, rated
from svg_ear_compile.kernels.gpu.launch import HOPPER

RECORDED = Path(__file__).with_name("recorded")

H200 = Hardware("NVIDIA H200", HOPPER, 132, 1_980_000, 3_201_000, 6144)
"""The GPU whose recorded efficiencies are scaled."""

# The stages whose bytes come from the cache for the most part.
_CACHED = ("score", "attend")

PORTABLE_ATTEND = 1.62
"""Time of the portable attend kernel over that of the Hopper kernel: 31.7 and 19.6 ms on the H200,
one process, see benchmarks/NOTES.md. The portable kernel ran with Hopper's tiles; with the tiles of
other GPUs it was never measured."""

HOPPER_UNCERTAINTY = 0.2
"""For the chip that was measured, in a card of other clocks and memory. On the H200 itself the
profile promises cold calls of 8,192 tokens or more at most 14 % more speed-up than they had."""

PORTABLE_UNCERTAINTY = 0.5
"""For the portable kernel on NVIDIA's GPUs: on none of them was it measured."""

AMD_UNCERTAINTY = 1.0
"""For AMD, where not even dense attention was measured."""

# A GPU of which nothing is known. The numbers serve only a user who decides against them, by
# ``min_tokens``: nothing goes sparse because of them.
_UNKNOWN = (
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
)
# From a CPU of two cores. A cold call at density 0.2 breaks even with dense attention near 10,000
# tokens, the uncertainty counted (early rounds of k-means as on an H200).
_CPU = (
    Roofs({"bfloat16": 0.06, "float16": 0.06, "float32": 0.06}, 20.0, 0.004),
    {"dense": Efficiency(1.0, 1.0, 1.0), "sparse": Efficiency(2.0, 5.3, 2.0)},
)
CPU_UNCERTAINTY = 0.5


def prior(device: Device, hardware: Hardware | None = None) -> Calibration:
    """The profile of a device that was never measured.

    Args:
        device: the device.
        hardware: what a GPU says of itself.

    Returns:
        A calibration with its `uncertainty`, which is None for a GPU of an architecture without
        rates. No kernel was compiled for such a GPU in the tests, and it may not run them: its
        attention stays dense until a calibration has run them all and has their times.
    """
    if device.kind == "cpu":
        roofs, stages = _CPU
        return _prior(device, roofs, 0.0, {"bfloat16/128": stages}, CPU_UNCERTAINTY)
    found = rated(hardware) if hardware is not None else None
    if found is None:
        roofs, host_ms, stages = _UNKNOWN
        return _prior(device, roofs, host_ms, {"bfloat16/128": stages}, None)
    record = _record()
    on_hopper = device.architecture == HOPPER
    by_class = {
        name: {
            stage: _scaled(stage, efficiency, record.roofs, found, on_hopper)
            for stage, efficiency in stages.items()
        }
        for name, stages in record.stages.items()
    }
    roofs = _reached(found, by_class["bfloat16/128"]["dense"].flops)
    uncertainty = PORTABLE_UNCERTAINTY if device.architecture.startswith("sm_") else AMD_UNCERTAINTY
    return _prior(
        device,
        roofs,
        record.host_ms,
        {
            name: {
                stage: Efficiency(
                    one.flops * roofs.flops["bfloat16"] / found.matrix,
                    one.bytes * roofs.bandwidth / found.bandwidth,
                    one.launches,
                )
                for stage, one in stages.items()
            }
            for name, stages in by_class.items()
        },
        HOPPER_UNCERTAINTY if on_hopper else uncertainty,
    )


def _prior(
    device: Device,
    roofs: Roofs,
    host_ms: float,
    stages: dict[str, dict[str, Efficiency]],
    uncertainty: float | None,
) -> Calibration:
    return Calibration(VERSION, "prior", device, roofs, host_ms, stages, uncertainty=uncertainty)


@functools.cache
def _record() -> Calibration:
    """The recorded profile of the H200."""
    found = read(RECORDED / "nvidia-h200.json", with_checksum=False)
    assert found is not None
    return found


def _reached(here: Rated, dense: float) -> Roofs:
    """The rates that large products and copies are expected to reach: the roofs of other work.

    Products keep the distance from dense attention that they have on the H200, where the limit of
    power holds both below the datasheet; copies keep their share of the datasheet's rate.

    Args:
        here: rates of the GPU.
        dense: factor by which dense attention is slower than these rates.
    """
    record, there = _record(), rated(H200)
    assert there is not None
    share = min(1.0, record.stages["bfloat16/128"]["dense"].flops / dense)
    single = record.roofs.flops["float32"] / there.single
    return Roofs(
        {
            "bfloat16": here.matrix * share,
            "float16": here.matrix * share,
            "float32": here.single * single,
        },
        here.bandwidth * record.roofs.bandwidth / there.bandwidth,
        record.roofs.launch_ms,
    )


def _scaled(
    stage: str, measured: Efficiency, roofs: Roofs, here: Rated, on_hopper: bool
) -> Efficiency:
    """Factors over the datasheet's roofs of a GPU, from the factors over the H200's measured roofs.

    Args:
        stage: name of the stage.
        measured: of the stage on the H200, relative to `roofs`.
        roofs: measured roofs of the H200.
        here: rates of the GPU.
        on_hopper: whether the kernels of the H200 run on it.
    """
    there = rated(H200)
    assert there is not None
    longer = PORTABLE_ATTEND if stage == "attend" and not on_hopper else 1.0
    matrix = measured.flops * longer * there.matrix / roofs.flops["bfloat16"]
    memory = measured.bytes * longer * there.bandwidth / roofs.bandwidth
    # How many more products or bytes of its own roof fit into a cycle here than there.
    per_cycle = here.matrix / there.matrix * there.cycles / here.cycles
    bytes_per_cycle = here.bandwidth / there.bandwidth * there.cycles / here.cycles
    flops = min(matrix, 1.0) + max(matrix - 1.0, 0.0) * per_cycle
    if stage == "dense":  # written for each architecture: nowhere further from its roof
        flops = min(flops, matrix)
    if stage in _CACHED:
        moved = memory * bytes_per_cycle
    else:
        moved = min(memory, 1.0) + max(memory - 1.0, 0.0) * bytes_per_cycle
    return Efficiency(flops, moved, measured.launches)
