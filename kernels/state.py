"""What one attention call remembers, and who decides it: the warm-start state.

The compiled graph says which kind of call it is (plan, site). Which layer is running, at which
denoising step, and what that layer remembers is known only while a bound model runs; the binding
that is active then resolves each call. Outside of a bound model nothing is remembered, so the same
inputs always give the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Blocks, Result
from svg_ear_compile.kernels.plan import AttentionPlan

MOST_AGE = 1
"""Calls in a row that may take over the same blocks, however little their tokens drift. Blocks that
serve longer repeat their error step by step, and it adds up to more than they save."""

_DTYPE_OF_LABELS = torch.int16  # half the memory, where there are few enough clusters


class Drift:
    """Share of the tokens whose cluster changed, on its way from the device to the host.

    It is asked for a whole forward later, so that nothing is left to wait for; waiting all the same
    where there is keeps the same calls giving the same bits.

    Args:
        before, after: clusters of the same tokens when they were made, and made anew.
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
        """Share of the tokens that change their cluster from one call to the next."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._changed.item() / self._calls


@dataclass
class Memory:
    """What one layer and guidance branch keeps from one denoising step to the next.

    Attributes:
        q_centroids: (B, H, Qc, D) in the dtype of q, or None.
        k_centroids: (B, H_kv, Kc, D) in the dtype of k, or None.
        blocks: clusters and exact blocks of the last call that made them.
        made_under: the plan of that call.
        age: calls that have taken them over.
        drift: of the clusters, when they were last made anew.
        exact_pairs: () float64 on the device of the call, query-key pairs of video tokens computed
            exactly by the last call, or None. Kept as a tensor so that nothing waits for it.
        pairs: query-key pairs of video tokens of that call.
        calls: sparse calls so far. taken_over: those that made no blocks.
    """

    q_centroids: Tensor | None = None
    k_centroids: Tensor | None = None
    blocks: Blocks | None = None
    made_under: AttentionPlan | None = None
    age: int = 0
    drift: Drift | None = None
    exact_pairs: Tensor | None = None
    pairs: int = 0
    calls: int = 0
    taken_over: int = 0

    def warm_start(
        self, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Remembered centroids if they are of these shapes and on this device, else None."""
        q, k = self.q_centroids, self.k_centroids
        if q is None or k is None or q.device != device:
            return None
        return (q, k) if q.shape == q_shape and k.shape == k_shape else None

    def lasting_blocks(self, plan: AttentionPlan, q_tokens: int, k_tokens: int) -> Blocks | None:
        """Blocks that the next call under `plan` may take over.

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
        """The blocks, if they were made under this plan for as many tokens."""
        if self.blocks is None or plan != self.made_under:
            return None
        return self.blocks if _tokens(self.blocks) == (q_tokens, k_tokens) else None

    def remember(
        self, result: Result, plan: AttentionPlan, pairs: int, *, warm: bool, taken_over: bool
    ) -> None:
        """Keep what a call leaves behind.

        Args:
            result: of the call.
            plan: of the call.
            pairs: query-key pairs of its video tokens.
            warm: it started from the remembered centroids.
            taken_over: and took over the remembered blocks.
        """
        dtype = result.out.dtype
        self.q_centroids = result.queries.centroids.to(dtype)
        self.k_centroids = result.keys.centroids.to(dtype)
        self.count(result, pairs, taken_over)
        if taken_over:
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

    def count(self, result: Result, pairs: int, taken_over: bool) -> None:
        """Note what a call computed, as `remember`; all that is kept of one that another leads."""
        self.exact_pairs, self.pairs = result.exact_pairs, pairs
        self.calls += 1
        self.taken_over += taken_over

    def skip(self) -> None:
        """A dense call came between: the blocks would be older than their age says."""
        self.blocks = None

    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        held = (self.q_centroids, self.k_centroids, self.exact_pairs, *(self.blocks or ()))
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def density(self) -> float | None:
        """Density that the last sparse call reached; waits for the device."""
        return None if self.exact_pairs is None else self.exact_pairs.item() / self.pairs


def _tokens(blocks: Blocks) -> tuple[int, int]:
    return blocks.q_labels.shape[2], blocks.k_labels.shape[2]


def _packed(blocks: Blocks) -> Blocks:
    """The same in less memory, where the labels fit."""
    _, _, q_clusters, k_clusters = blocks.block_mask.shape
    if max(q_clusters, k_clusters) + 1 > torch.iinfo(_DTYPE_OF_LABELS).max:
        return blocks
    q_labels, k_labels = (t.to(_DTYPE_OF_LABELS) for t in (blocks.q_labels, blocks.k_labels))
    return Blocks(q_labels, k_labels, blocks.block_mask)


@dataclass(frozen=True)
class Call:
    """How one attention call is carried out.

    Attributes:
        plan: its plan.
        memory: what it may remember.
        leader: memory of the first guidance branch, which was called at this step before, where
            this is another branch and may take over what that one made.
        stacked: memories of the other guidance branches where the call carries several, one after
            the other along the batch; the first leads them.
        batch: of the model: a call whose batch is another (frames, say) does not carry them.
    """

    plan: AttentionPlan
    memory: Memory | None = None
    leader: Memory | None = None
    stacked: tuple[Memory, ...] = ()
    batch: int = 0


class Resolver(Protocol):
    """Decides the calls made while it is active; see `active`."""

    def resolve(self, layer: Tensor | None, site: str, plan: AttentionPlan) -> Call:
        """The call of `site` in the layer that owns the parameter `layer`, compiled with `plan`."""
        ...


@dataclass
class _Active(threading.local):
    stack: list[Resolver] = field(default_factory=list)


_ACTIVE = _Active()


@contextmanager
def active(resolver: Resolver) -> Iterator[None]:
    """Let `resolver` decide the attention calls of this thread inside the with block."""
    _ACTIVE.stack.append(resolver)
    try:
        yield
    finally:
        _ACTIVE.stack.pop()


def resolve(layer: Tensor | None, site: str, plan: AttentionPlan) -> Call:
    """How to carry out a call: as the innermost active resolver says, else as compiled."""
    if not _ACTIVE.stack:
        return Call(plan)
    return _ACTIVE.stack[-1].resolve(layer, site, plan)
