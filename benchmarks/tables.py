"""`python -m benchmarks.tables`: write the tables of README.md and docs/ from code and records.

A table stands between the markers ``<!-- name -->`` and ``<!-- /name -->`` of exactly one page.
`--check` only says whether all pages are up to date (exit code 1 if one is not).

Longer than 400 lines: it is one list of tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.attention import cache, chunks, heads, launches, likeness
from benchmarks.attention.summary import (
    Row,
    cold_ms,
    dense_ms,
    is_default,
    reused_speedup,
    rows_of,
    summary_table,
)
from benchmarks.context_parallel import report, ring_error
from benchmarks.end_to_end.report import forward_seconds, forward_table, generation_table
from benchmarks.fidelity import schedules
from benchmarks.fidelity.frontier import Point
from benchmarks.fidelity.grid import OURS, PAPER, RIVALS, WARM_UPS
from benchmarks.fidelity.record import read
from benchmarks.fidelity.report import markdown_table, paired_table, rivals_summary, rivals_table
from benchmarks.fidelity.rules import RULES
from benchmarks.fidelity.sol import BLOCK
from benchmarks.fidelity.times import WAN
from benchmarks.priors import gpus_table, long_lists_table, long_sequences_table
from benchmarks.provenance import where
from benchmarks.stacking import report as stacking
from svg_ear_compile.passes.patterns import PRODUCTS, STEPS
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.summary import CURES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION = RESULTS / "nvidia-h200" / "attention.json"
END_TO_END = RESULTS / "nvidia-h200" / "end_to_end"
FIDELITY = RESULTS / "nvidia-h200" / "fidelity"
TIMES = FIDELITY / "times.json"
HEADS = RESULTS / "nvidia-h200" / "heads.json"
CACHE = RESULTS / "nvidia-h200" / "cache.json"
CHUNKS = RESULTS / "nvidia-h200" / "chunks.json"
LAUNCHES = RESULTS / "nvidia-h200" / "launches.txt"
COMPILE_TIME = RESULTS / "cpu" / "compile_time" / "compile_time.json"
ZOO = ROOT / "tests" / "zoo" / "sites.json"

Record = dict[str, Any]
Table = Callable[[Path], str]
"""Makes the Markdown of a table for a page of the folder, to which pictures are relative."""

_MARKED = re.compile(
    r"^<!-- (?P<name>[a-z-]+) -->\n(?P<table>.*?)^<!-- /(?P=name) -->$", re.DOTALL | re.MULTILINE
)
# Shapes that the README names: title, name in the records.
_MODELS = {
    "Wan 2.1 14B, 720p": "wan14b-720p",
    "HunyuanVideo, 720p": "hunyuan-720p",
    "Wan 2.1 1.3B, 480p": "wan1.3b-480p",
    "CogVideoX 5B": "cogvideox-5b",
}
_README_DENSITY = 0.2
_SOL = "kitchen_top_k_cubes"
_BESIDE = ((OURS, 0.2), (OURS, 0.1), (_SOL, 0.2), (_SOL, 0.1), (PAPER, 0.2))  # README's pictures
_TRAINED = {
    "self": "PSNR, video alone",
    "joint": "PSNR, text and video in one attention",
    "third": "PSNR, films",
}
_CLUSTERS = (256, 64)  # mean tokens of a query and of a key cluster, by default at Wan's shape


def reasons_table() -> str:
    """Every reason to leave a site dense, and what a user can do about it."""
    rows = [f"| `{r.value}` | {r.sentence} | {CURES.get(r, '')} |" for r in Reason]
    return "\n".join(["| code | why the call stays as it was | cure |", "|---|---|---|", *rows])


def models_table(zoo: dict[str, Any]) -> str:
    """What goes sparse and what is left in every family of the zoo, by the zoo's own table."""
    lines = [
        "| model | goes sparse | left as it is |",
        "|---|---|---|",
    ]
    for name, found in zoo.items():
        sparse: dict[str, None] = {}
        left: dict[str, None] = {}
        for _, layer, role, places, what in found["sites"]:
            short = ".".join(layer.split(".")[-2:]).replace("*.", "").replace("*", "N")
            if what.startswith("sparse"):
                side = f", exact: {places}" if places else ""
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


