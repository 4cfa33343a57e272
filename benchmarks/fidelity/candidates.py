"""`python -m benchmarks.fidelity.candidates --out DIR`: ideas for less error, on recorded Q, K, V.

Every candidate replaces one part of first-order compensation (clusters, routing score, stand-ins,
or what is reused from an earlier denoising step) and is judged by the relative L2 error of the
attention output of the video DiT. Predictions and verdicts are in `NOTES.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.fidelity import head
from benchmarks.fidelity.grid import DENSITIES, FINE
from benchmarks.fidelity.head import Blocks, Head, Mass, StandIns
from benchmarks.fidelity.scores import relative_error
from benchmarks.provenance import provenance
from benchmarks.tuning.recorded import Recording, record
from benchmarks.video_dit.demo import SHAPES
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Clusters

STEPS = 24
LAST_DENSE, MIDDLE = 4, 10
"""Denoising steps of 24: the last of five dense ones, and the one that errors are compared at."""

RECORDED = (LAST_DENSE, 5, 6, 7, MIDDLE, 14, 19)


@dataclass(frozen=True)
class Case:
    """One head, clustered, and what candidates make of it."""

    head: Head

    @cached_property
    def dense(self) -> Tensor:
        """Dense attention, (N, D)."""
        this = self.head
        return torch.softmax(this.scale * this.q @ this.k.T, -1) @ this.v

    @cached_property
    def blocks(self) -> Blocks:
        """What blocks look like from their query centroids."""
        return head.probe(self.head)

    @cached_property
    def first_order(self) -> StandIns:
        """Stand-ins of first-order compensation."""
        return head.first_order_stand_ins(self.head, self.blocks)

    @cached_property
    def mass(self) -> Tensor:
        """Share of every block in its row's mass at the query centroid, (Qc, Kc)."""
        return self.over_blocks(self.weights)

    def by_error(self, density: float) -> Tensor:
        """The paper's blocks."""
        return head.choose(self.head, head.error_score(self.head, self.blocks), density)

    @cached_property
    def weights(self) -> Tensor:
        """Weight of every key at the query centroid, all keys together 1, (Qc, N)."""
        return torch.softmax(self.head.scale * self.head.q_centroids @ self.head.k.T, -1)

    @cached_property
    def away(self) -> Tensor:
        """``q - q_i``, (N, D); 0 for text."""
        centroids = torch.nn.functional.pad(self.head.q_centroids, (0, 0, 0, 1))
        clustered = self.head.q_labels < len(self.head.q_sizes)
        return (self.head.q - centroids[self.head.q_labels]) * clustered[:, None]

    def over_blocks(self, x: Tensor) -> Tensor:
        """Sums of (Qc, N) over the keys of every block, (Qc, Kc)."""
        clusters = len(self.head.k_sizes)
        sums = x.new_zeros(len(x), clusters + 1).index_add_(1, self.head.k_labels, x)
        return sums[:, :clusters]


def variance(case: Case, of: Tensor, mean: Tensor) -> Tensor:
    """Trace of the covariance of `of` (N, D) in every block at the query centroid, (Qc, Kc)."""
    square = case.over_blocks(case.weights * of.square().sum(-1)) / case.mass.clamp(min=1e-30)
    return (square - mean.square().sum(-1)).clamp(min=0)


Routing = Callable[[Case, float], Tensor]
"""Of a case and a density: exact blocks (Qc, Kc)."""

Form = Callable[[Case, Tensor], Tensor]
"""Of a case and its exact blocks: the output (N, D)."""


@dataclass(frozen=True)
class Candidate:
    """A routing and what the skipped blocks do."""

    form: Form
    route: Routing = Case.by_error

    def __call__(self, case: Case, density: float) -> Tensor:
        """The output (N, D) at a density."""
        return self.form(case, self.route(case, density))


# Forms as they are.


def centroids(case: Case, exact: Tensor) -> Tensor:
    """The paper's."""
    return head.attend(case.head, exact, head.centroid_stand_ins(case.head))


def values_only(case: Case, exact: Tensor) -> Tensor:
    """Posterior values, the centroid's logit."""
    centroid = head.centroid_stand_ins(case.head)
    stand_ins = StandIns(centroid.key, case.blocks.mean_value, centroid.bias)
    return head.attend(case.head, exact, stand_ins)


