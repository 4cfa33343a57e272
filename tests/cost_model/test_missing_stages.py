"""Stages that no sample ran: they are fitted as nothing, and scaled as the prior has them."""

from __future__ import annotations

from calibrations import even, sample_of

from svg_ear_compile.cost_model.calibration import Efficiency
from svg_ear_compile.cost_model.fit import fit, scale
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.kernels.plan import AttentionPlan


def test_a_stage_that_no_sample_ran_is_fitted_as_nothing_and_scaled_as_the_prior_says() -> None:
    base = even()
    samples = [
        sample_of(
            base,
            AttentionShape(1, heads, heads, 9000, 9000, 128, "bfloat16"),
            AttentionPlan(compensation="centroid"),
        )
        for heads in (8, 16)
    ]
    fitted = fit(samples, base.roofs, base.device)["bfloat16/128"]
    assert fitted["correction"] == Efficiency(0.0, 0.0, 0.0)
    assert fitted["attend"] != Efficiency(0.0, 0.0, 0.0)
    assert scale(base, samples, base.roofs) == base.stages
