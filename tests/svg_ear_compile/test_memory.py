"""What a layer remembers: centroids, clusters and block masks, and when they are reused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels import op
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Blocks, Result
from svg_ear_compile.kernels.registry import sparse_attention
from svg_ear_compile.memory import Drift, Memory, RememberedCall, calls_by_branch

PLAN = AttentionPlan(density=0.3, q_clusters=3, k_clusters=7, max_drift=0.2)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def random_qkv(
    seed: int,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q of 61 tokens, k and v of 45, all gathered around six centers; head dim 32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int) -> Tensor:
        centers = torch.randn(batch, heads, 6, 32, generator=generator)
        pick = torch.randint(6, (batch, heads, tokens, 1), generator=generator)
        near = 0.3 * torch.randn(batch, heads, tokens, 32, generator=generator)
        return (centers.gather(2, pick.expand(-1, -1, -1, 32)) + near).to(device, dtype)

    return draw(heads[0], 61), draw(heads[1], 45), draw(heads[1], 45)


def later_step(x: Tensor, seed: int) -> Tensor:
    """The same tokens a little later: most are still nearest to their cluster, some are not."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + 0.3 * noise.to(x.device, x.dtype)


class Steps:
    """A source for one layer, or one that follows a reference branch."""

    def __init__(self, plan: AttentionPlan, reference: Memory | None = None) -> None:
        self.plan, self.memories, self.reference = plan, [Memory()], reference

    @property
    def memory(self) -> Memory:
        return self.memories[0]

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        if self.plan.is_dense:
            self.memory.skip()
            yield AttentionCall(self.plan)
        else:
            yield from calls_by_branch(request, self.plan, self.memories, self.reference)

    def finished(self, call: AttentionCall, result: Result) -> None:
        assert isinstance(call, RememberedCall)
        call.finished(result)

    def step(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> int:
        """Attend; the age of the blocks that served."""
        with calls_from(self):
            self.out, self.lse = op.attention(q, k, v, mask, return_lse=True)
        return self.memory.age


@DEVICES
def test_centroids_start_the_next_call_and_tell_the_density(device: str) -> None:
    q, k, v = random_qkv(0, 2, (4, 2), device=device)
    steps = Steps(replace(PLAN, max_drift=0.0, shared_branches=False))
    assert steps.memory.density is None
    steps.step(q, k, v)
    memory = steps.memory
    remembered = (memory.q_centroids, memory.k_centroids)
    wanted = sparse_attention(q, k, v, steps.plan, centroids=remembered)
    steps.step(q, k, v)
    assert torch.equal(steps.out, wanted.out)
    density = (wanted.row_area.double() * wanted.queries.sizes).sum() / (2 * 4 * 61 * 45)
    assert memory.density == pytest.approx(density.item())
    assert memory.nbytes() == 4 * 32 * 2 * (4 * 3 + 2 * 7) + 8
    assert (memory.cold, memory.recomputed, memory.reused) == (1, 1, 0)


@DEVICES
def test_memory_of_another_shape_starts_cold(device: str) -> None:
    q, k, v = random_qkv(0, 2, (4, 2), device=device)
    steps, cold = Steps(PLAN), Steps(PLAN)
    steps.memories = [
        Memory(torch.ones(2, 4, 5, 32, device=device), torch.ones(2, 2, 7, 32, device=device))
    ]
    steps.step(q, k, v)
    cold.step(q, k, v)
    assert torch.equal(steps.out, cold.out)
    memory, shapes = steps.memory, ((2, 4, 3, 32), (2, 2, 7, 32))
    assert memory.warm_start(*shapes, q.device) is not None
    assert memory.warm_start(*shapes, torch.device("meta")) is None


@DEVICES
def test_still_tokens_are_clustered_as_seldom_as_may_be(device: str) -> None:
    # Well apart, so that no token changes its cluster once they are found.
    steps = Steps(replace(PLAN, q_clusters=2, k_clusters=2, first_iterations=9))
    qkv = random_qkv(0, device=device)
    ages = [steps.step(*qkv) for _ in range(14)]
    assert ages == [0, *[0, 1] * 6, 0]
    assert (steps.memory.calls, steps.memory.reused) == (14, 6)


@DEVICES
def test_drifting_tokens_are_clustered_as_often_as_they_must(device: str) -> None:
    steps = Steps(PLAN)
    # Every step shows something else.
    ages = [steps.step(*random_qkv(seed, device=device)) for seed in range(6)]
    assert ages == [0] * 6
    assert steps.memory.drift is not None
    assert 0.2 < steps.memory.drift.of_a_call() <= 1.0
    assert steps.memory.blocks is not None
    assert steps.memory.blocks.q_labels.dtype == torch.int16


@DEVICES
def test_drift_is_the_fraction_of_tokens_that_changed_cluster(device: str) -> None:
    exact = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=device)
    labels = torch.arange(40, device=device).reshape(1, 1, 40) % 4
    moved = labels.clone()
    moved[..., :10] = 3 - moved[..., :10]
    before, after = Blocks(labels, labels, exact), Blocks(moved, labels, exact)
    assert Drift(before, after, calls=2).of_a_call() == pytest.approx(0.25 / 2 / 2)


