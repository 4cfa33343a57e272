"""Compilation of the variants, for the GPU that is there or for sm_90 where there is none."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.attention.sorted_copies.pages import PageCopies, Scales, scales_of
from benchmarks.attention.sorted_copies.variants import DIM, VARIANTS, Variant
from svg_ear_compile.kernels.gpu.kmeans import SortedClusters, sort_by_label


def tiny(variant: Variant, device: str) -> tuple[PageCopies, Scales]:
    """Copies of a small problem whose clusters are arbitrary, to compile for."""
    heads, tokens, q_clusters, k_clusters = 2, 2048, 8, 32
    q, k, v = (
        torch.randn(1, tokens, heads, DIM, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )

    def sorted_by(clusters: int) -> SortedClusters:
        labels = torch.arange(tokens, device=device, dtype=torch.int32) % clusters
        labels = labels.expand(heads, -1).contiguous()
        means = torch.zeros(heads, clusters, DIM, device=device)
        return SortedClusters(labels, *sort_by_label(labels, clusters), means, means.to(q.dtype))

    keys = sorted_by(k_clusters)
    mask = torch.ones(1, heads, q_clusters, k_clusters, dtype=torch.bool, device=device)
    routed = SimpleNamespace(
        q_sorted=sorted_by(q_clusters), k_sorted=keys, value_means=keys.rounded, block_mask=mask
    )
    return PageCopies(q, k, v, routed, variant), scales_of(k, v, variant)


def compile_variant(variant: Variant, device: str) -> Any:
    """The compiled attend kernel of a variant."""
    copies, scales = tiny(variant, device)
    tiles = torch.zeros(2, 2, 64, dtype=torch.int32, device=device)
    table = torch.zeros(2, 2048, device=device)
    return copies.attend(scales, (tiles[0], tiles[1]), table, table.clone(), 0.1, compile_only=True)


def compile_for_sm90(names: list[str], dump: Path | None) -> None:
    """Compile without a GPU; prints registers, spills and shared memory.

    Args:
        names: of the variants.
        dump: folder for PTX and cubins, or None.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tests.kernels.aot_compiler import resource_usage

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: "cuda90",
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    for name in names:
        began = time.perf_counter()
        kernel = compile_variant(VARIANTS[name], "cpu")
        registers, spilled = resource_usage(kernel)
        print(
            f"{name:22s} {registers} registers, {spilled} B spilled, "
            f"{kernel.metadata.shared} B shared, {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        if dump:
            (dump / f"{name}.ptx").write_text(kernel.asm["ptx"])
            (dump / f"{name}.cubin").write_bytes(kernel.asm["cubin"])
