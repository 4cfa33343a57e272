"""K, V and proxy tokens as pages in cluster order, and the launches that make and read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.attention.sorted_copies.attend_kernel import attend_pages_kernel
from benchmarks.attention.sorted_copies.copy_kernels import copy_pages_kernel, page_list_kernel
from benchmarks.attention.sorted_copies.variants import DIM, FP8, Variant
from svg_ear_compile.kernels.gpu.launch import token_strides

# Words of the lists of a tile of so many pages, see `attend_kernel.py`.
PAGE_WORD = {2: torch.int32, 4: torch.int64, 8: torch.int64}
FILL_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Scales:
    """Mean key (G, D), scale of keys (G,) and of values (G, D), float32; 0 and 1 in bf16."""

    k_mean: Tensor
    k: Tensor
    v: Tensor


def power_of_two(largest: Tensor) -> Tensor:
    """The least power of two that brings numbers of this size into e4m3."""
    return torch.exp2(torch.ceil(torch.log2(largest.float().clamp(min=1e-30) / 448.0)))


def scales_of(k: Tensor, v: Tensor, variant: Variant | None) -> Scales:
    """Scales of k, v (B, H, N, D); those of bf16 without a variant."""
    heads, dim = k.shape[0] * k.shape[1], k.shape[3]
    mean = k.new_zeros(heads, dim, dtype=torch.float32)
    k_scale, v_scale = torch.ones_like(mean[:, 0]), torch.ones_like(mean)
    if variant and variant.k8:
        # Means in the dtype of k keep k less its mean a difference of what the kernels read.
        mean = k.mean(2).flatten(0, 1).float()
        low, high = torch.aminmax(k, dim=2)
        largest = torch.maximum(high.flatten(0, 1).float() - mean, mean - low.flatten(0, 1).float())
        k_scale = power_of_two(largest.amax(-1))
    if variant and variant.v8:
        low, high = torch.aminmax(v, dim=2)
        v_scale = power_of_two(torch.maximum(high, -low).flatten(0, 1))
    return Scales(mean, k_scale, v_scale)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x through e4m3 with a scale that broadcasts, in the dtype of x."""
    return ((x.float() / scale).clamp(-448, 448).to(FP8).float() * scale).to(x.dtype)


