"""Candidates for less error: each is what it says on small recorded calls, and in generations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import candidate_clips, candidates
from benchmarks.fidelity.candidate_clips import Method
from benchmarks.fidelity.candidates import LAST_DENSE, RECORDED, Case, Study, cases_of, labels_of
from benchmarks.fidelity.scores import relative_error
from benchmarks.tuning.recorded import Recording
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import AttentionPlan

GRID = (3, 5, 7)
FORMS_WITH_COVARIANCE = (
    candidates.with_covariance(None),
    candidates.with_shared_covariance(),
    candidates.with_shared_covariance("isotropic"),
    candidates.with_shared_covariance("diagonal"),
)
FIRST_ORDER = candidates.BY_CASE["first order"]
PLAN = AttentionPlan(density=0.2, q_clusters=4, k_clusters=9)


def call_of(step: int, seed: int = 0) -> Recording:
    """One call of a smooth latent plus noise that changes with the step."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 1, 2, 105, 16, generator=generator)
    noise = torch.randn(3, 1, 2, 105, 16, generator=torch.Generator().manual_seed(step))
    return Recording(0, step, *(base + 0.02 * step * noise))


def cases(call: Recording, text: int = 0) -> list[Case]:
    return cases_of(call, labels_of(candidates.plain(call), PLAN, text), PLAN, text)


@pytest.mark.parametrize("text", [0, 6])
@pytest.mark.parametrize("form", ["first order", "paper"])
def test_a_case_is_the_definition(form: str, text: int) -> None:
    call = call_of(10)
    plan = AttentionPlan(
        **{**vars(PLAN), "compensation": "centroid" if form == "paper" else "first_order"}
    )
    wanted = reference.sparse_attention(call.q, call.k, call.v, plan, text=(0, text)).out
    for case, out in zip(cases(call, text), wanted[0], strict=True):
        found = candidates.BY_CASE[form](case, 0.2)
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [0, 6])
def test_every_candidate_keeps_the_area_and_stays_close(text: int) -> None:
    for case in cases(call_of(10), text):
        plain = relative_error(FIRST_ORDER(case, 0.2), case.dense)
        dropped = relative_error(candidates.BY_CASE["paper"](case, 0.0), case.dense)
        for name, candidate in candidates.BY_CASE.items():
            assert relative_error(candidate(case, 0.2), case.dense) < dropped, name
        oracle = candidates.BY_CASE["routing: true error (oracle)"](case, 0.2)
        assert relative_error(oracle, case.dense) < plain
        for route in (candidates.by_spreads, candidates.by_covariance, candidates.with_own_block):
            area = (route(case, 0.2) * case.head.k_sizes).sum(-1)
            assert (area >= 0.2 * (105 - text) - 1e-6).all()
        area = (candidates.over_rows(case, 0.2) * case.head.k_sizes).sum(-1) @ case.head.q_sizes
        assert float(area) >= 0.2 * (105 - text) ** 2 - 1e-3


def test_the_covariance_of_full_rank_is_the_whole_one_and_helps() -> None:
    for case in cases(call_of(10)):
        exact = case.by_error(0.1)
        whole = candidates.with_covariance(None)(case, exact)
        full = candidates.with_covariance(16)(case, exact)
        torch.testing.assert_close(full, whole, rtol=1e-3, atol=1e-4)
        errors = [relative_error(out, case.dense) for out in (whole, FIRST_ORDER(case, 0.1))]
        assert errors[0] < errors[1]


def test_shared_covariance_is_the_whole_one_where_weights_within_blocks_are_equal() -> None:
    call = call_of(10)
    flat = replace(call, q=1e-3 * call.q)  # logits near zero: a block's tokens weigh the same
    for case in cases(flat):
        exact = case.by_error(0.1)
        outs = [form(case, exact) for form in FORMS_WITH_COVARIANCE]
        plain = candidates.first_order(case, exact)
        moved = (outs[0] - plain).norm()
        assert moved > 0
        for out in outs[1:]:
            assert (out - outs[0]).norm() < 0.02 * moved


def test_the_mass_term_is_half_the_variance_of_the_logits() -> None:
    """One block, far from the rest: log-sum-exp grows by the variance along the query."""
    for case in cases(call_of(10)):
        none = torch.zeros(4, 9, dtype=torch.bool)
        errors = {
            mass: relative_error(candidates.with_shared_covariance(mass)(case, none), case.dense)
            for mass in ("first order", "diagonal")
        }
        assert errors["diagonal"] < errors["first order"]


