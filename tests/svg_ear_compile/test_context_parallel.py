"""diffusers' Ulysses over two processes: an ordinary site with fewer heads.

That the outputs are those of one process is seen in `test_accelerated_models.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_groups import spawn
from transformer_models import wan

from svg_ear_compile import explain

RANKS = 2
OPTIONS = {"min_tokens": 64, "q_clusters": 4, "k_clusters": 8}


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
    torch.save(rows, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_each_of_two_ranks_has_all_tokens_and_half_of_the_heads(tmp_path: Path) -> None:
    spawn(worker, (str(tmp_path),), RANKS)
    for rank in range(RANKS):
        assert torch.load(tmp_path / f"{rank}.pt") == [
            ("blocks.0.attn1", "self", (1, 1, 192, 192, 32), True),
            ("blocks.0.attn2", "cross", (1, 2, 96, 7, 32), False),
            ("blocks.1.attn1", "self", (1, 1, 192, 192, 32), True),
            ("blocks.1.attn2", "cross", (1, 2, 96, 7, 32), False),
        ]
