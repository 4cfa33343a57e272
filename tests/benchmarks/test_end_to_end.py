"""The end-to-end benchmark at a size that a CPU takes: what it measures is what it says."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from benchmarks.end_to_end.__main__ import table
from benchmarks.end_to_end.measure import forward, generation
from benchmarks.end_to_end.models import SIZES, TINY, Size, _hunyuan

HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12), "guidance_embeds": True,
}  # fmt: skip
TINY_HUNYUAN = Size(
    _hunyuan, (4, 3, 16, 16), (7, 16), HUNYUAN, ("num_layers", "num_single_layers"), 8
)
OPTIONS = {"density": 0.3, "min_tokens": 64}


@pytest.mark.slow
def test_a_forward_reports_time_attention_and_clusters() -> None:
    rows = [
        {"model": "wan", **forward(TINY, backend, options, 2, "cpu", torch.float32)}
        for backend, options in (("inductor", {}), ("svg_ear", OPTIONS))
    ]
    for row in rows:
        assert row["finite"]
        assert len(row["samples_seconds"]) == 2
        assert 0 < row["attention_fraction"] < 1
        assert row["first_seconds"] > min(row["samples_seconds"])
    dense, sparse = rows
    assert (dense["clusters"], dense["densities"]) == ([], [])
    assert len(sparse["clusters"]) == 2
    assert all(0.3 <= density < 0.9 for density in sparse["densities"] if density is not None)
    mean, deviation = sparse["clusters"][0]["keys"]
    assert mean > 0
    assert deviation >= 0
    console = Console(width=110, record=True)
    console.print(table("forward", rows))
    assert "svg_ear" in console.export_text()


@pytest.mark.slow
def test_a_generation_is_run_from_caches_that_its_first_steps_fill(through_aot: None) -> None:
    rows = [
        {
            "model": "wan",
            **generation(
                TINY,
                backend,
                options,
                steps=3,
                dense_steps=1,
                device="cpu",
                dtype=torch.float32,
            ),
        }
        for backend, options in (("inductor", {}), ("svg_ear", OPTIONS))
    ]
    assert all(row["finite"] and row["seconds"] > 0 for row in rows)
    assert [row["dense_steps"] for row in rows] == [3, 1]
    console = Console(width=110, record=True)
    console.print(table("generation", rows))
    assert "svg_ear" in console.export_text()


@torch.no_grad()
def test_a_model_with_pooled_text_and_guidance_takes_its_inputs() -> None:
    size = TINY_HUNYUAN
    out = size.build("cpu", torch.float32)(**size.inputs("cpu", torch.float32))[0]
    assert out.shape == (1, *size.latents)
    assert out.isfinite().all()


def test_published_sizes_have_their_tokens() -> None:
    tokens = {
        name: size.latents[1] * size.latents[2] * size.latents[3] // 4
        for name, size in SIZES.items()
    }
    assert tokens == {"wan14b-720p": 75600, "wan1.3b-480p": 32760, "hunyuan-720p": 118800}
    assert SIZES["hunyuan-720p"].with_layers((3, 5)).config["num_single_layers"] == 5
