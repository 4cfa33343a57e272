"""`python -m benchmarks.attention.profile --out FILE`: the recorded device profile of an H200.

A calibration keeps within half a minute and within 98,304 tokens. The attention record has what it
lacks: calls of up to 300,000 tokens, and of many heads. So the profile that the package ships is
fitted to that record; a calibration gives roofs of other dtypes and the host's time. Two models,
all cold and reused calls and other numbers of clusters test it in `test_recorded.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.attention.inputs import plan_of
from benchmarks.attention.summary import dense_ms
from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.calibration import Calibration, Sample
from svg_ear_compile.cost_model.fit import fit
from svg_ear_compile.cost_model.latency import Start
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.kernels.plan import AttentionPlan

RESULTS = Path(__file__).parents[1] / "results" / "nvidia-h200"
UNCERTAINTY = 0.15
"""No call of the record is promised so much more speed-up with cold clusters than it had: at most
14 % (24 heads x 16,384)."""

HELD_OUT = ("hunyuan-720p", "minimax-h3")
SHORTEST = 8192
"""Tokens below which a call takes the host's time."""
_SAMPLES = {"cold": "cold_samples_ms", "warm": "samples_ms", "reused": "reused_samples_ms"}


class Measured(NamedTuple):
    """A row of the attention record: one sparse call, recomputed, reused and cold."""

    name: str
    shape: AttentionShape
    plan: AttentionPlan
    dense_ms: float
    call_ms: dict[Start, float]
    stages_ms: dict[str, float]
    by_default: bool


def calls_of(record: dict[str, Any]) -> Iterator[Measured]:
    """Sparse calls of an attention record that are no shorter than `SHORTEST`."""
    for row in record["rows"]:
        batch, heads, tokens, dim = row["size"]
        if "cold_samples_ms" not in row or tokens < SHORTEST or row["density"] == 1.0:
            continue
        stages = dict(row["stages_ms"])
        cluster = sum(stages.pop(part) for part in ("assign", "means", "sort"))
        yield Measured(
            row["shape"],
            AttentionShape(batch, heads, heads, tokens, tokens, dim, "bfloat16", row["text"]),
            plan_of(row["clusters"], row["form"], row["density"]),
            dense_ms(row),
            {start: statistics.median(row[name]) for start, name in _SAMPLES.items()},
            {"cluster": cluster, **stages},
            row["clusters"] == "default",
        )


def profile_of(record: dict[str, Any], calibration: Calibration) -> Calibration:
    """The profile of the device of an attention record.

    Args:
        record: `attention.json`.
        calibration: of a device of that name, for what the record does not measure.
    """
    samples = tuple(_sample(row) for row in calls_of(record) if row.by_default)
    measured = record["roofs"]
    flops = calibration.roofs.flops | {"bfloat16": measured["tflops"]}
    roofs = replace(calibration.roofs, flops=flops, bandwidth=measured["gb_per_second"])
    return replace(
        calibration,
        roofs=roofs,
        stages=fit(samples, roofs, calibration.device),
        seconds=record["seconds"],
        samples=samples,
        uncertainty=UNCERTAINTY,
    )


def _sample(row: Measured) -> Sample:
    shape, plan = row.shape, row.plan
    return Sample(
        shape.q_tokens, shape.heads, shape.head_dim, shape.dtype, plan.density, plan.compensation,
        *plan.clusters(*shape.clustered), row.dense_ms, row.call_ms["warm"], row.stages_ms,
        row.name not in HELD_OUT, shape.batch, shape.text,
    )  # fmt: skip


def main() -> None:
    """Write the profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=RESULTS / "attention.json")
    parser.add_argument("--calibration", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    record = json.loads(given.record.read_text())
    found = profile_of(record, json_record.read(Calibration, given.calibration))
    json_record.write(given.out, found)


if __name__ == "__main__":
    main()
