"""`python -m benchmarks.end_to_end {forward,generation} --out DIR`: seconds that a user feels.

Compares ``backend="svg_ear"`` with ``backend="inductor"`` in one process on diffusers' transformers
at their published sizes with random weights. Prints a table and writes every raw sample as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.end_to_end.measure import forward, generation
from benchmarks.end_to_end.models import SIZES
from benchmarks.provenance import provenance


def table(kind: str, rows: list[dict[str, Any]]) -> Table:
    """What is worth seeing at once; the first row is what the others are compared with."""
    found = Table(title=f"{kind}: {rows[0]['model']}")
    headings = {
        "forward": ("backend", "density", "s", "speed-up", "attention", "first call, s", "peak GB"),
        "generation": ("backend", "density", "dense steps", "s", "speed-up"),
    }[kind]
    for heading in headings:
        found.add_column(heading, justify="right")
    key = "samples_seconds" if kind == "forward" else "seconds"

    def seconds(row: dict[str, Any]) -> float:
        value = row[key]
        return statistics.median(value) if isinstance(value, list) else float(value)

    for row in rows:
        density = str(row["options"].get("density", "dense"))
        speedup = f"{seconds(rows[0]) / seconds(row):.2f}x"
        if kind == "forward":
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
            cells = (
                row["backend"], density, f"{seconds(row):.3f}", speedup,
                f"{row['attention_fraction']:.0%}", f"{row['first_seconds']:.0f}", peak,
            )  # fmt: skip
        else:
            cells = (
                row["backend"], density, str(row["dense_steps"]), f"{seconds(row):.1f}", speedup,
            )  # fmt: skip
        found.add_row(*cells)
    return found


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("forward", "generation"))
    parser.add_argument("--model", choices=SIZES, default="wan1.3b-480p")
    parser.add_argument("--layers", help="fewer layers, e.g. 10 or 5,10: said so in the record")
    parser.add_argument("--densities", default="0.1,0.2")
    parser.add_argument("--repeats", type=int, default=5, help="forwards that are timed")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--dense-steps", default="10", help="leading ones, each such as 5,0")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = SIZES[given.model]
    if given.layers:
        size = size.with_layers(tuple(int(n) for n in given.layers.split(",")))
    schedules = [0]  # a forward has no schedule
    if given.kind == "generation":
        schedules = [int(n) for n in given.dense_steps.split(",")]
    runs: list[tuple[str, dict[str, Any], int]] = [("inductor", {}, 0)]
    runs += [
        ("svg_ear", {"density": float(d)}, dense_steps)
        for d in given.densities.split(",")
        for dense_steps in schedules
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.kind}-{given.model}.json"
    rows = []
    for backend, options, dense_steps in runs:
        if given.kind == "forward":
            row = forward(size, backend, options, given.repeats, device, dtype)
        else:
            row = generation(
                size, backend, options, steps=given.steps, dense_steps=dense_steps,
                device=device, dtype=dtype,
            )  # fmt: skip
        rows.append({"model": given.model, "layers": given.layers, **row})
        print(f"{backend} {options}: done", flush=True)
        path.write_text(json.dumps({**provenance(), "rows": rows}))
    Console(width=110).print(table(given.kind, rows))


if __name__ == "__main__":
    main()
