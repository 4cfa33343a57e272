"""Caches of keys that grow: labels that are kept, keys labelled anew, chunks of a video."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.data import grid_of, video_like
from svg_ear_compile.kernels import op
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Result
from svg_ear_compile.kernels.registry import sparse_attention
from svg_ear_compile.memory import Memory, RememberedCall, calls_by_branch

PLAN = AttentionPlan(density=0.2)
TOKENS, HEADS, DIM = 4600, 2, 32
FRAMES, HEIGHT, WIDTH = grid_of(TOKENS)
FRAME = HEIGHT * WIDTH


class Stream:
    """A source for one layer, to which chunk after chunk is attended."""

    def __init__(self, plan: AttentionPlan = PLAN) -> None:
        self.plan, self.memory = plan, Memory()

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        yield from calls_by_branch(request, self.plan, [self.memory])

    def finished(self, call: AttentionCall, result: Result) -> None:
        assert isinstance(call, RememberedCall)
        self.result = result
        call.finished(result)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with calls_from(self):
            return op.attention(q, k, v, mask, cached_keys=True)[0]

    def next_chunk(self) -> None:
        self.memory = self.memory.next_chunk()


def video(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = video_like(1, HEADS, TOKENS, DIM, seed=seed, device="cpu", dtype=torch.float32)
    return q, k, v


def noisy(x: Tensor, level: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return x + level * x.std() * torch.randn(x.shape, generator=generator)


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    wanted = F.scaled_dot_product_attention(q, k, v)
    return ((out - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("window", [FRAMES, 3])
def test_errors_stay_those_of_clustering_anew(window: int) -> None:
    """Of a growing cache and of one that rolls; finished chunks' keys drift slowly."""
    q, k, v = video()
    stream, kept, anew = Stream(), [], []
    for frame in range(FRAMES):
        here = slice(frame * FRAME, (frame + 1) * FRAME)
        first = max(0, frame + 1 - window) * FRAME
        for step, level in enumerate((0.4, 0.1)):
            keys = torch.cat([k[:, :, first : here.start], noisy(k[:, :, here], level, step)], 2)
            values = torch.cat([v[:, :, first : here.start], noisy(v[:, :, here], level, step)], 2)
            keys = noisy(keys, 0.02, 10 * frame + step)
            queries = noisy(q[:, :, here], level, step)
            out = stream.attend(queries, keys, values)
            if frame:
                kept.append(error(out, queries, keys, values))
                cold = sparse_attention(queries, keys, values, PLAN)
                anew.append(error(cold.out, queries, keys, values))
        stream.next_chunk()
    ratios = [mine / other for mine, other in zip(kept, anew, strict=True)]
    assert sum(ratios) / len(ratios) < 1.1
    assert stream.memory.cold == 1
