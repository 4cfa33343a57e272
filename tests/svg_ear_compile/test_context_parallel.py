"""diffusers' Ulysses over two processes: an ordinary site with fewer heads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformer_models import wan

from svg_ear_compile import explain

RANKS = 2
OPTIONS = {"min_tokens": 64, "q_clusters": 4, "k_clusters": 8}


def run(model: Any, inputs: Any, kwargs: Any, density: float) -> Tensor:
    torch._dynamo.reset()
    options = {**OPTIONS, "density": density}
    with torch.no_grad():
        return torch.compile(model, backend="svg_ear", options=options)(*inputs, **kwargs)[0]


def worker(rank: int, folder: str) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    # diffusers counts accelerators to choose a device; a CPU is none.
    torch.accelerator.device_count = lambda: 1
    model, inputs, kwargs = wan()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    with torch.no_grad():
        model(*inputs, **kwargs)  # its hooks log once, which would break the first graph
    found = explain(model, *inputs, options=OPTIONS, **kwargs)
    rows = [(site.layer, site.role, site.shape, site.plan is not None) for site in found.sites]
    outputs = [run(model, inputs, kwargs, density) for density in (1.0, 0.3)]
    torch.save({"rows": rows, "outputs": outputs}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    model, inputs, kwargs = wan()
    wanted = [run(model, inputs, kwargs, density) for density in (1.0, 0.3)]
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4
    mp.spawn(worker, (str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got["rows"] == [
            ("blocks.0.attn1", "self", (1, 1, 192, 192, 32), True),
            ("blocks.0.attn2", "cross", (1, 2, 96, 7, 32), False),
            ("blocks.1.attn1", "self", (1, 1, 192, 192, 32), True),
            ("blocks.1.attn2", "cross", (1, 2, 96, 7, 32), False),
        ]
        for output, single in zip(got["outputs"], wanted, strict=True):
            torch.testing.assert_close(output, single, rtol=1e-4, atol=1e-5)
