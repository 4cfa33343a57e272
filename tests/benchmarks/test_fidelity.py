"""The fidelity bench: its rules against the definition, its scores, its frontier, its record."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.inputs import Inputs
from benchmarks.fidelity import __main__ as bench
from benchmarks.fidelity import head
from benchmarks.fidelity.frontier import Point, density_curve, derived, first_at, rising, value_at
from benchmarks.fidelity.grid import Cell, cells
from benchmarks.fidelity.head import Head
from benchmarks.fidelity.record import Evidence, Record, read
from benchmarks.fidelity.report import derived_rows, markdown_table
from benchmarks.fidelity.rules import RULES, Remembered, attend_by_head, attention
from benchmarks.fidelity.scores import Interval, flicker, interval, score_clips
from benchmarks.fidelity.times import WAN, measure_times
from benchmarks.video_dit.zoo import MODELS
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.memory import Memory

PLAN = AttentionPlan(density=0.3, q_clusters=5, k_clusters=11, first_iterations=3)
TEXTS = pytest.mark.parametrize("text", [0, 7])


def random_qkv(
    tokens: int = 117, dim: int = 32, dtype: torch.dtype = torch.float64, seed: int = 4
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, tokens, dim, generator=generator, dtype=dtype) for _ in range(3)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def paper(this: Head, density: float) -> tuple[Tensor, Tensor]:
    blocks = head.score_blocks(this)
    exact = head.choose(this, head.error_score(this, blocks), density)
    return head.attend(this, exact, head.value_means(this)), exact


@TEXTS
def test_the_parts_of_a_head_are_the_definition(text: int) -> None:
    q, k, v = random_qkv()
    plan = AttentionPlan(**{**vars(PLAN), "compensation": "centroid"})
    wanted = reference.sparse_attention(q, k, v, plan, kinds=exact_at_ends(q, k, 0, text))
    memory = Memory()
    found = attend_by_head(q, k, v, paper, plan, text, memory)
    torch.testing.assert_close(found, wanted.out)
    wanted_scores = reference.score_blocks(wanted.queries, wanted.keys, k, v, 32**-0.5)
    for place, this in head.heads_of(q, k, v, wanted.queries, wanted.keys, 32**-0.5):
        blocks = head.score_blocks(this)
        # Of a block without any error, the rounding of one is left: another one on each machine.
        floor = math.log(1e-10)
        torch.testing.assert_close(
            blocks.log_error.clamp(min=floor), wanted_scores.log_error[place].clamp(min=floor)
        )
        torch.testing.assert_close(blocks.log_mass, wanted_scores.log_mass[place])
        logits = this.scale * this.q_centroids @ this.k.T
        for j in range(len(this.k_sizes)):
            weights = logits[:, this.k_labels == j].softmax(-1)
            for found_mean, x in ((blocks.mean_key, this.k), (blocks.mean_value, this.v)):
                torch.testing.assert_close(found_mean[:, j], weights @ x[this.k_labels == j])
    assert memory.exact_pairs == wanted.exact_pairs
    assert memory.pairs == 6 * (117 - text) ** 2


@TEXTS
def test_empty_clusters_have_no_part(text: int) -> None:
    q, k, v = random_qkv()
    k[:, :, :110] = k[:, :, :1]  # all in one cluster but for the last ones
    plan = AttentionPlan(**{**vars(PLAN), "density": 0.5})
    for rule in ("svg2", "score", "values"):
        found = attention(q, k, v, rule, plan, text=text)
        assert found.isfinite().all(), rule


@TEXTS
@pytest.mark.parametrize("rule", [n for n, rule in RULES.items() if not rule.by_call] + ["uniform"])
def test_rules_tend_to_dense_attention(rule: str, text: int) -> None:
    q, k, v = random_qkv(dtype=torch.float32)
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for density in (0.1, 0.5, 0.999):
        plan = AttentionPlan(**{**vars(PLAN), "density": density})
        out = attention(q, k, v, rule, plan, text=text)
        errors.append(relative(out, dense))
        # Text queries attend to everything at any density.
        assert relative(out[:, :, 117 - text :], dense[:, :, 117 - text :]) < 1e-5 or not text
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (1e-5 if rule != "uniform" else 0.2)
    assert errors[0] > 0.01


def test_rules_rank_as_their_papers_say() -> None:
    error: Counter[str] = Counter()  # of several draws: on one the clusters may favour any rule
    for seed in range(4):
        q, k, v = random_qkv(tokens=300, dtype=torch.float32, seed=seed)
        q, k = 0.4 * q, 0.4 * k
        dense = F.scaled_dot_product_attention(q, k, v)
        for name, rule in RULES.items():
            if not rule.by_call:
                error[name] += relative(attention(q, k, v, name, PLAN), dense)
    assert (
        error["gaussian"] < error["first_order"] < error["values"] < error["paper"] < error["score"]
    )
    assert error["score"] < error["svg2"]


def test_dropping_leaves_attention_over_the_chosen_blocks() -> None:
    q, k, v = random_qkv()
    plan = replace(PLAN, cluster_metric="euclidean")
    queries, keys, _ = reference.cluster(q, k, plan, exact_at_ends(q, k, 0, 4), None)
    out = attention(q, k, v, "svg2", PLAN, text=4)
    for (b, h), this in head.heads_of(q, k, v, queries, keys, 32**-0.5):
        exact = head.choose(this, head.mass_score(this), PLAN.density)
        taken = F.pad(exact, (0, 1, 0, 1), value=True)[this.q_labels][:, this.k_labels]
        wanted = F.scaled_dot_product_attention(this.q, this.k, this.v, taken)
        torch.testing.assert_close(out[b, h], wanted)


def test_uniform_keys_are_a_regular_sample_that_weighs_as_much_as_all() -> None:
    q, k, v = random_qkv()
    k[:, :, :100] = k[:, :, :1]  # any sample of equal keys has the right logits
    v[:, :, :100] = v[:, :, :1]
    found = attention(q, k, v, "uniform", PLAN, text=17)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("rule", ["paper", "values"])
def test_a_generation_is_remembered_site_by_site(rule: str) -> None:
    q, k, v = random_qkv(dtype=torch.float32)
    remembered = Remembered()
    assert remembered.density is None
    cold = attention(q, k, v, rule, PLAN, site="0", remembered=remembered)
    warm = attention(q, k, v, rule, PLAN, site="0", remembered=remembered)
    other = attention(q, k, v, rule, PLAN, site="1", remembered=remembered)
    assert torch.equal(cold, other)
    assert not torch.equal(cold, warm)
    assert remembered.density is not None
    assert PLAN.density <= remembered.density < PLAN.density + 1 / 5
    assert math.isfinite(remembered.density)


def test_flicker_is_about_changes_between_frames() -> None:
    frames = torch.rand(5, 6, 7, 3, generator=torch.Generator().manual_seed(0)) / 2
    assert flicker(frames, frames) == 0
    assert flicker(frames + 0.25, frames) == pytest.approx(0, abs=1e-7)  # a shift does not flicker
    other = frames.clone()
    other[1::2] += 0.25
    assert flicker(other, frames) == pytest.approx(0.25)
    assert flicker(frames[:1], other[:1]) == 0


def test_scores_of_clips_are_each_clips_own() -> None:
    clips = torch.rand(3, 2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    noisy = (clips + 0.01 * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1, 1)).clamp(0, 2)
    found = score_clips(noisy, clips)
    assert found["psnr"] == pytest.approx([40.0, 40 - 6.02, 40 - 12.04], abs=0.01)
    assert all(len(values) == 3 for values in found.values())


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    half = 3.18245 * (5 / 3) ** 0.5 / 2
    assert found.high == pytest.approx(2.5 + half, rel=1e-5)
    assert found.low == pytest.approx(2.5 - half, rel=1e-5)
    assert interval([3.0]) == Interval(3.0, None, None)
    assert "±" not in str(interval([3.0]))


def test_curves_are_read_between_their_points_alone() -> None:
    curve = rising([(4.0, 30.0), (1.0, 20.0), (2.0, 19.0), (16.0, 34.0), (4.0, 29.0)])
    assert curve == [(1.0, 20.0), (4.0, 30.0), (16.0, 34.0)]
    assert value_at(curve, 2.0) == pytest.approx(25.0)
    assert value_at(curve, 8.0) == pytest.approx(32.0)
    assert value_at(curve, 4.0) == 30.0
    assert value_at(curve, 0.9) is None
    assert value_at(curve, 17.0) is None
    assert first_at(curve, 25.0) == pytest.approx(2.0)
    assert first_at(curve, 19.0) is None
    assert first_at(curve, 35.0) is None
    assert value_at([], 1.0) is None
    assert value_at([(2.0, 3.0)], 2.0) == 3.0


def made_point(
    rule: str, density: float, psnr: float, ms: float | None, queries: int = 128
) -> Point:
    times = {} if ms is None else {"wan": ms}
    error = 0.2 if rule == "paper" else 0.15
    scores = ((psnr - 1, psnr + 1), (0.9, 0.9), (0.1, 0.1))
    return Point(Cell("self", rule, density, queries, 64), *scores, error, times)


def test_figures_that_follow_from_points() -> None:
    points = [
        *(
            made_point("paper", d, p, t)
            for d, p, t in [(0.05, 20, 10), (0.1, 24, 20), (0.2, 28, 40)]
        ),
        *(made_point("gaussian", d, p, t) for d, p, t in [(0.05, 24, 12), (0.1, 29, 24)]),
        *(made_point("svg2", d, p, None) for d, p in [(0.1, 22), (0.2, 24), (0.4, 26)]),
    ]
    found = derived(points, ["wan"])
    first, second = found["equal_density"]
    assert first["gain"]["mean"] == 4
    assert first["gain"]["high"] == pytest.approx(4)  # paired: both seeds gain the same
    assert first["error_ratio"] == pytest.approx(0.75)
    assert first["svg2_density"] == (pytest.approx(4.0), "")
    assert second["svg2_density"] == (pytest.approx(4.0), "over")
    at = {row["ms"]: row["gain"] for row in found["equal_time"]["wan"]}
    assert at[10] is None
    assert at[40] is None
    assert at[20] == pytest.approx(24 + 5 * math.log(20 / 12) / math.log(2) - 24)
    assert found["time_ratio"]["wan"] == (pytest.approx(12 * 2**0.8 / 40), "")
    rows = derived_rows(found, "wan")
    assert rows[0][1].startswith("+4.00 ± 0.00 / +5.00 ± 0.00 / -")
    assert rows[2][1] == "4.0x / over 4.0x / -"
    assert rows[-1][1] == f"{12 * 2**0.8 / 40:.2f}x"


def test_curves_and_ratios_are_over_the_density_that_was_reached() -> None:
    ours = replace(made_point("gaussian", 0.1, 24, None), density_reached=0.11)
    peers = [
        replace(made_point("svg2", d, p, None), density_reached=1.1 * d)
        for d, p in [(0.2, 22), (0.4, 24)]
    ]
    assert density_curve(peers, "svg2") == [(pytest.approx(0.22), 22), (pytest.approx(0.44), 24)]
    points = [ours, replace(made_point("paper", 0.1, 20, None), density_reached=0.11), *peers]
    (row,) = derived(points, [])["equal_density"]
    assert row["svg2_density"] == (pytest.approx(4.0), "")


def test_the_decisive_cells_come_first() -> None:
    found = cells(["self", "joint"])
    decisive = [cell for cell in found if cell.is_decisive]
    assert found[: len(decisive)] == decisive
    assert len(decisive) == 2 * 2 * 3 * 2
    assert len(set(found)) == len(found)
    assert Cell("self", "paper", 0.1, 128, 64).plan(1000).clusters(1000, 1000) == (8, 16)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both models shrunk and untrained; the folder is for results."""
    shrunk = {}
    for name in ("self", "joint"):
        trained = MODELS[name]
        torch.manual_seed(0)
        small = replace(trained.shrunk(), weights=tmp_path / name, long=(4, 36, 36))
        model = small.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.3)
        model.save(small.weights)
        shrunk[name] = small
    monkeypatch.setattr(bench, "MODELS", shrunk)
    return tmp_path / "out"


