"""Device facts: the device for which times are predicted, and the software that they depend on."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from svg_ear_compile import kernels
from svg_ear_compile.kernels.checked import InvalidValueError, shown
from svg_ear_compile.kernels.gpu.launch import architecture


@dataclass(frozen=True)
class Device:
    """A device and the versions of the software that runs on it.

    Attributes:
        kind: ``"cuda"`` or ``"cpu"``.
        name: name of the GPU; for a CPU its model, vector width and number of threads in use.
        torch: version of torch.
        triton: version of Triton; "" if it is not installed, and for a CPU.
        kernels: digest of this package's kernels, since other kernels have other times.
        architecture: architecture of a GPU, e.g. ``"sm_90"``, which decides the tiles of the
            kernels. "" in budgets that are older than this field.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    torch: str
    triton: str
    kernels: str
    architecture: str = ""

    @property
    def key(self) -> str:
        """File name of the calibration; it contains all facts, so a change of any is a miss."""
        facts = (self.name, "torch", self.torch, "triton" if self.triton else "", self.triton)
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(facts).lower()).strip("-") + f"-{self.kernels}"


def describe(device: torch.device | str) -> Device:
    """The facts of a device that this process can run on.

    Raises:
        ValueError: there is no such device here, or there are no kernels for devices of that type.
    """
    found = _device(device)
    if found.type == "cuda":
        return Device(
            "cuda", torch.cuda.get_device_name(found), torch.__version__, _triton_version(),
            kernels_digest(), architecture(found),
        )  # fmt: skip
    vectors = torch.backends.cpu.get_cpu_capability()
    name = f"{_cpu_model()} {vectors} {torch.get_num_threads()} threads"
    return Device("cpu", name, torch.__version__, "", kernels_digest())


def _device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
    except (RuntimeError, ValueError, TypeError) as error:  # torch raises all of them
        raise InvalidValueError(f"{shown(given)} is no device; try cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise InvalidValueError(f"there are no kernels for a device of type {device.type!r}")
    if device.type == "cuda":
        # A build of torch without CUDA has no device; counting would raise there.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InvalidValueError(f"there is no device {str(device)!r}: torch sees {count} GPUs")
    return device


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # AMD's builds name the package otherwise
        return ""


@functools.cache
def kernels_digest() -> str:
    """First 8 hex digits of the SHA-256 of every source file of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(kernels.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@functools.cache
def _cpu_model() -> str:
    try:  # `platform.processor` is empty on most Linux systems
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if found:
        return found[1].strip()
    return platform.processor() or platform.machine()
