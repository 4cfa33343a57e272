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

from benchmarks.attention.targets import (
    cold_ms,
    dense_ms,
    rows_of,
    taken_over_speedup,
    targets_table,
)
from benchmarks.fidelity.grid import OURS
from benchmarks.fidelity.record import read
from benchmarks.fidelity.report import readme_table
from benchmarks.fidelity.times import WAN
from svg_ear_compile.passes.patterns import PRODUCTS, STEPS
from svg_ear_compile.passes.site import Reason

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION = RESULTS / "nvidia-h200" / "attention.json"
END_TO_END = RESULTS / "nvidia-h200" / "end_to_end"
FIDELITY = RESULTS / "nvidia-h200" / "fidelity"
COMPILE_TIME = RESULTS / "cpu" / "compile_time" / "compile_time.json"
ZOO = ROOT / "tests" / "zoo" / "sites.json"


def reasons_table() -> str:
    """Every reason to leave a site dense."""
    rows = [f"| `{reason.value}` | {reason.sentence} |" for reason in Reason]
    return "\n".join(["| code | why the call stays as it was |", "|---|---|", *rows])


def models_table(zoo: dict[str, Any]) -> str:
    """What goes sparse and what is left in every family of the zoo, by the zoo's own table."""
    lines = [
        "| model | goes sparse | left as it is |",
        "|---|---|---|",
    ]
    for name, found in zoo.items():
        sparse: dict[str, None] = {}
        left: dict[str, None] = {}
        for _, layer, role, text, what in found["sites"]:
            short = ".".join(layer.split(".")[-2:]).replace("*.", "").replace("*", "N")
            if what.startswith("sparse"):
                side = "" if text == [0, 0] else ", text first" if text[0] else ", text last"
                when = re.sub(r"^sparse( from \d+ video tokens on)?,?", "", what)
                sparse[f"`{short}` ({role}{side}{when})"] = None
            else:
                left[f"`{short}` ({role}: `{what}`)"] = None
        cells = (", ".join(part) or "nothing" for part in (sparse, left))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def patterns_list() -> str:
    """Every pattern of hand-written attention that the pass reads."""
    products, steps = ("; ".join(s.name for s in part) for part in (PRODUCTS, STEPS))
    return f"Products: {products}. Steps between them: {steps}."


