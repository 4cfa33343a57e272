"""Tables of a record: every cell, and the figures that are derived from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.fidelity.frontier import Point, beside_rivals, derived, gain_of
from benchmarks.fidelity.grid import CLUSTERS, DENSITIES, OURS, PAPER, RIVALS, WARM_UPS, Cell
from benchmarks.fidelity.record import Evidence
from benchmarks.fidelity.rules import RULES
from benchmarks.fidelity.scores import interval
from benchmarks.fidelity.times import SHORTER, WAN
from benchmarks.provenance import where


def cells_table(evidence: Evidence) -> Table:
    """Every point with its intervals, and its time at the first shape."""
    table = Table(title="Against the dense clips, raw frames (± 95 % over seeds)")
    for heading in ("model", "rule", "budget", "clusters", "warm-up", "PSNR dB", "SSIM", "flicker",
                    "attention error", "op ms"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("model", "rule") else "right")
    for point in sorted(evidence.points, key=lambda p: p.cell):
        cell = point.cell
        ms = point.ms.get(evidence.shape)
        table.add_row(
            cell.model, RULES[cell.rule].title, cell.budget, f"{cell.queries}/{cell.keys}",
            f"{cell.warm_up:.0%}", str(interval(point.psnr)),
            f"{interval(point.ssim).mean:.4f}", f"{interval(point.flicker).mean:.4f}",
            f"{point.attention_error:.3f}", "" if ms is None else f"{ms:.1f}",
        )  # fmt: skip
    return table


def derived_rows(found: dict[str, Any], shape: str) -> list[tuple[str, str]]:
    """One model's derived figures (see `frontier.derived`), each with its name before it."""
    rows = []
    by_clusters: dict[tuple[int, int], dict[float, dict[str, Any]]] = {}
    for row in found["equal_density"]:
        by_clusters.setdefault((row["queries"], row["keys"]), {})[row["density"]] = row
    for (queries, keys), by_density in sorted(by_clusters.items()):
        chosen = [by_density.get(density) for density in DENSITIES]

        def joined(form: Any, chosen: list[dict[str, Any] | None] = chosen) -> str:
            return " / ".join("-" if row is None else form(row) for row in chosen)

        each = f"densities {' / '.join(map(str, DENSITIES))}, {queries}/{keys} tokens a cluster"
        rows += [
            (f"PSNR over the paper's, {each}",
             joined(lambda r: f"{'+' if r['gain']['mean'] >= 0 else ''}{gain_of(r)}") + " dB"),
            (f"attention error over the paper's, {each}",
             joined(lambda r: f"{r['error_ratio']:.2f}x")),
            (f"density SVG2 needs at equal PSNR, over ours, {each}",
             joined(lambda r: _bounded(r["svg2_density"], ".1f"))),
        ]  # fmt: skip
    gains = found["equal_time"].get(shape, [])
    texts = [
        f"{'-' if g['gain'] is None else format(g['gain'], '+.1f')} at {g['ms']:.1f} ms"
        for g in gains
    ]
    ratio = found["time_ratio"].get(shape)
    rows += [
        (f"PSNR over the paper's at equal operator time ({shape})",
         ", ".join(texts) or "not measured"),
        (f"operator time at the paper's PSNR at density 0.2, over the paper's ({shape})",
         _bounded(ratio, ".2f")),
    ]  # fmt: skip
    return rows


def _bounded(ratio: Sequence[Any] | None, form: str) -> str:
    """A ratio with its bound, as `frontier.derived` gives them."""
    if ratio is None:
        return "not measured"
    value, bound = ratio
    return f"{bound} {value:{form}}x".strip()


def _derived_by_model(evidence: Evidence) -> dict[str, list[tuple[str, str]]]:
    points = {m: [p for p in evidence.points if p.cell.model == m] for m in evidence.models}
    return {
        model: derived_rows(derived(of, evidence.shapes), evidence.shape)
        for model, of in points.items()
    }


def derived_table(evidence: Evidence) -> Table:
    """`derived_rows` of every model, for a terminal."""
    table = Table(title="Gaussian compensation beside the paper's rule and SVG2")
    for heading in ("model", "", "measured"):
        table.add_column(heading)
    for model, rows in _derived_by_model(evidence).items():
        for row in rows:
            table.add_row(model, *row)
        table.add_section()
    return table


def markdown_table(evidence: Evidence) -> str:
    """`derived_rows` of every model as Markdown, after what was run."""
    lines = ["| model | | measured |", "|---|---|---|"]
    for model, rows in _derived_by_model(evidence).items():
        name = f"{model}, {evidence.models[model]['model']['tokens']:,} tokens"
        lines += [f"| {name} | {' | '.join(row)} |" for row in rows]
    models = evidence.models.values()
    scores = [m["model"]["ceiling"]["psnr"] for m in models]
    ceilings = ", ".join(f"{interval(psnr).mean:.1f} dB" for psnr in scores)
    seeds = ", ".join(str(len(psnr)) for psnr in scores)
    steps = " and ".join(dict.fromkeys(str(m["settings"]["steps"]) for m in models))
    return "\n".join(
        [
            f"{len(evidence.points)} points, {seeds} seeds, {steps} denoising steps. "
            f"Dense against dense on another backend: {ceilings}.",
            "",
            *lines,
        ]
    )


