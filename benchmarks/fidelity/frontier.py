"""Figures that follow from measured points: gains at equal density and at equal time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.fidelity.grid import DENSITIES, DROPPING, OURS, PAPER, RIVALS, WARM_UPS, Cell
from benchmarks.fidelity.scores import Interval, interval

Curve = list[tuple[float, float]]
"""Points (time or density, PSNR), both rising."""


@dataclass(frozen=True)
class Point:
    """A measured cell: scores of each seed, and milliseconds of the operator by shape."""

    cell: Cell
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    flicker: tuple[float, ...]
    attention_error: float
    ms: Mapping[str, float]
    density_reached: float | None = None

    @property
    def density(self) -> float:
        """The fraction computed exactly: whole blocks overshoot what was asked for."""
        return self.cell.density if self.density_reached is None else self.density_reached

    @property
    def mean_psnr(self) -> float:
        """Mean over the seeds in dB."""
        return sum(self.psnr) / len(self.psnr)


def rising(points: Sequence[tuple[float, float]]) -> Curve:
    """The points that no other beats in both, by rising time."""
    kept: Curve = []
    for at, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or value > kept[-1][1]:
            kept.append((at, value))
    return kept


def value_at(curve: Curve, at: float) -> float | None:
    """PSNR at a time or density, linear in its logarithm between points; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * math.log(at / x0) / math.log(x1 / x0)
    return next((y for x, y in curve if x == at), None)


