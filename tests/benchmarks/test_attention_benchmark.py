"""The attention benchmark on a CPU: rows, the gate, FlexAttention's cover, and the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import likeness, measure
from benchmarks.attention.data import video_like
from benchmarks.attention.flex import TILE, covering_tiles
from benchmarks.attention.inputs import CAPTURED, Inputs, exact_pairs, inputs_of
from benchmarks.attention.plots import write_plots
from benchmarks.tuning.captured import capture
from benchmarks.video_dit.pixel_dit import PixelDiT
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import sparse_attention


def tiny(text: int = 0) -> Inputs:
    tensors = video_like(1, 2, 700, 32, text=text, device="cpu", dtype=torch.float32)
    return Inputs("tiny", *tensors, text)


@pytest.mark.parametrize(
    ("text", "flex"), [(0, False), pytest.param(9, True, marks=pytest.mark.slow)]
)
def test_rows_of_a_shape(text: int, flex: bool) -> None:
    said: list[str] = []
    forms = ["gaussian", "centroid"]
    rows = measure.measure_shape(tiny(text), [0.2], forms, ["default", "4/9"], 2, flex, said.append)
    assert [row["form"] for row in rows] == ["gaussian", *["flex"] * flex, "centroid"] * 2
    assert len(said) == 1 + len(rows)
    for row in rows:
        assert row["gate"] < 1e-2
        assert len(row["samples_ms"]) == 2
        assert 0 < row["error"] < 1
        assert row["speedup"] > 0
    assert all(0.2 <= row["density_reached"] < 0.5 for row in rows if row["form"] != "flex")
    for row in (row for row in rows if row["form"] == "flex"):
        assert row["waste"] > 1
        assert row["computed_tflops"] == pytest.approx(row["useful_tflops"] * row["waste"])


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = sparse_attention(*args, **kwargs)
        result.out.mul_(1.05)
        return result

    monkeypatch.setattr(measure, "captured_attention", lambda device: wrong)
    said: list[str] = []
    (row,) = measure.measure_shape(tiny(), [0.3], ["centroid"], ["default"], 2, False, said.append)
    assert row["gate"] == pytest.approx(0.05, rel=0.1)
    assert "samples_ms" not in row
    assert "GATE FAILED" in said[-1]


def test_the_cover_holds_every_exact_pair_and_no_needless_tile() -> None:
    inputs = tiny(text=5)
    plan = AttentionPlan(density=0.2, q_clusters=6, k_clusters=11)
    result = sparse_attention(
        inputs.q, inputs.k, inputs.v, plan, kinds=exact_at_ends(inputs.q, inputs.k, 0, 5)
    )
    labels = [c.labels.sort(dim=-1, stable=True).values for c in (result.queries, result.keys)]
    tiles = covering_tiles(result, *labels)
    exact = torch.nn.functional.pad(result.block_mask, (0, 1, 0, 1), value=True)
    pairs = exact[0, 1][labels[0][0, 1]][:, labels[1][0, 1]]  # [N, N] of the last head
    for i in range(tiles.shape[2]):
        for j in range(tiles.shape[3]):
            inside = pairs[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
            assert bool(tiles[0, 1, i, j]) == bool(inside.any())
    assert float(pairs.sum()) <= exact_pairs(result, inputs)


def test_captured_inputs_are_the_video_dits(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.attention import inputs as module

    monkeypatch.setattr(module, "TRAIN_SHAPE", (2, 24, 24))
    monkeypatch.setattr(module, "_STEPS", 2)
    monkeypatch.setattr(module, "_STEP", 1)
    found = inputs_of(CAPTURED, "cpu", torch.float32)
    assert found.q.shape == (1, 4, 32, 64)
    assert not torch.equal(found.q, found.k)


def test_traits_that_make_attention_easy() -> None:
    noise = torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0))
    assert likeness.participation_ratio(noise) == pytest.approx(8, rel=0.02)
    assert likeness.participation_ratio(noise * torch.eye(8)[0] + 5) == pytest.approx(1)
    assert likeness.perplexity(torch.zeros(1, 3, 8), noise[:1]) == pytest.approx(4000, rel=1e-3)
    assert likeness.perplexity(100 * noise, 100 * noise) == pytest.approx(1, abs=0.1)


def test_no_step_runs_after_the_last_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = 0
    velocity = PixelDiT.velocity

    def counted(self: PixelDiT, *arguments: Any) -> torch.Tensor:
        nonlocal forwards
        forwards += 1
        return velocity(self, *arguments)

    monkeypatch.setattr(PixelDiT, "velocity", counted)
    calls = list(capture((2, 24, 24), 6, [0, 2], 0, "cpu"))
    assert [call.step for call in calls] == [0] * 8 + [2] * 8
    assert forwards == 3


def test_likeness_of_a_model_with_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "_STEPS", 3)
    monkeypatch.setattr(likeness, "_WANTED", (1,))
    monkeypatch.setattr(likeness, "_LAYERS", (0.0, 1.0))
    rows = likeness.rows_of("joint", (4, 48, 48), "cpu", torch.float32, ["gaussian"])
    named = [(row["inputs"], row["name"]) for row in rows]
    layers = [("captured", f"layer {layer}, step 1") for layer in (0, 9)]
    assert named == [*layers, ("synthetic", "seed 0"), ("synthetic", "seed 1")]
    assert all(0 < row["drift"] < 2 for row in rows[:2])
    assert all(row["errors"][-1] < row["errors"][0] for row in rows)


def row(tokens: int, form: str = "gaussian") -> dict[str, Any]:
    stages = dict.fromkeys(measure.STAGE_NAMES, 0.5)
    return {
        "shape": f"n{tokens}", "size": [1, 2, tokens, 128], "text": 0, "clusters": "default",
        "form": form, "density": 0.2, "samples_ms": [3.0, 3.1], "stages_ms": stages,
        "dense_backend": "default", "dense_samples_ms": {"default": [9.0]},
        "q_sizes": [128.0, 60.0], "k_sizes": [64.0, 30.0],
    }  # fmt: skip


def test_plots_are_made_of_the_record(tmp_path: Path) -> None:
    rows = [row(n, form) for n in (1000, 2000, 4000) for form in ("gaussian", "centroid")]
    record = {"rows": rows, "roofs": {"tflops": 700.0, "gb_per_second": 4000.0}}
    made = write_plots(record, tmp_path)
    assert sorted(path.name for path in made) == ["lengths.png", "roofline.png", "stages.png"]
    assert all(path.stat().st_size > 5000 for path in made)
    assert write_plots({"rows": rows[:1]} | {"roofs": record["roofs"]}, tmp_path)[-1].exists()
    assert write_plots({"rows": [], "roofs": record["roofs"]}, tmp_path) == []


def test_synthetic_queries_look_at_many_keys() -> None:
    """Own tokens are exact: of queries that look at these alone nothing else would be tested."""
    q, k, _ = video_like(1, 2, 1024, 128, device="cpu", dtype=torch.float32)
    assert likeness.perplexity(q, k) > 20


def test_the_table_of_likeness_shows_means_over_steps_and_seeds(tmp_path: Path) -> None:
    def row(inputs: str, name: str, form: str, drift: float | None, error: float) -> dict[str, Any]:
        traits = {"participation_ratio": 9.0, "perplexity": 1000.0, "drift": drift}
        errors = [error] * len(likeness.DENSITIES)
        size = [1, 2, 4000, 64]
        return {
            "inputs": inputs, "name": name, "form": form, "size": size, **traits, "errors": errors,
        }  # fmt: skip

    record = {
        "device": "CPU", "versions": {"torch": "2"}, "cuda": None, "model": "a",
        "rows": [
            row("captured", "layer 0, step 8", "gaussian", 0.1, 0.02),
            row("captured", "layer 0, step 8", "centroid", 0.1, 0.9),
            row("captured", "layer 0, step 16", "gaussian", 0.3, 0.04),
            row("synthetic", "seed 0", "gaussian", None, 0.05),
        ],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert likeness.table(tmp_path).splitlines()[-2:] == [
        "| a, layer 0 | 9.0 of 64 | 1,000 of 4,000 | 0.200 | 0.030 | 0.030 |",
        "| synthetic, the same size | 9.0 of 64 | 1,000 of 4,000 |  | 0.050 | 0.050 |",
    ]