def first_order(case: Case, exact: Tensor) -> Tensor:
    """First-order compensation."""
    return head.attend(case.head, exact, case.first_order)


# Routing.


def by_estimate(case: Case, log_error: Tensor, density: float) -> Tensor:
    """Blocks by ``log_error - log n_j``."""
    score = log_error - case.head.k_sizes.clamp(min=1).log()
    return head.choose(case.head, score, density)


def by_spreads(case: Case, density: float) -> Tensor:
    """Mass times spread of posterior values times spread of posterior keys."""
    blocks = case.blocks
    spreads = [
        variance(case, of, mean).clamp(min=1e-30).log()
        for of, mean in ((case.head.v, blocks.mean_value), (case.head.k, blocks.mean_key))
    ]
    return by_estimate(case, 2 * blocks.log_mass + spreads[0] + spreads[1], density)


def query_covariance(case: Case) -> Tensor:
    """Covariance of the queries of every cluster, (Qc, D, D)."""
    rows = head.members(case.head.q_labels, case.head.q_sizes)
    away = case.away[rows.index] * rows.inside[..., None]  # [Qc, M, D]
    return away.transpose(1, 2) @ away / case.head.q_sizes.clamp(min=1)[:, None, None]


def principal_directions(covariance: Tensor, rank: int) -> Tensor:
    """Orthonormal (C, D, rank), by four rounds of subspace iteration on (C, D, D)."""
    start = torch.eye(covariance.shape[-1], rank, device=covariance.device)
    directions = covariance @ start.flip(0) + start
    for _ in range(4):
        directions = torch.linalg.qr(covariance @ directions).Q
    return directions


def by_covariance(case: Case, density: float) -> Tensor:
    """The residual itself: ``Z^2 tr(Cov(v, k) Cov(q) Cov(v, k)')``, D x D for each pair."""
    this, blocks = case.head, case.blocks
    keys = head.members(this.k_labels, this.k_sizes)
    spread = query_covariance(case)
    k, v = this.k[keys.index], this.v[keys.index]  # [Kc, M, D]
    rows = []
    for i, mine in enumerate(case.weights):
        weight = mine[keys.index] * keys.inside / case.mass[i].clamp(min=1e-30)[:, None]
        away_v = v - blocks.mean_value[i][:, None]
        away_k = k - blocks.mean_key[i][:, None]
        found = (weight[..., None] * away_v).transpose(1, 2) @ away_k  # [Kc, D, D]
        rows.append((found @ spread[i] * found).sum((1, 2)))
    log_error = 2 * blocks.log_mass + torch.stack(rows).clamp(min=1e-30).log()
    return by_estimate(case, log_error, density)


def by_true_error(case: Case, density: float) -> Tensor:
    """An oracle: the true squared error of each block's stand-in, over the cluster's queries."""
    this, stand_ins = case.head, case.first_order
    keys = head.members(this.k_labels, this.k_sizes)
    rows = head.members(this.q_labels, this.q_sizes)
    logits = this.scale * this.q @ this.k.T
    weights = torch.softmax(logits, -1)
    total = torch.logsumexp(logits, -1)
    v = this.v[keys.index] * keys.inside[..., None]  # [Kc, M, D]
    found = []
    for i, (index, inside) in enumerate(zip(rows.index, rows.inside, strict=True)):
        mine = index[inside]
        true = torch.einsum("mjt,jtd->mjd", weights[mine][:, keys.index] * keys.inside, v)
        logit = this.scale * this.q[mine] @ stand_ins.key[i].T + stand_ins.bias[i]
        estimate = (logit - total[mine][:, None]).exp()[..., None] * stand_ins.value[i]
        found.append((true - estimate).square().sum((0, 2)))
    return by_estimate(case, torch.stack(found).clamp(min=1e-38).log(), density)


def over_rows(case: Case, density: float) -> Tensor:
    """``rho_ij`` over all rows of the head together: the same area, shared out between rows."""
    this, blocks = case.head, case.blocks
    sizes = this.k_sizes.clamp(min=1).log()
    log_rho = blocks.log_error - 2 * blocks.log_mass.logsumexp(-1, keepdim=True) - sizes
    area = (this.q_sizes[:, None] * this.k_sizes).to(log_rho.dtype)
    budget = density * area.sum()
    exact = reference.take_until(log_rho.flatten(), area.flatten(), budget).view_as(area)
    return exact & (this.k_sizes > 0)


