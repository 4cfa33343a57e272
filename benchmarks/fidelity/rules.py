"""Every rule that is compared: what it computes exactly and what it does with the rest.

The paper's rule and the operator's own compensations go through the operator that users get. The
others are written out in plain PyTorch (`head.py`, `orders.py`, `sol.py`), the published ones from
their descriptions: SVG2 is arXiv 2505.18875, SVG-EAR arXiv 2603.08982, Sol-Attn arXiv 2607.24027.
Sol-Attn's own kernels run too where the wheel is installed (`kitchen.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fidelity import head, orders
from benchmarks.fidelity.head import Head, heads_of
from benchmarks.fidelity.kitchen import Kitchen
from benchmarks.fidelity.sol import Grid, SolAttn
from svg_ear_compile.kernels import op, reference
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan, ClusterMetric, Compensation
from svg_ear_compile.kernels.reference import Result
from svg_ear_compile.memory import Memory, RememberedCall, calls_by_branch

ByHead = Callable[[Head, float], tuple[Tensor, Tensor]]
"""Of a head and a density: output (N, D) and block mask (Qc, Kc)."""

ByCall = Callable[[Tensor, Tensor, Tensor, AttentionPlan, int, Grid], tuple[Tensor, Tensor | None]]
"""Of q, k, v, a plan, text tokens and the grid: output (B, H, N, D), and the number of exact pairs
of video tokens, () float64, or None where it is not known."""


@dataclass(frozen=True)
class Rule:
    """One way to attend sparsely.

    Attributes:
        title: in tables and plots.
        compensation: the operator's form, for rules that the operator has.
        metric: of the clusters; published rules have Euclidean ones.
        max_drift, shared_branches: see `AttentionPlan`; published rules cluster every branch at
            every step.
        by_head: the rule in plain PyTorch, for rules that need our clusters.
        by_call: the rule as a whole, for rules without clusters.
        timed_as: name of the rule whose calls take the time that this one's would, if another. The
            order of the tokens costs nothing: the model itself can keep it.
        needs_kitchen: runs where `kitchen.missing` says nothing.
    """

    title: str
    compensation: Compensation | None = None
    metric: ClusterMetric = "euclidean"
    max_drift: float = 0.0
    shared_branches: bool = False
    by_head: ByHead | None = None
    by_call: ByCall | None = None
    timed_as: str | None = None
    needs_kitchen: bool = False


def svg2(this: Head, density: float) -> tuple[Tensor, Tensor]:
    """The blocks with most mass by centroids; everything else is dropped."""
    exact = head.choose(this, head.mass_score(this), density)
    return head.attend(this, exact, None), exact


def score_and_centroids(this: Head, density: float) -> tuple[Tensor, Tensor]:
    """SVG2's blocks; the others act as their centroids."""
    exact = head.choose(this, head.mass_score(this), density)
    return head.attend(this, exact, head.value_means(this)), exact


def values_only(this: Head, density: float) -> tuple[Tensor, Tensor]:
    """The paper's blocks; the others keep the centroid's logit and mass, with posterior values."""
    blocks = head.score_blocks(this)
    exact = head.choose(this, head.error_score(this, blocks), density)
    return head.attend(this, exact, blocks.mean_value), exact


