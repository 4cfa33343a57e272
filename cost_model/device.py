"""Facts of the device that times are predicted for: its name, and what makes a timing stale."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from svg_ear_compile import kernels
from svg_ear_compile.kernels.gpu.launch import architecture


@dataclass(frozen=True)
class Device:
    """A device and the software whose speed on it is spoken of.

    Attributes:
        kind: ``"cuda"`` or ``"cpu"``.
        name: of the GPU; of a CPU its model, vector width and number of threads in use.
        torch: version of torch.
        triton: version of Triton, "" on a CPU, where it does not run.
        kernels: digest of this package's kernels: other kernels have other times.
        architecture: of a GPU, e.g. ``"sm_90"``: it decides which tiles the kernels take. Budgets
            that are older than this field have "".
    """

    kind: str
    name: str
    torch: str
    triton: str
    kernels: str
    architecture: str = ""

    @property
    def key(self) -> str:
        """File name of its calibration: every fact is in it, so a change of any is a miss."""
        facts = (self.name, "torch", self.torch, "triton" if self.triton else "", self.triton)
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(facts).lower()).strip("-") + f"-{self.kernels}"


def describe(device: torch.device | str) -> Device:
    """The facts of a device that this process can run on.

    Raises:
        ValueError: there are no kernels for devices of that type.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name, triton = torch.cuda.get_device_name(device), importlib.metadata.version("triton")
    elif device.type == "cpu":
        vectors = torch.backends.cpu.get_cpu_capability()
        name, triton = f"{_cpu_model()} {vectors} {torch.get_num_threads()} threads", ""
    else:
        raise ValueError(f"there are no kernels for a device of type {device.type!r}")
    return Device(
        device.type, name, torch.__version__, triton, kernels_digest(), architecture(device)
    )


@functools.cache
def kernels_digest() -> str:
    """First 8 hex digits of the SHA-256 of every source file of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(kernels.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@functools.cache
def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # `platform.processor` is empty on most Linux systems
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