def compile_time_table(record: dict[str, Any]) -> str:
    """Seconds of our passes and of Inductor, by depth."""
    lines = [
        f"{_where(record)}, {record['threads']} threads.",
        "",
        "| layers of Wan | nodes | passes, s | Inductor, s | share |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        median = statistics.median(row["passes_seconds"])
        inductor = row["inductor_seconds"]
        lines.append(
            f"| {row['layers']} | {row['nodes']} | {median:.3f} | {inductor:.1f} "
            f"| {median / inductor:.2%} |"
        )
    return "\n".join(lines)


NOT_MEASURED = (
    "No run of this state on a GPU is recorded yet, so there are no figures here: "
    "`python -m benchmarks.attention --out benchmarks/results/nvidia-h200` makes them, and "
    "`python -m benchmarks.readme` this table."
)


def attention_table(record: dict[str, Any]) -> str:
    """Measured rows of the attention benchmark; rows whose gate failed say so."""
    lines = [
        f"{_where(record)}. Matrix product {record['roofs']['tflops']:.0f} TFLOP/s, copy "
        f"{record['roofs']['gb_per_second']:.0f} GB/s.",
        "",
        targets_table(record),
        "",
        "| shape (B × H × N × D) | clusters (mean sizes) | form | density | dense ms | op ms "
        "| op over dense, warm | attend, useful TFLOP/s (of dense) "
        "| rest, of dense | extra memory of Q+K+V+O | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(record):
        dense = dense_ms(row)
        clusters = row["clusters"]
        if "q_sizes" in row:
            clusters += f" ({row['q_sizes'][0]:.0f} / {row['k_sizes'][0]:.0f})"
        shape = f"{row['shape']} ({' × '.join(map(str, row['size']))})"
        cells = [shape, clusters, row["form"], f"{row['density']:g}", f"{dense:.1f}"]
        if "samples_ms" not in row:
            cells += [f"gate failed ({row['gate']:.1e})", *[""] * 5]
        else:
            rest = rate = memory = ""
            if "stages_ms" in row:
                rate = f"{row['useful_tflops']:.0f} ({row['attend_over_dense_rate']:.2f})"
                rest, memory = f"{row['rest_share']:.1%}", f"{row['extra_memory']:.2f}"
            elif "useful_tflops" in row:
                rate = f"{row['useful_tflops']:.0f}"
            ms = statistics.median(row["samples_ms"])
            others = []
            if "taken_over_samples_ms" in row:
                others.append(f"blocks taken over {taken_over_speedup(row):.2f}x")
            if "cold_samples_ms" in row:
                others.append(f"cold {dense / cold_ms(row):.2f}x")
            speedups = f"{row['speedup']:.2f}x" + (f" ({', '.join(others)})" if others else "")
            cells += [f"{ms:.1f}", speedups, rate, rest, memory]
            cells.append(f"{row['error']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def end_to_end_table(records: list[dict[str, Any]]) -> str:
    """Forwards through the whole model, dense and sparse."""
    where = dict.fromkeys(map(_where, records))
    lines = [
        f"{'; '.join(where)}. Random weights.",
        "",
        "| model | layers | backend | density | s a forward | speed-up | first call, s "
        "| peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        dense = statistics.median(record["rows"][0]["samples_seconds"])
        for row in record["rows"]:
            seconds = statistics.median(row["samples_seconds"])
            cells = [
                row["model"], row["layers"] or "all", row["backend"],
                str(row["options"].get("density", "dense")), f"{seconds:.3f}",
                f"{dense / seconds:.2f}x", f"{row['first_seconds']:.0f}",
                f"{row['peak_bytes'] / 2**30:.1f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def generation_table(records: list[dict[str, Any]]) -> str:
    """Whole sampling loops, dense and sparse."""
    where = dict.fromkeys(map(_where, records))
    lines = [
        f"{'; '.join(where)}. Random weights.",
        "",
        "| model | backend | density | denoising steps (dense ones) | blocks taken over "
        "| s a generation | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        dense = record["rows"][0]["seconds"]
        for row in record["rows"]:
            shares = row.get("taken_over")
            cells = [
                row["model"], row["backend"], str(row["options"].get("density", "dense")),
                f"{row['steps']} ({row['dense_steps']})",
                f"{statistics.fmean(shares):.0%} of sparse calls" if shares else "",
                f"{row['seconds']:.1f}",
                f"{dense / row['seconds']:.2f}x",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


FIDELITY_NOT_MEASURED = (
    "No run of this state on a GPU is recorded yet: `python -m benchmarks.fidelity --out "
    "benchmarks/results/nvidia-h200/fidelity` measures it, and `python -m benchmarks.readme` makes "
    "this table."
)


def fidelity_section(folder: Path) -> str:
    """The frontier's plot and the table of what was asked and measured."""
    evidence = read(folder)
    plot = (folder / "frontier.png").relative_to(ROOT)
    where = " and ".join(dict.fromkeys(_where(m) for m in evidence.models.values()))
    times = f"; times: {_where(evidence.times)}" if evidence.times else ""
    return (
        f"Clips: {where}{times}.\n\n"
        f"![Fidelity against time and density, one curve per rule]({plot})\n\n"
        f"{readme_table(evidence)}"
        + (f"\n\n{shared_calls_table(evidence.times)}" if evidence.times else "")
    )


def shared_calls_table(times: dict[str, Any]) -> str:
    """What calls of the default take at Wan's shape, and those that take their blocks over."""
    rows = [row for row in times["rows"] if (row["shape"], row["rule"]) == (WAN, OURS)]
    lines = [
        f"The operator at {WAN}, by default:",
        "",
        "| density | tokens of a query cluster | dense ms | blocks made anew, ms "
        "| taken over, ms |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        dense, made, later = row["dense_ms"], row["ms"], row["taken_over_ms"]
        lines.append(
            f"| {row['density']:g} | {row['queries']} | {dense:.1f} | {made:.1f} "
            f"({dense / made:.2f}x) | {later:.1f} ({dense / later:.2f}x) |"
        )
    return "\n".join(lines)


def _where(record: dict[str, Any]) -> str:
    versions = record["versions"]
    triton = f", Triton {versions['triton']}" if record["cuda"] else ""
    return f"{record['device']}, torch {versions['torch']}{triton}, commit {record['commit']}"


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
    measured = ATTENTION.exists()
    tables = {
        "reasons": reasons_table(),
        "models": models_table(json.loads(ZOO.read_text())),
        "patterns": patterns_list(),
        "attention": attention_table(json.loads(ATTENTION.read_text()))
        if measured
        else NOT_MEASURED,
        "end-to-end": end_to_end_table(
            [json.loads(path.read_text()) for path in sorted(END_TO_END.glob("forward-*.json"))]
        ),
        "generation": generation_table(
            [json.loads(path.read_text()) for path in sorted(END_TO_END.glob("generation-*.json"))]
        ),
        "fidelity": fidelity_section(FIDELITY) if FIDELITY.exists() else FIDELITY_NOT_MEASURED,
        "compile-time": compile_time_table(json.loads(COMPILE_TIME.read_text())),
    }
    after = before
    for name, table in tables.items():
        after = fill(after, name, table)
    if given.check:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
