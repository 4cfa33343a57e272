"""The table of a stacking record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.provenance import where


def section(records: Path) -> str:
    """For a page: the table of every record in a folder, each after what was run."""
    parts = []
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text())
        layers = "" if record["layers"] is None else f", {record['layers']} layers"
        parts += [
            f"{record['model']}{layers}, random weights, {record['steps']} steps with guidance, "
            f"density {record['density']:g}; {where([record])}.",
            table(record),
        ]
    return "\n\n".join(parts)


def table(record: dict[str, Any]) -> str:
    """Seconds, speed-up, memory and error of every row; a row that failed says why."""
    lines = [
        "| beside | dense, s | sparse, s | speed-up | over dense alone | peak GiB, dense → sparse "
        "| sparse layers | relative error of the latents |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = next((r["dense"]["seconds"] for r in record["rows"] if r["name"] == "alone"), None)
    for row in record["rows"]:
        if "error" in row:
            lines.append(f"| {row['title']} | did not run: {row['error']} | | | | | | |")
            continue
        dense, sparse = row["dense"], row["sparse"]
        over = "" if alone is None else f"{alone / sparse['seconds']:.2f}x"
        cells = [
            row["title"], f"{dense['seconds']:.2f}", f"{sparse['seconds']:.2f}",
            f"**{dense['seconds'] / sparse['seconds']:.2f}x**", over,
            f"{_gib(dense)} → {_gib(sparse)}", f"{sparse['sparse_layers']} of {sparse['layers']}",
            f"{row['relative_error']:.1%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gib(side: dict[str, Any]) -> str:
    return "?" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 2**30:.1f}"
