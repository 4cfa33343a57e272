"""Policy: the decisions for a graph under each objective, and the report about them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_models
from made_budgets import budget_for
from transformer_models import TOKENS, stack, wan

from benchmarks.priors import prior_of, video
from svg_ear_compile import explain, policy
from svg_ear_compile.cost_model.budget import Choice, Schedule
from svg_ear_compile.cost_model.calibration import Calibration, Efficiency
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.prior import prior
from svg_ear_compile.cost_model.stages import STAGES, AttentionShape
from svg_ear_compile.kernels.checked import InvalidValueError
from svg_ear_compile.policy import SiteFacts, calibration_of, decide
from svg_ear_compile.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def calibration(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calibration]:
    """A calibration of sparse stages at the roofs, without launches, so that few tokens pay."""
    base = prior(describe("cpu"))
    ideal = dict.fromkeys((*STAGES["cpu"], "dense"), Efficiency(1.0, 1.0, 0.0))
    known = dataclasses.replace(
        base, origin="calibrated", stages={"float32/64": ideal}, uncertainty=0.0
    )
    monkeypatch.setattr(policy, "calibration_of", lambda device: known)
    yield known
    calibration_of.cache_clear()


def facts(tokens: int = 4096, layers: int = 4) -> list[SiteFacts]:
    shape = AttentionShape(1, 4, 4, tokens, tokens, 64, "float32")
    return [SiteFacts(f"blocks.{i}.attn", shape, CPU) for i in range(layers)]


def densities(options: dict[str, Any], **sites: int) -> list[float]:
    settings = Settings.parse(options)
    found = decide(facts(**sites), 1e9, 1e6, settings)
    return [1.0 if d.plan is None else d.plan.density for d in found]


def test_a_density_is_used_where_it_pays_and_nowhere_else() -> None:
    assert densities({"density": 0.1}) == [0.1] * 4
    assert densities({"density": 0.1}, tokens=32) == [1.0] * 4
    (short, *_) = decide(facts(32), 0, 0, Settings.parse({}))
    assert short.reason == "short"
    assert short.expected is not None
    assert short.expected.sparse_ms > short.expected.dense_ms


def test_cached_keys_whose_clusters_are_kept_pay_where_clustering_does_not() -> None:
    shape = AttentionShape(1, 4, 4, 512, 65536, 64, "float32")
    decisions = [
        decide([SiteFacts("attn", shape, CPU, cached)], 0, 0, Settings.parse({}))[0]
        for cached in (False, True)
    ]
    assert [d.reason for d in decisions] == ["short"] * 2
    assert [d.min_cached_keys > 0 for d in decisions] == [False, True]
    assert "In a session" in decisions[1].sentence
    (asked,) = decide(
        [SiteFacts("attn", shape, CPU, True)], 0, 0, Settings.parse({"min_tokens": 9})
    )
    assert (asked.plan is None, asked.min_cached_keys) == (False, 0)


def test_min_tokens_is_the_users_own_word() -> None:
    assert densities({"min_tokens": 16}, tokens=32) == [0.2] * 4
    assert densities({"min_tokens": 5000}) == [1.0] * 4
    assert densities({"target_speedup": 1.5, "min_tokens": 5000}) == [1.0] * 4


@pytest.mark.parametrize("target", [1.1, 1.4])
def test_a_speed_up_is_predicted_to_be_met_and_not_overspent(
    target: float, calibration: Calibration
) -> None:
    def predicted(options: dict[str, Any]) -> float:
        settings = Settings.parse(options)
        found = decide(facts(), 1e8, 1e6, settings)
        dense = [d.expected.dense_ms for d in found if d.expected]
        now = [d.expected.sparse_ms if d.plan else d.expected.dense_ms for d in found if d.expected]
        rest = policy.non_attention_ms(1e8, 1e6, "float32", calibration)
        return (sum(dense) + rest) / (sum(now) + rest)

    assert target <= predicted({"target_speedup": target}) < target * 1.15


def test_what_is_uncertain_counts_against_a_speed_up(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = densities({"target_speedup": 1.2})
    unsure = dataclasses.replace(calibration, uncertainty=0.3)
    monkeypatch.setattr(policy, "calibration_of", lambda device: unsure)
    assert sum(densities({"target_speedup": 1.2})) < sum(sure)
    found = decide(facts(), 1e8, 1e6, Settings.parse({"target_speedup": 1.2}))
    assert "whole graph at least 1." in found[0].sentence
    # Of such a device nothing is known, so it is the user who says what pays.
    unknown = dataclasses.replace(calibration, uncertainty=None)
    monkeypatch.setattr(policy, "calibration_of", lambda device: unknown)
    assert densities({"target_speedup": 1.2}) == [1.0] * 4
    assert min(densities({"target_speedup": 1.2, "min_tokens": 16})) < 1.0


def test_a_faster_target_is_never_denser() -> None:
    sums = [sum(densities({"target_speedup": s})) for s in (1.05, 1.2, 1.5)]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] > sums[-1]


def test_an_unreachable_speed_up_names_the_best(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.parse({"target_speedup": 50.0})
    found = decide(facts(), 1e9, 1e6, settings)
    assert "target_speedup 50 cannot be reached here: the best is" in caplog.text
    assert all(d.plan is not None and d.plan.density == min(policy.DENSITIES) for d in found)
    assert "cannot be reached" in found[0].sentence


def test_devices_without_kernels_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "calibration_of", lambda device: None)
    for options in ({}, {"target_speedup": 1.5}):
        found = decide(facts(), 0, 0, Settings.parse(options))
        assert all(d.plan is None and "no kernels" in d.sentence for d in found)


def test_a_budget_gives_each_layer_its_densest_phase_and_its_clusters() -> None:
    model, inputs = stack()
    layers = {
        "blocks.0": (Choice(0.3, 5, 9), Choice(0.1)),
        "blocks.1": (Choice(1.0), Choice(1.0)),
    }
    budget = budget_for(model, layers, TOKENS, Schedule(phase_starts=(500.0,)))
    found = explain(model, *inputs, options={"budget": budget})
    first, second = found.sites
    assert first.plan is not None
    assert (first.plan.density, first.clusters) == (0.3, (5, 9))
    assert "until it is bound" in first.sentence
    assert second.plan is None
    assert second.sentence == "The budget leaves it dense."


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_a_budget_is_scaled_within_its_range_and_dense_beyond(factor: float) -> None:
    model, inputs = stack()
    layers = dict.fromkeys(("blocks.0", "blocks.1"), (Choice(0.3, 8, 16),))
    budget = budget_for(model, layers, round(TOKENS / factor))
    sites = explain(model, *inputs, options={"budget": budget}).sites
    if factor <= 2:
        assert [s.clusters for s in sites] == [(round(8 * factor), round(16 * factor))] * 2
    else:
        assert all(s.plan is None and "good from" in s.sentence for s in sites)


def test_a_budget_for_another_model_leaves_attention_dense_and_says_so() -> None:
    model, inputs, kwargs = wan()
    other = budget_for(stack()[0], {"blocks.0.attn": (Choice(0.1),)}, 192)
    found = explain(model, *inputs, options={"budget": other, "min_tokens": 1}, **kwargs)
    assert all(site.plan is None for site in found.sites)
    assert "the budget has no layer 'blocks.0.attn1'" in found.sites[0].sentence


def test_a_block_that_serves_all_layers_takes_the_densest_of_them() -> None:
    model, _ = stack()
    layers = {"blocks.0.attn1": (Choice(0.1),), "blocks.1.attn1": (Choice(0.4),)}
    budget = budget_for(model, layers, 4096)
    shared = [dataclasses.replace(facts()[0], layer="attn1")]
    (found,) = decide(shared, 0, 0, Settings.parse({"budget": budget}))
    assert found.plan is not None
    assert found.plan.density == 0.4
    assert "the densest of 2 layers until it is bound" in found.sentence


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', None])
def test_a_budget_file_that_is_broken_is_one_sentence(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    if text is not None:
        path.write_text(text)
    model, inputs = stack()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="svg_ear", options={"budget": str(path)})
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"the budget cannot be used: .*budget\.json"),
    ):
        compiled(*inputs)
    with pytest.raises(InvalidValueError, match=r"the budget cannot be used: .*budget\.json"):
        explain(model, *inputs, options={"budget": str(path)})


def test_the_budget_of_another_model_with_such_layers_is_refused() -> None:
    model, inputs = stack()
    foreign = budget_for(transformer_models.Stack(3), {"blocks.0": (Choice(0.1),)}, TOKENS)
    for_other_class = dataclasses.replace(
        foreign, fingerprint=dataclasses.replace(foreign.fingerprint, model="Wan")
    )
    for budget, message in ((foreign, "of other shapes"), (for_other_class, "is for Wan, not for")):
        torch._dynamo.reset()
        options = {"budget": budget}
        compiled = torch.compile(model, backend="svg_ear", options=options)
        with torch.no_grad(), pytest.raises(Exception, match=message):
            compiled(*inputs)
        with pytest.raises(Exception, match=message):
            explain(model, *inputs, options=options)
        # The graph of a block does not tell which model it belongs to.
        (site,) = explain(model.blocks[0], inputs[0], options=options).sites
        assert site.layer == ""


def test_text_that_leaves_no_video_is_ignored_with_a_reason() -> None:
    model, inputs = stack()
    options = {"density": 0.3, "min_tokens": 1, "text_prefix": 100}
    for more, ignored in ((0, False), (27, False), (28, True), (2**31 - 101, True)):
        sites = explain(model, *inputs, options=options | {"text_suffix": more}).sites
        for site in sites:
            count = 0 if ignored else 100 + more
            assert site.exact == (count, count)
            assert ("do not fit its tokens: ignored here" in site.sentence) == ignored


def test_a_budget_file_is_read(tmp_path: Path) -> None:
    model, inputs = stack()
    path = tmp_path / "budget.json"
    layers = dict.fromkeys(("blocks.0", "blocks.1"), (Choice(0.3, 4, 8),))
    budget_for(model, layers, TOKENS).save(path)
    found = explain(model, *inputs, options={"budget": path})
    assert [site.plan is not None for site in found.sites] == [True, True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.1, "target_speedup": 2.0}, ValueError, "density and target_speedup are"),
        ({"target_speedup": 2.0, "budget": "x"}, ValueError, "target_speedup and budget are"),
        ({"max_error": 0.1}, ValueError, "max_error needs a tuned budget: .*svg-ear tune"),
        ({"target_speedup": 1.0}, ValueError, "target_speedup must be finite and above 1"),
        ({"target_speedup": float("inf")}, ValueError, "must be finite"),
        ({"target_speedup": "fast"}, TypeError, "target_speedup must be float"),
        ({"budget": 3}, TypeError, "budget must be a path or a Budget"),
        ({"target_speedup": 2, "routing": "top_p"}, ValueError, "target_speedup decides routing"),
        ({"budget": "x", "q_clusters": 3}, ValueError, "budget decides q_clusters"),
        ({"target_speedo": 2}, ValueError, "did you mean 'target_speedup'"),
    ],
)
def test_objectives_that_contradict_each_other_are_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Settings.parse(options)


def test_the_report_says_what_is_expected_and_where_it_comes_from() -> None:
    model, inputs = stack()
    found = explain(model, *inputs, options={"density": 0.3, "min_tokens": TOKENS})
    (graph,) = json.loads(found.to_json())["graphs"]
    expected = graph["sites"][0]["expected"]
    assert expected["sparse_ms"] > 0
    assert expected["times"] == "calibrated on this machine"
    text = " ".join(str(found).split())
    assert "Milliseconds: calibrated on this machine" in text
    assert "not measured on this one" in text


def test_a_length_known_at_run_time_keeps_the_least_that_pays() -> None:
    model, (x, timestep) = stack()
    torch._dynamo.mark_dynamic(x, 1)
    found = explain(model, x, timestep, options={"density": 0.1})
    (least,) = {site.plan.min_tokens for site in found.sites if site.plan is not None}
    assert least > TOKENS
    assert f"sparse from {least:,} video tokens on" in found.sites[0].sentence


def test_a_gpu_of_which_nothing_is_known_stays_dense_unless_the_user_says_from_when(
    monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    device = dataclasses.replace(calibration.device, kind="cuda", architecture="sm_70")
    monkeypatch.setattr(policy, "calibration_of", lambda _: prior(device))
    (found, *_) = decide(facts(), 0, 0, Settings.parse({}))
    assert (found.plan, found.reason) == (None, "short")
    assert found.sentence == "The device's times are unknown: nothing was measured on sm_70."
    profile = policy.profile_of(torch.device("cuda"))
    assert profile is not None
    assert (profile.origin, profile.uncertainty) == ("prior", None)
    assert profile.improved_by == "svg-ear calibrate --device cuda"
    assert densities({"min_tokens": 16}) == [0.2] * 4


@pytest.mark.parametrize(
    ("gpu", "sparse", "words"),
    [
        ("H100 SXM", True, r"^sparse .* ms \(uncertain by 20%\) instead of "),
        (
            "MI300X",
            False,
            r"^Too few tokens: sparse from \d{2,3},\d{3} video tokens on; here .* 100%",
        ),
        ("A100 80 GB", True, r"^sparse .* ms \(uncertain by 50%\) instead of "),
        ("RTX 4090", True, r"^sparse .* ms \(uncertain by 50%\) instead of "),
    ],
)
def test_a_480p_video_on_a_gpu_with_a_prior(
    gpu: str, sparse: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "calibration_of", lambda _: prior_of(gpu))
    site = SiteFacts("blocks.0.attn1", video(32760, 12), torch.device("cuda"))
    (found,) = decide([site], 0, 0, Settings.parse({}))
    assert (found.plan is not None) == sparse
    assert re.search(words, found.sentence), found.sentence
    assert (found.reason == "short") == (not sparse)
    profile = policy.profile_of(torch.device("cuda"))
    assert profile is not None
    assert profile.basis == prior_of(gpu).basis
    assert profile.improved_by == "svg-ear calibrate --device cuda"
