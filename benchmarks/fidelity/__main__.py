"""`python -m benchmarks.fidelity --out DIR`: how close videos stay to dense, by rule and by time.

Every rule generates the clips of the same seeds as dense attention did; raw frames are compared.
On a GPU the operator is timed at the models' shapes and at that of Wan 14B at 720p with clusters of
the same size. `clips`, `times` and `report` do a part each: clips of two models may be made at the
same time, on devices of any kind, and times want a device for themselves.

Cells are measured in the order of what they decide and written one by one: a run that ends early,
or is told to by `--minutes`, goes on where it was when it is started again. Tables, derived figures
and the frontier plot are made of whatever is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.attention.inputs import Inputs, inputs_of
from benchmarks.fidelity import kitchen
from benchmarks.fidelity.grid import OURS, Cell, cells
from benchmarks.fidelity.plots import write_frontier
from benchmarks.fidelity.record import Record, read
from benchmarks.fidelity.report import cells_table, derived_table, rivals_table
from benchmarks.fidelity.rules import RULES
from benchmarks.fidelity.scores import interval, score_clips
from benchmarks.fidelity.subject import Subject
from benchmarks.fidelity.times import SHORTER, WAN, measure_times
from benchmarks.video_dit.zoo import MODELS

SEEDS = {"self": 6, "joint": 4, "third": 3}
"""Clips of a cell by default: the longer model's take longer."""

_FIRST = 10.0  # seconds that a rule may take the first time
_RESERVE = 12.0  # seconds for tables and plots

say = partial(print, flush=True)


class OutOfTime(Exception):
    """What is next would not end in time."""