def with_own_block(case: Case, density: float) -> Tensor:
    """The key cluster that holds most of a query cluster's own tokens is always exact."""
    this = case.head
    shared = this.q.new_zeros(len(this.q_sizes) + 1, len(this.k_sizes) + 1)
    once = this.q.new_ones(len(this.q))
    shared.index_put_((this.q_labels, this.k_labels), once, accumulate=True)
    shared = shared[:-1, :-1]
    own = torch.nn.functional.one_hot(shared.argmax(-1), len(this.k_sizes)).bool()
    score = head.error_score(this, case.blocks).masked_fill(own, math.inf)
    return head.choose(this, score, density)


# Other forms.


def rounded(dtype: torch.dtype) -> Form:
    """Tables of keys and values in a narrower type; the bias keeps its own."""

    def form(case: Case, exact: Tensor) -> Tensor:
        whole = case.first_order
        key, value = (t.to(dtype).to(t.dtype) for t in (whole.key, whole.value))
        own = case.head.scale * torch.einsum("id,ijd->ij", case.head.q_centroids, key)
        stand_ins = StandIns(key, value, case.blocks.log_mass - own)
        return head.attend(case.head, exact, stand_ins)

    return form


def tables_for(share: float) -> Form:
    """First order for the pairs that hold a share of each row's skipped mass, centroids for others.

    The fewest pairs of the row, by mass.
    """

    def form(case: Case, exact: Tensor) -> Tensor:
        chosen = pairs_with_mass(case, exact, share)
        centroid, whole = head.centroid_stand_ins(case.head), case.first_order
        stand_ins = StandIns(
            torch.where(chosen[..., None], whole.key, centroid.key),
            torch.where(chosen[..., None], whole.value, centroid.value),
            torch.where(chosen, whole.bias, centroid.bias),
        )
        return head.attend(case.head, exact, stand_ins)

    return form


def pairs_with_mass(case: Case, exact: Tensor, share: float) -> Tensor:
    """The fewest pairs of every row that hold a share of its skipped mass, (Qc, Kc) bool."""
    skipped = case.mass.masked_fill(exact, 0.0)
    return reference.take_until(skipped, skipped, share * skipped.sum(-1)) & ~exact


def with_covariance(rank: int | None) -> Form:
    """First order plus ``T_i (q - q_i)``.

    ``T_i = s sum_j p_ij Cov_ij(v, k)`` over the skipped blocks of the row: one D x D matrix for a
    query cluster instead of one for each pair, with the mass ``p_ij`` of the query centroid. With a
    rank, q - q_i is projected on that many principal directions of the cluster's queries: then T_i
    is a table of (rank, D), and each direction costs one more pass of the probe over the values.
    """

    def form(case: Case, exact: Tensor) -> Tensor:
        this, blocks = case.head, case.blocks
        out = head.attend(this, exact, case.first_order)
        taken = torch.nn.functional.pad(exact, (0, 1), value=True)[:, this.k_labels]
        weight = case.weights.masked_fill(taken, 0.0)  # [Qc, N]
        mass = case.mass.masked_fill(exact, 0.0)
        matrix = torch.stack([(w[:, None] * this.v).T @ this.k for w in weight])
        own = (mass[..., None] * blocks.mean_value).transpose(1, 2) @ blocks.mean_key
        matrix = this.scale * (matrix - own)  # [Qc, D, D], values by keys
        if rank is not None:
            directions = principal_directions(query_covariance(case), rank)
            matrix = matrix @ directions @ directions.transpose(1, 2)
        return add_moves(case, out, matrix)

    return form


def add_moves(case: Case, out: Tensor, matrix: Tensor) -> Tensor:
    """``out + T_i (q - q_i)`` with T (Qc, D, D), values by keys."""
    rows = head.members(case.head.q_labels, case.head.q_sizes)
    moves = case.away[rows.index] @ matrix.transpose(1, 2)  # [Qc, M, D]
    out[rows.index[rows.inside]] += moves[rows.inside]
    return out


def with_shared_covariance(mass: Mass = "first order") -> Form:
    """One covariance for a key cluster, whatever the query cluster."""

    def form(case: Case, exact: Tensor) -> Tensor:
        stand_ins = head.second_order_stand_ins(case.head, case.blocks, exact, mass)
        return head.attend(case.head, exact, stand_ins)

    return form


