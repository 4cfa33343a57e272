"""`python -m benchmarks.fidelity --out DIR`: how close videos stay to dense, by rule and by time.

Every rule generates the clips of the same seeds as dense attention did; raw frames are compared.
Cells are measured in the order of what they decide and written one by one: a run that ends early,
or is told to by `--minutes`, goes on where it was when it is started again. On a GPU the operator
is timed at the models' shapes and at that of Wan 14B at 720p with clusters of the same size.
Tables, derived figures and the frontier plot are made of whatever is there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.attention.inputs import Inputs, inputs_of
from benchmarks.fidelity.frontier import derived, points_of
from benchmarks.fidelity.grid import Cell, cells
from benchmarks.fidelity.plots import write_frontier
from benchmarks.fidelity.report import asked_table, cells_table
from benchmarks.fidelity.scores import interval, score_clips
from benchmarks.fidelity.subject import Subject
from benchmarks.fidelity.times import WAN, measure_times
from benchmarks.provenance import provenance
from benchmarks.video_dit.zoo import MODELS

SEEDS = {"self": 6, "joint": 4}
"""Clips of a cell by default: the longer model's take longer."""

_RESERVE = 12.0  # seconds for tables and plots


class OutOfTime(Exception):
    """What is next would not end in time."""


class Record:
    """The JSON file of a run, written after every measurement.

    Raises:
        ValueError: the file is of other settings, another device or another commit.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        fresh = {**provenance(), "settings": settings}
        self.data: dict[str, Any] = {
            **fresh,
            "models": {},
            "cells": [],
            "times": [],
            "seconds": 0.0,
        }
        if path.exists():
            self.data = json.loads(path.read_text())
            for name, value in fresh.items():
                if self.data[name] != value:
                    raise ValueError(
                        f"{path} is of another run ({name}: {self.data[name]!r} instead of "
                        f"{value!r}): choose another --out"
                    )

    def write(self) -> None:
        """Write everything measured so far."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.rename(self.path)

    @property
    def done(self) -> set[Cell]:
        """Cells that are measured."""
        return {Cell(**row["cell"]) for row in self.data["cells"]}


class Run:
    """One run of the bench: what it measures, how, and until when."""

    def __init__(
        self, record: Record, given: argparse.Namespace, say: Callable[[str], None]
    ) -> None:
        self.record, self.given, self.say = record, given, say
        self.started = time.perf_counter()
        self.before = record.data["seconds"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.subjects: dict[str, Subject] = {}
        self.longest: dict[tuple[str, str], float] = {}

    def subject(self, name: str) -> Subject:
        """The model of that name, its dense clips made and the noise ceiling measured."""
        if name not in self.subjects:
            given, began = self.given, time.perf_counter()
            trained = MODELS[name]
            found = self.subjects[name] = Subject(
                trained,
                range(given.seeds or SEEDS[name]),
                given.steps,
                given.guidance,
                getattr(trained, given.clip),
                self.device,
            )
            if name not in self.record.data["models"]:
                self.record.data["models"][name] = {
                    "clip": found.shape, "tokens": found.tokens, "text": found.text,
                    "layers": found.layers, "head_dim": found.calls[0][0].shape[-1],
                    "heads": found.calls[0][0].shape[1],
                    "ceiling": score_clips(found.other_backend(), found.dense_clips),
                }  # fmt: skip
                self._keep()
            self.say(f"{name}: dense clips in {time.perf_counter() - began:.1f} s")
        return self.subjects[name]

    def measure(self, cell: Cell) -> None:
        """Measure one cell and keep it."""
        kind = (cell.model, cell.rule)
        self._need(self.longest.get(kind, 0.0))
        began = time.perf_counter()
        subject = self.subject(cell.model)
        clips, reached = subject.sparse_clips(cell)
        scores = score_clips(clips, subject.dense_clips)
        row = {
            "cell": asdict(cell),
            **scores,
            "attention_error": subject.attention_error(cell),
            "density_reached": reached,
        }
        seconds = time.perf_counter() - began
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))
        self.record.data["cells"].append(row)
        self._keep()
        self.say(
            f"{cell.model:5} {cell.rule:11} d={cell.density:<5g} {cell.queries}/{cell.keys} "
            f"warm-up {cell.warm_up:g}: {interval(scores['psnr'])} dB, attention error "
            f"{row['attention_error']:.3f} ({seconds:.1f} s)"
        )

    def measure_times(self, models: Sequence[str], wanted: Sequence[Cell]) -> None:
        """Time the operator at every shape that has no times yet."""
        timed = {row["shape"] for row in self.record.data["times"]}
        for name in (WAN, *models):
            if name in timed:
                continue
            self._need(50.0 if name == WAN else 20.0)
            if name == WAN:
                inputs = inputs_of(WAN, "cuda", torch.bfloat16)
            else:
                subject = self.subject(name)
                inputs = Inputs(name, *subject.calls[len(subject.calls) // 2], subject.text)
            self.record.data["times"] += measure_times(inputs, wanted, self.say)
            self._keep()
            del inputs
            torch.cuda.empty_cache()

    def _need(self, seconds: float) -> None:
        if self.given.minutes is None:
            return
        left = 60 * self.given.minutes - (time.perf_counter() - self.started)
        if left < seconds + _RESERVE:
            raise OutOfTime

    def _keep(self) -> None:
        self.record.data["seconds"] = self.before + time.perf_counter() - self.started
        self.record.write()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS), help="names in video_dit/zoo.py")
    parser.add_argument("--minutes", type=float, help="stop before this; start again to go on")
    parser.add_argument("--clip", choices=("short", "long"), default="long")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, help=f"clips of a cell, by default {SEEDS}")
    parser.add_argument("--rules", help="only these rules")
    parser.add_argument("--densities", help="only these densities")
    parser.add_argument("--clusters", help="only these, for example 128/64,256/64")
    parser.add_argument("--warm-ups", help="only these shares of dense steps")
    return parser.parse_args()