def uniform_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, text: int, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Every query attends to the same regular sample of the keys, and to all text.

    The sample is the keys at places ``floor(i n / m)`` of the n video keys, i = 0..m-1 with
    ``m = ceil(density n)``; each stands for n/m keys, a logit bias of ``log(n/m)`` beside text keys
    of bias 0. Text queries attend to everything. Arguments and result as `ByCall`.
    """
    video = k.shape[2] - text
    sampled = math.ceil(plan.density * video)
    taken = torch.arange(sampled, device=k.device) * video // sampled
    places = torch.cat([taken, torch.arange(video, video + text, device=k.device)])
    bias = None  # without text every weight has the same factor
    if text:
        bias = q.new_zeros(1, 1, 1, len(places))
        bias[..., :sampled] = math.log(video / sampled)
        bias = bias.expand(-1, -1, video, -1)
    out = F.scaled_dot_product_attention(q[:, :, :video], k[:, :, places], v[:, :, places], bias)
    if text:
        own = F.scaled_dot_product_attention(q[:, :, video:], k, v)
        out = torch.cat([out, own], 2)
    pairs = q.shape[0] * q.shape[1] * video * sampled
    return out, torch.tensor(pairs, dtype=torch.float64, device=q.device)


RULES = {
    "svg2": Rule("SVG2: score, drop", by_head=svg2),
    "score": Rule("score, centroids", by_head=score_and_centroids),
    "paper": Rule("paper (SVG-EAR)", compensation="centroid"),
    "paper_clusters": Rule("paper, clusters by logits", compensation="centroid", metric="logits"),
    "values": Rule("first order, values only", by_head=values_only),
    "first_order": Rule("first order", metric="logits", by_head=orders.first_order),
    "second_order": Rule("second order", metric="logits", by_head=orders.second_order),
    "gaussian": Rule(
        "Gaussian (svg_ear)",
        compensation="gaussian",
        metric="logits",
        max_drift=AttentionPlan.max_drift,
        shared_branches=True,
    ),
    "shared": Rule(
        "Gaussian, shared by branches, recomputed every step",
        compensation="gaussian",
        metric="logits",
        shared_branches=True,
    ),
    "recomputed": Rule("Gaussian, recomputed every time", compensation="gaussian", metric="logits"),
    "uniform": Rule("uniform keys", by_call=uniform_attention),
    "top_k_drop": Rule("top-k of 64-token blocks, drop", by_call=SolAttn(keeps_rest=False)),
    "sol_top_k": Rule("Sol-Attn, top-k", by_call=SolAttn(), timed_as="kitchen_top_k"),
    "sol_top_k_cubes": Rule(
        "Sol-Attn, top-k, 4 x 4 x 4", by_call=SolAttn("cubes"), timed_as="kitchen_top_k"
    ),
    "sol_tau": Rule("Sol-Attn, tau", by_call=SolAttn(), timed_as="kitchen_tau"),
    "sol_tau_cubes": Rule(
        "Sol-Attn, tau, 4 x 4 x 4", by_call=SolAttn("cubes"), timed_as="kitchen_tau"
    ),
    "sol_tokens": Rule(
        "Sol-Attn, top-k and 256 tokens",
        by_call=SolAttn(augmented=256),
        timed_as="kitchen_tokens",
    ),
    "sol_tokens_cubes": Rule(
        "Sol-Attn, top-k and 256 tokens, 4 x 4 x 4",
        by_call=SolAttn("cubes", augmented=256),
        timed_as="kitchen_tokens",
    ),
    "kitchen_top_k": Rule("Sol-Attn kernels, top-k", by_call=Kitchen(), needs_kitchen=True),
    "kitchen_top_k_cubes": Rule(
        "Sol-Attn kernels, top-k, 4 x 4 x 4",
        by_call=Kitchen("cubes"),
        timed_as="kitchen_top_k",
        needs_kitchen=True,
    ),
    "kitchen_tau": Rule("Sol-Attn kernels, tau", by_call=Kitchen(), needs_kitchen=True),
    "kitchen_tau_cubes": Rule(
        "Sol-Attn kernels, tau, 4 x 4 x 4",
        by_call=Kitchen("cubes"),
        timed_as="kitchen_tau",
        needs_kitchen=True,
    ),
    "kitchen_tokens": Rule(
        "Sol-Attn kernels, top-k and 256 tokens",
        by_call=Kitchen(augmented=256),
        needs_kitchen=True,
    ),
}


@dataclass
class Remembered:
    """What one generation remembers, call site by call site: a source of the operator's calls.

    Attributes:
        memories: by site, of the first branch and of the second.
        branches: guidance branches that a call carries along its batch, 1 or 2.
        batch: of the calls.
    """

    memories: dict[str, tuple[Memory, Memory]] = field(default_factory=dict)
    branches: int = 1
    batch: int = 0

    def of_site(self, site: str) -> tuple[Memory, Memory]:
        """What a site remembers of the first branch and of the second."""
        return self.memories.setdefault(site, (Memory(), Memory()))

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """See `kernels.call.CallSource`."""
        shared = self.branches == 2 and request.plan.shared_branches
        split = shared and request.q_shape[0] == self.batch
        memories = self.of_site(request.site)[: 2 if split else 1]
        yield from calls_by_branch(request, request.plan, memories)

    def finished(self, call: AttentionCall, result: Result) -> None:
        """See `kernels.call.CallSource`."""
        assert isinstance(call, RememberedCall)
        call.finished(result)

    def _used(self) -> list[Memory]:
        return [memory for pair in self.memories.values() for memory in pair if memory.pairs]

    @property
    def density(self) -> float | None:
        """Mean density that the sites' last sparse calls reached; waits for the device."""
        found = [d for m in self._used() if (d := m.density) is not None]
        return sum(found) / len(found) if found else None

    @property
    def reused(self) -> float:
        """Fraction of the sparse calls that reused their blocks."""
        memories = self._used()
        return sum(m.reused for m in memories) / max(1, sum(m.calls for m in memories))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: str,
    plan: AttentionPlan,
    *,
    text: int = 0,
    grid: Grid | None = None,
    site: str = "",
    remembered: Remembered | None = None,
) -> Tensor:
    """Sparse self-attention by one of `RULES`.

    Args:
        q, k, v: (B, H, N, D), text tokens last.
        rule: its name.
        plan: density, clusters, iterations, seed; the rule decides the rest.
        text: text tokens at the end.
        grid: of the video tokens; None is a single row.
        site: what is remembered is remembered for this site.
        remembered: starts from and keeps centroids; None for a cold call.

    Returns:
        (B, H, N, D) in the dtype of q.
    """
    remembered = Remembered() if remembered is None else remembered
    chosen = RULES[rule]
    plan = replace(
        plan,
        cluster_metric=chosen.metric,
        max_drift=chosen.max_drift,
        shared_branches=chosen.shared_branches,
    )
    if chosen.compensation is not None:
        plan = replace(plan, compensation=chosen.compensation)
        with calls_from(remembered):
            exact = torch.arange(q.shape[2], device=q.device) >= q.shape[2] - text
            out, _ = op.attention(
                q, k, v, None, None, None, None, None, exact[None], exact[None],
                plan=plan.encode(), site=site, clustered_queries=q.shape[2] - text,
                clustered_keys=q.shape[2] - text,
            )  # fmt: skip
        return out
    memory = remembered.of_site(site)[0]
    if chosen.by_head is not None:
        return attend_by_head(q, k, v, chosen.by_head, plan, text, memory)
    assert chosen.by_call is not None
    video = q.shape[2] - text
    out, memory.exact_pairs = chosen.by_call(q, k, v, plan, text, grid or (1, 1, video))
    memory.pairs = q.shape[0] * q.shape[1] * video**2
    return out


def attend_by_head(
    q: Tensor, k: Tensor, v: Tensor, by_head: ByHead, plan: AttentionPlan, text: int, memory: Memory
) -> Tensor:
    """`attention` by a rule in plain PyTorch, in float32 where the inputs are narrower."""
    wide_q, wide_k, wide_v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    video = q.shape[2] - text
    q_clusters, k_clusters = plan.clusters(video, video)
    batch, heads, _, dim = q.shape
    warm = memory.warm_start(
        (batch, heads, q_clusters, dim), (batch, heads, k_clusters, dim), q.device
    )
    queries, keys, _ = reference.cluster(wide_q, wide_k, plan, exact_at_ends(q, k, 0, text), warm)
    out = torch.empty_like(q)
    pairs = torch.zeros((), dtype=torch.float64, device=q.device)
    for place, this in heads_of(wide_q, wide_k, wide_v, queries, keys, dim**-0.5):
        result, exact = by_head(this, plan.density)
        out[place] = result.to(out.dtype)
        pairs += ((exact * this.k_sizes).sum(-1) * this.q_sizes).sum()
    memory.q_centroids, memory.k_centroids = queries.centroids, keys.centroids
    memory.exact_pairs, memory.pairs = pairs, batch * heads * video**2
    return out
