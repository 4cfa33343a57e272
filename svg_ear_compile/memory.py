"""Memory of one layer and guidance branch from one denoising step to the next.

Centroids start the next k-means. Clusters and block masks are reused as a whole: by the other
guidance branches of the step, and by the next step if few tokens are expected to have changed their
cluster. Keys that are cached keep their clusters for as long as these fit them, from one chunk of
the video to the next, see `kernels.kept_clusters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from svg_ear_compile.kernels.call import AttentionCall, CallRequest, ExactTokens
from svg_ear_compile.kernels.clusters import Blocks, Result
from svg_ear_compile.kernels.kept_clusters import CachedKeys, KeptClusters
from svg_ear_compile.kernels.plan import AttentionPlan

if TYPE_CHECKING:
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

MOST_AGE = 1
"""Largest number of successive calls that reuse the same blocks, however little their tokens drift.
Blocks that are reused longer repeat their error in every step, and the sum outweighs the saving."""

STALE, OUTDATED = 0.1, 0.25
"""Excess spread of kept clusters, see `kept_clusters.excess_spread`, from which on the next call
labels all keys, starting from the kept centroids, and from which on it clusters them anew. On keys
of a trained model, whose metric follows the queries, labels grow stale after several chunks. The
excess is above 0.25 once a tenth of the keys has moved without their values."""

HOPELESS = 2
"""Clusters that are stale or outdated so often in a row cost more than they save where clustering
all keys takes longer than attention."""

_DTYPE_OF_LABELS = torch.int16  # half the memory of int32; holds up to 32,766 clusters


Start = Literal["cold", "recomputed", "reused", "kept"]
"""Origin of the clusters of a call; a count of `Memory` and of `LayerReport` each."""


class Arriving:
    """A number on its way from the device to the host.

    It is read one forward later, when the copy has usually arrived. Otherwise the host waits for
    it, so that the same calls always give the same bits.

    Args:
        number: () float.
    """

    def __init__(self, number: Tensor) -> None:
        self._arrived = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._number.item()


class Drift:
    """Fraction of the tokens whose cluster changed.

    Args:
        before, after: clusters of the same tokens, first computed and recomputed.
        calls: number of calls from `before` to `after`.
    """

    def __init__(self, before: Blocks, after: Blocks, calls: int) -> None:
        pairs = ((before.q_labels, after.q_labels), (before.k_labels, after.k_labels))
        changed = sum((old != new).float().mean() for old, new in pairs) / len(pairs)
        assert isinstance(changed, Tensor)
        self._calls = calls
        self._changed = Arriving(changed)

    def of_a_call(self) -> float:
        """Mean fraction of the tokens that change their cluster from one call to the next."""
        return self._changed.read() / self._calls


@dataclass
class Memory:
    """Memory of one layer and guidance branch.

    Attributes:
        q_centroids: (B, H, Qc, D) in the dtype of q, or None.
        k_centroids: (B, H_kv, Kc, D) in the dtype of k, or None.
        blocks: clusters and block mask of the last call that computed them.
        blocks_plan: the plan of that call.
        age: number of calls that have reused the blocks.
        drift: drift of the clusters when they were last recomputed, or None.
        exact_pairs: () float64 on the device of the call, query-key pairs of clustered tokens that
            the last call computed exactly, or None. It stays a tensor: the host need not wait.
        pairs: query-key pairs of clustered tokens of the last call.
        identities: (B, N_k) int64 of the last cached keys, None if the keys are not cached.
        k_labels: (B, H_kv, N_k) their labels.
        excess: excess spread of the last clusters that were kept, or None.
        is_stale: the next call labels all keys.
        outdated: number of times in a row that the excess was too large.
        cold, recomputed, reused, kept: numbers of sparse calls, see `LayerReport`.
        step: denoising step of the last sparse call, None before the first.
        stream: CUDA stream that wrote these tensors last, None on other devices.
    """

    q_centroids: Tensor | None = None
    k_centroids: Tensor | None = None
    blocks: Blocks | None = None
    blocks_plan: AttentionPlan | None = None
    age: int = 0
    drift: Drift | None = None
    exact_pairs: Tensor | None = None
    pairs: int = 0
    identities: Tensor | None = None
    k_labels: Tensor | None = None
    excess: Arriving | None = None
    is_stale: bool = False
    outdated: int = 0
    cold: int = 0
    recomputed: int = 0
    reused: int = 0
    kept: int = 0
    step: int | None = None
    stream: torch.cuda.Stream | None = None

    @property
    def calls(self) -> int:
        """Number of sparse calls."""
        return self.cold + self.recomputed + self.reused + self.kept

    def warm_start(
        self, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """The centroids, if they have these shapes and are on this device, else None."""
        q, k = self.q_centroids, self.k_centroids
        if q is None or k is None or q.device != device:
            return None
        return (q, k) if q.shape == q_shape and k.shape == k_shape else None

    def lasting_blocks(self, plan: AttentionPlan, q_tokens: int, k_tokens: int) -> Blocks | None:
        """The blocks, if the next call under `plan` may reuse them, else None.

        Blocks may be reused while the expected fraction of tokens in an outdated cluster is below
        `plan.max_drift`. The expectation extrapolates the last measured drift. Without one, as in
        the first steps, blocks are not reused: models of few steps move far in each.
        """
        if plan.max_drift == 0.0 or self.drift is None or self.age >= MOST_AGE:
            return None
        if (self.age + 1) * self.drift.of_a_call() >= plan.max_drift:
            return None
        return self.blocks_of(plan, q_tokens, k_tokens)

    def blocks_of(self, plan: AttentionPlan, q_tokens: int, k_tokens: int) -> Blocks | None:
        """The blocks, if they were computed under `plan` for these numbers of tokens, else None."""
        if self.blocks is None or plan != self.blocks_plan:
            return None
        return self.blocks if _tokens(self.blocks) == (q_tokens, k_tokens) else None

    def kept_clusters(
        self, plan: AttentionPlan, k_shape: tuple[int, ...], device: torch.device
    ) -> KeptClusters | None:
        """The clusters of cached keys, if the next call under `plan` may keep them, else None.

        Args:
            plan: plan of the call.
            k_shape: (B, H_kv, Kc, D) of its key centroids.
            device: device of the call.
        """
        if self.identities is None or self.k_labels is None or plan.max_drift == 0.0:
            return None
        assert self.k_centroids is not None
        batch, heads, clusters, dim = self.k_centroids.shape
        alike = (batch, heads, dim) == (*k_shape[:2], k_shape[3]) and clusters <= k_shape[2]
        if not alike or self.identities.device != device:
            return None
        return KeptClusters(self.identities, self.k_labels, self.k_centroids)

    def take_stock(self) -> None:
        """Read how the last clusters of cached keys fitted; outdated ones are dropped."""
        if self.excess is None:
            return
        excess, self.excess = self.excess.read(), None
        self.is_stale = excess >= STALE
        self.outdated = self.outdated + 1 if self.is_stale else 0
        if excess >= OUTDATED:
            self.q_centroids = self.k_centroids = self.blocks = self.identities = None

    @property
    def is_hopeless(self) -> bool:
        """Whether the clusters of cached keys turned out stale again and again."""
        return self.outdated >= HOPELESS

    def next_chunk(self) -> Memory:
        """What is left of the memory when the next chunk of the video starts: the cached keys."""
        return replace(
            self, q_centroids=None, blocks=None, blocks_plan=None, age=0, drift=None, step=None
        )

    def remember(
        self, result: Result, plan: AttentionPlan, pairs: int, *, start: Start, warm: bool
    ) -> None:
        """Store the clusters and the block mask of a call.

        Args:
            result: result of the call.
            plan: plan of the call.
            pairs: query-key pairs of its clustered tokens.
            start: where its clusters came from.
            warm: query clusters started from the centroids of this memory.
        """
        dtype = result.out.dtype
        self.q_centroids = result.queries.centroids.to(dtype)
        self.k_centroids = result.keys.centroids.to(dtype)
        self.identities = result.identities
        self.count(result, pairs, start)
        if start == "reused":
            self.age += 1
            return
        before, computed = self.blocks, None
        if plan.max_drift > 0.0 or plan.shared_branches:
            computed = _packed(result.blocks)
        self.k_labels = None
        if result.identities is not None and computed is not None:
            self.k_labels = computed.k_labels
        self.excess = None if result.excess is None else Arriving(result.excess)
        self.drift = None
        # Clusters keep their numbers only if k-means started from the earlier centroids.
        warm_drift = warm and plan.max_drift > 0.0
        if warm_drift and before and computed and _tokens(before) == _tokens(computed):
            self.drift = Drift(before, computed, self.age + 1)
        self.blocks, self.blocks_plan, self.age = computed, plan, 0

    def count(self, result: Result, pairs: int, start: Start) -> None:
        """Count a call and store its exact area; see `remember` for the arguments."""
        self.exact_pairs, self.pairs = result.exact_pairs, pairs
        setattr(self, start, getattr(self, start) + 1)
        if result.out.is_cuda:
            self.stream = torch.cuda.current_stream(result.out.device)

    def skip(self) -> None:
        """Drop the blocks after a dense call, which their age does not count."""
        self.blocks = None

    def tensors(self) -> list[Tensor]:
        """All tensors held on the device."""
        held = (
            self.q_centroids, self.k_centroids, self.exact_pairs, self.identities, self.k_labels,
            *(self.blocks or ()),
        )  # fmt: skip
        return list({id(t): t for t in held if t is not None}.values())

    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def hand_over(self, device: torch.device) -> None:
        """Make the tensors safe to read on the current stream of a device."""
        if self.stream is None or device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        if current == self.stream or self.stream.device != device:
            return  # tensors of another device are not used, see `warm_start`
        current.wait_stream(self.stream)
        for tensor in self.tensors():
            tensor.record_stream(current)
        self.stream = current

    @property
    def density(self) -> float | None:
        """Fraction of the area that the last sparse call computed exactly; waits for the device."""
        if self.stream is not None:
            self.stream.synchronize()
        return None if self.exact_pairs is None else self.exact_pairs.item() / self.pairs


@dataclass(frozen=True, eq=False)
class RememberedCall(AttentionCall):
    """An attention call with the memory that its result goes to.

    Attributes:
        memory: memory of the guidance branch of the call, or None.
        follows: the call is that of a follower: it reuses the clusters of the reference branch and
            stores none of its own.
        pairs: query-key pairs of its clustered tokens.
    """

    memory: Memory | None = None
    follows: bool = False
    pairs: int = 0

    def finished(self, result: Result) -> None:
        """Store the result of the call in its memory."""
        if self.memory is None:
            return
        warm = self.centroids is not None
        start: Start = "recomputed" if warm else "cold"
        if self.blocks is not None:
            start = "reused"
        elif self.cache is not None and self.cache.kept is not None:
            start = "kept"
        if self.follows:
            self.memory.count(result, self.pairs, start)
        else:
            self.memory.remember(result, self.plan, self.pairs, start=start, warm=warm)


def calls_by_branch(
    request: CallRequest,
    plan: AttentionPlan,
    memories: Sequence[Memory],
    reference: Memory | None = None,
    captured: CapturedGraphs | None = None,
    exact: ExactTokens | None = None,
) -> Iterator[RememberedCall]:
    """One call for each guidance branch along a batch.

    Args:
        request: the call; its batch size is a multiple of the number of branches.
        plan: plan of all branches, not dense.
        memories: memories of the branches, in the order of the batch.
        reference: memory of the reference branch if it ran in an earlier forward. None makes the
            first of `memories` the reference branch and the others its followers.
        captured, exact: see `AttentionCall`.
    """
    count = len(memories)
    batch = request.q_shape[0] // count
    for place, memory in enumerate(memories):
        rows = None if count == 1 else slice(place * batch, (place + 1) * batch)
        yield _call(request, plan, rows, batch, memory, reference, captured, exact)
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
    exact: ExactTokens | None,
) -> RememberedCall:
    clustered = request.clustered if exact is None else exact.clustered
    q_clusters, k_clusters = plan.clusters(*clustered)
    q_heads, q_tokens, dim = request.q_shape[1:]
    k_heads, k_tokens = request.k_shape[1:3]
    shapes = (batch, q_heads, q_clusters, dim), (batch, k_heads, k_clusters, dim)
    centroids, blocks = None, None
    if reference is not None:
        reference.hand_over(request.device)
        centroids = reference.warm_start(*shapes, request.device)
        blocks = reference.blocks_of(plan, q_tokens, k_tokens) if centroids else None
    follows = blocks is not None
    queries, keys = clustered
    cache = None
    if not follows:
        memory.hand_over(request.device)
        grows = memory.q_centroids is None
        memory.take_stock()
        centroids = memory.warm_start(*shapes, request.device)
        if centroids is not None and not memory.is_stale:
            blocks = memory.lasting_blocks(plan, q_tokens, k_tokens)
        if request.cached_keys:
            kept = None
            if blocks is None:
                kept = memory.kept_clusters(plan, shapes[1], request.device)
            is_stale, memory.is_stale = memory.is_stale, False
            cache = CachedKeys(kept, min(queries, keys), grows, memory.calls, is_stale)
    pairs = batch * q_heads * queries * keys
    return RememberedCall(
        plan, rows, centroids, blocks, captured, cache, exact, memory, follows, pairs
    )  # fmt: skip


def _tokens(blocks: Blocks) -> tuple[int, int]:
    return blocks.q_labels.shape[2], blocks.k_labels.shape[2]


def _packed(blocks: Blocks) -> Blocks:
    """The blocks with labels of 16 bits, if the labels fit."""
    _, _, q_clusters, k_clusters = blocks.block_mask.shape
    if max(q_clusters, k_clusters) + 1 > torch.iinfo(_DTYPE_OF_LABELS).max:
        return blocks
    q_labels, k_labels = (t.to(_DTYPE_OF_LABELS) for t in (blocks.q_labels, blocks.k_labels))
    return Blocks(q_labels, k_labels, blocks.block_mask)