def run_bench(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> Evidence:
    base = ["fidelity", "--out", str(out), "--steps", "4", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", [*base, *arguments])
    bench.main()
    return read(out)


def test_a_run_is_recorded_and_goes_on_where_it_was(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = ("--densities", "0.2", "--clusters", "128/64", "--warm-ups", "0.2")
    first = run_bench(monkeypatch, tiny, *part, "--rules", "paper,gaussian")
    assert [p.cell.rule for p in first.points] == ["paper", "gaussian"] * 2
    assert first.models["joint"]["model"]["text"] == 16
    assert first.models["self"]["model"]["tokens"] == 4 * 6 * 6
    for model in ("self", "joint"):
        ceiling = first.models[model]["model"]["ceiling"]["psnr"]
        mine = [p for p in first.points if p.cell.model == model]
        assert all(len(p.psnr) == 2 for p in mine)
        assert all(max(p.psnr) < min(ceiling) for p in mine)
        assert derived(mine, [])["equal_density"][0]["error_ratio"] > 0
    assert (tiny / "frontier.png").stat().st_size > 5000
    capsys.readouterr()
    whole = run_bench(monkeypatch, tiny, "clips", *part, "--models", "self")
    whole = run_bench(monkeypatch, tiny, "clips", *part, "--models", "joint")
    assert [p for p in whole.points if p.cell.rule in ("paper", "gaussian")] == first.points
    assert {p.cell.rule for p in whole.points} == {
        name for name, rule in RULES.items() if name == "uniform" or not rule.by_call
    }
    said = capsys.readouterr().out
    assert "values" in said
    assert "self  paper  " not in said
    assert "beside the paper's rule" in said
    assert markdown_table(whole).count("\n| self, 144 tokens") == 5
    with pytest.raises(ValueError, match="choose another --out"):
        run_bench(monkeypatch, tiny, *part, "--guidance", "1.5")


def test_times_go_to_the_points_of_their_plan(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = ("--densities", "0.2", "--clusters", "128/64", "--rules", "paper,svg2")
    found = run_bench(monkeypatch, tiny, "clips", *part)
    assert found.shape == "no time measured"
    times = Record(tiny / "times.json", {})
    plan = {"rule": "paper", "density": 0.2, "queries": 128, "keys": 64, "dense_ms": 9.0}
    times.rows += [{**plan, "shape": s, "ms": ms} for s, ms in [("self", 2.0), (WAN, 70.0)]]
    times.rows.append({**plan, "rule": "gaussian", "shape": WAN, "ms": None})
    times.write()
    found = run_bench(monkeypatch, tiny, "report")
    assert found.shape == WAN
    for point in found.points:
        assert point.ms == ({"self": 2.0, WAN: 70.0} if point.cell.rule == "paper" else {})


def test_a_point_takes_as_long_as_its_calls_do_in_the_mean(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ("--densities", "0.2", "--clusters", "128/64", "--rules", "gaussian,shared,recomputed")
    run_bench(monkeypatch, tiny, "clips", *part, "--models", "self", "--warm-ups", "0.2")
    times = Record(tiny / "times.json", {})
    plan = {"rule": "gaussian", "density": 0.2, "queries": 128, "keys": 64, "shape": WAN}
    times.rows.append({**plan, "ms": 60.0, "reused_ms": 40.0, "dense_ms": 200.0})
    times.write()
    found = {p.cell.rule: p.ms[WAN] for p in run_bench(monkeypatch, tiny, "report").points}
    assert found["recomputed"] == 60.0
    assert found["shared"] == 50.0  # one branch of two
    assert 40.0 < found["gaussian"] <= 50.0


def test_time_that_is_up_leaves_a_record(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_bench(monkeypatch, tiny, "--minutes", "0.01")
    assert found.points == []
    assert "out of time" in capsys.readouterr().out


def test_times_of_plans_that_were_asked_for() -> None:
    q, k, v = random_qkv(dtype=torch.float32)
    wanted = [
        Cell("self", rule, density, 32, 16)
        for rule in ("paper", "gaussian", "uniform", "svg2")
        for density in (0.1, 0.2)
    ]
    rows = measure_times(Inputs("tiny", q, k, v, 7), wanted, lambda line: None)
    found = {(row["rule"], row["density"], row["queries"], row["keys"]) for row in rows}
    assert found == {(c.rule, c.density, 32, 16) for c in wanted if c.rule != "svg2"}
    assert all(row["ms"] > 0 and row["dense_ms"] > 0 for row in rows)
