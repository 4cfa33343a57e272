"""Inputs of the attention tests, the forms under test, and the float64 oracle of one result."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels import reference, registry
from svg_ear_compile.kernels.kinds import TokenKinds, token_kinds
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
    """q (B, H, N_q, D), k and v (B, H_kv, N_k, D) whose tokens are near a few centers.

    Layouts: "bhsd" is contiguous; "bshd" is views of (B, N, H, D). "fused" is slices of one tensor
    (B, N, 3, H, D) if q and k have the same shape, else slices of (B, N, H, 2 D). "strided" is
    every second element of the last dim of "bshd" memory; "bhds" is views of (B, H, D, N).
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
    """Key-padding mask of the shape (*`shape`, 1, N_k), where `shape` is (B|1, H_kv|1)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [full if wide else 1 for wide, full in zip(shape, kv_shape, strict=True)]
    mask = torch.rand(*sizes, 1, keys, generator=generator) < 0.75
    mask[..., 0] = True
    return mask.to(device)


def random_kinds(
    seed: int,
    mask: Tensor | None,
    batch: int,
    tokens: tuple[int, int],
    exact: tuple[float, float],
    device: str,
) -> TokenKinds:
    """Kinds of (N_q, N_k) tokens of which these shares, anywhere, are always exact."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor | None] = []
    clustered = []
    for count, share in zip(tokens, exact, strict=True):
        drawn = torch.rand(batch if seed % 2 else 1, count, generator=generator) < share
        drawn[:, 0] = False
        found.append(drawn.to(device) if share else None)
        clustered.append(count - int(drawn.sum(-1).min()))
    return token_kinds(mask, found[0], found[1], (clustered[0], clustered[1]))


def on_host(clusters: Clusters) -> Clusters:
    """Clusters in float64 and int64 on the CPU."""
    labels, centroids, sizes = (t.cpu() for t in clusters)
    return Clusters(labels.long(), centroids.double(), sizes.long())


def per_query_head(clusters: Clusters, groups: int) -> Clusters:
    return Clusters(*(t.repeat_interleave(groups, 1) for t in clusters))


@dataclass(frozen=True)
class Oracle:
    """Scores and attention by the definition for the labels of a result, in float64 on the CPU.

    Kernels store query centroids in the dtype of q, so the oracle's are rounded to it too.
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
        q_64, k_64, v_64 = (t.cpu().double() for t in (q, k, v))
        k_64, v_64 = (t.repeat_interleave(groups, 1) for t in (k_64, v_64))
        scores = reference.score_blocks(queries, keys, k_64, v_64, scale)
        return Oracle(q_64, k_64, v_64, queries, keys, scale, plan, scores)

    def attend(self, block_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp for a block mask."""
        return self._attend(block_mask, torch.float64, None)

    def attend_stored_in(self, block_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`attend` in float32, with proxy tokens, value corrections and output rounded to `dtype`.

        An implementation whose tensors have this dtype cannot avoid these rounding errors.
        """
        return self._attend(block_mask, torch.float32, dtype)

    def _attend(
        self, block_mask: Tensor, computed: torch.dtype, stored: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        def rounded(t: Tensor) -> Tensor:
            return t.to(computed) if stored is None else t.to(stored).to(computed)

        value_means, _ = reference.cluster_means(self.v, self.keys.labels, block_mask.shape[3])
        proxies = reference.proxy_tokens(self.keys, value_means)
        corrected = None
        if self.plan.compensation == "gaussian":
            found = reference.corrections(
                self.q, self.k, self.v, self.queries, self.keys, value_means, self.scale
            )
            corrected = Corrections(found.logit.to(computed), rounded(found.value))
        stored_proxies = ProxyTokens(
            rounded(proxies.keys), rounded(proxies.values), proxies.bias.to(computed)
        )
        out, lse = reference.softmax_over(
            *(t.to(computed) for t in (self.q, self.k, self.v)),
            self.queries.labels, self.keys.labels, block_mask.cpu(),
            stored_proxies, self.scale, corrected,
        )  # fmt: skip
        if corrected is not None and self.q.shape[2] == self.k.shape[2]:
            out, lse = reference.with_own_tokens(
                out, lse, *(t.to(computed) for t in (self.q, self.k, self.v)),
                self.queries, self.keys, block_mask.cpu(), stored_proxies, self.scale, corrected,
            )  # fmt: skip
        return rounded(out), lse


def assert_within_rounding(actual: Tensor, wanted: Tensor, yardstick: Tensor, ulp: float) -> None:
    """Maximum and RMS error at most twice the yardstick's plus two units in the last place."""
    error = (actual.cpu().double() - wanted).abs()
    allowed = (yardstick.double() - wanted).abs()
    assert error.isfinite().all()
    assert error.max() <= 2 * allowed.max() + 2 * ulp * wanted.abs().max()
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= 2 * allowed_rms + ulp * wanted.square().mean().sqrt()
