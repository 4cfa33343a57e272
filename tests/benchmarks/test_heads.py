"""Heads of known types: what dense attention does with them, and that the bench names the worst."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.attention import heads
from benchmarks.attention.heads import SINK_MASS, TYPES, Scene, scene_of, sink_places

TOKENS = 1011  # the last row of the grid is cut


@pytest.fixture(scope="module", params=[64, 128])
def scene(request: pytest.FixtureRequest) -> Scene:
    return scene_of(TOKENS, request.param, 0, "cpu")


def weights(name: str, scene: Scene) -> Tensor:
    q, k, _ = TYPES[name](scene)
    return torch.softmax(scene.dim**-0.5 * q @ k.T, -1)


def mass(weight: Tensor, inside: Tensor) -> Tensor:
    """Mass of every query inside a set of keys (N, N) bool."""
    return (weight * inside).sum(1)


def apart(scene: Scene) -> tuple[Tensor, Tensor]:
    """Frames between two tokens, and rows and columns between them, both (N, N)."""
    difference = scene.at[:, None] - scene.at
    return difference[..., 0].abs(), difference[..., 1:].abs().amax(-1)


def test_one_token_has_the_mass(scene: Scene) -> None:
    for name in ("one token, by its place", "one token, by what it shows"):
        assert float(weights(name, scene).diagonal().mean()) > 0.98, name


def test_the_frame_before_has_the_mass(scene: Scene) -> None:
    back = scene.at[:, None] - scene.at
    other = (back[..., 0] == 1) & (back[..., 1:] == 0).all(-1)
    share = mass(weights("one token of the frame before", scene), other)
    assert float(share[other.any(1)].mean()) > 0.98


def test_neighbours_in_space_have_the_mass(scene: Scene) -> None:
    frames, side = apart(scene)
    weight = weights("neighbours in space", scene)
    assert float(mass(weight, (frames == 0) & (side <= 4)).mean()) > 0.9
    assert float(mass(weight, (frames == 0) & (side <= 1)).mean()) < 0.9


def test_one_place_at_all_times_has_the_mass(scene: Scene) -> None:
    frames, side = apart(scene)
    weight = weights("one place at all times", scene)
    assert float(mass(weight, side == 0).mean()) > 0.98
    assert float(mass(weight, (side == 0) & (frames == 0)).mean()) < 0.4


def test_one_token_and_everything_share_the_mass(scene: Scene) -> None:
    weight = weights("one token and everything", scene)
    assert float(weight.diagonal().mean()) == pytest.approx(0.5, abs=0.1)
    weight.fill_diagonal_(0)
    assert float(weight.max()) < 0.1


def test_everything_has_no_place(scene: Scene) -> None:
    assert float(weights("everything", scene).max()) < 20 / TOKENS


def test_sinks_have_the_mass(scene: Scene) -> None:
    weight = weights("sinks", scene)
    places = sink_places(TOKENS, scene.code.device)
    assert len(places.unique()) == heads.SINKS
    share = weight[:, places].sum(1)
    assert float(share.mean()) == pytest.approx(SINK_MASS, abs=0.05)


def test_the_worst_type_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["heads", "--tokens", "333", "--dim", "32"])
    heads.main()
    lines = capsys.readouterr().out.splitlines()
    errors = {line[:30].strip(): float(line.split()[-2]) for line in lines[2:-2]}
    assert errors.keys() == TYPES.keys()
    worst = max(errors, key=lambda name: errors[name])
    assert lines[-2] == f"worst at 0.1: {worst}, {errors[worst]:.3f}"
    assert errors["everything"] < 0.1 < errors[worst]
