"""Implementations of sparse attention: the calls that each supports, and the choice among them.

An implementation has two stages. `cluster_and_route` groups the tokens into clusters and chooses
the exact blocks; `attend` is a pure function of the tensors and of the first stage's result.
An implementation registers when its module is imported. Triton is imported only for a GPU call.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from svg_ear_compile.kernels.clusters import Blocks, Result, Routed
from svg_ear_compile.kernels.kept_clusters import CachedKeys, Placed, identities_of, placed
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, TokenKinds
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

log = logging.getLogger(__name__)


class ClusterAndRoute(Protocol):
    """Stages 1 to 3; see `reference.cluster_and_route`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        *,
        kinds: TokenKinds,
        scale: float,
        centroids: tuple[Tensor, Tensor] | None,
        blocks: Blocks | None,
        update: Placed | None = None,
    ) -> Routed: ...


class Attend(Protocol):
    """Stages 4 and 5; see `reference.attend`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routed: Routed,
        compensation: Compensation,
        *,
        scale: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]: ...


class Unsupported(Protocol):
    """Reason why an implementation cannot take q, k and v, in words; None where it can."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> str | None: ...


@dataclass(frozen=True)
class Implementation:
    """An implementation of sparse attention.

    Attributes:
        name: name by which it can be requested.
        unsupported: see `Unsupported`.
        cluster_and_route, attend: the two stages.
    """

    name: str
    unsupported: Unsupported
    cluster_and_route: ClusterAndRoute
    attend: Attend

    def sparse_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        *,
        kinds: TokenKinds = ALL_CLUSTERED,
        scale: float | None = None,
        centroids: tuple[Tensor, Tensor] | None = None,
        blocks: Blocks | None = None,
        cache: CachedKeys | None = None,
        return_lse: bool = False,
    ) -> Result:
        """`cluster_and_route`, then `attend`.

        Args:
            q: (B, H, N_q, D). k, v: (B, H_kv, N_k, D), H_kv dividing H, any strides.
            plan: see `AttentionPlan`.
            kinds: which tokens are clustered, always exact or padding.
            scale: logit scale, 1/sqrt(D) by default.
            centroids: (B, H, Qc, D) and (B, H_kv, Kc, D), the initial centroids of k-means; None
                starts cold.
            blocks: labels and block mask of an earlier call under this plan, to be reused together
                with the `centroids` of that call; None recomputes them.
            cache: how the keys are clustered, if they are cached; not with `blocks` that are reused
                and clusters that are kept, both.
            return_lse: whether to compute the log-sum-exp; otherwise `Result.lse` is empty.

        Returns:
            `Result`, its output in the dtype and layout of q.
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        identities = None if cache is None else identities_of(v)
        update = None if cache is None or identities is None else placed(cache, identities)
        routed = self.cluster_and_route(
            q, k, v, plan, kinds=kinds, scale=scale, centroids=centroids, blocks=blocks,
            update=update,
        )  # fmt: skip
        out, lse = self.attend(
            q, k, v, routed, plan.compensation, scale=scale, return_lse=return_lse
        )
        return Result(
            out, lse, routed.queries, routed.keys, routed.block_mask, routed.row_area,
            identities, routed.excess,
        )  # fmt: skip


_REGISTERED: dict[str, Implementation] = {}
# The module that registers each implementation, and the order of preference for each device type.
_MODULES = {
    "cpu": "kernels.cpu",
    "hopper": "kernels.gpu.attention",
    "triton": "kernels.gpu.attention",
}
_PREFERRED = {"cuda": ("hopper", "triton")}


def register(implementation: Implementation) -> Implementation:
    """Register an implementation under its name; returns it."""
    _REGISTERED[implementation.name] = implementation
    return implementation


def get(name: str) -> Implementation:
    """The implementation of that name.

    Raises:
        ValueError: no implementation has this name; the message lists all names.
    """
    if name not in _REGISTERED:
        if name not in _MODULES:
            raise ValueError(f"no implementation {name!r}; there are {', '.join(_MODULES)}")
        importlib.import_module(f"svg_ear_compile.{_MODULES[name]}")
    return _REGISTERED[name]


def choose(q: Tensor, k: Tensor, v: Tensor) -> Implementation:
    """The implementation that serves a call of these tensors: the first that supports it.

    Raises:
        ValueError: none does.
    """
    refused: list[str] = []
    for candidate in _PREFERRED.get(q.device.type, ("cpu",)):
        found = get(candidate)
        why = found.unsupported(q, k, v)
        if why is None:
            _say(candidate, q.device, q.dtype, q.shape[-1], "; ".join(refused))
            return found
        refused.append(f"{candidate}: {why}")
    raise ValueError(f"no implementation serves this call ({'; '.join(refused)})")


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, **more: Any) -> Result:
    """`Implementation.sparse_attention` of the implementation that `choose` returns."""
    return choose(q, k, v).sparse_attention(q, k, v, plan, **more)


def captured_attention(device: torch.device) -> Callable[..., Result]:
    """`sparse_attention`; on a GPU with captured graphs, as for the calls of a session.

    For measurements. The returned function owns the captured graphs.
    """
    if device.type != "cuda":
        return sparse_attention
    from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs

    return CapturedGraphs().sparse_attention


@functools.lru_cache(maxsize=256)
def _say(name: str, device: torch.device, dtype: torch.dtype, dim: int, refused: str) -> None:
    """Log each choice once per process."""
    because = f" ({refused})" if refused else ""
    log.info("%s, %s, head dim %d: served by %r%s", device, dtype, dim, name, because)
