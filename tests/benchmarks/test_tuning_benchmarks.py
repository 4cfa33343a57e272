"""The scripts behind the cost model: fits that find what was put in, inputs of the right shape."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.tuning import wan
from benchmarks.tuning.local_error import (
    CLUSTER_SIZES,
    DENSITIES,
    FORMS,
    Row,
    fit_power_law,
)
from benchmarks.tuning.video_dit import forward_error, show
from benchmarks.video_dit.attention import attention_answered_by
from benchmarks.video_dit.demo import WEIGHTS
from benchmarks.video_dit.model import VideoDiT
from svg_ear_compile import Budget
from svg_ear_compile.fingerprint import fingerprint_of


def rows(noise: float) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer, density, (q, k), form in itertools.product(
        range(4), DENSITIES, CLUSTER_SIZES, FORMS
    ):
        error = (1 - density) * math.exp(-5 + layer / 10) * density**-0.5 * q**0.4 * k**0.3
        error *= math.exp(noise * float(torch.randn((), generator=generator)))
        found.append(Row(2304, layer, 3, 0, density, form, q, k, density, error))  # type: ignore[arg-type]
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


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BUDGETS = sorted(RESULTS.rglob("budget-*.json"))
PROOFS = sorted(
    path
    for path in RESULTS.rglob("*.json")
    if path.stem in ("self", "joint") and {"max_error", "tuning"} & {*path.parts}
)


@pytest.mark.parametrize("path", BUDGETS, ids=lambda path: "/".join(path.parts[-2:]))
def test_committed_budgets_are_read_or_name_what_is_gone(path: Path) -> None:
    text = path.read_text()
    if "first_order" in text or "second_order" in text:
        with pytest.raises(ValueError, match="has to be tuned again"):
            Budget.load(path)
        return
    budget, model = Budget.load(path), VideoDiT.from_pretrained(WEIGHTS)
    if budget.fingerprint.model == type(model).__name__:
        budget.check_model(fingerprint_of(model))


@pytest.mark.parametrize("path", PROOFS, ids=lambda path: "/".join(path.parts[-3:]))
def test_committed_proofs_are_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(path.read_text())
    show(record)
    shown = capsys.readouterr().out
    for point in record["points"]:
        assert f"{point['gain_db']:+.2f}" in shown
    if "max_error" in record:
        assert f"max_error {record['max_error']['objective']:g}: kept on" in shown


def test_a_target_is_shown_beside_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    show({"points": [], "speedup": {"objective": 1.25, "measured": {"speedup": 1.3}}})
    assert "target_speedup 1.25: 1.300 (+4.0%)" in capsys.readouterr().out


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