BY_CASE: dict[str, Candidate] = {
    "paper": Candidate(centroids),
    "values only": Candidate(values_only),
    "first order": Candidate(first_order),
    "routing: spread of values x keys": Candidate(first_order, by_spreads),
    "routing: covariance of values and keys": Candidate(first_order, by_covariance),
    "routing: true error (oracle)": Candidate(first_order, by_true_error),
    "routing: rho over all rows": Candidate(first_order, over_rows),
    "routing: own tokens always exact": Candidate(first_order, with_own_block),
    "tables in bfloat16": Candidate(rounded(torch.bfloat16)),
    "tables in float8 e4m3": Candidate(rounded(torch.float8_e4m3fn)),
    "tables for 50 % of skipped mass": Candidate(tables_for(0.5)),
    "tables for 80 % of skipped mass": Candidate(tables_for(0.8)),
    "tables for 95 % of skipped mass": Candidate(tables_for(0.95)),
    "covariance": Candidate(with_covariance(None)),
    "covariance, rank 1": Candidate(with_covariance(1)),
    "covariance, rank 4": Candidate(with_covariance(4)),
    "covariance, rank 16": Candidate(with_covariance(16)),
    "shared covariance": Candidate(with_shared_covariance()),
    "shared covariance, isotropic mass": Candidate(with_shared_covariance("isotropic")),
    "second order": Candidate(with_shared_covariance("diagonal")),
    "second order, routing: spread of values x keys": Candidate(
        with_shared_covariance("diagonal"), by_spreads
    ),
}
"""Candidates that keep the clusters."""


# Clusters. Features are (1, H, N, F) and made of q, k, v (1, H, N, D).


def root(x: Tensor) -> Tensor:
    """Symmetric square root of the second moment of (1, H, N, D) about the mean, (1, H, D, D)."""
    away = (x - x.mean(2, keepdim=True)).float()
    values, vectors = torch.linalg.eigh(away.transpose(2, 3) @ away / x.shape[2])
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.transpose(2, 3)


def logit_metric(call: Recording) -> tuple[Tensor, Tensor]:
    """Distances between queries as the keys see them, and the other way round.

    ``|Σ_k^{1/2} (q - q')|^2`` is the variance over the keys of the difference of two queries'
    logits, which is what a query cluster should keep small.
    """
    return call.q.float() @ root(call.k), call.k.float() @ root(call.q)


def with_values(share: float) -> Callable[[Recording], tuple[Tensor, Tensor]]:
    """Keys cluster by key and value together; values have `share` of the variance of the keys."""

    def features(call: Recording) -> tuple[Tensor, Tensor]:
        factor = math.sqrt(share * float(call.k.var(2).mean() / call.v.var(2).mean()))
        return call.q, torch.cat([call.k, factor * call.v], -1)

    return features


def with_coordinates(
    share: float, grid: tuple[int, int, int]
) -> Callable[[Recording], tuple[Tensor, Tensor]]:
    """Frame, row and column as three more features, with `share` of the whole variance."""

    def features(call: Recording) -> tuple[Tensor, Tensor]:
        axes = [torch.linspace(-1, 1, size, device=call.q.device) for size in grid]
        at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, 1, -1, 3)

        def joined(x: Tensor) -> Tensor:
            factor = math.sqrt(share * float(x.var(2).sum(-1).mean() / at.var(2).sum()))
            return torch.cat([x, (factor * at).expand(1, x.shape[1], -1, -1)], -1)

        return joined(call.q), joined(call.k)

    return features


Features = Callable[[Recording], tuple[Tensor, Tensor]]


def plain(call: Recording) -> tuple[Tensor, Tensor]:
    """Queries and keys themselves."""
    return call.q, call.k


Labels = tuple[Tensor, Tensor]


def labels_of(features: tuple[Tensor, Tensor], plan: AttentionPlan, text: int = 0) -> Labels:
    """Labels (B, H, N) of queries and keys by k-means on features, from scratch."""
    wide = (x.float() for x in features)
    queries, keys = reference.cluster(*wide, plan, None, (0, text), None)
    return queries.labels, keys.labels


def cases_of(call: Recording, labels: Labels, plan: AttentionPlan, text: int = 0) -> list[Case]:
    """Every head of a call in float32 under labels, with centroids of its own tokens."""
    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    video = q.shape[2] - text
    queries, keys = (
        Clusters(label, *reference.cluster_means(x, label, count))
        for label, x, count in zip(labels, (q, k), plan.clusters(video, video), strict=True)
    )
    return [Case(this) for _, this in head.heads_of(q, k, v, queries, keys, q.shape[-1] ** -0.5)]