def compile_time_table(record: Record) -> str:
    """Seconds of our passes and of Inductor, by depth."""
    lines = [
        f"{where([record])}, {record['threads']} threads.",
        "",
        "| layers of Wan | nodes | passes, s | Inductor, s | passes over Inductor |",
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


def attention_table(record: Record) -> str:
    """Rows of the attention benchmark with default plans."""
    roofs, rows = record["roofs"], [row for row in rows_of(record) if is_default(row)]
    return "\n\n".join(
        [
            f"{where([record])}. Matrix product {roofs['tflops']:.0f} TFLOP/s, copy "
            f"{roofs['gb_per_second']:.0f} GB/s.",
            _attention_rows(rows),
        ]
    )


def other_attention_table(record: Record) -> str:
    """The summary at the paper's clusters, and the rows of other plans and of FlexAttention."""
    rows = [row for row in rows_of(record) if not is_default(row)]
    parts = f"{where([record])}.", summary_table(record), _attention_rows(rows, "clusters", "form")
    return "\n\n".join(parts)


def _attention_rows(rows: Sequence[Row], *named: str) -> str:
    """Measured rows with these of their attributes; rows whose gate failed say so.

    Args:
        rows: of an attention record.
        named: attributes in which they differ, beside shape and density.
    """
    headings = (
        "shape", "B×H×N×D", *named, "density", "ms, dense → recomputed", "recomputed", "reused",
        "cold", "attend's rate", "other stages", "extra memory", "error",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows:
        dense = dense_ms(row)
        size = "×".join(map(str, row["size"]))
        cells = [row["shape"], size, *(row[name] for name in named), f"{row['density']:g}"]
        if "samples_ms" in row:
            ms = statistics.median(row["samples_ms"])
            cells += [f"{dense:.1f} → {ms:.1f}", f"{row['speedup']:.2f}x"]
            cells.append(f"{reused_speedup(row):.2f}x" if "reused_samples_ms" in row else "")
            cells.append(f"{dense / cold_ms(row):.2f}x" if "cold_samples_ms" in row else "")
            staged = "stages_ms" in row
            cells.append(f"{row['attend_over_dense_rate']:.2f}" if staged else "")
            cells.append(f"{row['other_stages_over_dense']:.1%}" if staged else "")
            cells += [f"{row['extra_memory']:.2f}" if staged else "", f"{row['error']:.3f}"]
        else:
            cells += [f"{dense:.1f}, gate failed ({row['gate']:.1e})", *[""] * 7]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fidelity_section(records: Path, folder: Path) -> str:
    """The frontier's plot, what was derived from its points, and times at Wan's shape.

    Args:
        records: folder of the fidelity bench.
        folder: of the page.
    """
    evidence = read(records)
    parts = [f"Clips: {where(list(evidence.models.values()))}"]
    if evidence.times:
        parts[0] += f"; times: {where([evidence.times])}"
    parts[0] += "."
    plot = os.path.relpath(records / "frontier.png", folder)
    parts.append(f"![Fidelity against time and density, one curve per rule]({plot})")
    parts.append(markdown_table(evidence))
    if evidence.times:
        parts.append(operator_table(evidence.times))
    return "\n\n".join(parts)


def densities_table(records: Path) -> str:
    """What the default costs and how close it stays at some densities, by the fidelity bench."""
    evidence = read(records)
    assert evidence.times is not None, "the table needs the operator's times"
    psnr = {
        (point.cell.model, point.cell.density): f"{point.mean_psnr:.1f} dB"
        for point in evidence.points
        if (point.cell.rule, point.cell.queries, point.cell.keys) == (OURS, *_CLUSTERS)
        and point.cell.warm_up == WARM_UPS[0]
    }
    tokens = {name: record["model"]["tokens"] for name, record in evidence.models.items()}
    # Guidance moves pictures by decibels: without it a figure contradicts that of another table.
    (asked,) = {
        (record["settings"]["steps"], record["settings"]["guidance"])
        for record in evidence.models.values()
    }
    lines = [
        f"Attention at {WAN} beside the fastest dense one ({where([evidence.times])}); PSNR "
        f"to dense of {len(tokens)} small video models, {asked[0]} steps, guidance {asked[1]:g}, "
        f"{WARM_UPS[0]:.0%} of the steps dense ({where(list(evidence.models.values()))}).",
        "",
        "| density | attention, recomputed | attention, reused "
        f"| {' | '.join(f'PSNR, {name}, {tokens[name]:,} tokens' for name in tokens)} |",
        f"|---|---|---|{'---|' * len(evidence.models)}",
    ]
    for row in evidence.times["rows"]:
        if (row["shape"], row["rule"], row["queries"]) == (WAN, OURS, _CLUSTERS[0]):
            speedups = [f"{row['dense_ms'] / row[ms]:.1f}x" for ms in ("ms", "reused_ms")]
            found = [psnr.get((name, row["density"]), "") for name in evidence.models]
            lines.append(f"| {row['density']:g} | {' | '.join([*speedups, *found])} |")
    return "\n".join(lines)


def operator_table(times: Record) -> str:
    """What calls of the default take at Wan's shape, recomputed and reused."""
    rows = [row for row in times["rows"] if (row["shape"], row["rule"]) == (WAN, OURS)]
    lines = [
        f"The operator at {WAN}, by default:",
        "",
        "| density | tokens of a query cluster | dense ms | recomputed ms | reused ms |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        dense, recomputed, reused = row["dense_ms"], row["ms"], row["reused_ms"]
        lines.append(
            f"| {row['density']:g} | {row['queries']} | {dense:.1f} | {recomputed:.1f} "
            f"({dense / recomputed:.2f}x) | {reused:.1f} ({dense / reused:.2f}x) |"
        )
    return "\n".join(lines)


def pictures_table(records: Path) -> str:
    """The default beside a rival and the published rule: time of attention, and picture."""
    evidence = read(records, TIMES)
    assert evidence.times is not None, "the table needs the operator's times"
    names = [name for name in evidence.models if name in _TRAINED]
    lines = [
        f"| attention | ms a call at {WAN} | {' | '.join(_TRAINED[name] for name in names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    dense = next(row["dense_ms"] for row in evidence.times["rows"] if row["shape"] == WAN)
    lines.append(f"| dense | {dense:.0f} |{' |' * len(names)}")
    for rule, density in _BESIDE:
        found: dict[str, Point] = {}
        for point in evidence.points:
            cell = point.cell
            asked = (cell.rule, cell.density, cell.warm_up) == (rule, density, WARM_UPS[0])
            # The default's clusters at Wan's shape, for rules that have clusters.
            tokens = (BLOCK, BLOCK) if rule in RIVALS else _CLUSTERS
            if asked and (cell.queries, cell.keys) == tokens:
                found[cell.model] = point
        ms = next((p.ms[WAN] for p in found.values() if WAN in p.ms), None)
        pictures = [f"{found[n].mean_psnr:.1f} dB" if n in found else "" for n in names]
        cells = [f"{RULES[rule].title}, {density:g}", "" if ms is None else f"{ms:.0f}", *pictures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def expectations_table(
    attention: Record, forwards: Sequence[Record], generations: Sequence[Record]
) -> str:
    """What a stranger may expect: dense and sparse times of some models at one density."""
    lines = [
        f"{attention['device']}, density {_README_DENSITY:g}, everything but attention by "
        "Inductor in both.",
        "",
        "| model | tokens | one attention | one forward | its peak memory | one generation |",
        "|---|---|---|---|---|---|",
    ]
    if {r["device"] for r in (*forwards, *generations)} != {attention["device"]}:
        raise ValueError("the records of this table are of several devices")
    calls = {
        row["shape"]: row
        for row in rows_of(attention)
        if is_default(row) and row["density"] == _README_DENSITY and "samples_ms" in row
    }
    forward = _pairs(forwards, forward_seconds)
    peaks = _pairs(forwards, lambda row: row["peak_bytes"] / 2**30)
    generation = _pairs(generations, lambda row: float(row["seconds"]))
    for title, shape in _MODELS.items():
        call = calls[shape]
        pairs = [
            _pair((dense_ms(call), statistics.median(call["samples_ms"])), "ms", 1),
            _pair(forward.get(shape), "s", 2),
            "{:.1f} → {:.1f} GiB".format(*peaks[shape]) if shape in peaks else "",
            _pair(generation.get(shape), "s", 1),
        ]
        lines.append(f"| {title} | {call['size'][2]:,} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def _pairs(
    records: Sequence[Record], seconds: Callable[[Record], float]
) -> dict[str, tuple[float, float]]:
    """Dense and sparse seconds by model, sparse ones at the README's density, few steps dense."""
    found = {}
    for record in records:
        dense, *sparse = record["rows"]
        asked = [row for row in sparse if row["options"]["density"] == _README_DENSITY]
        chosen = min(asked, key=lambda row: row.get("dense_steps", 0))
        found[dense["model"]] = (seconds(dense), seconds(chosen))
    return found


def _pair(times: tuple[float, float] | None, unit: str, digits: int) -> str:
    if times is None:
        return ""
    dense, sparse = times
    return f"{dense:.{digits}f} → {sparse:.{digits}f} {unit} (**{dense / sparse:.1f}x**)"


def tables() -> dict[str, Table]:
    """Every generated table by the name of its markers."""
    attention, compile_time, zoo = (
        json.loads(path.read_text()) for path in (ATTENTION, COMPILE_TIME, ZOO)
    )
    forwards, generations = (
        [json.loads(path.read_text()) for path in sorted(END_TO_END.glob(f"{kind}-*.json"))]
        for kind in ("forward", "generation")
    )
    times = json.loads(TIMES.read_text())
    pictures = [read(folder, TIMES) for folder in (FIDELITY, FIDELITY / "guidance-5")]
    return {
        "expectations": lambda folder: expectations_table(attention, forwards, generations),
        "reasons": lambda folder: reasons_table(),
        "models": lambda folder: models_table(zoo),
        "patterns": lambda folder: patterns_list(),
        "gpus": lambda folder: gpus_table(),
        "long-sequences": lambda folder: long_sequences_table(),
        "long-lists": lambda folder: long_lists_table(),
        "attention": lambda folder: attention_table(attention),
        "attention-others": lambda folder: other_attention_table(attention),
        "end-to-end": lambda folder: forward_table(forwards),
        "generation": lambda folder: generation_table(generations),
        "pictures": lambda folder: pictures_table(FIDELITY / "guidance-5"),
        "densities": lambda folder: densities_table(FIDELITY),
        "schedules": lambda folder: schedules.section(FIDELITY / "schedules"),
        "heads": lambda folder: heads.table(json.loads(HEADS.read_text())),
        "cache": lambda folder: cache.table(json.loads(CACHE.read_text())),
        "chunks": lambda folder: chunks.table(json.loads(CHUNKS.read_text())),
        "likeness": lambda folder: likeness.table(RESULTS / "cpu" / "likeness"),
        "launches": lambda folder: launches.table(LAUNCHES.read_text()),
        "stacking": lambda folder: stacking.section(RESULTS / "nvidia-h200" / "stacking"),
        "fidelity": lambda folder: fidelity_section(FIDELITY, folder),
        "paired": lambda folder: paired_table(pictures),
        "rivals": lambda folder: rivals_table(pictures, times),
        "rivals-summary": lambda folder: rivals_summary(pictures, times),
        "context-parallel": lambda folder: report.section(RESULTS / "nvidia-h200", folder),
        "ring-error": lambda folder: ring_error.section(RESULTS / "cpu" / "ring"),
        "compile-time": lambda folder: compile_time_table(compile_time),
    }


def fill(pages: Mapping[Path, str], made: Mapping[str, Table]) -> dict[Path, str]:
    """The pages with what the tables make between their markers.

    Raises:
        ValueError: a page has markers of a name that no table has, or a table has none or several
            pairs of markers in all pages together.
    """
    placed: list[str] = []

    def page(path: Path, text: str) -> str:
        def table(marked: re.Match[str]) -> str:
            name = marked["name"]
            if name not in made:
                raise ValueError(f"no table is called {name!r}, there are {', '.join(made)}")
            placed.append(name)
            return f"<!-- {name} -->\n{made[name](path.parent)}\n<!-- /{name} -->"

        return _MARKED.sub(table, text)

    filled = {path: page(path, text) for path, text in pages.items()}
    for name in made:
        if (count := placed.count(name)) != 1:
            raise ValueError(f"the pages must have one pair of markers {name!r}, have {count}")
    return filled


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    before = {path: path.read_text() for path in paths}
    after = fill(before, tables())
    stale = [path for path in paths if after[path] != before[path]]
    if given.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not up to date: run python -m benchmarks.tables")
        return int(bool(stale))
    for path in stale:
        path.write_text(after[path])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
