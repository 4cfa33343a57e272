"""The demo: its scores on clips whose scores are known, its pictures, its record, one tiny run."""

import argparse
import io
import json
import math

import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmarks.video_dit import demo, demo_runs
from benchmarks.video_dit.compare import (
    FrameScores,
    ShownClip,
    score_frames,
    write_animation,
    write_contact_sheet,
)
from benchmarks.video_dit.data import CAMERA_FIELDS, DEMO_SHAPE, LABELS, TRAIN_SHAPE
from benchmarks.video_dit.model import VideoDiT, VideoDiTConfig


def random_clip(seed=0, shape=(5, 24, 32)):
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed))


def finite_run(title="svg_ear", compensation="gaussian", seed=1, density=0.2):
    layers = (demo_runs.LayerDensity("blocks.0.attn", density, "parameter"),)
    return demo_runs.Run(
        title,
        compensation,
        random_clip(seed),
        (9.0, 1.0, 2.0, 3.0),
        layers if compensation else (),
    )


def test_equal_frames_score_infinity_and_one(recwarn):
    scores = score_frames(random_clip(), random_clip())
    assert scores.psnr == (math.inf,) * 5
    assert scores.ssim == pytest.approx((1.0,) * 5)
    assert scores.summary()["psnr_mean"] == math.inf
    assert not recwarn.list


@pytest.mark.parametrize("offset", [0.1, 0.01])
def test_psnr_of_a_constant_offset_is_its_square_in_decibels(offset):
    clip = 0.5 * random_clip()
    scores = score_frames(clip + offset, clip)
    assert scores.psnr == pytest.approx((-20 * math.log10(offset),) * 5, abs=1e-3)


def test_each_frame_is_scored_by_itself():
    clip = random_clip()
    spoiled = clip.clone()
    spoiled[3] = 1 - clip[3]
    scores = score_frames(spoiled, clip)
    assert [math.isinf(value) for value in scores.psnr] == [True, True, True, False, True]
    assert scores.ssim[3] < 0 < 0.999 < min(scores.ssim[:3])
    assert scores.summary()["psnr_min"] == scores.psnr[3]
    assert scores.summary()["ssim_min"] == scores.ssim[3]


def test_clips_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 24, 32, 3\)"):
        score_frames(random_clip(), random_clip(shape=(4, 24, 32)))


def shown(seed):
    return ShownClip(f"clip {seed}", "a caption", random_clip(seed))


def scored(seed):
    clip = random_clip(seed)
    return ShownClip(f"clip {seed}", "a caption", clip, score_frames(clip, random_clip(0)))


def test_contact_sheet_has_a_row_per_clip_and_per_difference(tmp_path):
    sizes = {}
    for others in (1, 2):
        path = tmp_path / f"{others}.png"
        write_contact_sheet(path, shown(0), [scored(1 + i) for i in range(others)], tile=64)
        with Image.open(path) as image:
            sizes[others] = image.size
    tile_height = 64 * 24 // 32
    assert sizes[1][0] == sizes[2][0] > 5 * 64
    assert sizes[2][1] - sizes[1][1] == 2 * (tile_height + 8)


def test_contact_sheet_is_black_where_a_clip_equals_the_reference(tmp_path):
    reference = shown(0)
    same = ShownClip("same", "", reference.frames, score_frames(reference.frames, reference.frames))
    write_contact_sheet(tmp_path / "sheet.png", reference, [same], tile=64)
    with Image.open(tmp_path / "sheet.png") as image:
        width, height = image.size
        last_tile = image.crop((width - 8 - 64, height - 8 - 48, width - 8, height - 8))
        assert last_tile.getextrema() == ((0, 0),) * 3


def test_animation_runs_to_the_last_frame_and_back(tmp_path):
    path = tmp_path / "clips.gif"
    write_animation(path, [shown(0), scored(1), scored(2)], tile=64)
    with Image.open(path) as image:
        assert image.n_frames == 5 + 3
        assert image.info["loop"] == 0
        assert image.width == 3 * (64 + 8) + 8
        assert image.height > 48


