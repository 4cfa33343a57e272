"""Where figures come from: device, versions and commit, for every record under results/."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Device, versions and commit of this run as plain data.

    The commit is ``SVG_EAR_COMMIT`` where the tree was copied without its history, else git's.
    """
    on_gpu = torch.cuda.is_available()
    commit = os.environ.get("SVG_EAR_COMMIT", "")
    if not commit:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        commit = described.stdout.strip() or "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
        "versions": versions,
        "commit": commit,
    }


def where(records: Sequence[dict[str, Any]]) -> str:
    """Devices and versions of records, each once."""
    found = []
    for record in records:
        versions = record["versions"]
        triton = f", Triton {versions['triton']}" if record["cuda"] else ""
        found.append(f"{record['device']}, torch {versions['torch']}{triton}")
    return "; ".join(dict.fromkeys(found))
