"""Which form of sparse attention serves a device; Triton is imported only where it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from svg_ear_compile.kernels.reference import Result


def sparse_form(on_gpu: bool) -> Callable[..., Result]:
    """`sparse_attention` of the Triton form or of the CPU's.

    Arguments and result of both are those of `reference.sparse_attention`.
    """
    if on_gpu:
        from svg_ear_compile.kernels.gpu.attention import sparse_attention
    else:
        from svg_ear_compile.kernels.cpu import sparse_attention
    return sparse_attention


def captured_form(device: torch.device) -> Callable[..., Result]:
    """As `sparse_form`; on a GPU with captured graphs of its own, as the calls of a session have.

    For measurements: what is captured is held as long as the returned function is.
    """
    if device.type != "cuda":
        return sparse_form(False)
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

    return CapturedGraphs().sparse_attention
