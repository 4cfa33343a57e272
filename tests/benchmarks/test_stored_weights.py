"""The file of a model's weights: small, the same for the same weights, and never half written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from benchmarks.video_dit.stored_weights import FILE, packed, read_weights, write_weights
from benchmarks.video_dit.zoo import MODELS


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.q.weight": torch.randn(64, 96, generator=generator),
        "blocks.0.q.bias": torch.randn(64, generator=generator),
        "patch_in.weight": torch.randn(96, 8, generator=generator),
    }


def test_weights_written_again_are_the_same_bytes(tmp_path: Path) -> None:
    write_weights(tmp_path, weights())
    first = (tmp_path / FILE).read_bytes()
    assert len(first) < 64 * 96 + 4 * 64 + 2 * (64 + 96 * 8) + 500
    write_weights(tmp_path, weights())
    assert (tmp_path / FILE).read_bytes() == first
    kept = read_weights(tmp_path)
    for name, tensor in weights().items():
        if name == "blocks.0.q.weight":
            assert (kept[name] - tensor).abs().max() <= 1.001 * tensor.abs().max() / 254
        else:
            assert torch.equal(kept[name], tensor.bfloat16().float())


def test_a_write_that_is_cut_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path, weights())
    before = read_weights(tmp_path)

    def cut(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", cut)
        with pytest.raises(OSError, match="no space"):
            write_weights(tmp_path, weights(1))
    after = read_weights(tmp_path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_committed_weights_are_small_and_of_one_format() -> None:
    folders = [model.weights for model in MODELS.values()]
    # The tracked files of the repository are to stay under 30 MB together.
    assert sum((folder / FILE).stat().st_size for folder in folders) < 25.1e6
    for folder in folders:
        assert not list(folder.glob("*.safetensors"))
        stored = load(gzip.decompress((folder / FILE).read_bytes()))
        eight_bits = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
        assert eight_bits == {
            name
            for name, tensor in packed(read_weights(folder)).items()
            if tensor.dtype == torch.int8
        }
        assert len(eight_bits) > 20
