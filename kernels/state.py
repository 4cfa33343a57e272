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

from svg_ear_compile.kernels.plan import AttentionPlan


@dataclass
class Memory:
    """What one layer and guidance branch keeps from one denoising step to the next.

    Attributes:
        q_centroids: (B, H, Qc, D) float32 or None.
        k_centroids: (B, H_kv, Kc, D) float32 or None.
        exact_pairs: () float64 on the device of the call, query-key pairs of video tokens computed
            exactly by the last call, or None. Kept as a tensor so that nothing waits for it.
        pairs: query-key pairs of video tokens of that call.
    """

    q_centroids: Tensor | None = None
    k_centroids: Tensor | None = None
    exact_pairs: Tensor | None = None
    pairs: int = 0

    def warm_start(
        self, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Remembered centroids if they are of these shapes and on this device, else None."""
        q, k = self.q_centroids, self.k_centroids
        if q is None or k is None or q.device != device:
            return None
        return (q, k) if q.shape == q_shape and k.shape == k_shape else None

    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        held = (self.q_centroids, self.k_centroids, self.exact_pairs)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def density(self) -> float | None:
        """Density that the last sparse call reached; waits for the device."""
        return None if self.exact_pairs is None else self.exact_pairs.item() / self.pairs


@dataclass(frozen=True)
class Call:
    """How one attention call is carried out: its plan, and what it may remember."""

    plan: AttentionPlan
    memory: Memory | None = None


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