def test_pairs_of_the_whole_mass_are_all_skipped_ones() -> None:
    for case in cases(call_of(10)):
        exact = case.by_error(0.2)
        none, some, every = (
            candidates.pairs_with_mass(case, exact, share) for share in (0.0, 0.5, 1.1)
        )
        assert not none.any()
        assert torch.equal(every, ~exact & (case.head.k_sizes > 0))
        assert 0 < some.sum() < every.sum()


def test_what_is_kept_from_a_step_like_this_one() -> None:
    old = cases(call_of(4))
    for case in old:
        fresh = FIRST_ORDER(case, 0.2)
        for aged in (candidates.blocks_kept, candidates.tables_kept):
            torch.testing.assert_close(aged(case, case, 0.2), fresh)
        torch.testing.assert_close(candidates.difference_added()(case, case, 0.2), case.dense)
        rounded = candidates.difference_added(torch.float8_e4m3fn)(case, case, 0.2)
        assert 0 < relative_error(rounded, case.dense) < 0.02


def test_features_of_clusters() -> None:
    call = call_of(1)
    q, _ = candidates.logit_metric(call)
    logits = call.q @ call.k.transpose(2, 3)  # [1, H, N, N]
    variance = (logits[..., 0, :] - logits[..., 1, :]).var(-1, correction=0)
    torch.testing.assert_close((q[:, :, 0] - q[:, :, 1]).square().sum(-1), variance)
    _, k = candidates.with_values(1.0)(call)
    spreads = [x.var(2).mean() for x in k.split(16, -1)]
    assert spreads[0] == pytest.approx(float(spreads[1]), rel=1e-4)
    q, _ = candidates.with_coordinates(0.3, GRID)(call)
    assert q.shape == (1, 2, 105, 19)


def test_a_study_measures_all(tmp_path: Path) -> None:
    said: list[str] = []
    calls = {step: [call_of(step)] for step in RECORDED}
    study = Study(calls, GRID, [0.1, 0.3], said.append)
    study.parts()
    study.clusters()
    study.time()
    names = {row["candidate"] for row in study.rows}
    assert len(study.rows) == 2 * len(names) == 2 * len(said)
    assert set(candidates.BY_CASE) < names
    assert all(0 <= row["error"] < 2 for row in study.rows)  # some plans have one block
    later = [step - LAST_DENSE for step in RECORDED[1:]]
    assert {f"step + {age}: old dense output" for age in later} < names


def steady(method: Method, steps: int, text: int = 0) -> list[Tensor]:
    """Outputs of a method over steps whose inputs do not change; step 1 leads dense."""
    call = call_of(4)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return [method.answer(dense, call, PLAN, text, age) for age in range(steps)]


@pytest.mark.parametrize("text", [0, 6])
def test_methods_over_steps(text: int) -> None:
    dense, first, *later = steady(Method(), 5, text)
    assert relative_error(first, dense) > 0.01
    assert all(torch.equal(out, first) for out in later)
    for kept in (Method(period=3), Method(period=3, keeps_blocks=True)):
        for out in steady(kept, 5, text)[1:]:
            torch.testing.assert_close(out, first)
    refreshed = steady(Method(refresh=2), 5, text)
    assert [torch.equal(out, dense) for out in refreshed] == [True, False, True, False, True]
    for out in steady(Method(refresh=3, adds_difference=True), 6, text):
        torch.testing.assert_close(out, dense)


def test_the_script_writes_a_row_for_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(
        candidate_clips.MODELS["self"].shrunk(), weights=tmp_path / "weights", short=(3, 36, 36)
    )
    torch.manual_seed(0)
    model = small.build()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save(small.weights)
    monkeypatch.setattr(candidate_clips, "MODELS", {"self": small})
    arguments = ["--out", str(tmp_path), "--clip", "short", "--steps", "4", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--methods", "1,6,10", "--clusters", "32/16"])
    candidate_clips.main()
    rows = json.loads((tmp_path / "candidate_clips.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [list(candidate_clips.METHODS)[i] for i in (1, 6, 10)]
    assert [row["dense"] for row in rows] == [0, 0, 0]
    assert all(len(row["psnr"]) == 2 for row in rows)
