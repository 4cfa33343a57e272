"""Ring attention, alone and inside of Ulysses: every part of the keys is a site of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_groups import spawn
from ring_models import DIM, HEADS, TOKENS, ring_input, ring_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from svg_ear_compile import backend, explain

DENSITIES = (1.0, 0.2)
QUERY_CLUSTERS, KEYS_PER_CLUSTER = 16, 16


def options(tokens: int) -> dict[str, int]:
    """For calls on so many tokens: a part of a video is as varied as the whole in its queries."""
    return {
        "min_tokens": 64,
        "q_clusters": QUERY_CLUSTERS,
        "k_clusters": tokens // KEYS_PER_CLUSTER,
    }


def run(model: nn.Module, x: Tensor, density: float, clusters: dict[str, int]) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="svg_ear", options={**clusters, "density": density})(x)


def worker(rank: int, ring: int, ulysses: int, folder: str) -> None:
    torch.set_num_threads(1)
    ranks = ring * ulysses
    backend.compile_fx = lambda gm, inputs, **given: gm.forward
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    model = ring_model(
        ring, ulysses, (mesh["ring"].get_group().group_name, mesh["ulysses"].get_group().group_name)
    )
    x = ring_input().chunk(ranks, 1)[rank]
    clusters = options(TOKENS // ring)
    found = explain(model, x, options=clusters)
    rows = [(site.layer, site.role, site.shape, site.plan is not None) for site in found.sites]
    outputs = [run(model, x, density, clusters) for density in DENSITIES]
    torch.save({"rows": rows, "outputs": outputs}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (2, 2)])
def test_a_ring_equals_one_process(ring: int, ulysses: int, tmp_path: Path) -> None:
    model, x = ring_model(), ring_input()
    with torch.no_grad():
        dense = model(x)
    alone = [run(model, x, density, options(TOKENS)) for density in DENSITIES]
    spawn(worker, (ring, ulysses, str(tmp_path)), ring * ulysses)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ring * ulysses)]
    shape = (1, HEADS // ulysses, TOKENS // ring, TOKENS // ring, DIM)
    for got in saved:
        assert got["rows"] == [("blocks.0", "self", shape, True) for _ in range(ring)]
    exact, sparse = (
        torch.cat(parts, 1) for parts in zip(*(got["outputs"] for got in saved), strict=True)
    )
    torch.testing.assert_close(exact, dense, rtol=1e-4, atol=1e-5)
    errors = [float((out - dense).norm()) for out in (alone[1], sparse)]
    assert errors[0] > 1e-3 * dense.norm()
    assert errors[1] <= 1.1 * errors[0]