@pytest.mark.parametrize("shared", [False, True])
def test_without_drift_blocks_are_recomputed_at_every_step(shared: bool) -> None:
    qkv = random_qkv(0)
    steps = Steps(replace(PLAN, max_drift=0.0, shared_branches=shared))
    assert [steps.step(*qkv) for _ in range(4)] == [0, 0, 0, 0]
    assert (steps.memory.blocks is not None) == shared  # nobody would ask for them


@pytest.mark.parametrize("change", ["density", "tokens", "dense step", "reuse forbidden meanwhile"])
def test_blocks_do_not_outlive_what_they_were_computed_for(change: str) -> None:
    q, k, v = random_qkv(0)
    steps = Steps(replace(PLAN, max_drift=1.0))
    steps.step(q, k, v)
    assert steps.memory.lasting_blocks(steps.plan, 61, 45) is None  # their drift is not known yet
    steps.step(q, k, v)
    assert steps.memory.lasting_blocks(steps.plan, 61, 45) is not None
    if change == "density":
        steps.plan = replace(steps.plan, density=0.2)
    elif change == "tokens":
        k, v = k[:, :, :44], v[:, :, :44]
    else:
        other = {"density": 1.0} if change == "dense step" else {"max_drift": 0.0}
        before, steps.plan = steps.plan, replace(steps.plan, **other)
        steps.step(q, k, v)
        steps.plan = before
    assert steps.step(q, k, v) == 0
    assert steps.memory.reused == 0


def branches(device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of two guidance branches: the same video, told and not told."""
    qkv = random_qkv(0, 1, (4, 2), device=device)
    return [qkv, tuple(later_step(x, 1) for x in qkv)]


@DEVICES
def test_a_follower_reuses_what_the_reference_branch_computed(device: str) -> None:
    first, other = branches(device)
    reference = Steps(PLAN)
    reference.step(*first)
    made = sparse_attention(*first, PLAN)
    wanted = sparse_attention(
        *other, PLAN, centroids=(made.queries.centroids, made.keys.centroids), blocks=made.blocks
    )
    follower = Steps(PLAN, reference.memory)
    follower.step(*other)
    assert torch.equal(follower.out, wanted.out)
    memory = follower.memory
    assert (memory.calls, memory.reused) == (1, 1)
    assert (memory.blocks, memory.q_centroids) == (None, None)
    assert memory.density == reference.memory.density
    # Of another length there is nothing to reuse.
    q, k, v = other
    follower.step(q, k[:, :, :40], v[:, :, :40])
    assert (memory.calls, memory.reused) == (2, 1)


@DEVICES
@pytest.mark.parametrize("masked", ["no", "alike", "each"])
def test_branches_along_the_batch_follow_the_first(device: str, masked: str) -> None:
    pair = branches(device)
    mask = None
    if masked != "no":
        mask = torch.arange(45, device=device).expand(2, 2, 1, 45) < 40
        mask = mask[:1] if masked == "alike" else mask.clone()
        mask[-1, :, :, 3:7] = False
    together = Steps(PLAN)
    together.memories.append(Memory())
    together.step(*(torch.cat(parts) for parts in zip(*pair, strict=True)), mask)
    assert [memory.reused for memory in together.memories] == [0, 1]
    apart = Steps(PLAN)
    for place, qkv in enumerate(pair):
        mine = mask if mask is None or masked == "alike" else mask[place : place + 1]
        apart.step(*qkv, mine)
        assert torch.equal(together.out[place : place + 1], apart.out)
        assert torch.equal(together.lse[place : place + 1], apart.lse)
        apart = Steps(PLAN, apart.memory)


def test_memory_counts_what_it_holds() -> None:
    steps = Steps(PLAN)
    steps.step(*random_qkv(0, dtype=torch.float16))
    centroids, labels, exact = 2 * 2 * 32 * (3 + 7), 2 * 2 * (61 + 45), 2 * 3 * 7
    assert steps.memory.nbytes() == centroids + labels + exact + 8


class FakeStream:
    """Stands in for a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waited_for = device, []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


def test_another_stream_waits_for_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    first, second = FakeStream(device), FakeStream(device)
    recorded: list[Any] = []
    steps = Steps(PLAN)
    steps.step(*random_qkv(0))
    memory = steps.memory
    memory.stream = first  # type: ignore[assignment]
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: second)
    memory.hand_over(device)
    assert second.waited_for == [first]
    assert recorded == [second] * len(memory.tensors())
    assert len(memory.tensors()) == 6
    memory.hand_over(device)  # it is this stream's now
    assert second.waited_for == [first]
    memory.hand_over(torch.device("cpu"))
    assert memory.stream is second


@pytest.mark.gpu
def test_a_step_on_another_stream_gives_the_same_bits() -> None:
    qkv = [random_qkv(0, 1, (4, 4), torch.bfloat16, "cuda")]
    qkv += [tuple(later_step(x, seed) for x in qkv[0]) for seed in range(1, 5)]
    alone, across = Steps(PLAN), Steps(PLAN)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for step, tensors in enumerate(qkv):
        alone.step(*tensors)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[step % 2]):
            torch.cuda._sleep(10_000_000)  # whoever does not wait reads too early
            across.step(*tensors)
        torch.cuda.synchronize()
        assert torch.equal(across.out, alone.out)