def chosen_cells(given: argparse.Namespace, models: Sequence[str]) -> list[Cell]:
    """The cells that the command line leaves, in order."""

    def within(cell: Cell) -> bool:
        texts = {
            "rules": cell.rule,
            "densities": f"{cell.density:g}",
            "clusters": f"{cell.queries}/{cell.keys}",
            "warm_ups": f"{cell.warm_up:g}",
        }
        return all(
            getattr(given, name) is None or text in getattr(given, name).split(",")
            for name, text in texts.items()
        )

    return [cell for cell in cells(models) if within(cell)]


def finish(record: Record, out: Path, console: Console) -> None:
    """Derive, plot and print what is there."""
    data = record.data
    points = points_of(data)
    shapes = list(dict.fromkeys(row["shape"] for row in data["times"]))
    models = list(data["models"])
    data["shape"] = WAN if WAN in shapes else (shapes[0] if shapes else "no time measured")
    data["derived"] = {
        model: derived([p for p in points if p.cell.model == model], shapes) for model in models
    }
    record.write()
    if points:
        write_frontier(points, models, [WAN], out / "frontier.png")
    console.print(cells_table(points, data["shape"]))
    console.print(asked_table(data["derived"], data["shape"]))


def main() -> None:
    """Measure until everything is done or time is up; tables last."""
    given = parse()
    torch.backends.cuda.matmul.allow_tf32 = False
    given.out.mkdir(parents=True, exist_ok=True)
    names = ("clip", "steps", "guidance", "seeds")
    record = Record(given.out / "fidelity.json", {name: getattr(given, name) for name in names})
    console = Console(width=170, soft_wrap=True)
    run = Run(record, given, lambda line: print(line, flush=True))
    models = []
    for name in given.models.split(","):
        if MODELS[name].weights.exists():
            models.append(name)
        else:
            print(f"{name} is left out: {MODELS[name].weights} is missing", flush=True)
    wanted = chosen_cells(given, models)
    try:
        for part in ([cell for cell in wanted if cell.is_decisive], wanted):
            for cell in part:
                if cell not in record.done:
                    run.measure(cell)
            if run.device.type == "cuda":
                run.measure_times(models, wanted)
    except OutOfTime:
        left = sum(cell not in record.done for cell in wanted)
        print(f"out of time: {left} of {len(wanted)} cells are left", flush=True)
    finish(record, given.out, console)


if __name__ == "__main__":
    main()
