"""`python -m benchmarks.readme`: write the generated tables of README.md from code and records.

`--check` only says whether the README is up to date (exit code 1 if it is not).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from svg_ear_compile.passes.site import Reason

ROOT = Path(__file__).parents[1]
ATTENTION = ROOT / "benchmarks" / "results" / "nvidia-h200" / "attention.json"


def reasons_table() -> str:
    """Every reason to leave a site dense."""
    rows = [f"| `{reason.value}` | {reason.sentence} |" for reason in Reason]
    return "\n".join(["| code | why the call stays as it was |", "|---|---|", *rows])


def attention_table(record: dict[str, Any]) -> str:
    """Measured rows of the attention benchmark; rows whose gate failed say so."""
    lines = [
        f"{record['gpu']}, torch {record['torch']}, Triton {record['triton']}, "
        f"commit {record['commit']}.",
        "",
        "| shape | clusters | form | density | dense ms | op ms | op over dense | attend, useful "
        "TFLOP/s (of dense) | rest, of dense | extra memory of Q+K+V+O | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        dense = statistics.median(row["dense_samples_ms"][row["dense_backend"]])
        name = f"| {row['shape']} | {row['clusters']} | {row['form']} | {row['density']:g} "
        if "samples_ms" not in row:
            lines.append(f"{name}| {dense:.1f} | gate failed ({row['gate']:.1e}) |||||||")
            continue
        lines.append(
            f"{name}| {dense:.1f} | {statistics.median(row['samples_ms']):.1f} "
            f"| {row['speedup']:.2f}x | {row['useful_tflops']:.0f} "
            f"({row['attend_over_dense_rate']:.2f}) | {row['rest_share']:.1%} "
            f"| {row['extra_memory']:.2f} | {row['error']:.3f} |"
        )
    return "\n".join(lines)


def fill(text: str, name: str, table: str) -> str:
    """Replace what stands between the README's markers of that name."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, count = marked.subn(lambda m: f"{m[1]}{table}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"README.md must have one pair of markers {name!r}, has {count}")
    return filled


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before, "reasons", reasons_table())
    after = fill(after, "attention", attention_table(json.loads(ATTENTION.read_text())))
    if given.check:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
