"""The scripts behind the cost model: fits that find what was put in, inputs of the right shape."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.tuning import wan
from benchmarks.tuning.local_error import (
    CLUSTER_SIZES,
    DENSITIES,
    FORMS,
    Row,
    correlation,
    fit_power_law,
)
from benchmarks.tuning.residual import residual, spread
from benchmarks.tuning.video_dit import forward_error
from benchmarks.video_dit.attention import attention_answered_by
from benchmarks.video_dit.demo import WEIGHTS
from benchmarks.video_dit.model import VideoDiT
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.fingerprint import fingerprint_of
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Clusters


def rows(noise: float) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer, density, (q, k), form in itertools.product(
        range(4), DENSITIES, CLUSTER_SIZES, FORMS
    ):
        error = (1 - density) * math.exp(-5 + layer / 10) * density**-0.5 * q**0.4 * k**0.3
        error *= math.exp(noise * float(torch.randn((), generator=generator)))
        found.append(Row(2304, layer, 3, 0, density, form, q, k, density, error, error / 2))  # type: ignore[arg-type]
    return found


def test_the_law_that_made_the_rows_is_found() -> None:
    law = fit_power_law(rows(0.0), "gaussian")
    assert law["density"] == pytest.approx(-0.5)
    assert law["queries_per_cluster"] == pytest.approx(0.4)
    assert law["keys_per_cluster"] == pytest.approx(0.3)
    assert law["intercept"] == pytest.approx(-5 + 0.15)
    assert law["rms_log_residual"] == pytest.approx(0, abs=1e-6)
    noisy = fit_power_law(rows(0.2), "gaussian")
    assert noisy["rms_log_residual"] == pytest.approx(0.2, rel=0.3)


def test_an_estimate_that_is_half_the_error_goes_along_with_it() -> None:
    for found in correlation(rows(0.1)).values():
        assert found["pearson_of_logs"] == pytest.approx(1)
        assert found["spearman_over_calls_at_one_plan"] == pytest.approx(1)
        assert found["median_error_over_estimate"] == pytest.approx(2)


RECORDED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("budget-*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: "/".join(path.parts[-2:]))
def test_recorded_budgets_are_read_or_name_what_is_gone(path: Path) -> None:
    text = path.read_text()
    if "first_order" in text or "second_order" in text:
        with pytest.raises(ValueError, match="has to be tuned again"):
            budgets.load(path)
        return
    budget, model = budgets.load(path), VideoDiT.from_pretrained(WEIGHTS)
    if budget.fingerprint.model == type(model).__name__:
        budget.check_model(fingerprint_of(model))


def test_forward_error_is_relative() -> None:
    x = torch.randn(5, 7)
    assert forward_error(x, x) == 0
    assert forward_error(1.5 * x, x) == pytest.approx(0.5)


def test_attention_is_answered_only_inside() -> None:
    q = torch.randn(1, 1, 5, 8)
    attention = torch.nn.functional.scaled_dot_product_attention

    def answer(dense, q, k, v):
        return dense(q, k, v) + torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with attention_answered_by(answer):
        outs = [
            torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=0.3) for _ in range(2)
        ]
    for out in outs:
        torch.testing.assert_close(out, attention(q, q, q, scale=0.3) + attention(q, q, q))
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_calls_of_wans_shape_run() -> None:
    model, calls = wan.small()
    assert [float(call.kwargs["timestep"]) for call in calls] == list(wan.TIMESTEPS)
    with torch.no_grad():
        (out,) = model(*calls[0].args, **calls[0].kwargs)
    assert out.shape == calls[0].args[0].shape
    assert out.isfinite().all()


def scattered(place: Tensor, noise: float) -> Tensor:
    """(1, 2, N, 32) tokens around 8 places, `noise` away from them."""
    centers = torch.randn(1, 2, 8, 32)
    return centers.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, 32)) + noise * torch.randn(
        1, 2, place.shape[2], 32
    )


@given(st.integers(0, 99))
def test_the_estimate_is_nothing_where_compensation_is_exact(seed: int) -> None:
    torch.manual_seed(seed)
    places = [torch.randint(8, (1, 2, 61)) for _ in range(2)]

    def estimate(q_noise: float, k_noise: float, v_noise: float, exact: bool = False) -> float:
        q = scattered(places[0], q_noise)
        k, v = (scattered(places[1], noise) for noise in (k_noise, v_noise))
        queries, keys = (
            Clusters(place, *reference.cluster_means(x, place, 8))
            for place, x in zip(places, (q, k), strict=True)
        )
        taken = torch.full((1, 2, 8, 8), exact)
        return float(residual(q, k, v, queries, keys, taken, 32**-0.5).max())

    assert estimate(1.0, 1.0, 1.0) > 1e-2
    assert estimate(1.0, 1.0, 1.0, exact=True) == 0.0
    # Keys of a block that coincide, or its values.
    assert estimate(1.0, 0.0, 1.0) < 1e-5
    assert estimate(1.0, 1.0, 0.0) < 1e-5


@given(st.integers(0, 99))
def test_the_estimate_falls_with_density_as_the_error_does(seed: int) -> None:
    torch.manual_seed(seed)
    place = torch.randint(8, (1, 2, 240))
    q, k, v = (scattered(place, 1.0) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    estimates, errors = [], []
    for density in (0.05, 0.3, 0.8):
        plan = AttentionPlan(density=density, q_clusters=12, k_clusters=30)
        found = reference.sparse_attention(q, k, v, plan)
        estimates.append(
            float(residual(q, k, v, found.queries, found.keys, found.exact, 32**-0.5).mean())
        )
        errors.append(float((found.out - dense).norm() / dense.norm()))
    assert estimates == sorted(estimates, reverse=True)
    assert errors[0] > errors[-1]


def test_spread_is_the_distance_from_the_mean() -> None:
    x = torch.tensor([[[[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [9.0, 9.0]]]])
    labels = torch.tensor([[[0, 0, 1, 3]]])  # the last is padding: C + 1
    found = Clusters(labels, torch.zeros(1, 1, 2, 2), torch.tensor([[[2, 1]]]))
    torch.testing.assert_close(spread(x, found), torch.tensor([[[1.0, 0.0]]]))
