"""Inputs of the attention tests, the forms under test, and the float64 answer to one result."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels import reference, registry
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Clusters, Corrections, ProxyTokens, Result

SEEDS = st.integers(0, 2**31 - 1)
LAYOUTS = ("bhsd", "bshd", "fused", "strided", "bhds")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="Triton kernels run on the CUDA device here, not interpreted"
)


@dataclass(frozen=True)
class Form:
    """An implementation and the device it runs on: "cpu", "interpreter" or "cuda"."""

    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def is_triton(self) -> bool:
        return self.name != "cpu"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, **more) -> Result:
        name = "cpu" if not self.is_triton else "triton" if self.name == "interpreter" else None
        found = registry.get(name) if name else registry.choose(q, k, v)
        return found.sparse_attention(q, k, v, plan, **more)


CPU, INTERPRETER, CUDA = Form("cpu"), Form("interpreter"), Form("cuda")
FORMS = (
    pytest.param(CPU, id="cpu"),
    pytest.param(INTERPRETER, id="interpreter", marks=needs_interpreter),
    pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
)


def random_qkv(
    seed: int,
    batch: int,
    heads: tuple[int, int],
    tokens: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    device: str,
    layout: str = "bhsd",
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, N_q, D), k and v (B, H_kv, N_k, D) that gather around a few centers.

    Layouts: "bhsd" contiguous; "bshd" views of (B, N, H, D); "fused" slices of one (B, N, 3, H, D)
    where the shapes allow it, else of a wider (B, N, H, 2 D); "strided" every second element of
    the last dim of "bshd" memory; "bhds" views of (B, H, D, N).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int) -> Tensor:
        centers = torch.randn(batch, heads, 6, dim, generator=generator)
        pick = torch.randint(6, (batch, heads, tokens, 1), generator=generator)
        noise = torch.randn(batch, heads, tokens, dim, generator=generator)
        return (centers.gather(2, pick.expand(-1, -1, -1, dim)) + 0.5 * noise).to(device, dtype)

    found = [draw(heads[0], tokens[0]), draw(heads[1], tokens[1]), draw(heads[1], tokens[1])]
    if layout == "bshd":
        found = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in found]
    elif layout == "fused" and found[0].shape == found[1].shape:
        fused = torch.stack([t.transpose(1, 2) for t in found], 2)
        found = [t.transpose(1, 2) for t in fused.unbind(2)]
    elif layout == "fused":
        found = [torch.cat([t, t + 1], -1).transpose(1, 2).contiguous() for t in found]
        found = [t.transpose(1, 2)[..., :dim] for t in found]
    elif layout == "strided":
        found = [torch.stack([t, t + 1], -1).transpose(1, 2).contiguous() for t in found]
        found = [t.transpose(1, 2)[..., 0] for t in found]
    elif layout == "bhds":
        found = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in found]
    q, k, v = found
    return q, k, v


def random_mask(
    seed: int, shape: tuple[int, int], kv_shape: tuple[int, int], keys: int, device: str
) -> Tensor:
    """Key-padding mask (B|1, H_kv|1, 1, N_k); `shape` says which of B and H_kv are written out."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [full if wide else 1 for wide, full in zip(shape, kv_shape, strict=True)]
    mask = torch.rand(*sizes, 1, keys, generator=generator) < 0.75
    mask[..., 0] = True
    return mask.to(device)


def on_host(clusters: Clusters) -> Clusters:
    """The same in float64 and int64 on the CPU."""
    labels, centroids, sizes = (t.cpu() for t in clusters)
    return Clusters(labels.long(), centroids.double(), sizes.long())


def per_query_head(clusters: Clusters, groups: int) -> Clusters:
    return Clusters(*(t.repeat_interleave(groups, 1) for t in clusters))


@dataclass(frozen=True)
class Oracle:
    """What the definition makes of the labels that a result came with, in float64 on the CPU.

    The query centroids are those that the kernels can see, rounded to the dtype of q where they
    are stored in it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Clusters
    keys: Clusters
    scale: float
    plan: AttentionPlan
    scores: reference.BlockScores

    @staticmethod
    def of(
        form: Form, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, got: Result
    ) -> Oracle:
        groups = q.shape[1] // k.shape[1]
        queries, keys = on_host(got.queries), per_query_head(on_host(got.keys), groups)
        if form.is_triton:
            queries = queries._replace(centroids=queries.centroids.to(q.dtype).double())
        wide_q, wide_k, wide_v = (t.cpu().double() for t in (q, k, v))
        wide_k, wide_v = (t.repeat_interleave(groups, 1) for t in (wide_k, wide_v))
        scores = reference.score_blocks(queries, keys, wide_k, wide_v, scale)
        return Oracle(wide_q, wide_k, wide_v, queries, keys, scale, plan, scores)

    def attend(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp for these blocks."""
        return self._attend(exact, torch.float64, None)

    def attend_stored_in(self, exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same in float32, with what is stored between stages rounded to `dtype`.

        Rounded are the proxy tokens, and the output: this is the
        error that no implementation with tensors of `dtype` can avoid.
        """
        return self._attend(exact, torch.float32, dtype)

    def _attend(
        self, exact: Tensor, wide: torch.dtype, stored: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        def rounded(t: Tensor) -> Tensor:
            return t.to(wide) if stored is None else t.to(stored).to(wide)

        value_means, _ = reference.cluster_means(self.v, self.keys.labels, exact.shape[3])
        proxies = reference.proxy_tokens(self.keys, value_means)
        corrected = None
        if self.plan.compensation == "gaussian":
            found = reference.corrections(
                self.q, self.k, self.v, self.queries, self.keys, value_means, self.scale
            )
            corrected = Corrections(found.logit.to(wide), rounded(found.value))
        out, lse = reference.softmax_over(
            *(t.to(wide) for t in (self.q, self.k, self.v)),
            self.queries.labels, self.keys.labels, exact.cpu(),
            ProxyTokens(rounded(proxies.keys), rounded(proxies.values), proxies.bias.to(wide)),
            self.scale, corrected,
        )  # fmt: skip
        return rounded(out), lse


def assert_within_rounding(actual: Tensor, wanted: Tensor, yardstick: Tensor, ulp: float) -> None:
    """Maximum and RMS error at most twice the yardstick's and two units in the last place."""
    error = (actual.cpu().double() - wanted).abs()
    allowed = (yardstick.double() - wanted).abs()
    assert error.isfinite().all()
    assert error.max() <= 2 * allowed.max() + 2 * ulp * wanted.abs().max()
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= 2 * allowed_rms + ulp * wanted.square().mean().sqrt()
