"""Clips of real motion: stored, cut into windows, learnt from, and training that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.video_dit import stored_weights
from benchmarks.video_dit.footage import (
    FRAMES,
    MOMENT_FIELDS,
    SHOTS,
    Footage,
    Shot,
    load_footage,
    moment_code,
    write_footage,
)
from benchmarks.video_dit.prepare_footage import cut
from benchmarks.video_dit.train import TrainingPlan, make_optimizer, train, training_step
from benchmarks.video_dit.training_state import TrainingState
from benchmarks.video_dit.zoo import MODELS

COUNTS = [4 + shot % 3 for shot in range(len(SHOTS))]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every shot of one red, its frames from dark to bright green."""
    path = tmp_path_factory.mktemp("films") / "films.npz"
    shots = [
        [Image.new("RGB", (24, 24), (6 * shot, 40 * frame, 128)) for frame in range(count)]
        for shot, count in enumerate(COUNTS)
    ]
    write_footage(path, shots, 95)
    return path


def test_windows_are_of_their_shot_and_moment(films: Path) -> None:
    footage = load_footage(films, 12, CPU)
    clips = footage.draw(64, (3, 12, 12), torch.Generator().manual_seed(0))
    assert clips.video.shape == (64, 3, 3, 12, 12)
    red, green = ((clips.video[:, c].mean(dim=(2, 3)) + 1) * 127.5 for c in (0, 1))
    assert torch.allclose(red, 6.0 * clips.label[:, None].expand(-1, 3), atol=2)
    frame = (green / 40).round()
    assert torch.equal(frame[:, 1] - frame[:, 0], torch.ones(64))
    middle = torch.tensor(COUNTS)[clips.label] / 2 - 0.5
    assert torch.allclose(clips.camera, moment_code(frame[:, 1] - middle), atol=1e-6)
    # The first and the last window of a shot occur.
    assert set(frame[:, 0].tolist()) == {0, 1, 2, 3}
    assert clips.camera.shape[1] == len(MOMENT_FIELDS)


def test_footage_of_other_shots_is_refused(tmp_path: Path) -> None:
    write_footage(tmp_path / "old.npz", [[Image.new("RGB", (8, 8))]], 80)
    with pytest.raises(ValueError, match=r"1 shots, not .* prepare it again"):
        load_footage(tmp_path / "old.npz", 8, CPU)


def test_a_shot_starts_and_strides_and_is_square() -> None:
    frames = np.zeros((80, 20, 40, 3), np.uint8)
    frames[..., 10:30, :] = np.arange(80, dtype=np.uint8)[:, None, None, None] * 3
    film = imageio.imwrite("<bytes>", frames, extension=".webp", plugin="pillow", lossless=True)
    found = cut(film, Shot("a", "a.webp", stride=2, start=5))
    assert [image.getpixel((0, 0))[0] for image in found] == [3 * f for f in range(5, 80, 2)]
    with pytest.raises(ValueError, match=f"20 of {FRAMES[0]}"):
        cut(film, Shot("a", "a.webp", stride=4))


def test_training_goes_on_where_it_was(films: Path, tmp_path: Path) -> None:
    footage = load_footage(films, 24, CPU)

    def made(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        model, smoothed = (MODELS["third"].shrunk().build() for _ in range(2))
        return TrainingState(
            model, smoothed, make_optimizer(model, 1e-3), torch.Generator().manual_seed(seed)
        )

    def step(state: TrainingState, footage: Footage) -> float:
        clips = footage.draw(2, (2, 24, 24), state.generator)
        return training_step(state.model, state.optimizer, clips, state.generator).item()

    first, second = made(0), made(1)
    step(first, footage)
    first.step, first.progress, first.losses = 1, 0.25, [{"loss_short": 0.5}]
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert (second.step, second.progress, second.losses) == (1, 0.25, [{"loss_short": 0.5}])
    for name, tensor in first.smoothed.state_dict().items():
        assert torch.equal(second.smoothed.state_dict()[name], tensor)
    assert [step(first, footage) for _ in range(2)] == [step(second, footage) for _ in range(2)]


def test_a_run_that_ended_is_trained_on_when_asked(films: Path, tmp_path: Path) -> None:
    small = replace(
        MODELS["third"].shrunk(), short=(2, 24, 24), short_batch=2, long=(4, 24, 24), long_batch=1
    )
    plan = TrainingPlan(
        small, 0.01, sample_steps=1, sample_labels=1, films=films, state=tmp_path / "kept" / "state"
    )
    out = tmp_path / "out"
    train(plan, out, CPU)
    steps = json.loads((out / "loss.json").read_text())["steps"]
    assert {path.name for path in out.iterdir()} == {
        stored_weights.FILE, "config.json", "loss.json", "data.png",
        "samples_short.png", "samples_long.png",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="has ended; --progress"):
        train(plan, out, CPU)
    train(replace(plan, progress=0.6), out, CPU)
    assert json.loads((out / "loss.json").read_text())["steps"] >= steps


def test_films_are_asked_for() -> None:
    with pytest.raises(SystemExit, match="--films"):
        MODELS["third"].clips(24, CPU, None)
