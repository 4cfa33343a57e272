"""`python -m benchmarks.fidelity.schedules --out DIR`: how to spend a budget over the steps.

A schedule gives each denoising step a density. Schedules are compared at equal time of a whole
generation's attention: the sum over the steps of the operator's recorded times at a shape, calls
that reuse their blocks in the share that the clips had. Each schedule generates the clips of the
same seeds at several levels; figures at equal time lie between these.

The times are those of a GPU; clips may be made on any device. Rows are written one by one, and a
run that ended goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.attention.summary import rows_of
from benchmarks.fidelity.frontier import rising, value_at
from benchmarks.fidelity.grid import FINE, OURS
from benchmarks.fidelity.record import Record
from benchmarks.fidelity.scores import score_clips
from benchmarks.fidelity.subject import Subject
from benchmarks.fidelity.times import WAN
from benchmarks.provenance import where
from benchmarks.video_dit.zoo import MODELS
from svg_ear_compile.kernels.plan import AttentionPlan

RESULTS = Path(__file__).parents[1] / "results" / "nvidia-h200"
SHORT = "wan1.3b-480p"
"""12 heads of 32,760 tokens."""

LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
SEEDS = {"self": 3, "joint": 2, "third": 2}


@dataclass(frozen=True)
class Schedule:
    """Density of each step.

    Attributes:
        name: in records and tables.
        fronts: fraction of the steps and their density over that of the last steps, from the first
            step on; infinite for dense ones. Fractions are rounded to whole steps.
    """

    name: str
    fronts: tuple[tuple[float, float], ...] = ()

    def densities(self, level: float, steps: int) -> tuple[float, ...]:
        """Densities of all steps, the level being that of the last."""
        found = [level] * steps
        end, at = 0.0, 0
        for fraction, factor in self.fronts:
            end += fraction
            until = round(end * steps)
            found[at:until] = [min(1.0, factor * level)] * (until - at)
            at = until
        return tuple(found)


USUAL = Schedule("first fifth dense", ((0.2, math.inf),))
"""The recipe of the papers."""
SHIPPED = Schedule("eighths at 2x, 1.5x", ((0.125, 2.0), (0.125, 1.5)))
"""The default of the project, below the most that an early step gets."""
SCHEDULES = (
    Schedule("even"),
    USUAL,
    Schedule("first eighth at 2x", ((0.125, 2.0),)),
    Schedule("first quarter at 1.5x", ((0.25, 1.5),)),
    Schedule("first quarter at 2x", ((0.25, 2.0),)),
    Schedule("first half at 1.5x", ((0.5, 1.5),)),
    Schedule("first half at 0.67x", ((0.5, 2 / 3),)),
    Schedule("first eighth at 3x", ((0.125, 3.0),)),
    Schedule("first eighth at 4x", ((0.125, 4.0),)),
    SHIPPED,
    Schedule("eighths at 3x, 1.5x", ((0.125, 3.0), (0.125, 1.5))),
)
SHOWN = (
    "even", "first eighth at 2x", "first quarter at 1.5x", "first eighth at 4x", SHIPPED.name
)  # fmt: skip
"""Names of the schedules that the documentation shows."""


@dataclass(frozen=True)
class CallTimes:
    """Milliseconds of one call at a shape.

    Attributes:
        dense: of dense attention.
        recomputed, reused: by rising density, (density, ms).
    """

    dense: float
    recomputed: tuple[tuple[float, float], ...]
    reused: tuple[tuple[float, float], ...]

    def at(self, density: float, reused: float) -> float:
        """Mean of calls of which a share reuses its blocks; never slower than dense attention."""
        if density >= 1.0:
            return self.dense
        made, taken = (_line(points, density) for points in (self.recomputed, self.reused))
        return min(self.dense, reused * taken + (1 - reused) * made)

    def of(self, densities: Sequence[float], reused: float) -> float:
        """Mean over the steps."""
        return statistics.fmean(self.at(density, reused) for density in densities)


def _line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between points, and on along the outermost two."""
    right = next((i for i, (x, _) in enumerate(points) if x >= at and i), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def recorded_times(results: Path = RESULTS) -> dict[str, CallTimes]:
    """The default's recorded times by shape.

    Args:
        results: folder of a GPU's records.
    """
    rows = json.loads((results / "fidelity" / "times.json").read_text())["rows"]
    mine = sorted(
        (r for r in rows if r["shape"] == WAN and r["rule"] == OURS and r["ms"] is not None
         and (r["queries"], r["keys"]) == FINE),
        key=lambda r: r["density"],
    )  # fmt: skip
    found = {
        WAN: CallTimes(
            mine[0]["dense_ms"],
            tuple((r["density"], r["ms"]) for r in mine),
            tuple((r["density"], r["reused_ms"]) for r in mine),
        )
    }
    record = json.loads((results / "attention.json").read_text())
    mine = sorted(
        (r for r in rows_of(record) if r["shape"] == SHORT and r["form"].startswith("gaussian")
         and r["clusters"] == "default" and "samples_ms" in r and "reused_samples_ms" in r),
        key=lambda r: r["density"],
    )  # fmt: skip
    if len(mine) > 1:
        dense = min(statistics.median(s) for s in mine[0]["dense_samples_ms"].values())
        points = {
            name: tuple((r["density"], statistics.median(r[name])) for r in mine)
            for name in ("samples_ms", "reused_samples_ms")
        }
        found[SHORT] = CallTimes(dense, points["samples_ms"], points["reused_samples_ms"])
    return found


def measure(subject: Subject, schedule: Schedule, level: float) -> dict[str, Any]:
    """Clips of one schedule at one level, scored against the dense ones."""
    densities = schedule.densities(level, subject.steps)
    queries, keys = (math.ceil(subject.tokens / each) for each in FINE)
    plans = [
        None if d >= 1.0 else AttentionPlan(density=d, q_clusters=queries, k_clusters=keys)
        for d in densities
    ]
    clips, remembered = subject.clips_by_step(OURS, plans)
    return {
        "schedule": asdict(schedule), "level": level, "densities": densities,
        "area": sum(densities), "reused": remembered.reused,
        **score_clips(clips, subject.dense_clips),
    }  # fmt: skip


Points = list[tuple[float, float]]
"""Milliseconds of a call in the mean over the steps, and PSNR in dB."""


def _curves(record: Mapping[str, Any], call: CallTimes) -> tuple[dict[str, Points], Points]:
    """The curve of each schedule by name, and the points of the usual recipe at 0.1 and 0.2."""
    points: dict[str, Points] = {}
    marks = {}
    for row in record["rows"]:
        name, level = row["schedule"]["name"], row["level"]
        point = (call.of(row["densities"], row["reused"]), statistics.fmean(row["psnr"]))
        points.setdefault(name, []).append(point)
        if name == USUAL.name:
            marks[level] = point
    return (
        {name: rising(of_name) for name, of_name in points.items()},
        [marks[level] for level in (0.1, 0.2) if level in marks],
    )


def compared(record: Mapping[str, Any], times: Mapping[str, CallTimes]) -> str:
    """PSNR of every schedule at the times of the usual recipe, and time at its picture.

    Args:
        record: of a run.
        times: by shape.
    """
    lines = []
    for shape, call in times.items():
        curves, marks = _curves(record, call)
        heads = "".join(f" | dB at {ms:.1f} ms a call" for ms, _ in marks)
        lines += [f"{shape}, dense {call.dense:.1f} ms a call", "", f"| schedule{heads} |"]
        lines.append("|---" * (1 + len(marks)) + "|")
        for name, curve in curves.items():
            values = [value_at(curve, ms) for ms, _ in marks]
            cells = ["" if value is None else f"{value:.1f}" for value in values]
            lines.append(f"| {' | '.join([name, *cells])} |")
        lines.append("")
    return "\n".join(lines)


def section(records: Path, shape: str = WAN) -> str:
    """For a page: PSNR over the usual recipe in its time, of the shown schedules in every study.

    Args:
        records: folder of the studies.
        shape: whose recorded times count.
    """
    studies = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    call = recorded_times()[shape]
    shown = [f"{name} (default)" if name == SHIPPED.name else name for name in SHOWN]
    lines = [
        f"Clips: {where(studies)}. Times of a generation's attention: the operator's at {shape}.",
        "",
        f"| model, steps, guidance | {USUAL.name}, then 0.1 / 0.2 | {' | '.join(shown)} |",
        "|---" * (2 + len(SHOWN)) + "|",
    ]
    for study in studies:
        curves, marks = _curves(study, call)
        settings = study["settings"]
        cells = [
            f"{settings['model']}, {settings['steps']}, {settings['guidance']:g}",
            " / ".join(f"{psnr:.1f} dB" for _, psnr in marks),
        ]
        for name in SHOWN:
            values = [(value_at(curves.get(name, []), ms), psnr) for ms, psnr in marks]
            cells.append(" / ".join("–" if v is None else f"{v - psnr:+.1f}" for v, psnr in values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="self")
    parser.add_argument("--clip", choices=("short", "long"), default="long")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, help=f"clips, by default {SEEDS}")
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    trained = MODELS[given.model]
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.model}-{given.steps}-{given.guidance:g}.json"
    settings = ("model", "clip", "steps", "guidance", "seeds")
    record = Record(path, {name: getattr(given, name) for name in settings})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(
        trained, range(given.seeds or SEEDS[given.model]), given.steps, given.guidance,
        getattr(trained, given.clip), device,
    )  # fmt: skip
    done = {(row["schedule"]["name"], row["level"]) for row in record.rows}
    for level in (float(x) for x in given.levels.split(",")):
        for schedule in SCHEDULES:
            if (schedule.name, level) in done:
                continue
            began = time.perf_counter()
            row = measure(subject, schedule, level)
            record.rows.append(row)
            record.write()
            psnr, seconds = statistics.fmean(row["psnr"]), time.perf_counter() - began
            print(f"{schedule.name}, {level:g}: {psnr:.2f} dB ({seconds:.1f} s)", flush=True)
    Console(width=120).print(Markdown(compared(record.data, recorded_times())))


if __name__ == "__main__":
    main()
