"""`python -m benchmarks.stacking --out DIR`: the backend beside what people use already.

Each row is a pipeline with one neighbour (quantised layers, an adapter, offload, a step cache, a
compile mode), dense by Inductor and sparse by `accelerate`, in one process. The record is written
after every row; a row that fails stands there with its error. ``--tiny`` runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.end_to_end.models import SIZES, TINY, TINY_OPTIONS
from benchmarks.provenance import provenance
from benchmarks.stacking.measure import stacked
from benchmarks.stacking.neighbours import NEIGHBOURS
from benchmarks.stacking.report import table


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("wan1.3b-480p", "wan14b-720p"), default="wan1.3b-480p")
    parser.add_argument("--layers", type=int, help="fewer layers: said so in the record")
    parser.add_argument("--rows", default=",".join(NEIGHBOURS), help="%(default)s")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps, with guidance")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    if unknown := set(given.rows.split(",")) - set(NEIGHBOURS):
        parser.error(f"--rows {', '.join(sorted(unknown))}: there are {', '.join(NEIGHBOURS)}")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU here: --tiny runs a small model on a CPU")
    device, dtype = ("cpu", torch.float32) if given.tiny else ("cuda", torch.bfloat16)
    size = TINY if given.tiny else SIZES[given.model]
    if given.layers:
        size = size.with_layers((given.layers,))
    options = {"density": given.density, **(TINY_OPTIONS if given.tiny else {})}
    record: dict[str, Any] = {
        **provenance(), "model": "tiny" if given.tiny else given.model, "layers": given.layers,
        "density": given.density, "steps": given.steps, "rows": [],
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{record['model']}.json"
    for name in given.rows.split(","):
        neighbour = NEIGHBOURS[name]
        if device == "cpu" and neighbour.needs_gpu:
            print(f"{name}: left out, {neighbour.needs_gpu}", flush=True)
            continue
        try:
            row = stacked(size, neighbour, options, given.steps, device, dtype)
        except Exception as error:  # the other rows are worth having, and this one says why
            traceback.print_exc()
            row = {"title": neighbour.title, "error": f"{type(error).__name__}: {error}"}
        record["rows"].append({"name": name, **row})
        print(f"{name}: done", flush=True)
        path.write_text(json.dumps(record, indent=1))
    Console(width=140).print(Markdown(table(record)))


if __name__ == "__main__":
    main()
