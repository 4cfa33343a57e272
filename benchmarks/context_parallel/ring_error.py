"""`python -m benchmarks.context_parallel.ring_error --out DIR`: what a ring costs in exactness.

Emulates a ring in one process on a CPU: the operator attends from each part of the queries to each
part of the keys, and the parts are merged by their log-sum-exp. Compares a budget for each part of
the keys with one budget for the whole row, on data like a video's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.data import video_like
from benchmarks.provenance import provenance
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import KEYS_PER_CLUSTER, AttentionPlan
from svg_ear_compile.kernels.routing import area_budget, error_per_area, take_until

DENSITY, TOKENS, DIM, SEEDS = 0.2, 2048, 64, 3
RINGS = (2, 4)
QUERIES_PER_CLUSTER = 128  # without a ring


def plan_for(tokens: int, queries: int) -> AttentionPlan:
    """A plan with so many queries to a cluster."""
    clusters = math.ceil(tokens / queries), math.ceil(tokens / KEYS_PER_CLUSTER)
    return AttentionPlan(density=DENSITY, q_clusters=clusters[0], k_clusters=clusters[1])


def by_part(q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], plan: AttentionPlan) -> Tensor:
    """Attention (B, H, n, D) to all parts of keys and values, each with a budget of its own."""
    results = [reference.sparse_attention(q, k, v, plan) for k, v in pairs]
    return _merged([(result.out, result.lse) for result in results])


def by_row(q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], plan: AttentionPlan) -> Tensor:
    """The same with one budget for all parts: it goes where the error is largest."""
    scale = q.shape[-1] ** -0.5
    routed = [reference.cluster_and_route(q, k, v, plan, scale=scale) for k, v in pairs]
    scores, sizes = [], []
    for part, (k, v) in zip(routed, pairs, strict=True):
        found = reference.score_blocks(part.queries, part.keys, k, v, scale)
        scores.append(error_per_area(found, part.queries, part.keys))
        sizes.append(part.keys.sizes.unsqueeze(-2).to(q.dtype).expand_as(scores[-1]))
    budget = torch.stack([area_budget(part.keys, plan) for part in routed]).sum(0).unsqueeze(-1)
    taken = take_until(torch.cat(scores, -1), torch.cat(sizes, -1), budget)
    masks = (taken & (torch.cat(sizes, -1) > 0)).split([s.shape[-1] for s in scores], -1)
    return _merged([
        reference.attend(q, k, v, replace(part, block_mask=mask), plan.compensation, scale=scale)
        for part, mask, (k, v) in zip(routed, masks, pairs, strict=True)
    ])  # fmt: skip


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    lse = torch.stack([part for _, part in parts])
    weights = (lse - lse.logsumexp(0)).exp().unsqueeze(-1)
    return (torch.stack([out for out, _ in parts]) * weights).sum(0)


def measure(seed: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Relative L2 distances from dense attention of one process and of the rings."""
    q, k, v = video_like(1, 1, tokens, DIM, seed=seed, device="cpu", dtype=torch.float32)
    dense = F.scaled_dot_product_attention(q, k, v)

    def error(out: Tensor) -> float:
        return float((out - dense).norm() / dense.norm())

    alone = reference.sparse_attention(q, k, v, plan_for(tokens, QUERIES_PER_CLUSTER))
    rows: list[dict[str, Any]] = [
        {"seed": seed, "ring": 1, "queries": QUERIES_PER_CLUSTER, "error": error(alone.out)}
    ]
    for ring in RINGS:
        pairs = list(zip(k.chunk(ring, 2), v.chunk(ring, 2), strict=True))
        for queries in (QUERIES_PER_CLUSTER, QUERIES_PER_CLUSTER // ring):
            plan = plan_for(tokens // ring, queries)
            for budget, attend in (("part", by_part), ("row", by_row)):
                out = torch.cat([attend(part, pairs, plan) for part in q.chunk(ring, 2)], 2)
                rows.append({
                    "seed": seed, "ring": ring, "queries": queries, "budget": budget,
                    "error": error(out),
                })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, and how many times the error of one process they are."""
    alone = statistics.fmean(row["error"] for row in rows if row["ring"] == 1)
    lines = [
        "| ring | queries of a cluster | budget for each part | one budget for the row |",
        "|---|---|---|---|",
        f"| one process | {QUERIES_PER_CLUSTER} | {alone:.3f} | |",
    ]
    kinds = dict.fromkeys((row["ring"], row["queries"]) for row in rows if row["ring"] > 1)
    for ring, queries in kinds:
        cells = []
        for budget in ("part", "row"):
            found = statistics.fmean(
                row["error"] for row in rows
                if (row["ring"], row["queries"], row.get("budget")) == (ring, queries, budget)
            )  # fmt: skip
            cells.append(f"{found:.3f} ({found / alone:.2f}x)")
        lines.append(f"| {ring} | {queries} | {' | '.join(cells)} |")
    return "\n".join(lines)


def section(records: Path) -> str:
    """For a page: the record of this folder."""
    record = json.loads((records / "ring_error.json").read_text())
    what = (
        f"{record['device']}, torch {record['versions']['torch']}; {record['tokens']:,} tokens, "
        f"density {record['density']:g}, relative error to dense, mean of "
        f"{len({row['seed'] for row in record['rows']})} videos."
    )
    return f"{what}\n\n{table(record['rows'])}"


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = [row for seed in range(SEEDS) for row in measure(seed)]
    given.out.mkdir(parents=True, exist_ok=True)
    record = {**provenance(), "density": DENSITY, "tokens": TOKENS, "rows": rows}
    (given.out / "ring_error.json").write_text(json.dumps(record, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
