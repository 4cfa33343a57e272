"""`python -m benchmarks.context_parallel --gpus N --model wan14b-720p --layers 4 --out DIR`.

Measures one forward on 1, 2, 4, … N GPUs of one host through NCCL: dense attention compiled by
Inductor, and svg_ear; Ulysses, ring, and both at once. The record is written after every group. A
run that was cut continues where the record of the same commit, device and model ends.
``--tiny`` uses processes on CPUs, to see that everything runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.context_parallel.layouts import layouts, misfit, sizes
from benchmarks.context_parallel.measure import Task, outputs_of_one_gpu, run
from benchmarks.context_parallel.models import SIZES, shape_of
from benchmarks.context_parallel.report import measured_table, write_plot
from benchmarks.end_to_end.models import TINY
from benchmarks.provenance import provenance


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, required=True, help="the largest group")
    parser.add_argument("--model", choices=SIZES, default="wan14b-720p")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--densities", default="0.2,0.1")
    parser.add_argument("--repeats", type=int, default=7, help="forwards that are timed")
    parser.add_argument("--tiny", action="store_true", help="a small model on CPUs")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    here = torch.cuda.device_count()
    if given.gpus < 1:
        parser.error(f"--gpus must be at least 1, got {given.gpus}")
    if not given.tiny and given.gpus > here:
        parser.error(f"--gpus {given.gpus}: this host has {here} (--tiny runs on CPUs)")
    model = "tiny" if given.tiny else given.model
    shape = shape_of(TINY if given.tiny else SIZES[model])
    densities = [1.0, *(float(d) for d in given.densities.split(","))]

    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{model}.json"
    record: dict[str, Any] = {
        **provenance(), "model": model, "layers": given.layers, "densities": densities,
        "rows": [], "left": [],
    }  # fmt: skip
    if path.exists() and outputs_of_one_gpu(given.out, densities):
        record = _continued(record, json.loads(path.read_text()))
    done = {(row["ring"], row["ulysses"]) for row in record["rows"]}
    console = Console(width=140)
    for layout in (layout for gpus in sizes(given.gpus) for layout in layouts(gpus, shape.heads)):
        if (layout.ring, layout.ulysses) in done:
            continue
        if (sentence := misfit(layout, shape)) is not None:
            console.print(f"left out: {sentence}")
            record["left"] = [*dict.fromkeys([*record["left"], sentence])]
        else:
            task = Task(model, given.layers, layout, tuple(densities), given.repeats, given.tiny)
            record["rows"] += run(task, given.out)
            console.print(f"{layout.gpus}, {layout.name}: done")
        path.write_text(json.dumps(record, indent=1))
    write_plot(record, path.with_suffix(".png"))
    console.print(Markdown(measured_table(record)))


def _continued(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The old record if the new one would have been made likewise, else the new one."""
    same = ("device", "versions", "commit", "model", "layers", "densities")
    return old if all(old.get(name) == new[name] for name in same) else new


if __name__ == "__main__":
    main()
