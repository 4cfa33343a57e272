"""`python -m benchmarks.attention.sorted_copies --out DIR`: K and V copied once in cluster order.

An experiment beside the operator: what the attend stage gains when clusters lie contiguous, in
bf16 and in e4m3, with the copies, their scales, the lists and the empty places of pages counted.
A variant is compared with the present kernel, which gets the same rounded inputs, before it is
timed. Variants run in a process of their own; one that hangs or fails is ended, and the rest go on.
`--compile` compiles every variant for sm_90 on a machine without a GPU, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.gate import relative_error
from benchmarks.attention.inputs import plan_of
from benchmarks.provenance import provenance

FP8 = torch.float8_e4m3fn
DIM = 128


@dataclass(frozen=True)
class Variant:
    """One form of the attend stage.

    Attributes:
        k8, v8: whether Q and K, and weights and V, are in e4m3.
        page, pages: places of a page, pages of a tile.
        stages: tiles of K, and of V, in shared memory.
        consumers: groups of warps with 64 queries each.
        parts: 1 where float32 registers add up the tiles; 2 where half of the columns at a time.
        trim: keys of few in their last page go to other clusters.
    """

    k8: bool
    v8: bool
    page: int
    pages: int
    stages: int
    consumers: int
    parts: int = 0
    trim: bool = False


# In the order in which a short run wants them.
VARIANTS = {
    "bf16-p16": Variant(False, False, 16, 4, 4, 3),
    "bf16-p8": Variant(False, False, 8, 8, 4, 3),
    "fp8-p32-2-parts": Variant(True, True, 32, 2, 8, 2, 1),
    "fp8-p32-3": Variant(True, True, 32, 2, 6, 3),
    "k8-p16": Variant(True, False, 16, 4, 4, 3),
    "bf16-p32": Variant(False, False, 32, 2, 4, 3),
    "bf16-p16-trim": Variant(False, False, 16, 4, 4, 3, trim=True),
    "fp8-p32-2-parts-trim": Variant(True, True, 32, 2, 8, 2, 1, True),
    "fp8-p32-3-trim": Variant(True, True, 32, 2, 6, 3, trim=True),
    "bf16-p16-5": Variant(False, False, 16, 4, 5, 3),
    "fp8-p32-2": Variant(True, True, 32, 4, 4, 2),
    "k8-p8": Variant(True, False, 8, 8, 4, 3),
    "fp8-p64-3": Variant(True, True, 64, 1, 6, 3),
    "bf16-p16-2": Variant(False, False, 16, 8, 2, 2),
    # These spill registers in their loops.
    "fp8-p32-2-halves-128": Variant(True, True, 32, 4, 4, 2, 2),
    "fp8-p32-3-halves": Variant(True, True, 32, 2, 6, 3, 2),
}


@dataclass(frozen=True)
class Scales:
    """Mean key (G, D), scale of keys (G,) and of values (G, D), float32; 0 and 1 in bf16."""

    k_mean: Tensor
    k: Tensor
    v: Tensor


def power_of_two(largest: Tensor) -> Tensor:
    """The least power of two that brings numbers of this size into e4m3."""
    return torch.exp2(torch.ceil(torch.log2(largest.float().clamp(min=1e-30) / 448.0)))


def scales_of(k: Tensor, v: Tensor, variant: Variant) -> Scales:
    """Scales of k, v (B, H, N, D)."""
    heads, dim = k.shape[0] * k.shape[1], k.shape[3]
    mean = k.new_zeros(heads, dim, dtype=torch.float32)
    k_scale, v_scale = torch.ones_like(mean[:, 0]), torch.ones_like(mean)
    if variant.k8:
        # Means in the dtype of k keep k less its mean a difference of what the kernels read.
        mean = k.mean(2).flatten(0, 1).float()
        low, high = torch.aminmax(k, dim=2)
        largest = torch.maximum(high.flatten(0, 1).float() - mean, mean - low.flatten(0, 1).float())
        k_scale = power_of_two(largest.amax(-1))
    if variant.v8:
        low, high = torch.aminmax(v, dim=2)
        v_scale = power_of_two(torch.maximum(high, -low).flatten(0, 1))
    return Scales(mean, k_scale, v_scale)


class PageCopies:
    """K, V and proxy tokens of every head as pages, and the kernels that make and read them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, routed: Any, variant: Variant) -> None:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

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
        self.fill = torch.zeros(groups, self.key_pages, dtype=torch.int32, device=k.device)
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
        self.pitch = self.key_pages
        self.list = torch.zeros(*shape, self.pitch, dtype=torch.int32, device=k.device)
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
        from benchmarks.attention.sorted_copies_kernels import copy_pages_kernel
        from svg_ear_compile.kernels.gpu.launch import token_strides

        k, v, keys, variant = self.k, self.v, self.routed.k_sorted, self.variant
        self.first_page = self.page_starts()
        grid = (self.k_clusters + triton.cdiv(self.k_clusters, self.rows), k.shape[0] * k.shape[1])
        copy_pages_kernel[grid](
            k, v, keys.order, keys.starts, self.first_page, keys.rounded, self.routed.value_means,
            scales.k_mean, scales.k, scales.v, self.fill, self.k_copy, self.v_copy,
            *token_strides(k), *token_strides(v), k.shape[1], self.tokens, self.k_clusters,
            self.key_pages, self.pages, D=DIM, ROWS=self.rows, PAGE=variant.page, K8=variant.k8,
            V8=variant.v8, num_warps=4,
        )  # fmt: skip

    def make_lists(self) -> None:
        """Pages of each row of blocks."""
        from benchmarks.attention.sorted_copies_kernels import page_list_kernel

        q_clusters = self.row.shape[1]
        block_k = triton.next_power_of_2(self.k_clusters)
        page_list_kernel[(q_clusters, self.row.shape[0])](
            self.routed.block_mask, self.routed.k_sorted.starts, self.first_page, self.bias,
            self.list, self.row, self.q.shape[1], self.k.shape[1], q_clusters, self.k_clusters,
            self.pitch, BLOCK_K=block_k, PAGE=self.variant.page, num_warps=4,
        )  # fmt: skip

    def attend(
        self, scales: Scales, tiles: tuple[Tensor, Tensor], correction: Tensor, weight: Tensor,
        scale: float, compile_only: bool = False,
    ) -> Any:  # fmt: skip
        """The attend stage, before the correction of values; or its compiled kernel."""
        from benchmarks.attention.sorted_copies_kernels import attend_pages_kernel
        from svg_ear_compile.kernels.gpu.launch import token_strides

        q, queries, variant = self.q, self.routed.q_sorted, self.variant
        grid = (tiles[0].shape[1], q.shape[0] * q.shape[1])
        arguments = (
            q, self.k_desc, self.v_desc, self.out, *tiles, queries.order, queries.starts,
            self.list, self.row, self.fill, self.bias, correction, weight, scales.k, scales.v,
            *token_strides(q), *token_strides(self.out), q.shape[1], self.k.shape[1], q.shape[2],
            self.row.shape[1], self.k_clusters, tiles[0].shape[1], self.pitch, self.key_pages,
            self.pages, scale,
        )  # fmt: skip
        constants: dict[str, Any] = {
            "D": DIM, "PAGE": variant.page, "PAGES": variant.pages, "STAGES": variant.stages,
            "CONSUMERS": variant.consumers, "PARTS": variant.parts, "CORRECTED": True,
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


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x through e4m3 with a scale that broadcasts, in the dtype of x."""
    return ((x.float() / scale).clamp(-448, 448).to(FP8).float() * scale).to(x.dtype)


class Bench:
    """One shape: inputs, clusters for every kind of tile, the present kernel, dense attention."""

    def __init__(self, heads: int, tokens: int, density: float, device: str = "cuda") -> None:
        from benchmarks.attention.data import video_like
        from svg_ear_compile.kernels.gpu import attention

        self.q, self.k, self.v = video_like(1, heads, tokens, DIM, device=device)
        self.scale = DIM**-0.5
        self.plan = plan_of("default", "gaussian", density)
        config = attention._config(self.q, True)
        cold = self._routed(config.query_tile, None, None)
        self.centroids = (cold.queries.centroids, cold.keys.centroids)
        self.known: dict[tuple[int, int], Any] = {}

    def _routed(self, query_tile: Any, key_tile: Any, centroids: Any) -> Any:
        """`cluster_and_route`, with key clusters aligned to `key_tile` too."""
        from svg_ear_compile.kernels.gpu import attention
        from svg_ear_compile.kernels.gpu.kmeans import kmeans

        def clustered(x: Tensor, mask: Any, init: Any, text: Any, rounds: int, config: Any,
                      metric: Any = None, tile: Any = None) -> Any:  # fmt: skip
            wanted = query_tile if tile is not None else key_tile
            return kmeans(x, mask, init, text, rounds, config, metric, wanted)

        with mock.patch.object(attention, "kmeans", clustered):
            return attention.cluster_and_route(
                self.q, self.k, self.v, self.plan, attn_mask=None, scale=self.scale, text=(0, 0),
                centroids=centroids, blocks=None, on_hopper=True,
            )  # fmt: skip

    def routed(self, variant: Variant | None) -> Any:
        """Clusters and blocks for the tiles of a variant, or of the present kernel."""
        from svg_ear_compile.kernels.clusters import QueryTile

        rows = 64 * (variant.consumers if variant else 3)
        page = variant.page if variant and variant.trim else 0
        if (rows, page) not in self.known:
            key_tile = QueryTile(page, page) if page else None
            self.known[rows, page] = self._routed(QueryTile(64, rows), key_tile, self.centroids)
        return self.known[rows, page]

    def correction(self, routed: Any) -> Tensor:
        """(G, N) float32 of the Gaussian form."""
        from svg_ear_compile.kernels.gpu import attention

        config = attention._config(self.q, True)
        curvature, _ = attention.curvature_and_slope(
            self.k, self.v, routed.k_sorted, routed.value_means, self.scale, config
        )
        return attention.logit_corrections(
            self.q, routed.q_sorted, curvature, self.k.shape[1], config
        )[0]

    def pairs(self, routed: Any) -> float:
        """Query-key pairs that are computed exactly."""
        return float((routed.row_area.double() * routed.queries.sizes.double()).sum())


class Present:
    """The present lists and kernel, on tensors that a variant may have rounded."""

    def __init__(self, bench: Bench, routed: Any, variant: Variant | None, scales: Scales) -> None:
        q, k, v = bench.q, bench.k, bench.v
        keys, values = routed.k_sorted.rounded, routed.value_means
        if variant and variant.k8:
            mean, by_head = (
                scales.k_mean[:, None].unflatten(0, k.shape[:2]),
                scales.k[:, None, None],
            )
            q = rounded(q, power_of_two(q.abs().amax(-1, keepdim=True)))
            k = rounded(k - mean, by_head.unflatten(0, k.shape[:2]))
            keys = rounded(keys - scales.k_mean[:, None], by_head)
            keys = keys.to(k.dtype)
        if variant and variant.v8:
            v = rounded(v, scales.v[:, None].unflatten(0, v.shape[:2]))
            values = rounded(values, scales.v[:, None])
        self.q, self.k, self.v, self.keys, self.values = q, k.to(q.dtype), v, keys, values
        self.routed, self.scale = routed, bench.scale
        shape = routed.block_mask.flatten(0, 1).shape
        groups, q_clusters, k_clusters = shape

        def table(*more: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(groups, q_clusters, *more, dtype=dtype, device=q.device)

        self.bias, self.offset = table(k_clusters, dtype=torch.float32), table(k_clusters)
        self.rows, self.list = table(3), table(routed.pitch)
        self.out = torch.empty_like(q)

    def make_lists(self) -> None:
        """Exact keys of each row of blocks."""
        from svg_ear_compile.kernels.gpu import attention
        from svg_ear_compile.kernels.gpu.launch import CLUSTERS_PER_COPY

        groups, q_clusters, k_clusters = self.bias.shape
        counts = (0, self.q.shape[1], self.k.shape[1])
        keys = self.routed.k_sorted
        block_k = triton.next_power_of_2(k_clusters)
        attention.kv_offset_kernel[(q_clusters, groups)](
            self.routed.block_mask.flatten(0, 1), keys.starts, self.bias, self.offset, self.rows,
            *counts, q_clusters, k_clusters, BLOCK_K=block_k,
            num_warps=attention._row_warps(block_k),
        )  # fmt: skip
        copies = triton.cdiv(k_clusters, CLUSTERS_PER_COPY)
        attention.kv_indices_kernel[(q_clusters, copies, groups)](
            self.offset, keys.starts, keys.order, self.list, *counts, self.k.shape[2], q_clusters,
            k_clusters, self.list.shape[2], BLOCK_J=CLUSTERS_PER_COPY, BLOCK_N=32,
        )  # fmt: skip

    def attend(self, tiles: tuple[Tensor, Tensor], correction: Tensor, weight: Tensor) -> Tensor:
        """The present attend stage, before the correction of values."""
        from svg_ear_compile.kernels.gpu.attend_wgmma import attend_wgmma_kernel
        from svg_ear_compile.kernels.gpu.launch import token_strides

        q, k, v, queries, keys = self.q, self.k, self.v, self.routed.q_sorted, self.routed.k_sorted
        groups, q_clusters, k_clusters = self.bias.shape
        attend_wgmma_kernel[(tiles[0].shape[1], groups)](
            q, k, v, self.out, self.bias, *tiles, queries.order, queries.starts, keys.order,
            keys.starts, self.list, self.rows, self.keys, self.values, self.bias, correction,
            weight, *token_strides(q), *token_strides(k), *token_strides(v),
            *token_strides(self.out), 0, q.shape[1], k.shape[1], q.shape[2], k.shape[2],
            q_clusters, k_clusters, tiles[0].shape[1], self.list.shape[2], self.scale,
            D=DIM, BLOCK_M=192, BLOCK_N=64, CORRECTED=True, WRITE_LSE=False, num_warps=4, STAGES=4,
        )  # fmt: skip
        return self.out


def median_ms(call: Callable[[], object], repeats: int) -> float:
    from svg_ear_compile.cost_model.timing import busy_ms

    return statistics.median(busy_ms(call, repeats))


# Largest relative difference from the present kernel on the same rounded inputs: what differs is
# the order of sums, and with e4m3 values the rounding of weights, 2**-4 at most and 0.02 on average.
GATES = {False: 8e-3, True: 5e-2}


def measure(
    bench: Bench, name: str, repeats: int, dense_ms: float, dense_out: Tensor
) -> dict[str, Any]:
    """A row of the table; "present" is the kernel as it is."""
    from svg_ear_compile.kernels.gpu.attention import query_tiles

    variant = VARIANTS.get(name)
    routed = bench.routed(variant)
    tokens = bench.q.shape[2]
    correction = bench.correction(routed)
    weight = torch.empty_like(correction)
    pairs = bench.pairs(routed)
    dense_flop = 4.0 * bench.q.shape[1] * tokens**2 * DIM
    row: dict[str, Any] = {"name": name, "density": bench.plan.density}
    present_tiles = query_tiles(routed.q_sorted, tokens, 192)
    scales = scales_of(bench.k, bench.v, variant or Variant(False, False, 16, 4, 4, 3))
    present = Present(bench, routed, variant, scales)
    present.make_lists()
    want = present.attend(present_tiles, correction, weight)
    want_weight = weight.clone()
    if variant is None:
        row["error"] = relative_error(want, dense_out)
        row["lists_ms"] = median_ms(present.make_lists, repeats)

        def call() -> Tensor:
            return present.attend(present_tiles, correction, weight)
    else:
        row |= asdict(variant)
        tiles = query_tiles(routed.q_sorted, tokens, 64 * variant.consumers)
        copies = PageCopies(bench.q, bench.k, bench.v, routed, variant)
        copies.make(scales)
        copies.make_lists()
        got = copies.attend(scales, tiles, correction, weight.fill_(math.nan), bench.scale)
        row["gate"] = relative_error(got, want)
        row["weight_gate"] = relative_error(weight, want_weight)
        row["error"] = relative_error(got, dense_out)
        row["empty_places"] = copies.empty_share()
        again = got.clone()
        copies.attend(scales, tiles, correction, weight, bench.scale)
        row["same_twice"] = bool(torch.equal(again, copies.out))
        if not (row["gate"] < GATES[variant.v8] and row["same_twice"]):
            return row  # no time for a wrong result
        row["lists_ms"] = median_ms(copies.make_lists, repeats)
        row["copies_ms"] = median_ms(lambda: copies.make(scales), repeats)
        row["scales_ms"] = median_ms(lambda: scales_of(bench.k, bench.v, variant), repeats)

        def call() -> Tensor:
            return copies.attend(scales, tiles, correction, weight, bench.scale)

    row["attend_ms"] = median_ms(call, repeats)
    parts = (
        "attend_ms",
        "lists_ms",
        "copies_ms",
        *(["scales_ms"] if variant and variant.k8 else []),
    )
    row["together_ms"] = sum(row.get(part, 0.0) for part in parts)
    useful = 4.0 * pairs * DIM / row["attend_ms"]
    row["useful_tflops"] = useful / 1e9
    row["over_dense_rate"] = useful / (dense_flop / dense_ms)
    row["density_reached"] = 4.0 * pairs * DIM / dense_flop
    return row


def said(row: dict[str, Any]) -> str:
    """A row as one line."""
    text = f"{row['name']:22s} d={row['density']:.2f} "
    if "gate" in row:
        text += f"gate {row['gate']:.1e} weights {row['weight_gate']:.1e} "
        text += f"empty {row['empty_places']:5.1%} "
    if "attend_ms" not in row:
        return text + f"FAILED THE GATE (same twice: {row.get('same_twice')})"
    text += f"attend {row['attend_ms']:7.2f} ms useful {row['useful_tflops']:4.0f} TF/s "
    text += f"({row['over_dense_rate']:.3f} of dense) lists {row['lists_ms']:.2f}"
    if "copies_ms" in row:
        text += f" work {row['useful_tflops'] / (1 - row['empty_places']):.0f} TF/s"
        text += f" copies {row['copies_ms']:.2f} scales {row['scales_ms']:.2f}"
    text += f" together {row['together_ms']:.2f} ms, error {row['error']:.4f}"
    return text


def work(given: argparse.Namespace) -> None:
    """Measure the named variants in this process; prints lines for `supervise`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    print("START setup", flush=True)
    benches = [
        Bench(given.heads, given.tokens, density)
        for density in map(float, given.densities.split(","))
    ]
    q, k, v = benches[0].q, benches[0].k, benches[0].v

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense_ms = median_ms(dense, 3)
        dense_out = dense()
    rate = 4e-9 * given.heads * given.tokens**2 * DIM / dense_ms
    found = {"name": "cudnn", "dense_ms": dense_ms, "dense_tflops": rate}
    print("ROW " + json.dumps(found), flush=True)
    for name in given.names.split(","):
        for bench in benches:
            print(f"START {name}", flush=True)
            row = measure(bench, name, given.repeats, dense_ms, dense_out)
            print("ROW " + json.dumps(row), flush=True)
            torch.cuda.empty_cache()


def supervise(given: argparse.Namespace) -> None:
    """Compile side by side, then run workers until every variant has its rows or failed."""
    ends = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    base = [sys.executable, "-u", "-m", "benchmarks.attention.sorted_copies"]
    names = given.names.split(",")
    compiled = [n for n in names if n in VARIANTS]
    began = time.monotonic()
    parts = [compiled[i::8] for i in range(8) if compiled[i::8]]
    asked = [["--warm", "--names", ",".join(part)] for part in parts]
    # One head of the same length compiles what the present operator runs.
    asked.append(["--work", "--names", "present", "--heads", "1", "--tokens", str(given.tokens)])
    compilers = [subprocess.Popen([*base, *more], stdout=subprocess.DEVNULL) for more in asked]
    for compiler in compilers:
        try:
            compiler.wait(timeout=max(0.1, began + 90.0 - time.monotonic()))
        except subprocess.TimeoutExpired:
            compiler.kill()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    left = list(names)
    while left and time.monotonic() < ends:
        options = ["--heads", str(given.heads), "--tokens", str(given.tokens)]
        options += ["--densities", given.densities, "--repeats", str(given.repeats)]
        worker = subprocess.Popen(
            [*base, "--work", "--names", ",".join(left), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
        current, patience, said_last = "setup", 90.0, []
        while True:
            try:
                line = lines.get(timeout=max(0.1, min(patience, ends - time.monotonic())))
            except queue.Empty:
                print(f"{current}: no word for {patience:.0f} s, ended", flush=True)
                break
            if line is None:
                break
            if line.startswith("START "):
                current = line.split()[1]
                patience = 90.0 if current == "setup" else given.patience
                # What was done before is not done again.
                left = left[left.index(current) :] if current in left else left
            elif line.startswith("ROW "):
                row = json.loads(line[4:])
                rows.append(row)
                print(said(row) if "density" in row else json.dumps(row), flush=True)
                record = {**provenance(), "heads": given.heads, "rows": rows}
                (given.out / "sorted_copies.json").write_text(json.dumps(record, indent=1))
            else:
                said_last = [*said_last[-25:], line.rstrip()]
        worker.kill()
        if worker.wait() == 0:
            left = []
        else:
            print(f"{current} did not end well; its last words:", *said_last, sep="\n", flush=True)
            rows.append({"name": current, "failed": said_last})
            left = left[1:] if current in left else []
    if left:
        print("no time for " + ", ".join(left), flush=True)


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    worker.wait()
    lines.put(None)


def tiny(variant: Variant, device: str) -> tuple[PageCopies, Scales]:
    """Copies of a small problem whose clusters are arbitrary, to compile for."""
    from types import SimpleNamespace

    from svg_ear_compile.kernels.gpu.kmeans import SortedClusters, sort_by_label

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


def compile_all(names: list[str]) -> None:
    """Compile for sm_90 without a GPU; prints registers, spills and shared memory."""
    from types import SimpleNamespace

    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tests.kernels.aot_compiler import resource_usage

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: "cuda90",
            get_current_stream=lambda device: 0, get_active_torch_device=lambda: torch.device("cpu"),
        )
    )  # fmt: skip
    for name in names:
        began = time.perf_counter()
        kernel = compile_variant(VARIANTS[name], "cpu")
        registers, spilled = resource_usage(kernel)
        print(
            f"{name:22s} {registers} registers, {spilled} B spilled, "
            f"{kernel.metadata.shared} B shared, {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        if os.environ.get("DUMP"):
            for kind in ("ptx", "cubin"):
                data = kernel.asm[kind]
                data = data.encode() if isinstance(data, str) else data
                Path(os.environ["DUMP"], f"{name}.{kind}").write_bytes(data)


def main() -> None:
    """Parse the command line and run, or compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default="present," + ",".join(VARIANTS))
    parser.add_argument("--densities", default="0.2,0.1")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=215.0, help="everything ends by then")
    parser.add_argument("--patience", type=float, default=25.0, help="seconds for one row")
    parser.add_argument("--out", type=Path, default=Path("sorted_copies"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        compile_all([n for n in given.names.split(",") if n in VARIANTS])
    elif given.warm:
        for name in given.names.split(","):
            compile_variant(VARIANTS[name], "cuda")
    elif given.work:
        work(given)
    else:
        supervise(given)


if __name__ == "__main__":
    main()
