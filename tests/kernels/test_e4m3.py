"""``precision="fp8"``: what is rounded, to which numbers, and what is left as it is."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CPU, random_qkv

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.clusters import Clusters
from svg_ear_compile.kernels.e4m3 import in_e4m3
from svg_ear_compile.kernels.gpu.launch import without_e4m3
from svg_ear_compile.kernels.kinds import token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan

PLAN = AttentionPlan(density=0.4, q_clusters=3, k_clusters=7, precision="fp8")
# All finite numbers of e4m3: 2^-9 and its multiples below 2^-6, then 8 for each power of two.
NUMBERS = torch.tensor(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
)


def one_cluster(tokens: int, padding: int) -> Clusters:
    """Key clusters of one head: all tokens in cluster 0 of mean 0, the last ones padding."""
    labels = torch.zeros(1, 1, tokens, dtype=torch.int64)
    labels[..., tokens - padding :] = 2
    return Clusters(labels, torch.zeros(1, 1, 1, 16), torch.tensor([[[tokens - padding]]]))


def test_numbers_become_the_nearest_of_e4m3_at_a_power_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 33, 16, generator=generator) * 0.1
    x[0, 0, 3] *= 1e-4  # its own scale as a query, nearly nothing among the keys
    x[0, 0, 5] = 0.0
    found = in_e4m3(x, x, one_cluster(33, 0))
    for got, scaled in ((found.q, x.abs().amax(-1, keepdim=True)), (found.k, x.abs().max())):
        # The largest number lies at 128 to 256.
        scale = torch.exp2(torch.floor(torch.log2(scaled.clamp(min=1e-30))) - 7)
        steps = ((x / scale).abs().unsqueeze(-1) - NUMBERS).abs()
        nearest = NUMBERS[steps.argmin(-1)] * x.sign() * scale
        distance, least = (got - x).abs(), (nearest - x).abs()
        torch.testing.assert_close(distance, least, rtol=1e-6, atol=0)  # a tie has two nearest
    assert (found.q - x).norm() > 0.01 * x.norm()
    assert (found.q[0, 0, 3] - x[0, 0, 3]).norm() < 0.05 * x[0, 0, 3].norm()


def test_padding_has_no_part_in_the_scale_and_what_is_not_finite_becomes_nan() -> None:
    q, k, _ = random_qkv(1, 1, (1, 1), (9, 40), 16, torch.float32, "cpu")
    clean = in_e4m3(q, k, one_cluster(40, 4)).k
    k[0, 0, -1] = 1e30
    k[0, 0, 2, 5] = torch.inf
    found = in_e4m3(q, k, one_cluster(40, 4)).k
    clean[0, 0, 2, 5] = torch.nan
    assert torch.equal(found[0, 0, :-1].nan_to_num(7.0), clean[0, 0, :-1].nan_to_num(7.0))


def test_a_part_that_all_keys_have_in_common_costs_nothing() -> None:
    """The definition takes the mean off; without that the errors would be 30 times as large."""
    q, k, v = random_qkv(2, 1, (2, 1), (70, 61), 32, torch.float32, "cpu")
    common = 100 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    settings = {"return_lse": True}
    plain = CPU(q, k, v, PLAN, **settings)
    blocks = {"blocks": plain.blocks}
    shifted_centroids = (plain.queries.centroids, plain.keys.centroids + common)
    shifted = CPU(q, k + common, v, PLAN, centroids=shifted_centroids, **blocks, **settings)
    torch.testing.assert_close(shifted.out, plain.out, rtol=0, atol=2e-3)
    by_hand = plain.lse + 32**-0.5 * (q @ common)
    torch.testing.assert_close(shifted.lse, by_hand, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("compensation", ["gaussian", "centroid"])
def test_only_exact_logits_are_rounded(compensation: str) -> None:
    q, k, v = random_qkv(4, 1, (4, 2), (70, 61), 64, torch.float16, "cpu")
    kinds = token_kinds(None, None, torch.arange(61).unsqueeze(0) > 57)
    errors = {}
    for density in (0.0, 0.5):
        plans = [
            AttentionPlan(
                density=density, q_clusters=3, k_clusters=7, precision=p, compensation=compensation  # type: ignore[arg-type]
            )
            for p in ("16", "fp8")
        ]  # fmt: skip
        exact, rounded = (CPU(q, k, v, plan, kinds=kinds) for plan in plans)
        assert torch.equal(exact.block_mask, rounded.block_mask)
        assert torch.equal(exact.keys.labels, rounded.keys.labels)
        errors[density] = (rounded.out - exact.out).float().norm() / exact.out.float().norm()
    assert 1e-3 < errors[0.5] < 0.06
    assert errors[0.0] < errors[0.5]
    plans = [AttentionPlan(density=0.0, precision=p) for p in ("16", "fp8")]  # type: ignore[arg-type]
    outs = [CPU(q, k, v, plan).out for plan in plans]
    torch.testing.assert_close(*outs, rtol=0, atol=0)  # no key is exact


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "gfx942", "sm_75"])
def test_gpus_without_products_in_e4m3_are_named(architecture: str) -> None:
    missing = without_e4m3(architecture)
    assert missing == (
        f'precision="fp8" needs an NVIDIA GPU of sm_89 or later, this one is {architecture}'
    )


@pytest.mark.parametrize("architecture", ["", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_other_devices_take_fp8(architecture: str) -> None:
    assert without_e4m3(architecture) is None


def test_the_choice_knows_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from svg_ear_compile.kernels.gpu import attention

    monkeypatch.setattr(attention, "architecture", lambda device: "sm_80")
    q, k, v = random_qkv(0, 1, (1, 1), (9, 9), 64, torch.float16, "cpu")
    with pytest.raises(ValueError, match=r"serves this call \(triton: .*sm_89 or later"):
        registry.choose(q, k, v, "triton", "fp8")
