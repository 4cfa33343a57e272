"""Which form of sparse attention serves a device; Triton is imported only where it runs."""

from __future__ import annotations

from collections.abc import Callable

from svg_ear_compile.kernels.clusters import Result


def sparse_form(on_gpu: bool) -> Callable[..., Result]:
    """`sparse_attention` of the Triton form, replayed where that is worth while, or of the CPU's.

    Arguments and result of both are those of `reference.sparse_attention`.
    """
    if on_gpu:
        from svg_ear_compile.kernels.gpu.replay import sparse_attention
    else:
        from svg_ear_compile.kernels.registry import sparse_attention
    return sparse_attention
