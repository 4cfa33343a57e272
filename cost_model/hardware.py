"""What a GPU says of itself, and the roofs that follow from it: rates of the datasheet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from svg_ear_compile.kernels.gpu.launch import architecture


@dataclass(frozen=True)
class Hardware:
    """Facts of a GPU from its driver.

    Attributes:
        name: name of the GPU.
        architecture: see `Device.architecture`.
        multiprocessors: multiprocessors, on AMD compute units.
        clock_khz: highest clock of a multiprocessor.
        memory_clock_khz: highest clock of the memory.
        memory_bits: width of the memory bus. It and the clocks are 0 where PyTorch does not say.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock_khz: int
    memory_clock_khz: int
    memory_bits: int


@dataclass(frozen=True)
class Rates:
    """What one architecture does in a cycle of its clocks.

    Attributes:
        matrix: FLOPs of a multiprocessor in a cycle, dense products of 16-bit elements with sums in
            float32.
        single: FLOPs of a multiprocessor in a cycle, float32 without matrix units.
        rated: clock of the datasheet's rates over the highest clock.
        geforce: share of `matrix` that GeForce cards have.
        transfers: bits on each line of the memory bus in a cycle of the memory clock.
    """

    matrix: int
    single: int
    rated: float = 1.0
    geforce: float = 1.0
    transfers: int = 2


# The rates are worked out from datasheets: rate / (multiprocessors * clock of the datasheet).
RATES = {
    # NVIDIA A100 Tensor Core GPU datasheet: 312 TFLOP/s, 108 multiprocessors, 1410 MHz.
    "sm_80": Rates(2048, 128),
    # GA102 white paper: RTX 3090 71 TFLOP/s, A40 datasheet 149.7 (84 multiprocessors, 1740 MHz).
    "sm_86": Rates(1024, 256, geforce=0.5),
    # Ada white paper: RTX 4090 165.2, L40S datasheet 362 TFLOP/s (142 multiprocessors, 2490 MHz).
    "sm_89": Rates(1024, 256, geforce=0.5),
    # Hopper white paper: H100 SXM5 989.4 TFLOP/s at 1830 MHz of 1980, PCIe 756 at 1620 of 1755.
    "sm_90": Rates(4096, 256, rated=0.924),
    # HGX B200 datasheet: 2250 TFLOP/s, 148 multiprocessors, 1855 MHz of 1965.
    "sm_100": Rates(8192, 256, rated=0.944),
    # HGX B300 datasheet: 2250 TFLOP/s; the clock is taken to be rated as on the B200.
    "sm_103": Rates(8192, 256, rated=0.944),
    # RTX Blackwell white paper: RTX 5090 209.5, RTX PRO 6000 503.8 TFLOP/s.
    "sm_120": Rates(1024, 256, geforce=0.5),
    # MI300X data sheet: 1307.4 TFLOP/s, 304 compute units, 2100 MHz; 5.2 Gbit/s on each line, of
    # which the driver names a quarter.
    "gfx942": Rates(2048, 256, transfers=4),
}


def hardware_of(device: torch.device) -> Hardware | None:
    """Facts of a GPU that this process can use; None for a CPU."""
    if device.type != "cuda":
        return None
    said = torch.cuda.get_device_properties(device)
    # PyTorch 2.11 to 2.15 have these three, but no promise of them: a prior is worth no error.
    rates = ("clock_rate", "memory_clock_rate", "memory_bus_width")
    return Hardware(
        said.name,
        architecture(device),
        said.multi_processor_count,
        *(getattr(said, name, 0) for name in rates),
    )


@dataclass(frozen=True)
class Rated:
    """Rates of a GPU by its datasheet.

    Attributes:
        matrix: TFLOP/s of dense products of 16-bit elements with sums in float32.
        single: TFLOP/s of float32.
        bandwidth: GB/s of the memory.
        cycles: cycles of all multiprocessors in a second, divided by 1e9.
    """

    matrix: float
    single: float
    bandwidth: float
    cycles: float


def rated(hardware: Hardware) -> Rated | None:
    """The rates of a GPU; None for an architecture that is not in `RATES`, or without clocks.

    Virtual and integrated GPUs may name no clocks.
    """
    rates = RATES.get(hardware.architecture)
    facts = (
        hardware.multiprocessors,
        hardware.clock_khz,
        hardware.memory_clock_khz,
        hardware.memory_bits,
    )
    if rates is None or min(facts) <= 0:
        return None
    cycles = hardware.multiprocessors * hardware.clock_khz * rates.rated / 1e6
    share = rates.geforce if "GeForce" in hardware.name else 1.0
    moved = hardware.memory_clock_khz * hardware.memory_bits * rates.transfers / 8e6
    return Rated(rates.matrix * share * cycles / 1e3, rates.single * cycles / 1e3, moved, cycles)