class PageCopies:
    """K, V and proxy tokens of every head as pages, and the kernels that make and read them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, routed: Any, variant: Variant) -> None:
        self.q, self.k, self.v, self.routed, self.variant = q, k, v, routed, variant
        page, groups = variant.page, k.shape[0] * k.shape[1]
        self.tokens, self.k_clusters = k.shape[2], routed.k_sorted.centroids.shape[1]
        self.key_pages = triton.cdiv(self.tokens, page) + self.k_clusters
        tile = page * variant.pages
        self.rows = max(32, page)
        proxies = triton.cdiv(self.k_clusters, max(tile, self.rows)) * max(tile, self.rows)
        self.pages = self.key_pages + proxies // page
        places = groups * self.pages * page
        k_dtype, v_dtype = (FP8 if narrow else k.dtype for narrow in (variant.k8, variant.v8))
        # Places that no kernel writes are never read but as whole pages without a key.
        self.k_copy = torch.zeros(places, DIM, dtype=torch.uint8, device=k.device).to(k_dtype)
        v_shape = (groups * self.pages * DIM, page) if variant.v8 else (places, DIM)
        self.v_copy = torch.zeros(v_shape, dtype=torch.uint8, device=k.device).to(v_dtype)
        k_box = [page, DIM if variant.k8 else 64]
        v_box = [DIM, page] if variant.v8 else [page, 64]
        self.k_desc = TensorDescriptor.from_tensor(
            self.k_copy, k_box, gl.NVMMASharedLayout(128, 8 if variant.k8 else 16, rank=2)
        )
        self.v_desc = TensorDescriptor.from_tensor(
            self.v_copy,
            v_box,
            gl.NVMMASharedLayout(page if variant.v8 else 128, 8 if variant.v8 else 16, rank=2),
        )
        q_clusters = routed.q_sorted.centroids.shape[1]
        shape = (q.shape[0] * q.shape[1], q_clusters)
        assert self.pages < 1 << 15, "a list holds numbers of pages in 16 bits"
        pitch = triton.cdiv(self.key_pages, 8) * 8
        self.list = torch.zeros(*shape, pitch, dtype=torch.int16, device=k.device)
        self.fill = torch.zeros(*shape, pitch, dtype=torch.uint8, device=k.device)
        self.row = torch.zeros(*shape, 2, dtype=torch.int32, device=k.device)
        self.bias = torch.zeros(*shape, self.k_clusters, device=k.device)
        self.out = torch.full_like(q, math.nan)
        self.first_page = self.page_starts()

    def page_starts(self) -> Tensor:
        """First page (G, Kc) int32 of each key cluster."""
        sizes = self.routed.k_sorted.starts.diff()[:, : self.k_clusters]
        page = self.variant.page
        pages = (sizes + page - 1) // page
        return (pages.cumsum(-1, dtype=torch.int32) - pages).to(torch.int32)

    def make(self, scales: Scales) -> None:
        """The pre-pass: pages of K, V and proxy tokens."""
        k, v, keys, variant = self.k, self.v, self.routed.k_sorted, self.variant
        self.first_page = self.page_starts()
        grid = (self.k_clusters + triton.cdiv(self.k_clusters, self.rows), k.shape[0] * k.shape[1])
        copy_pages_kernel[grid](
            k, v, keys.order, keys.starts, self.first_page, keys.rounded, self.routed.value_means,
            scales.k_mean, scales.k, scales.v, self.k_copy, self.v_copy,
            *token_strides(k), *token_strides(v), k.shape[1], self.tokens, self.k_clusters,
            self.key_pages, self.pages, D=DIM, ROWS=self.rows, PAGE=variant.page, K8=variant.k8,
            V8=variant.v8, num_warps=4,
        )  # fmt: skip

    def make_lists(self) -> None:
        """Pages of each row of blocks."""
        q_clusters = self.row.shape[1]
        block_k = triton.next_power_of_2(self.k_clusters)
        page_list_kernel[(q_clusters, self.row.shape[0])](
            self.routed.block_mask, self.routed.k_sorted.starts, self.first_page, self.bias,
            self.list, self.fill, self.row, self.q.shape[1], self.k.shape[1], q_clusters,
            self.k_clusters, self.list.shape[2], BLOCK_K=block_k, PAGE=self.variant.page,
            PAGES=self.variant.pages, num_warps=4,
        )  # fmt: skip

    def attend(
        self, scales: Scales, tiles: tuple[Tensor, Tensor], correction: Tensor, weight: Tensor,
        scale: float, compile_only: bool = False,
    ) -> Any:  # fmt: skip
        """The attend stage, before the correction of values; or its compiled kernel."""
        q, queries, variant = self.q, self.routed.q_sorted, self.variant
        grid = (tiles[0].shape[1], q.shape[0] * q.shape[1])
        pages, keys = (
            self.list.view(PAGE_WORD[variant.pages]),
            self.fill.view(FILL_WORD[variant.pages]),
        )
        arguments = (
            q, self.k_desc, self.v_desc, self.out, *tiles, queries.order, queries.starts,
            pages, keys, self.row, self.bias, correction, weight, scales.k, scales.v,
            *token_strides(q), *token_strides(self.out), q.shape[1], self.k.shape[1], q.shape[2],
            self.row.shape[1], self.k_clusters, tiles[0].shape[1], pages.shape[2], keys.shape[2],
            self.key_pages, self.pages, scale,
        )  # fmt: skip
        constants: dict[str, Any] = {
            "D": DIM, "PAGE": variant.page, "PAGES": variant.pages, "STAGES": variant.stages,
            "CONSUMERS": variant.consumers, "PARTS": variant.parts, "COPIED": variant.copied,
            "num_warps": 4,
        }  # fmt: skip
        if compile_only:
            return attend_pages_kernel.warmup(*arguments, grid=grid, **constants)
        attend_pages_kernel[grid](*arguments, **constants)
        return self.out

    def empty_share(self) -> float:
        """Share of the places of listed pages that hold no key."""
        sizes = self.routed.k_sorted.starts.diff()[:, : self.k_clusters].double()
        mask = self.routed.block_mask.flatten(0, 1).double()
        rows = (self.routed.q_sorted.starts.diff()[:, : mask.shape[1]] > 0).double()
        keys = float((rows * (mask @ sizes[:, :, None])[..., 0]).sum())
        places = float((rows * self.row[..., 1].double()).sum()) * self.variant.page
        return 1.0 - keys / places
