"""`python -m benchmarks.attention --out DIR`: sparse attention against the fastest dense attention.

Every sparse result passes the gate (sampled rows against the float64 definition) before it is
timed. Prints a table, writes every raw sample as JSON, and plots.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention.inputs import (
    CAPTURED,
    MODEL_SHAPES,
    NARROW,
    PAPERS_CLUSTERS,
    SHAPES,
    SWEEP,
    inputs_of,
)
from benchmarks.attention.measure import measure_shape
from benchmarks.attention.plots import write_plots
from benchmarks.provenance import provenance
from svg_ear_compile.cost_model.timing import measure_roofs


def jobs(given: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Shapes and the arguments of `measure_shape`; without `--shapes` those of the record."""
    job = {
        "densities": [float(d) for d in given.densities.split(",")],
        "forms": given.forms.split(","),
        "clusters": given.clusters.split(","),
        "repeats": given.repeats,
        "flex": given.flex,
    }
    if given.shapes:
        asked = given.shapes.split(",")
        names = [n for name in asked for n in (SWEEP if name == "sweep" else [name])]
        return [(name, job) for name in names]
    job["flex"] = False
    papers = job | {"clusters": [PAPERS_CLUSTERS]}
    default = job | {"clusters": ["default"], "forms": ["centroid", "gaussian"]}
    price = {"densities": [1.0], "forms": ["centroid"], "clusters": [PAPERS_CLUSTERS]}
    return [
        # FlexAttention where its index lists are small enough to be quick.
        *(
            (name, part | {"flex": name == "wan1.3b-480p"})
            for name in MODEL_SHAPES
            for part in (papers, default)
        ),
        ("wan14b-720p", job | price),
        *((name, default | {"densities": [0.2]}) for name in (*SWEEP, *NARROW)),
        (CAPTURED, default),
    ]


def main() -> None:
    """Parse the command line, measure, write `attention.json` and plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", help=f"only these: {', '.join([*SHAPES, CAPTURED])}, or sweep for all lengths"
    )
    parser.add_argument("--densities", default="0.1,0.2")
    parser.add_argument("--forms", default="centroid,gaussian")
    parser.add_argument("--clusters", default=f"{PAPERS_CLUSTERS},default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="with --shapes: FlexAttention too")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    started = time.time()
    kind = "bfloat16" if device == "cuda" else "float32"
    side, copied = (8192, 1 << 31) if device == "cuda" else (1024, 1 << 26)
    measured = measure_roofs(torch.device(device), [kind], side, copied)
    roofs = {"tflops": measured.flops[kind], "gb_per_second": measured.bandwidth}
    rows: list[dict[str, Any]] = []
    given.out.mkdir(parents=True, exist_ok=True)
    for name, job in jobs(given):
        rows += measure_shape(
            inputs_of(name, device, dtype), **job, say=lambda line: print(line, flush=True)
        )
        torch.cuda.empty_cache()
        seconds = time.time() - started
        record = {**provenance(), "seconds": seconds, "roofs": roofs, "rows": rows}
        (given.out / "attention.json").write_text(json.dumps(record, indent=1))
    write_plots(record, given.out)


if __name__ == "__main__":
    main()
