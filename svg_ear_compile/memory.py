"""What one layer and guidance branch keeps from one denoising step to the next.

Centroids start the next k-means. Clusters and block masks are reused whole: by the other guidance
branches of a step, and by the next step while few tokens are expected to have changed cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svg_ear_compile.kernels.call import AttentionCall, CallRequest
from svg_ear_compile.kernels.clusters import Blocks, Result
from svg_ear_compile.kernels.plan import AttentionPlan

if TYPE_CHECKING:
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

MOST_AGE = 1
"""Calls in a row that may reuse the same blocks, however little their tokens drift. Blocks that
serve longer repeat their error step by step, and it adds up to more than they save."""

_DTYPE_OF_LABELS = torch.int16  # half the memory, where there are few enough clusters


class Drift:
    """Fraction of the tokens whose cluster changed, on its way from the device to the host.

    It is asked for a whole forward later, so that nothing is left to wait for; waiting all the same
    where there is keeps the same calls giving the same bits.

    Args:
        before, after: clusters of the same tokens when they were made, and recomputed.
        calls: how many calls lie between.
    """

    def __init__(self, before: Blocks, after: Blocks, calls: int) -> None:
        pairs = ((before.q_labels, after.q_labels), (before.k_labels, after.k_labels))
        changed = sum((old != new).float().mean() for old, new in pairs) / len(pairs)
        assert isinstance(changed, Tensor)
        self._calls = calls
        self._arrived = None
        self._changed = changed
        if changed.is_cuda:
            self._changed = torch.empty((), dtype=changed.dtype, pin_memory=True)
            self._changed.copy_(changed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def of_a_call(self) -> float:
        """Fraction of the tokens that change their cluster from one call to the next."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._changed.item() / self._calls