class Clock:
    """What is left of the time that a run was given."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.started = minutes, time.perf_counter()

    def need(self, seconds: float) -> None:
        """Raise `OutOfTime` unless that much is left."""
        if self.minutes is not None:
            left = 60 * self.minutes - (time.perf_counter() - self.started)
            if left < seconds + _RESERVE:
                raise OutOfTime


class Clips:
    """Measures cells of one model into its record."""

    def __init__(self, name: str, given: argparse.Namespace, clock: Clock) -> None:
        self.name, self.given, self.clock = name, given, clock
        self.longest: dict[str, float] = {}

    @cached_property
    def record(self) -> Record:
        """Where the cells go, with what the model is and its noise ceiling."""
        names = ("clip", "steps", "guidance", "seeds")
        found = Record(
            self.given.out / f"{self.name}.json", {n: getattr(self.given, n) for n in names}
        )
        if "model" not in found.data:
            mine, (q, _, _) = self.subject, self.subject.calls[0]
            found.data["model"] = {
                "name": self.name, "clip": mine.shape, "tokens": mine.tokens, "text": mine.text,
                "layers": mine.layers, "head_dim": q.shape[-1], "heads": q.shape[1],
                "ceiling": score_clips(mine.other_backend(), mine.dense_clips),
            }  # fmt: skip
            found.write()
        return found

    @cached_property
    def subject(self) -> Subject:
        """The model, its dense clips made."""
        given, began = self.given, time.perf_counter()
        trained = MODELS[self.name]
        found = Subject(
            trained,
            range(given.seeds or SEEDS[self.name]),
            given.steps,
            given.guidance,
            getattr(trained, given.clip),
            _device(),
        )
        say(f"{self.name}: dense clips in {time.perf_counter() - began:.1f} s")
        return found

    def measure(self, cell: Cell) -> None:
        """Measure one cell and keep it."""
        self.clock.need(self.longest.get(cell.rule, _FIRST))
        began = time.perf_counter()
        clips, remembered = self.subject.sparse_clips(cell)
        scores = score_clips(clips, self.subject.dense_clips)
        row = {
            "cell": asdict(cell),
            **scores,
            "attention_error": self.subject.attention_error(cell),
            "density_reached": remembered.density,
            "reused": remembered.reused,
        }
        seconds = time.perf_counter() - began
        self.longest[cell.rule] = max(seconds, self.longest.get(cell.rule, 0.0))
        self.record.rows.append(row)
        self.record.write()
        say(
            f"{cell.model:5} {cell.rule:16} {cell.budget:<5} {cell.queries}/{cell.keys} "
            f"warm-up {cell.warm_up:g}: {interval(scores['psnr'])} dB, attention error "
            f"{row['attention_error']:.3f} ({seconds:.1f} s)"
        )


def make_clips(clips: Sequence[Clips], wanted: Sequence[Cell]) -> None:
    """Measure every cell that is not measured yet, in order."""
    of = {c.name: c for c in clips}
    for cell in wanted:
        if asdict(cell) not in [row["cell"] for row in of[cell.model].record.rows]:
            of[cell.model].measure(cell)


def take_times(
    clips: Sequence[Clips], wanted: Sequence[Cell], given: argparse.Namespace, clock: Clock
) -> None:
    """Time the operator at every shape that has no times yet."""
    settings = {name: getattr(given, name) for name in ("clip", "rules", "densities", "clusters")}
    record = Record(given.out / "times.json", settings)
    timed = {row["shape"] for row in record.rows}
    beside = [cell for cell in wanted if cell.rule == OURS or RULES[cell.rule].needs_kitchen]
    for shape, cells_of in ((WAN, wanted), *((shape, beside) for shape in SHORTER)):
        if shape not in timed:
            clock.need(50.0)
            record.rows += measure_times(inputs_of(shape, "cuda", torch.bfloat16), cells_of, say)
            record.write()
            torch.cuda.empty_cache()
    for of in clips:
        if of.name not in timed:
            clock.need(20.0)
            calls = of.subject.calls
            inputs = Inputs(of.name, *calls[len(calls) // 2], of.subject.text)
            record.rows += measure_times(inputs, wanted, say)
            record.write()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", choices=("all", "clips", "times", "report"), nargs="?", default="all"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS), help="names in video_dit/zoo.py")
    parser.add_argument("--minutes", type=float, help="stop before this; start again to go on")
    parser.add_argument("--clip", choices=("short", "long"), default="long")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, help=f"clips of a cell, by default {SEEDS}")
    parser.add_argument("--rules", help="only these rules")
    parser.add_argument("--densities", help="only these densities, tau1, tau2")
    parser.add_argument("--clusters", help="only these, for example 128/64,256/64")
    parser.add_argument("--warm-ups", help="only these fractions of dense steps")
    return parser.parse_args()


def chosen_cells(given: argparse.Namespace, models: Sequence[str]) -> list[Cell]:
    """The cells that the command line leaves, in order."""

    def within(cell: Cell) -> bool:
        texts = {
            "rules": cell.rule,
            "densities": cell.budget,
            "clusters": f"{cell.queries}/{cell.keys}",
            "warm_ups": f"{cell.warm_up:g}",
        }
        return all(
            getattr(given, name) is None or text in getattr(given, name).split(",")
            for name, text in texts.items()
        )

    found = [cell for cell in cells(models) if within(cell)]
    missing = kitchen.missing(_device())
    if missing is None:
        return found
    if any(RULES[cell.rule].needs_kitchen for cell in found):
        say(f"comfy-kitchen's own kernels are left out: {missing}")
    return [cell for cell in found if not RULES[cell.rule].needs_kitchen]


def report(out: Path) -> None:
    """Plot and print what is there."""
    evidence = read(out)
    if evidence.points:
        write_frontier(evidence.points, list(evidence.models), [WAN], out / "frontier.png")
    console = Console(width=170, soft_wrap=True)
    console.print(cells_table(evidence))
    console.print(derived_table(evidence))
    if set(evidence.shapes).issuperset((WAN, *SHORTER)):
        console.print(Markdown(rivals_table([evidence], evidence.times)))


def main() -> None:
    """Measure until everything is done or time is up; tables last."""
    given = parse()
    torch.backends.cuda.matmul.allow_tf32 = False
    given.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(given.minutes)
    if given.part != "report":
        clips = [Clips(name, given, clock) for name in given.models.split(",")]
        wanted = chosen_cells(given, [c.name for c in clips])
        try:
            if given.part != "times":
                make_clips(clips, [cell for cell in wanted if cell.is_decisive])
            if given.part != "clips" and _device().type == "cuda":
                take_times(clips, wanted, given, clock)
            if given.part != "times":
                make_clips(clips, wanted)
        except OutOfTime:
            say("out of time: start it again to go on")
    report(given.out)


if __name__ == "__main__":
    main()
