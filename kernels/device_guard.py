"""The current CUDA device, set in one place.

Triton launches on the current device, and streams and events belong to it. Code that uses them has
to run while the device of its tensors is the current one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one inside the with block; does nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