@dataclass
class Memory:
    """What one layer and guidance branch keeps from one denoising step to the next.

    Attributes:
        q_centroids: (B, H, Qc, D) in the dtype of q, or None.
        k_centroids: (B, H_kv, Kc, D) in the dtype of k, or None.
        blocks: clusters and block mask of the last call that computed them.
        made_under: the plan of that call.
        age: calls that have reused them.
        drift: of the clusters, when they were last recomputed.
        exact_pairs: () float64 on the device of the call, query-key pairs of video tokens computed
            exactly by the last call, or None. Kept as a tensor so that nothing waits for it.
        pairs: query-key pairs of video tokens of that call.
        cold, recomputed, reused: sparse calls so far that clustered from nothing, from remembered
            centroids, and not at all.
        step: denoising step of the last sparse call, None where nobody counts them.
        stream: CUDA stream that wrote these tensors last, None on other devices.
    """

    q_centroids: Tensor | None = None
    k_centroids: Tensor | None = None
    blocks: Blocks | None = None
    made_under: AttentionPlan | None = None
    age: int = 0
    drift: Drift | None = None
    exact_pairs: Tensor | None = None
    pairs: int = 0
    cold: int = 0
    recomputed: int = 0
    reused: int = 0
    step: int | None = None
    stream: torch.cuda.Stream | None = None

    @property
    def calls(self) -> int:
        """Sparse calls so far."""
        return self.cold + self.recomputed + self.reused

    def warm_start(
        self, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Remembered centroids if they are of these shapes and on this device, else None."""
        q, k = self.q_centroids, self.k_centroids
        if q is None or k is None or q.device != device:
            return None
        return (q, k) if q.shape == q_shape and k.shape == k_shape else None

    def lasting_blocks(self, plan: AttentionPlan, q_tokens: int, k_tokens: int) -> Blocks | None:
        """Blocks that the next call under `plan` may reuse.

        It may while fewer than `plan.max_drift` of the tokens are expected in another cluster than
        would be theirs, if they drift as they did before, but never where that is not known: a
        model of few steps moves far in each.
        """
        if plan.max_drift == 0.0 or self.drift is None or self.age >= MOST_AGE:
            return None
        if (self.age + 1) * self.drift.of_a_call() >= plan.max_drift:
            return None
        return self.blocks_of(plan, q_tokens, k_tokens)

    def blocks_of(self, plan: AttentionPlan, q_tokens: int, k_tokens: int) -> Blocks | None:
        """The blocks, if they were computed under this plan for as many tokens."""
        if self.blocks is None or plan != self.made_under:
            return None
        return self.blocks if _tokens(self.blocks) == (q_tokens, k_tokens) else None

    def remember(
        self, result: Result, plan: AttentionPlan, pairs: int, *, warm: bool, reused: bool
    ) -> None:
        """Keep what a call leaves behind.

        Args:
            result: of the call.
            plan: of the call.
            pairs: query-key pairs of its video tokens.
            warm: it started from the remembered centroids.
            reused: and from the remembered blocks.
        """
        dtype = result.out.dtype
        self.q_centroids = result.queries.centroids.to(dtype)
        self.k_centroids = result.keys.centroids.to(dtype)
        self.count(result, pairs, warm=warm, reused=reused)
        if reused:
            self.age += 1
            return
        before, made = self.blocks, None
        if plan.max_drift > 0.0 or plan.shared_branches:
            made = _packed(result.blocks)
        self.drift = None
        # Only clusters that grew out of those before have the same numbers.
        if before and made and warm and plan.max_drift > 0.0 and _tokens(before) == _tokens(made):
            self.drift = Drift(before, made, self.age + 1)
        self.blocks, self.made_under, self.age = made, plan, 0

    def count(self, result: Result, pairs: int, *, warm: bool, reused: bool) -> None:
        """Note what a call computed, see `remember`; all that is kept of a follower's call."""
        self.exact_pairs, self.pairs = result.exact_pairs, pairs
        self.reused += reused
        self.recomputed += warm and not reused
        self.cold += not warm
        if result.out.is_cuda:
            self.stream = torch.cuda.current_stream(result.out.device)

    def skip(self) -> None:
        """A dense call came between: the blocks would be older than their age says."""
        self.blocks = None

    def tensors(self) -> list[Tensor]:
        """Everything held on the device."""
        held = (self.q_centroids, self.k_centroids, self.exact_pairs, *(self.blocks or ()))
        return [t for t in held if t is not None]

    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def hand_over(self, device: torch.device) -> None:
        """Let the current stream of a device read and outlive what another stream remembered."""
        if self.stream is None or device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        if current == self.stream or self.stream.device != device:
            return  # of another device nothing is taken, see `warm_start`
        current.wait_stream(self.stream)
        for tensor in self.tensors():
            tensor.record_stream(current)
        self.stream = current

    @property
    def density(self) -> float | None:
        """Density that the last sparse call reached; waits for the device."""
        if self.stream is not None:
            self.stream.synchronize()
        return None if self.exact_pairs is None else self.exact_pairs.item() / self.pairs


@dataclass(frozen=True, eq=False)
class RememberedCall(AttentionCall):
    """A call that knows where its result is kept.

    Attributes:
        memory: of the branch that the call is.
        follows: it reuses what a reference branch computed, and keeps nothing of its own.
        pairs: query-key pairs of its video tokens.
    """

    memory: Memory | None = None
    follows: bool = False
    pairs: int = 0

    def finished(self, result: Result) -> None:
        """Keep what the call leaves behind."""
        if self.memory is None:
            return
        warm, reused = self.centroids is not None, self.blocks is not None
        if self.follows:
            self.memory.count(result, self.pairs, warm=True, reused=True)
        else:
            self.memory.remember(result, self.plan, self.pairs, warm=warm, reused=reused)


def calls_by_branch(
    request: CallRequest,
    plan: AttentionPlan,
    memories: Sequence[Memory],
    reference: Memory | None = None,
    captured: CapturedGraphs | None = None,
) -> Iterator[RememberedCall]:
    """One call for each guidance branch that a batch carries.

    Args:
        request: the call, whose batch is a multiple of the branches.
        plan: of all branches, not dense.
        memories: of the branches, in the order of the batch.
        reference: memory of the reference branch if that was an earlier forward; otherwise the
            first of `memories` is, and the others follow it.
        captured: see `AttentionCall`.
    """
    count = len(memories)
    batch = request.q_shape[0] // count
    for place, memory in enumerate(memories):
        rows = None if count == 1 else slice(place * batch, (place + 1) * batch)
        yield _call(request, plan, rows, batch, memory, reference, captured)
        if plan.shared_branches and reference is None:
            reference = memory


def _call(
    request: CallRequest,
    plan: AttentionPlan,
    rows: slice | None,
    batch: int,
    memory: Memory,
    reference: Memory | None,
    captured: CapturedGraphs | None,
) -> RememberedCall:
    q_clusters, k_clusters = plan.clusters(*request.video_tokens)
    q_heads, q_tokens, dim = request.q_shape[1:]
    k_heads, k_tokens = request.k_shape[1:3]
    shapes = (batch, q_heads, q_clusters, dim), (batch, k_heads, k_clusters, dim)
    centroids, blocks = None, None
    if reference is not None:
        reference.hand_over(request.device)
        centroids = reference.warm_start(*shapes, request.device)
        blocks = reference.blocks_of(plan, q_tokens, k_tokens) if centroids else None
    follows = blocks is not None
    if not follows:
        memory.hand_over(request.device)
        centroids = memory.warm_start(*shapes, request.device)
        blocks = memory.lasting_blocks(plan, q_tokens, k_tokens) if centroids else None
    video_q, video_k = request.video_tokens
    pairs = batch * q_heads * video_q * video_k
    return RememberedCall(plan, rows, centroids, blocks, captured, memory, follows, pairs)


def _tokens(blocks: Blocks) -> tuple[int, int]:
    return blocks.q_labels.shape[2], blocks.k_labels.shape[2]


def _packed(blocks: Blocks) -> Blocks:
    """The same in less memory, where the labels fit."""
    _, _, q_clusters, k_clusters = blocks.block_mask.shape
    if max(q_clusters, k_clusters) + 1 > torch.iinfo(_DTYPE_OF_LABELS).max:
        return blocks
    q_labels, k_labels = (t.to(_DTYPE_OF_LABELS) for t in (blocks.q_labels, blocks.k_labels))
    return Blocks(q_labels, k_labels, blocks.block_mask)
