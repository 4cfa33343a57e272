"""`python -m benchmarks.compile_time --out DIR`: time of our passes beside Inductor's.

Compiles diffusers' Wan with random weights and ever more layers. Widths are tiny and every other
number is the real model's, so the graph has the nodes of the real one and little else to do. Each
depth starts with empty compile caches; the passes are timed on copies of the graph that Inductor
then gets. Writes the raw samples as JSON, and a plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_inductor_cache
from torch.fx import GraphModule

from benchmarks.provenance import provenance
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

REPEATS = 7


def measure(layers: int) -> dict[str, Any]:
    """Seconds of the passes (raw samples) and of Inductor for one depth."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    torch._dynamo.reset()
    model = WanTransformer3DModel(
        num_layers=layers, num_attention_heads=2, attention_head_dim=32, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    settings = Settings.parse({"min_tokens": 64})
    row: dict[str, Any] = {"layers": layers}

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        samples = []
        for _ in range(REPEATS):
            graph = copy.deepcopy(gm)
            started = time.perf_counter()
            report = rewrite_graph(graph, settings)
            samples.append(time.perf_counter() - started)
        assert report.rewritten == layers
        started = time.perf_counter()
        compiled = compile_fx(gm, example_inputs)
        inductor = time.perf_counter() - started
        row.update(nodes=len(gm.graph.nodes), passes_seconds=samples, inductor_seconds=inductor)
        return compiled

    inputs = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 9, 16))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, fresh_inductor_cache(dir=folder):
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Passes and Inductor over the number of nodes, with the line that linear growth would be."""
    from matplotlib.figure import Figure

    nodes = [row["nodes"] for row in rows]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    passes = [statistics.median(row["passes_seconds"]) for row in rows]
    for seconds, name in (([r["inductor_seconds"] for r in rows], "Inductor"), (passes, "passes")):
        axis.loglog(nodes, seconds, marker="o", label=name)
        axis.loglog(nodes, [seconds[0] * n / nodes[0] for n in nodes], ":", color="gray", lw=1)
    axis.plot([], [], ":", color="gray", lw=1, label="linear")
    axis.set(xlabel="nodes of the Dynamo graph", ylabel="seconds", title="Compiling Wan, CPU")
    axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, measure, print, write `compile_time.json` and `.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="5,10,20,40")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/compile_time"))
    given = parser.parse_args()
    rows = [measure(int(layers)) for layers in given.layers.split(",")]
    record = {**provenance(), "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compile_time.json").write_text(json.dumps(record, indent=1))
    plot(rows, given.out / "compile_time.png")
    table = Table(title="Seconds of compiling")
    for column in ("layers", "nodes", "passes, median (min … max)", "Inductor", "fraction"):
        table.add_column(column, justify="right")
    for row in rows:
        samples = row["passes_seconds"]
        median = statistics.median(samples)
        spread = f"{median:.3f} ({min(samples):.3f} … {max(samples):.3f})"
        inductor = row["inductor_seconds"]
        cells = (row["layers"], row["nodes"], spread, f"{inductor:.1f}", f"{median / inductor:.2%}")
        table.add_row(*map(str, cells))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
