"""Ranks of torch.distributed that divide a tuning; one rank where no process group is set up."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_reduce_max(found: Tensor) -> None:
    """Replace each element of `found`, on every rank, by its largest value over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
