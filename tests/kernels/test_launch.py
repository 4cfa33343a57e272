"""Launch configurations by architecture."""

from __future__ import annotations

import pytest
import torch

from svg_ear_compile.kernels.gpu.launch import HOPPER, architecture, launch_config


@pytest.fixture(autouse=True)
def forget_devices() -> None:
    architecture.cache_clear()


@pytest.mark.parametrize(("capability", "name"), [((8, 9), "sm_89"), ((9, 0), "sm_90")])
def test_an_architecture_is_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert architecture(device) == name


def test_what_is_no_gpu_has_none_and_takes_the_measured_tiles() -> None:
    assert architecture(torch.device("cpu")) == ""
    assert launch_config(128, 2, "") == launch_config(128, 2, HOPPER)


def test_query_tiles_are_whole_subtiles() -> None:
    for dim in (32, 64, 128, 256):
        for name in (HOPPER, "sm_80"):
            tile = launch_config(dim, 2, name).query_tile
            assert tile.tile % tile.subtile == 0
            assert tile.candidates & (tile.candidates - 1) == 0  # the kernel takes a power of two
    assert launch_config(128, 2, HOPPER).query_tile == (64, 192)