def paired_table(evidences: Sequence[Evidence]) -> str:
    """The default beside the paper's rule, seed by seed, as Markdown.

    Args:
        evidences: each of one guidance. A model's clusters without both rules have no row.
    """
    densities = DENSITIES[1:]
    lines = [
        "| model, guidance | seeds | tokens of a query / key cluster "
        f"| {' | '.join(f'density {d:g}' for d in densities)} |",
        f"|---|---|---|{'---|' * len(densities)}",
    ]
    for evidence in evidences:
        of = {point.cell: point for point in evidence.points}
        for model, record in evidence.models.items():
            named = f"{model}, {record['settings']['guidance']:g}"
            for clusters in CLUSTERS:
                pairs = [
                    [of.get(Cell(model, rule, d, *clusters, WARM_UPS[0])) for rule in (PAPER, OURS)]
                    for d in densities
                ]
                if any(None not in pair for pair in pairs):
                    seeds = max(len(point.psnr) for pair in pairs for point in pair if point)
                    cells = " | ".join(_paired(*pair) for pair in pairs)
                    lines.append(f"| {named} | {seeds} | {clusters[0]} / {clusters[1]} | {cells} |")
    return "\n".join(lines)


def _paired(paper: Point | None, ours: Point | None) -> str:
    if paper is None or ours is None:
        return "not measured"
    gain = interval([a - b for a, b in zip(ours.psnr, paper.psnr, strict=True)])
    sign = "+" if gain.mean >= 0 else ""
    return f"{paper.mean_psnr:.1f} → {ours.mean_psnr:.1f} dB ({sign}{gain})"


def rivals_table(evidences: Sequence[Evidence], times: dict[str, Any]) -> str:
    """The default beside every measured way to use Sol-Attn, by shape, as Markdown.

    Args:
        evidences: each of one guidance.
        times: the record of times; its shapes of published models and lengths are columns.
    """
    lines = [
        "| model, guidance | Sol-Attn | budget | its PSNR | "
        + " | ".join(f"{shape}: its ms, ours at its PSNR" for shape in _RIVAL_SHAPES)
        + " | our PSNR in its time, less its |",
        f"|---|---|---|---|{'---|' * len(_RIVAL_SHAPES)}---|",
    ]
    for named, _, pairs in _beside(evidences):
        for point, rows in pairs:
            cells = [
                named, RULES[point.cell.rule].title, point.cell.budget, str(interval(point.psnr)),
                *(_in_time(row) for row in rows),
                "-" if rows[0]["gain"] is None else f"{gain_of(rows[0])} dB",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_dense_times(times), "", *lines])


def rivals_summary(evidences: Sequence[Evidence], times: dict[str, Any]) -> str:
    """`rivals_table` in a row for each model and guidance; arguments as there."""
    lines = [
        "| model, guidance | tokens | ways "
        "| our PSNR in its time, less its: least / median / most | "
        + " | ".join(f"{s}: our time at its PSNR over its, median / most" for s in _RIVAL_SHAPES)
        + " |",
        f"|---|---|---|---|{'---|' * len(_RIVAL_SHAPES)}",
    ]
    for named, tokens, pairs in _beside(evidences):
        gains = [gain_of(rows[0]).mean for _, rows in pairs if rows[0]["gain"] is not None]
        if not gains:
            continue
        ratios = zip(*([row["time_ratio"][0] for row in rows] for _, rows in pairs), strict=True)
        cells = [
            named, f"{tokens:,}", str(len(pairs)),
            " / ".join(f"{x:+.1f}" for x in (min(gains), median(gains), max(gains))) + " dB",
            *(f"{median(of_shape):.2f}x / {max(of_shape):.2f}x" for of_shape in ratios),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([_dense_times(times), "", *lines])


_RIVAL_SHAPES = (WAN, *SHORTER)


def _dense_times(times: dict[str, Any]) -> str:
    sizes = {row["shape"]: row["dense_ms"] for row in times["rows"]}
    each = ", ".join(f"{sizes[shape]:.1f} ms ({shape})" for shape in _RIVAL_SHAPES)
    return f"{where([times])}. Dense attention: {each}."


def _beside(
    evidences: Sequence[Evidence],
) -> Iterator[tuple[str, int, list[tuple[Point, list[dict[str, Any]]]]]]:
    """Of each model and guidance: its name, its tokens, and Sol-Attn's points with ours.

    Beside a point stands its row of `frontier.beside_rivals` for each of `_RIVAL_SHAPES`.
    """
    for evidence in evidences:
        for model, record in evidence.models.items():
            points = [
                p
                for p in evidence.points
                if p.cell.model == model and p.cell.warm_up == WARM_UPS[0]
            ]
            of = [beside_rivals(points, shape) for shape in _RIVAL_SHAPES]
            scores = [p for p in points if p.cell.rule in RIVALS and WAN in p.ms]
            pairs = [(p, list(rows)) for p, *rows in zip(scores, *of, strict=True)]
            yield f"{model}, {record['settings']['guidance']:g}", record["model"]["tokens"], pairs


def _in_time(row: dict[str, Any]) -> str:
    ratio, bound = row["time_ratio"]
    ours = f"{bound} {ratio * row['ms']:.1f}".strip()
    return f"{row['ms']:.1f}, {ours} ({ratio:.2f}x)"
