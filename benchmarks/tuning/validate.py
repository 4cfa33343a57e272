"""`python -m benchmarks.tuning.validate --record FILE --out FOLDER`: predicted and measured times.

Predicts every row of a record of `python -m benchmarks.attention` from a calibration of its
device: shapes, densities, forms and cluster counts that were not used to fit, on inputs of another
generator. Writes every row as JSON and the plot of predicted against measured milliseconds. Needs
no device.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.attention.inputs import plan_of
from benchmarks.attention.profile import SHORTEST
from benchmarks.attention.summary import dense_ms, rows_of
from svg_ear_compile import plots
from svg_ear_compile.cost_model import device_profile, latency
from svg_ear_compile.cost_model.calibration import Calibration, Sample, read
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.fit import Comparison, shape_of


def calibration_for(record: dict[str, Any]) -> Calibration:
    """That of the device of a record.

    Raises:
        ValueError: such a device was never calibrated.
    """
    versions = record["versions"]
    kind = "cuda" if record["cuda"] else "cpu"
    device = Device(kind, record["device"], versions["torch"], versions.get("triton", ""), "")
    found = device_profile.load(device)
    if found.origin == "prior":
        raise ValueError(f"no calibration of {device.name}: put one into cost_model/recorded")
    return found


def compared(record: dict[str, Any], calibration: Calibration) -> list[tuple[str, Comparison]]:
    """Shape and predicted times of every timed sparse row whose plan is not dense."""
    found = []
    for row in rows_of(record):
        if "samples_ms" not in row or row["form"] == "flex" or row["density"] >= 1:
            continue
        if record["cuda"] and row["size"][2] < SHORTEST:
            continue
        plan = plan_of(row["clusters"], row["form"], row["density"])
        batch, heads, tokens, head_dim = row["size"]
        q_clusters, k_clusters = plan.clusters(tokens - row["text"], tokens - row["text"])
        sample = Sample(
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            dtype="bfloat16" if record["cuda"] else "float32",
            density=row["density"],
            compensation=row["form"],
            q_clusters=q_clusters,
            k_clusters=k_clusters,
            dense_ms=dense_ms(row),
            op_ms=statistics.median(row["samples_ms"]),
            stages_ms=row.get("stages_ms", {}),
            fitted=False,
            batch=batch,
            text=row["text"],
        )
        shape = shape_of(sample)
        dense = latency.dense_ms(shape, calibration)
        op = latency.sparse_ms(shape, plan, calibration).total
        found.append((row["shape"], Comparison(sample, op, dense)))
        if "reused_samples_ms" in row:
            reused = statistics.median(row["reused_samples_ms"])
            sample = replace(sample, op_ms=reused, stages_ms=row.get("reused_stages_ms", {}))
            op = latency.sparse_ms(shape, plan, calibration, "reused").total
            found.append((f"{row['shape']}, reused", Comparison(sample, op, dense)))
    return found


def summary(found: list[Comparison]) -> dict[str, float]:
    """Median and worst relative error of whole calls and of dense attention."""
    op = [abs(c.op_error) for c in found]
    dense = [abs(c.dense_ms / c.sample.dense_ms - 1) for c in found]
    return {
        "op_median": statistics.median(op), "op_worst": max(op),
        "dense_median": statistics.median(dense), "dense_worst": max(dense),
    }  # fmt: skip


def main() -> None:
    """Compare and write; the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="of another machine, as `save` writes it")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    record = json.loads(given.record.read_text())
    known = (
        read(given.calibration, with_checksum=True)
        if given.calibration
        else calibration_for(record)
    )
    if known is None:
        parser.error(f"{given.calibration} does not exist")
    rows = compared(record, known)
    found = summary([c for _, c in rows])
    given.out.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {
        "device": record["device"],
        "commit": record["commit"],
        "calibration_seconds": known.seconds,
        "summary": found,
        "rows": [
            {
                "shape": name, "compensation": c.sample.compensation, "density": c.sample.density,
                "q_clusters": c.sample.q_clusters, "k_clusters": c.sample.k_clusters,
                "ms": c.sample.op_ms, "predicted_ms": c.op_ms,
                "dense_ms": c.sample.dense_ms, "predicted_dense_ms": c.dense_ms,
            }
            for name, c in rows
        ],
    }  # fmt: skip
    (given.out / "validate.json").write_text(json.dumps(written, separators=(",", ":")) + "\n")
    title = f"{known.device.name}, calibrated in {known.seconds:.0f} s"
    plots.times([c for _, c in rows], title, given.out / "validate.png")
    table = Table(title=f"Predicted / measured ms ({title})")
    for heading in ("shape", "clusters", "form", "density", "op", "error", "dense"):
        table.add_column(heading, justify="right")
    for name, c in rows:
        s = c.sample
        table.add_row(
            name, f"{s.q_clusters}/{s.k_clusters}", s.compensation, f"{s.density:g}",
            f"{c.op_ms:.1f} / {s.op_ms:.1f}", f"{c.op_error:+.1%}",
            f"{c.dense_ms:.1f} / {s.dense_ms:.1f}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    console.print({name: round(value, 4) for name, value in found.items()})


if __name__ == "__main__":
    main()