def test_record_is_strict_json_with_every_number():
    settings = demo_runs.DemoSettings("cpu", (5, 24, 32), steps=4, dense_steps=1)
    dense = finite_run("dense", None, seed=0)
    runs = [dense, finite_run(seed=0), finite_run(seed=1, density=None)]
    scores = [score_frames(run.frames, dense.frames) for run in runs[1:]]
    record = demo.make_record(settings, runs, scores, 12.5, "a table\nof two lines")
    read = json.loads(json.dumps(record, allow_nan=False))

    assert set(read) == {
        "settings", "device", "threads", "versions", "clip", "total_seconds", "explain", "runs",
    }  # fmt: skip
    assert read["settings"]["label"] == "astronaut"
    assert set(read["versions"]) == {"python", "torch", "svg-ear-compile"}
    assert read["explain"] == ["a table", "of two lines"]
    assert [run["title"] for run in read["runs"]] == ["dense", "svg_ear", "svg_ear"]
    for run in read["runs"]:
        assert run["finite"] is True
        assert run["seconds"] == {
            "first_step": 9.0,
            "median_step": 2.0,
            "steps": [9.0, 1.0, 2.0, 3.0],
        }
    first, equal, other = read["runs"]
    assert first["scores"] is None
    assert first["layers"] == []
    assert equal["scores"]["psnr"] == [None] * 5
    assert equal["scores"]["psnr_mean"] is None
    assert equal["density_mean"] == 0.2
    assert equal["layers"] == [{"path": "blocks.0.attn", "density": 0.2, "identity": "parameter"}]
    assert other["density_mean"] is None
    assert other["scores"]["psnr_min"] == min(other["scores"]["psnr"])


def test_printed_tables_name_every_frame_layer_and_run():
    settings = demo_runs.DemoSettings("cpu", (5, 24, 32), steps=4, dense_steps=1)
    runs = [finite_run("dense", None), finite_run("paper's rule", "centroid"), finite_run()]
    scores = [FrameScores((31.25,) * 5, (0.9,) * 5), FrameScores((math.inf,) * 5, (1.0,) * 5)]
    text = io.StringIO()
    demo.print_results(settings, runs, scores, Console(file=text, width=100))
    printed = text.getvalue()
    for expected in ("blocks.0.attn", "31.25", "∞", "0.200", "9.00", "2.000", "paper's rule"):
        assert expected in printed


def test_a_step_that_compiles_is_not_in_the_median():
    run = finite_run()
    assert run.median_seconds(dense_steps=0) == 2.0
    assert run.median_seconds(dense_steps=2) == 2.5
    assert run.median_seconds(dense_steps=4) == 2.5


def command_line(**given):
    names = (
        "device", "shape", "steps", "dense_steps", "density", "seed", "label", "guidance",
        "compensation",
    )  # fmt: skip
    return argparse.Namespace(**{**dict.fromkeys(names), **given})


def test_device_decides_what_the_command_line_leaves_open():
    cpu = demo.settings_from(command_line(device="cpu"))
    assert (cpu.shape, cpu.dtype) == (DEMO_SHAPE, torch.float32)
    gpu = demo.settings_from(command_line(device="cuda"))
    assert (gpu.shape, gpu.dtype, gpu.steps) == (TRAIN_SHAPE, torch.bfloat16, 24)
    mixed = demo.settings_from(
        command_line(device="cpu", shape="long", label="coffee", seed=7, compensation="centroid")
    )
    assert mixed.shape == TRAIN_SHAPE
    assert (mixed.label, mixed.seed, mixed.steps) == (LABELS.index("coffee"), 7, cpu.steps)
    assert mixed.compensations == ("centroid",)


def test_whole_demo_on_a_tiny_model(tmp_path, monkeypatch, through_aot):
    config = VideoDiTConfig(
        class_names=LABELS,
        camera_fields=CAMERA_FIELDS,
        width=32,
        heads=1,
        layers=2,
        mlp_width=64,
        cond_width=16,
    )
    torch.manual_seed(0)
    model = VideoDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.save(tmp_path / "weights")
    monkeypatch.setattr(demo_runs, "_MIN_TOKENS", 64)
    settings = demo_runs.DemoSettings(
        "cpu", (3, 48, 48), steps=3, dense_steps=1, compensations=("gaussian",)
    )
    text = io.StringIO()
    out = tmp_path / "out"
    demo.run_demo(settings, tmp_path / "weights", out, Console(file=text, width=120))

    record = json.loads((out / "demo.json").read_text())
    dense, sparse = record["runs"]
    assert len(dense["seconds"]["steps"]) == len(sparse["seconds"]["steps"]) == 3
    assert len(sparse["layers"]) == 2
    assert all(0 < layer["density"] < 1 for layer in sparse["layers"])
    # A density below 1 changes the clip, and not by much.
    assert sparse["scores"]["psnr_mean"] > 10
    for name in ("side_by_side.gif", "contact_sheet.jpg"):
        with Image.open(out / name) as image:
            image.verify()
    assert "blocks.1" in text.getvalue()
    page = (out / "index.html").read_text()
    assert page.count("data:image/webp") == 3  # two clips and one difference
    assert "svg_ear" in page
    assert "astronaut" in page
    assert str(out / "index.html") in text.getvalue().splitlines()[-1]