def errors_of(cases: Sequence[Case], candidate: Candidate, density: float) -> list[float]:
    """Relative L2 error of every head."""
    return [relative_error(candidate(case, density), case.dense) for case in cases]


class Study:
    """Recorded calls and the errors of candidates on them.

    Attributes:
        rows: name, density and relative L2 errors of what was measured: their mean, and each
            head's in the order of the calls.
    """

    def __init__(
        self, calls: dict[int, list[Recording]], grid: tuple[int, int, int],
        densities: Sequence[float], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.calls, self.grid, self.densities, self.say = calls, grid, densities, say
        self.tokens = math.prod(grid)
        self.rows: list[dict[str, Any]] = []

    def plan(self, queries: int = FINE[0], keys: int = FINE[1]) -> AttentionPlan:
        """Clusters of a mean size, five rounds."""
        return AttentionPlan(
            q_clusters=math.ceil(self.tokens / queries), k_clusters=math.ceil(self.tokens / keys)
        )

    def keep(self, name: str, errors_at: Callable[[float], list[float]]) -> None:
        """Measure one candidate at all densities."""
        began = time.perf_counter()
        means = []
        for density in self.densities:
            errors = errors_at(density)
            means.append(sum(errors) / len(errors))
            self.rows.append(
                {"candidate": name, "density": density, "error": means[-1], "errors": errors}
            )
        found = " ".join(f"{mean:.4f}" for mean in means)
        self.say(f"{name}: {found} ({time.perf_counter() - began:.0f} s)")

    def parts(self) -> None:
        """Candidates that keep the clusters, and how many pairs hold how much mass."""
        plan = self.plan()
        cases = [
            case
            for call in self.calls[MIDDLE]
            for case in cases_of(call, labels_of(plain(call), plan), plan)
        ]
        for name, candidate in BY_CASE.items():
            self.keep(name, partial(errors_of, cases, candidate))
        for share in (0.5, 0.8, 0.95):

            def pairs(density: float, share: float = share) -> list[float]:
                found = [pairs_with_mass(c, c.by_error(density), share) for c in cases]
                return [float(f.float().mean()) for f in found]

            self.keep(f"share of pairs that holds {share:.0%} of skipped mass", pairs)

    def clusters(self) -> None:
        """Other clusters under three forms."""
        variants: dict[str, tuple[Features, AttentionPlan]] = {
            f"{q} queries, {k} keys a cluster": (plain, self.plan(q, k))
            for q in (64, 128, 256)
            for k in (64, 128)
        }
        variants |= {
            "clusters in the metric of logits": (logit_metric, self.plan()),
            "key clusters see values, share 0.25": (with_values(0.25), self.plan()),
            "key clusters see values, share 1": (with_values(1.0), self.plan()),
            "coordinates as features, share 0.05": (with_coordinates(0.05, self.grid), self.plan()),
            "coordinates as features, share 0.3": (with_coordinates(0.3, self.grid), self.plan()),
        }
        for name, (features, plan) in variants.items():
            cases = [
                case
                for call in self.calls[MIDDLE]
                for case in cases_of(call, labels_of(features(call), plan), plan)
            ]
            for form in ("paper", "first order", "second order"):
                self.keep(f"{name}: {form}", partial(errors_of, cases, BY_CASE[form]))

    def time(self) -> None:
        """What the last dense step leaves: labels, blocks, tables, and the difference to dense."""
        plan = self.plan()
        then = self.calls[LAST_DENSE]
        labels = [labels_of(plain(call), plan) for call in then]
        old = [cases_of(c, x, plan) for c, x in zip(then, labels, strict=True)]
        for step in sorted(self.calls)[1:]:
            now = self.calls[step]
            fresh = [cases_of(c, labels_of(plain(c), plan), plan) for c in now]
            kept = [cases_of(c, x, plan) for c, x in zip(now, labels, strict=True)]
            variants: dict[str, tuple[Aged, list[list[Case]]]] = {
                "clustered anew": (lambda _, case, d: BY_CASE["first order"](case, d), fresh),
                "labels kept": (lambda _, case, d: BY_CASE["first order"](case, d), kept),
                "labels and blocks kept": (blocks_kept, kept),
                "labels, blocks and tables kept": (tables_kept, kept),
                "old dense output": (lambda old, _case, _density: old.dense, kept),
                "blocks kept, difference to dense added": (difference_added(), kept),
                "the same, second order": (
                    difference_added(form=with_shared_covariance("diagonal")), kept,
                ),
                "the same, difference in float8 e4m3": (
                    difference_added(torch.float8_e4m3fn), kept,
                ),
            }  # fmt: skip
            for name, (aged, cases) in variants.items():
                self.keep(
                    f"step + {step - LAST_DENSE}: {name}", partial(aged_errors, old, cases, aged)
                )


Aged = Callable[[Case, Case, float], Tensor]
"""Of the case at the last dense step, that of now, and a density."""


def blocks_kept(old: Case, case: Case, density: float) -> Tensor:
    """The blocks of the last dense step, fresh tables."""
    return first_order(case, old.by_error(density))


def tables_kept(old: Case, case: Case, density: float) -> Tensor:
    """Blocks and tables of the last dense step."""
    return head.attend(case.head, old.by_error(density), old.first_order)


def difference_added(dtype: torch.dtype | None = None, form: Form = first_order) -> Aged:
    """What the same blocks lost at the last dense step is added, kept in `dtype`."""

    def aged(old: Case, case: Case, density: float) -> Tensor:
        exact = old.by_error(density)
        lost = old.dense - form(old, exact)
        if dtype is not None:
            unit = lost.abs().amax() / torch.finfo(dtype).max
            lost = (lost / unit).to(dtype).to(lost.dtype) * unit
        return form(case, exact) + lost

    return aged


def aged_errors(
    old: Sequence[Sequence[Case]], now: Sequence[Sequence[Case]], aged: Aged, density: float
) -> list[float]:
    """Relative L2 error of every head of now."""
    return [
        relative_error(aged(before, case, density), case.dense)
        for olds, news in zip(old, now, strict=True)
        for before, case in zip(olds, news, strict=True)
    ]


def recorded(
    shape: tuple[int, int, int], layers: Sequence[int], heads: int
) -> dict[int, list[Recording]]:
    """Calls by step: some layers of one clip, some heads of each."""
    found: dict[int, list[Recording]] = {step: [] for step in RECORDED}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for call in record(shape, STEPS, RECORDED, 0, device):
        if call.layer in layers:
            q, k, v = (x[:, :heads].contiguous() for x in (call.q, call.k, call.v))
            found[call.step].append(replace(call, q=q, k=k, v=v))
    return found


def main() -> None:
    """Record, measure, write; the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clip", choices=SHAPES, default="long")
    parser.add_argument("--layers", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--heads", type=int, default=1, help="of each layer")
    parser.add_argument("--parts", default="parts,clusters,time", help="of these three")
    given = parser.parse_args()
    began = time.perf_counter()
    shape = SHAPES[given.clip]
    layers = [int(layer) for layer in given.layers.split(",")]
    calls = recorded(shape, layers, given.heads)
    grid = (shape[0], shape[1] // 6, shape[2] // 6)
    print(f"recorded in {time.perf_counter() - began:.0f} s", flush=True)
    study = Study(calls, grid, DENSITIES, lambda line: print(line, flush=True))
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.parts.split(","):
        {"parts": study.parts, "clusters": study.clusters, "time": study.time}[part]()
        record_of = {
            **provenance(),
            "tokens": study.tokens, "layers": layers, "heads": given.heads,
            "steps": [STEPS, *RECORDED], "seconds": time.perf_counter() - began,
            "rows": study.rows,
        }  # fmt: skip
        (given.out / "candidates.json").write_text(json.dumps(record_of, indent=1) + "\n")
    show(study.rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Mean errors, and the worst head against first-order compensation."""
    table = Table(title="Mean relative L2 error (worst head over first order's)")
    table.add_column("candidate")
    base = {row["density"]: row["errors"] for row in rows if row["candidate"] == "first order"}
    for density in DENSITIES:
        table.add_column(f"{density:g}", justify="right")
    for name in dict.fromkeys(row["candidate"] for row in rows):
        cells = []
        for row in rows:
            if row["candidate"] == name:
                pairs = zip(row["errors"], base.get(row["density"], []), strict=False)
                worst = max((mine / first for mine, first in pairs), default=math.nan)
                cells.append(f"{row['error']:.4f} ({worst:.2f}x)")
        table.add_row(name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
