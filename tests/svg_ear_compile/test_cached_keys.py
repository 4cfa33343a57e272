"""Caches of keys that grow: labels that are kept, keys labelled anew, and when all are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.data import grid_of, rope, video_like
from svg_ear_compile.kernels import op
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Result
from svg_ear_compile.kernels.registry import sparse_attention
from svg_ear_compile.memory import (
    HOPELESS,
    OUTDATED,
    STALE,
    Arriving,
    Memory,
    RememberedCall,
    calls_by_branch,
)

PLAN = AttentionPlan(density=0.2)
ALL_BLOCKS = replace(PLAN, routing="threshold", threshold=0.0)
TOKENS, HEADS, DIM = 2300, 2, 32
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

    @property
    def counts(self) -> tuple[int, int, int, int]:
        memory = self.memory
        return memory.cold, memory.recomputed, memory.reused, memory.kept


@pytest.fixture(scope="module")
def video() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = video_like(1, HEADS, TOKENS, DIM, device="cpu", dtype=torch.float32)
    return q, k, v


Video = tuple[Tensor, Tensor, Tensor]


def chunk(video: Video, frame: int, first: int = 0) -> Video:
    """Queries of one frame, keys and values of the frames from `first` to it."""
    q, k, v = video
    here = slice(frame * FRAME, (frame + 1) * FRAME)
    known = slice(first * FRAME, here.stop)
    return q[:, :, here], k[:, :, known], v[:, :, known]


def noisy(x: Tensor, level: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return x + level * x.std() * torch.randn(x.shape, generator=generator)


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    wanted = F.scaled_dot_product_attention(q, k, v)
    return ((out - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("window", [FRAMES, 3])
def test_errors_stay_those_of_clustering_anew(window: int, video: Video) -> None:
    """Of a cache that grows, and of one that rolls. The keys of finished chunks drift slowly."""
    stream, kept, anew = Stream(), 0.0, 0.0
    for frame in range(TOKENS // FRAME):
        for step, level in enumerate((0.4, 0.1)):
            q, k, v = chunk(video, frame, max(0, frame + 1 - window))
            q, k = noisy(q, level, step), noisy(k, 0.02, 10 * frame + step)
            k, v = (torch.cat([x[:, :, :-FRAME], noisy(x[:, :, -FRAME:], level, step)], 2)
                    for x in (k, v))  # fmt: skip
            kept += error(stream.attend(q, k, v), q, k, v)
            anew += error(sparse_attention(q, k, v, PLAN).out, q, k, v)
        stream.next_chunk()
    assert kept < 1.1 * anew
    assert stream.counts[:2] == (1, 0)


def test_with_every_block_outdated_labels_are_exact(video: Video) -> None:
    stream = Stream(ALL_BLOCKS)
    stream.attend(*chunk(video, 2))
    stream.next_chunk()
    q, k, v = chunk(video, 3)
    out = stream.attend(q, -k.flip(2), v)  # keys that their labels say nothing of
    wanted = F.scaled_dot_product_attention(q, -k.flip(2), v)
    assert stream.memory.kept == 1
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


def rotated(k: Tensor, factor: float, shift: float) -> Tensor:
    """The keys, rotated as by positions that are scaled and shifted."""
    place = torch.arange(k.shape[2])
    at = torch.stack([place // FRAME, place // WIDTH % HEIGHT, place % WIDTH], 1).float()
    moved = torch.stack([rope(head, (factor - 1) * at + shift) for head in k[0]])
    return moved.unsqueeze(0)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 5.0), (3.0, 0.0)])
def test_clusters_outlive_positions_that_are_applied_anew(
    factor: float, shift: float, video: Video
) -> None:
    """Rotary positions that are shifted or stretched change every key, but no value beside it."""
    stream = Stream()
    stream.attend(*chunk(video, 4))
    stream.next_chunk()
    q, k, v = chunk(video, 5)
    q = rotated(torch.cat([k[:, :, :-FRAME], q], 2), factor, shift)[:, :, -FRAME:]
    k = rotated(k, factor, shift)
    anew = error(sparse_attention(q, k, v, PLAN).out, q, k, v)
    for _ in range(2):
        assert error(stream.attend(q, k, v), q, k, v) < 1.1 * anew
    assert stream.counts == (1, 0, 0, 2)


def test_keys_that_moved_without_their_values_are_found(video: Video) -> None:
    stream = Stream()
    q, k, v = chunk(video, 5)
    stream.attend(q, k, v)
    order = torch.arange(k.shape[2])
    moved = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))[
        : len(order) // 4
    ]
    order[moved] = moved.flip(0)
    k = k[:, :, order]
    anew = error(sparse_attention(q, k, v, PLAN).out, q, k, v)
    assert error(stream.attend(q, k, v), q, k, v) > 1.2 * anew
    assert error(stream.attend(q, k, v), q, k, v) == anew
    assert stream.counts == (2, 0, 0, 1)


@pytest.mark.parametrize(
    ("excess", "counts"),
    [(0.9 * STALE, (1, 0, 0, 1)), (STALE, (1, 0, 0, 1)), (OUTDATED, (2, 0, 0, 0))],
)
def test_stale_labels_are_all_renewed(excess: float, counts: tuple[int, ...], video: Video) -> None:
    stream = Stream()
    q, k, v = chunk(video, 5)
    stream.attend(q, k, v)
    memory = stream.memory
    assert memory.k_labels is not None
    memory.k_labels = torch.zeros_like(memory.k_labels)  # fit no key, beside centroids that do
    memory.excess = Arriving(torch.tensor(excess))
    stream.attend(q, k, v)
    assert stream.counts == counts
    found = stream.result.excess
    assert (found is not None and found.item() > 0.5) == (excess < STALE)
    assert not memory.is_stale


def test_keys_that_outdate_again_and_again_are_hopeless(video: Video) -> None:
    stream = Stream()
    for seed in range(2 * HOPELESS + 1):
        q, k, v = chunk(video, 5)
        assert not stream.memory.is_hopeless
        order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed))
        stream.attend(q, k[:, :, order], v)
    stream.memory.take_stock()
    assert stream.counts == (HOPELESS + 1, 0, 0, HOPELESS)
    assert stream.memory.is_hopeless


def test_padding_and_exact_tokens_move_with_the_cache(video: Video) -> None:
    """A cache of one length whose mask grows, with text keys in front of it."""
    stream = Stream(ALL_BLOCKS)
    text = torch.randn(2, 1, HEADS, 7, DIM, generator=torch.Generator().manual_seed(1))
    is_text = (torch.arange(7 + 6 * FRAME) < 7).unsqueeze(0)
    for frame in (3, 4, 5):
        q, k, v = chunk(video, frame)
        room = k.new_zeros(1, HEADS, (5 - frame) * FRAME, DIM)
        k, v = (torch.cat([t, x, room], 2) for t, x in zip(text, (k, v), strict=True))
        mask = (torch.arange(k.shape[2]) < k.shape[2] - room.shape[2])[None, None, None]
        with calls_from(stream):
            out, _ = op.attention(
                q, k, v, mask, exact_keys=is_text, clustered_keys=6 * FRAME, cached_keys=True
            )
        wanted = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)
        labels, sizes = stream.result.keys.labels, stream.result.keys.sizes
        clusters = sizes.shape[2]
        assert (labels[..., :7] == clusters).all()
        assert (labels[..., k.shape[2] - room.shape[2] :] == clusters + 1).all()
        assert (sizes.sum(-1) == (frame + 1) * FRAME).all()
        stream.next_chunk()
    assert stream.counts == (1, 0, 0, 2)


def test_clusters_are_kept_for_a_call_of_their_shape_and_device(video: Video) -> None:
    stream = Stream()
    stream.attend(*chunk(video, 5))
    memory, cpu = stream.memory, torch.device("cpu")
    assert memory.k_centroids is not None
    batch, heads, clusters, dim = memory.k_centroids.shape
    for more in (0, 1):
        assert memory.kept_clusters(PLAN, (batch, heads, clusters + more, dim), cpu) is not None
    assert memory.kept_clusters(PLAN, (batch, heads, clusters - 1, dim), cpu) is None
    assert memory.kept_clusters(PLAN, (batch, heads + 1, clusters, dim), cpu) is None
    assert memory.kept_clusters(PLAN, (batch, heads, clusters, dim), torch.device("meta")) is None


def test_labels_that_are_remembered_twice_are_held_once(video: Video) -> None:
    stream = Stream()
    q, k, v = chunk(video, 3)
    stream.attend(q, k, v)
    memory, tokens = stream.memory, k.shape[2]
    q_clusters, k_clusters = PLAN.clusters(FRAME, tokens)
    centroids = 4 * HEADS * DIM * (q_clusters + k_clusters)
    blocks = 2 * HEADS * (FRAME + tokens) + HEADS * q_clusters * k_clusters
    assert memory.nbytes() == centroids + blocks + 8 * tokens + 8
