"""What the variants are measured against: a shape, its clusters and blocks, the present kernel."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.attention.data import video_like
from benchmarks.attention.inputs import plan_of
from benchmarks.attention.sorted_copies.pages import Scales, power_of_two, rounded
from benchmarks.attention.sorted_copies.variants import DIM, Variant
from svg_ear_compile.kernels.clusters import QueryTile
from svg_ear_compile.kernels.gpu import attention
from svg_ear_compile.kernels.gpu.attend_wgmma import attend_wgmma_kernel
from svg_ear_compile.kernels.gpu.kmeans import kmeans
from svg_ear_compile.kernels.gpu.launch import CLUSTERS_PER_COPY, token_strides
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED


class Bench:
    """One shape: inputs, clusters for every kind of tile, the present kernel, dense attention."""

    def __init__(self, heads: int, tokens: int, density: float, device: str = "cuda") -> None:

        self.q, self.k, self.v = video_like(1, heads, tokens, DIM, device=device)
        self.scale = DIM**-0.5
        self.plan = plan_of("default", "gaussian", density)
        config = attention._config(self.q, True)
        cold = self._routed(config.query_tile, None, None)
        self.centroids = (cold.queries.centroids, cold.keys.centroids)
        self.known: dict[tuple[int, int], Any] = {}

    def _routed(self, query_tile: Any, key_tile: Any, centroids: Any) -> Any:
        """`cluster_and_route`, with key clusters aligned to `key_tile` too."""

        def clustered(x: Tensor, kinds: Any, init: Any, rounds: int, config: Any,
                      metric: Any = None, tile: Any = None) -> Any:  # fmt: skip
            wanted = query_tile if tile is not None else key_tile
            return kmeans(x, kinds, init, rounds, config, metric, wanted)

        with mock.patch.object(attention, "kmeans", clustered):
            return attention.cluster_and_route(
                self.q, self.k, self.v, self.plan, kinds=ALL_CLUSTERED, scale=self.scale,
                centroids=centroids, blocks=None, on_hopper=True,
            )  # fmt: skip

    def routed(self, variant: Variant | None) -> Any:
        """Clusters and blocks for the tiles of a variant, or of the present kernel."""

        rows = 64 * (variant.consumers if variant else 3)
        page = variant.page if variant and variant.trim else 0
        if (rows, page) not in self.known:
            key_tile = QueryTile(page, page) if page else None
            self.known[rows, page] = self._routed(QueryTile(64, rows), key_tile, self.centroids)
        return self.known[rows, page]

    def correction(self, routed: Any) -> Tensor:
        """(G, N) float32 of the Gaussian form."""

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
            mean, by_head = scales.k_mean[:, None], scales.k[:, None, None]
            q = rounded(q, power_of_two(q.abs().amax(-1, keepdim=True)))
            # Exact in the dtype of q: e4m3 times powers of two.
            k = rounded(k - mean.unflatten(0, k.shape[:2]), by_head.unflatten(0, k.shape[:2])).to(
                q.dtype
            )
            keys = rounded(keys - mean, by_head).to(q.dtype)
        if variant and variant.v8:
            v = rounded(v, scales.v[:, None].unflatten(0, v.shape[:2]))
            values = rounded(values, scales.v[:, None])
        self.q, self.k, self.v, self.keys, self.values = q, k, v, keys, values
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
