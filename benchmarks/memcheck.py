"""Every kernel on a GPU once in each of its forms, for a sanitizer to look at.

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1
python -m benchmarks.memcheck``: without PyTorch's allocator each tensor is an allocation of its
own, so that an access past its end is seen. Run it once without the sanitizer before: Triton then
has compiled everything. Sizes are odd. Gluon's kernels run in no interpreter, so this and the
comparisons with the reference are all that checks them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.kept_clusters import CachedKeys, KeptClusters
from svg_ear_compile.kernels.kinds import TokenKinds, token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

HEADS, KV_HEADS, QUERIES, KEYS = 4, 2, 1237, 1411

WRITTEN = 100
"""Keys that are written anew between two calls."""


@dataclass(frozen=True)
class Call:
    """One form of a call.

    Attributes:
        implementation: name in the registry.
        dim: head dim in elements.
        compensation: see `AttentionPlan`.
        density: 0 and 1 are the ends at which lists are empty and full.
        has_kinds: whether some tokens are exact and some keys are padding.
    """

    implementation: str
    dim: int
    compensation: Compensation
    density: float
    has_kinds: bool


def calls() -> Iterator[Call]:
    """All forms, the plain ones first."""
    dims, implementations = (128, 64, 80), ("hopper", "triton")
    forms: tuple[Compensation, ...] = get_args(Compensation)
    for has_kinds, density, dim in itertools.product((False, True), (0.2, 0.0, 0.999), dims):
        for implementation, form in itertools.product(implementations, forms):
            yield Call(implementation, dim, form, density, has_kinds)


def kinds_of(call: Call, device: torch.device) -> TokenKinds:
    """Kinds of tokens that lie anywhere."""
    if not call.has_kinds:
        return token_kinds(None, None, None, (QUERIES, KEYS))
    place = torch.arange(KEYS, device=device)
    exact = (place % 37 == 5)[None]
    exact_queries = exact[:, :QUERIES]
    clustered = (QUERIES - int(exact_queries.sum()), KEYS - int(exact.sum()))
    padding = (place % 11 != 3)[None, None, None]
    return token_kinds(padding, exact_queries.contiguous(), exact, clustered)


def run(call: Call, device: torch.device) -> bool:
    """The call cold, with its blocks reused and with kept clusters; False if it is unsupported."""
    draw = torch.Generator(device).manual_seed(0)

    def tokens(heads: int, count: int) -> Tensor:
        shape = (1, heads, count, call.dim)
        return torch.randn(shape, generator=draw, device=device).to(torch.bfloat16)

    q, k, v = tokens(HEADS, QUERIES), tokens(KV_HEADS, KEYS), tokens(KV_HEADS, KEYS)
    serving = registry.get(call.implementation)
    if serving.unsupported(q, k, v) is not None:
        return False
    plan = AttentionPlan(
        density=call.density, compensation=call.compensation, q_clusters=7, k_clusters=33,
        first_iterations=1,
    )  # fmt: skip
    kinds = kinds_of(call, device)
    cold = serving.sparse_attention(
        q, k, v, plan, kinds=kinds, cache=CachedKeys(None, WRITTEN, False, 0), return_lse=True
    )
    centroids = (cold.queries.centroids, cold.keys.centroids)
    serving.sparse_attention(q, k, v, plan, kinds=kinds, centroids=centroids, blocks=cold.blocks)
    assert cold.identities is not None
    kept = KeptClusters(cold.identities, cold.keys.labels, cold.keys.centroids)
    v[:, :, -WRITTEN:] += 1.0
    for grows in (False, True):
        cache = CachedKeys(kept, WRITTEN, grows, 1)
        serving.sparse_attention(q, k, v, plan, kinds=kinds, centroids=centroids, cache=cache)
    return True


def main() -> None:
    """Parse the command line and run what fits the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no call after this")
    given = parser.parse_args()
    started, tried = time.monotonic(), list(calls())
    done = []
    for call in tried:
        if time.monotonic() - started > given.seconds:
            break
        if run(call, torch.device("cuda")):
            torch.cuda.synchronize()
            done.append(call)
            print(f"{time.monotonic() - started:6.1f} s {call}", flush=True)
    print(f"{len(done)} of {len(tried)} forms ran; the others were unsupported or had no time")


if __name__ == "__main__":
    main()
