"""The tables of forwards and of generations, from their records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.provenance import where

Record = dict[str, Any]


def forward_seconds(row: Record) -> float:
    """Median of the timed forwards of a row."""
    return statistics.median(row["samples_seconds"])


def forward_table(records: Sequence[Record]) -> str:
    """Forwards through the whole model, dense and sparse."""
    lines = [
        f"{where(records)}. Random weights.",
        "",
        "| model | layers | backend | density | s a forward | speed-up | first call, s "
        "| peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        dense = forward_seconds(record["rows"][0])
        for row in record["rows"]:
            seconds = forward_seconds(row)
            cells = [
                row["model"], row["layers"] or "all", row["backend"],
                str(row["options"].get("density", "dense")), f"{seconds:.3f}",
                f"{dense / seconds:.2f}x", f"{row['first_seconds']:.0f}",
                f"{row['peak_bytes'] / 2**30:.1f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def generation_table(records: Sequence[Record]) -> str:
    """Whole sampling loops, dense and sparse."""
    lines = [
        f"{where(records)}. Random weights.",
        "",
        "| model | backend | density | denoising steps (dense ones) | reused | s a generation "
        "| speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        dense = record["rows"][0]["seconds"]
        for row in record["rows"]:
            reused = row.get("reused")
            cells = [
                row["model"], row["backend"], str(row["options"].get("density", "dense")),
                f"{row['steps']} ({row['dense_steps']})",
                f"{statistics.fmean(reused):.0%} of sparse calls" if reused else "",
                f"{row['seconds']:.1f}",
                f"{dense / row['seconds']:.2f}x",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
