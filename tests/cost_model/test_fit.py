"""Coefficients from measured calls: fitted, scaled, enough of them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from calibrations import even, h200, sample_of
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.priors import GPUS, prior_of
from svg_ear_compile.cost_model import json_record, prior
from svg_ear_compile.cost_model.calibrate import WORKLOADS, cases_of
from svg_ear_compile.cost_model.calibration import Calibration, Efficiency, Sample
from svg_ear_compile.cost_model.fit import compare, fit, scale
from svg_ear_compile.cost_model.latency import dense_ms, sparse_ms
from svg_ear_compile.cost_model.stages import STAGES, AttentionShape
from svg_ear_compile.kernels.plan import AttentionPlan

H200 = h200()
RECORDED = json_record.read(Calibration, prior.RECORDED / "nvidia-h200.json")


def needed_samples() -> list[Sample]:
    """The samples of the H200's calibration that are fitted when time is short."""
    calls = {
        (case.head_dim, case.tokens, case.plan.compensation, case.plan.q_clusters)
        for case in cases_of(WORKLOADS["cuda"])
        if case.needed
    }
    return [
        dataclasses.replace(sample, fitted=True)
        for sample in H200.samples
        if (sample.head_dim, sample.tokens, sample.compensation, sample.q_clusters) in calls
    ]


def test_what_a_calibration_needs_is_enough() -> None:
    needed = needed_samples()
    assert len(needed) == 12
    fitted = dataclasses.replace(H200, stages=fit(needed, H200.roofs, H200.device))
    errors = sorted(abs(each.op_error) for each in compare(fitted, H200.samples))
    assert errors[len(errors) // 2] < 0.05
    assert errors[-1] < 0.10
    for each in compare(fitted, H200.samples):
        assert each.dense_ms == pytest.approx(each.sample.dense_ms, rel=0.05)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_prior_of_any_gpu_scaled_by_two_calls_keeps_within_what_is_stated(
    gpu: str,
) -> None:
    two = [
        sample for sample in RECORDED.samples
        if (sample.heads, sample.compensation) == (24, "gaussian")
        and sample.tokens in (16384, 65536)
    ]  # fmt: skip
    assert len(two) == 2
    base = dataclasses.replace(prior_of(gpu), device=RECORDED.device)
    known = dataclasses.replace(RECORDED, stages=scale(base, two, RECORDED.roofs))
    compared = 0
    for each in compare(known, RECORDED.samples):
        tokens = each.sample.tokens
        default = AttentionPlan().clusters(tokens, tokens)
        if tokens < 16384 or default != (each.sample.q_clusters, each.sample.k_clusters):
            continue
        promised, had = each.op_ms / each.dense_ms, each.sample.op_ms / each.sample.dense_ms
        of_two = each.sample.head_dim == two[0].head_dim
        assert had < promised * (1.1 if of_two else 1.4)
        compared += 1
    assert compared == 24


def test_scaling_moves_each_stage_by_its_own_measurement_and_keeps_to_new_roofs() -> None:
    base = even()
    slower = {name: 1.0 + at for at, name in enumerate((*STAGES["cuda"], "dense"))}
    stages = {
        name: Efficiency(*(x * slower[name] for x in dataclasses.astuple(one)))
        for name, one in base.stages["bfloat16/128"].items()
    }
    truth = dataclasses.replace(base, stages={"bfloat16/128": stages})
    roofs = dataclasses.replace(
        base.roofs, flops={"bfloat16": 250.0}, bandwidth=500.0, launch_ms=0.01
    )
    shape = AttentionShape(1, 8, 8, 9000, 9000, 64, "bfloat16")
    found = scale(base, [sample_of(truth, shape, AttentionPlan())], roofs)
    scaled = dataclasses.replace(base, stages=found, roofs=roofs)
    for other in (shape, dataclasses.replace(shape, heads=24, kv_heads=24, head_dim=128)):
        plan = AttentionPlan(density=0.4, compensation="centroid")
        times = [sparse_ms(other, plan, known).stages for known in (truth, scaled)]
        assert times[0] == pytest.approx(times[1])
        assert dense_ms(other, truth) == pytest.approx(dense_ms(other, scaled))


coefficients = st.floats(0.5, 20)


@given(st.dictionaries(st.sampled_from([*STAGES["cuda"], "dense"]), st.tuples(*[coefficients] * 3)))
def test_a_fit_to_exact_times_predicts_times_that_it_never_saw(
    given_stages: dict[str, tuple[float, float, float]],
) -> None:
    base = even("cuda")
    known = {**base.stages["bfloat16/128"]}
    known |= {stage: Efficiency(*values) for stage, values in given_stages.items()}
    truth = dataclasses.replace(base, stages={"float32/64": known})

    def sample(tokens: int, plan: AttentionPlan, fitted: bool) -> Sample:
        shape = AttentionShape(1, 2, 2, tokens, tokens, 64, "float32")
        return sample_of(truth, shape, plan, fitted)

    seen = [
        sample(n, AttentionPlan(density=d, compensation=form, q_clusters=c, k_clusters=2 * c), True)
        for n, d, form, c in itertools.product(
            (999, 4000, 9000), (0.1, 0.4), ("gaussian", "centroid"), (7, 50)
        )
    ]
    found = dataclasses.replace(truth, stages=fit(seen, truth.roofs, truth.device))
    unseen = [sample(20_011, AttentionPlan(density=0.25, q_clusters=90), False)]
    for compared in compare(found, unseen):
        assert compared.op_error == pytest.approx(0, abs=0.02)
        assert compared.dense_ms == pytest.approx(compared.sample.dense_ms, rel=0.02)