def first_at(curve: Curve, value: float) -> float | None:
    """Time or density from which the curve has a PSNR; None where it never or always has."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y0 <= value <= y1:
            return x0 * (x1 / x0) ** ((value - y0) / (y1 - y0))
    return next((x for x, y in curve if y == value), None)


def bounded(curve: Curve, value: float) -> tuple[float, str] | None:
    """`first_at`, or the end of what was measured with ``"over"`` or ``"under"``; None if empty."""
    if not curve:
        return None
    found = first_at(curve, value)
    if found is not None:
        return found, ""
    return (curve[-1][0], "over") if value > curve[-1][1] else (curve[0][0], "under")


def _selected(points: Sequence[Point], rule: str, **fixed: float) -> list[Point]:
    return [
        p
        for p in points
        if p.cell.rule == rule and all(getattr(p.cell, k) == v for k, v in fixed.items())
    ]


def time_curve(points: Sequence[Point], rule: str, shape: str) -> Curve:
    """The frontier of a rule over all its densities and clusters, by milliseconds at a shape."""
    timed = [p for p in points if p.cell.rule == rule and shape in p.ms]
    return rising([(p.ms[shape], p.mean_psnr) for p in timed])


def density_curve(points: Sequence[Point], rule: str) -> Curve:
    """The best PSNR of a rule over its clusters, by density."""
    best: dict[float, Point] = {}
    for point in _selected(points, rule):
        known = best.setdefault(point.cell.density, point)
        best[point.cell.density] = max(known, point, key=lambda p: p.mean_psnr)
    return rising([(p.density, p.mean_psnr) for p in best.values()])


def derived(points: Sequence[Point], shapes: Sequence[str]) -> dict[str, Any]:
    """Every figure that the report shows, of one model at the longer warm-up.

    Args:
        points: of one model.
        shapes: where times were measured.

    Returns:
        ``equal_density``: rows with the PSNR gain of Gaussian compensation over the paper's
        rule (an interval over seeds, paired), the ratio of their attention errors and the density
        that SVG2 (the best of its clusters) needs for the PSNR of Gaussian compensation, over
        its own. ``equal_time``: by shape, the gain at the times at which the paper's frontier has
        its points; ``time_ratio``: by shape, the time of Gaussian compensation at the PSNR that
        the paper's rule has at density 0.2 (the best of its clusters) over the least time that the
        paper's rule has it in. Interpolated in the logarithm of time or density. Ratios come as
        (value, bound): ``"over"`` or ``"under"`` where the PSNR lies outside of what was measured.
    """
    points = [p for p in points if p.cell.warm_up == WARM_UPS[0]]
    dropping = density_curve(points, DROPPING)
    equal_density = []
    for ours in sorted(_selected(points, OURS), key=lambda p: (p.cell.queries, p.cell.density)):
        cell = ours.cell
        same = {"density": cell.density, "queries": cell.queries, "keys": cell.keys}
        for paper in _selected(points, PAPER, **same):
            gains = [a - b for a, b in zip(ours.psnr, paper.psnr, strict=True)]
            row: dict[str, Any] = same | {
                "gain": asdict(interval(gains)),
                "error_ratio": ours.attention_error / paper.attention_error,
                "svg2_density": None,
            }
            needed = bounded(dropping, ours.mean_psnr)
            if needed is not None:
                row["svg2_density"] = (needed[0] / ours.density, needed[1])
            equal_density.append(row)
    equal_time: dict[str, list[dict[str, float | None]]] = {}
    time_ratio: dict[str, tuple[float, str] | None] = {}
    for shape in shapes:
        paper_curve, our_curve = (time_curve(points, rule, shape) for rule in (PAPER, OURS))
        equal_time[shape] = []
        for ms, psnr in paper_curve:
            reached = value_at(our_curve, ms)
            gain = None if reached is None else reached - psnr
            equal_time[shape].append({"ms": ms, "paper": psnr, "gain": gain})
        at_fifth = [p.mean_psnr for p in _selected(points, PAPER, density=DENSITIES[-1])]
        wanted = max(at_fifth, default=math.nan)
        ours_at, paper_at = bounded(our_curve, wanted), first_at(paper_curve, wanted)
        time_ratio[shape] = None
        if ours_at is not None and paper_at is not None:
            time_ratio[shape] = (ours_at[0] / paper_at, ours_at[1])
    return {
        "equal_density": equal_density,
        "equal_time": equal_time,
        "time_ratio": time_ratio,
    }


def beside_rivals(points: Sequence[Point], shape: str) -> list[dict[str, Any]]:
    """Gaussian compensation beside every point of Sol-Attn that has a time at a shape.

    Returns:
        A row for each: rule, budget and ms of the rival; ``gain``, an interval over seeds (paired)
        of the PSNR of Gaussian compensation in the same time less the rival's, None where all of
        its points take longer; ``time_ratio``, the time in which it has the rival's PSNR over the
        rival's, as in `derived`.
    """
    curve = time_curve(points, OURS, shape)
    rows: list[dict[str, Any]] = []
    for rival in points:
        if rival.cell.rule not in RIVALS or shape not in rival.ms:
            continue
        ms = rival.ms[shape]
        ours = _seeds_at(points, shape, ms)
        gain = None
        if ours is not None:
            gain = asdict(interval([a - b for a, b in zip(ours, rival.psnr, strict=True)]))
        needed = bounded(curve, rival.mean_psnr)
        ratio = None if needed is None else (needed[0] / ms, needed[1])
        named = {"rule": rival.cell.rule, "budget": rival.cell.budget, "ms": ms}
        rows.append({**named, "gain": gain, "time_ratio": ratio})
    return rows


def _seeds_at(points: Sequence[Point], shape: str, ms: float) -> tuple[float, ...] | None:
    """PSNR of every seed that Gaussian compensation has in that time, on its frontier.

    The last point of the frontier stands for all longer times.
    """
    frontier: list[Point] = []
    timed = [p for p in _selected(points, OURS) if shape in p.ms]
    for point in sorted(timed, key=lambda p: (p.ms[shape], -p.mean_psnr)):
        if not frontier or point.mean_psnr > frontier[-1].mean_psnr:
            frontier.append(point)
    faster = [p for p in frontier if p.ms[shape] <= ms]
    if not faster or faster[-1] is frontier[-1]:
        return faster[-1].psnr if faster else None
    before, after = faster[-1], frontier[len(faster)]
    share = math.log(ms / before.ms[shape]) / math.log(after.ms[shape] / before.ms[shape])
    return tuple(x + share * (y - x) for x, y in zip(before.psnr, after.psnr, strict=True))


def gain_of(row: dict[str, Any]) -> Interval:
    """The gain of a row of ``equal_density``."""
    return Interval(**row["gain"])
