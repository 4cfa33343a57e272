"""The one place where a device becomes the current one.

Triton launches on the current device and CUDA's streams and events are its own: whatever touches
them runs under the device of its tensors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one inside the with block; other devices need nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
