"""Budgets for the video models: tune on some clips, judge on others.

    svg-ear tune --model benchmarks.tuning.video_dit:short --density 0.2 --out budget.json
    python -m benchmarks.tuning.video_dit --model joint --out benchmarks/results/GPU/tuning

The second command is the proof: at each operating point it tunes, generates clips of seeds that
were not used in tuning with dense attention, one density for all and the tuned budget, and compares
raw frames with the dense clip. Writes every number as JSON, the budgets, and plots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.tuning.captured import CAMERA
from benchmarks.video_dit.compare import score_frames
from benchmarks.video_dit.data import LABELS
from benchmarks.video_dit.pixel_dit import PixelDiT
from benchmarks.video_dit.sample import generate
from benchmarks.video_dit.zoo import MODELS, Shape
from svg_ear_compile import ModelCall, TuningSettings, bind, capture_calls, plots, tune
from svg_ear_compile.backend import svg_ear
from svg_ear_compile.cost_model.budget import Budget, Choice
from svg_ear_compile.cost_model.device import describe

TUNED_ON = (100, 101, 102)
"""Seeds of the clips that are tuned on; the proof counts from 0."""


def device() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str) -> PixelDiT:
    """A model of `MODELS`: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    return MODELS[name].load(device=device(), dtype=dtype)


def clip(model: Any, shape: Shape, steps: int, seed: int) -> torch.Tensor:
    """Frames (T, H, W, 3) of one clip; its label follows from the seed."""
    inner = getattr(model, "_orig_mod", model)
    return generate(
        model,
        label=seed % len(LABELS),
        camera=CAMERA,
        seed=seed,
        steps=steps,
        guidance=1.0,
        shape=shape,
        device=device(),
        dtype=next(inner.parameters()).dtype,
    )


def calls_of(
    model: PixelDiT,
    shape: Shape,
    steps: int,
    at: Sequence[int],
    seeds: Sequence[int],
) -> list[ModelCall]:
    """Inputs of the steps `at` of one dense generation for each seed."""

    def run() -> None:
        for seed in seeds:
            clip(model, shape, steps, seed)

    return capture_calls(model, run, keep=lambda index: index % steps in at)


def short() -> tuple[PixelDiT, list[ModelCall]]:
    """The demo's 2,304 tokens, two clips, two steps each."""
    model = load("self")
    return model, calls_of(model, MODELS["self"].short, 12, (5, 9), TUNED_ON[:2])


def long() -> tuple[PixelDiT, list[ModelCall]]:
    """The 6,912 tokens that the model was trained at, two clips, one step each."""
    model = load("self")
    return model, calls_of(model, MODELS["self"].long, 6, (3,), TUNED_ON[:2])


def forward_error(sparse: torch.Tensor, dense: torch.Tensor) -> float:
    """Relative RMS distance."""
    return float((sparse.float() - dense.float()).norm() / dense.float().norm())


def shape_of(name: str, length: str) -> Shape:
    """Frames, height and width of a model's clips.

    Args:
        name: of the model.
        length: ``"short"``, ``"long"``, or ``"longer"``: four times the frames of a long one, more
            than the model was trained on, where sparse attention pays on a large GPU.
    """
    if length == "longer":
        frames, height, width = MODELS[name].long
        return 4 * frames, height, width
    return MODELS[name].short if length == "short" else MODELS[name].long


class Proof:
    """Runs of one shape: every clip and forward is made with the same compiled model."""

    def __init__(
        self, name: str, shape: Shape, steps: int, dense_steps: int, tuned_on: Sequence[int]
    ) -> None:
        self.shape, self.steps, self.dense_steps = shape, steps, dense_steps
        self.model = load(name)
        options = {"density": 0.5, "min_tokens": 1}
        self.compiled = torch.compile(self.model, backend=svg_ear, options=options)
        self.at = [round(dense_steps + f * (steps - dense_steps)) for f in (0.1, 0.5, 0.8)]
        self.settings = TuningSettings(
            densities=(0.03, 0.05, 0.1, 0.2, 0.4), dense_steps=dense_steps, phases=3
        )
        self.tuning_calls = calls_of(self.model, shape, steps, self.at, tuned_on)
        self.dense: dict[int, tuple[torch.Tensor, float]] = {}

    def tuned(self, folder: Path, **objective: float) -> Budget:
        """The budget of one objective; objectives share the measurements."""
        found = tune(
            self.model,
            self.tuning_calls,
            settings=self.settings,
            checkpoint=folder / "checkpoint",
            **objective,
        )
        found.save(folder / f"budget-{found.objective.replace(' ', '-')}.json")
        return found

    def frames(self, budget: Budget, seed: int) -> tuple[torch.Tensor, float]:
        """One clip under a budget and its seconds (the first clip compiles)."""
        with bind(self.compiled, budget=budget):
            began = time.perf_counter()
            return clip(self.compiled, self.shape, self.steps, seed), time.perf_counter() - began

    def point(self, density: float, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
        """Tuned against uniform at one density: PSNR of unseen clips, measured milliseconds."""
        tuned = self.tuned(folder, density=density)
        compared = {"tuned": tuned, "uniform": alike(tuned, density)}
        rows = []
        for seed in seeds:
            if seed not in self.dense:
                self.dense[seed] = self.frames(alike(tuned, 1.0), seed)
            reference, dense_seconds = self.dense[seed]
            row: dict[str, Any] = {"seed": seed, "dense_seconds": dense_seconds}
            for name, budget in compared.items():
                frames, seconds = self.frames(budget, seed)
                row[name] = score_frames(frames, reference).summary()["psnr_mean"]
                row[f"{name}_seconds"] = seconds
            rows.append(row)
        return {
            "density": density, "outcome": tuned.outcome,
            "gain_db": statistics.fmean(r["tuned"] - r["uniform"] for r in rows), "rows": rows,
            "tuned": asdict(tuned.measured), "uniform": asdict(tuned.uniform),
            "predicted": asdict(tuned.predicted), "note": tuned.note,
        }  # fmt: skip

    def unseen_errors(self, budget: Budget, seeds: Sequence[int]) -> list[float]:
        """Largest error of one forward over the captured steps, for each unseen seed."""
        found = []
        for seed in seeds:
            calls = calls_of(self.model, self.shape, self.steps, self.at, [seed])
            outputs = []
            for each in (alike(budget, 1.0), budget):
                # Leading dense steps are for generations: these calls are all meant to be sparse.
                used = replace(each, schedule=replace(budget.schedule, dense_steps=0))
                with torch.no_grad(), bind(self.compiled, budget=used):
                    outputs.append([self.compiled(*call.args) for call in calls])
            found.append(max(forward_error(s, d) for d, s in zip(*outputs, strict=True)))
        return found


def alike(budget: Budget, density: float) -> Budget:
    """The budget with one density for every layer and phase."""
    choices = (Choice(density),) * budget.schedule.phases
    return replace(budget, layers=dict.fromkeys(budget.layers, choices))


def main() -> None:
    """The proof; short tables last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    # The third model is told no camera.
    parser.add_argument("--model", choices=("self", "joint"), default="self")
    parser.add_argument("--shape", choices=("short", "long", "longer"), default="long")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--dense-steps", type=int, default=5)
    parser.add_argument("--densities", default="0.05,0.1,0.2", help="operating points, or none")
    parser.add_argument("--tuned-seeds", type=int, help="clips that are tuned on, by default all")
    parser.add_argument("--seeds", type=int, default=6, help="unseen clips at each point")
    parser.add_argument("--speedup", type=float, help="also check this target_speedup")
    parser.add_argument("--max-error", type=float, help="also check this max_error on 10 seeds")
    given = parser.parse_args()
    began = time.time()
    given.out.mkdir(parents=True, exist_ok=True)
    shape = shape_of(given.model, given.shape)
    tuned_on = TUNED_ON[: given.tuned_seeds]
    proof = Proof(given.model, shape, given.steps, given.dense_steps, tuned_on)
    record: dict[str, Any] = {
        "model": given.model, "shape": given.shape, "steps": given.steps, "points": [],
    }  # fmt: skip

    def keep() -> None:
        record.update(device=asdict(describe(device())), seconds=time.time() - began)
        (given.out / f"{given.model}.json").write_text(json.dumps(record, indent=1) + "\n")

    for density in map(float, filter(None, given.densities.split(","))):
        record["points"].append(proof.point(density, given.out, range(given.seeds)))
        keep()
        print(f"density {density:g}: {record['points'][-1]['gain_db']:+.2f} dB", flush=True)
    if given.speedup is not None:
        found = proof.tuned(given.out, target_speedup=given.speedup)
        record["speedup"] = {"objective": given.speedup, "measured": asdict(found.measured)}
        keep()
    if given.max_error is not None:
        found = proof.tuned(given.out, max_error=given.max_error)
        errors = proof.unseen_errors(found, range(10))
        record["max_error"] = {"objective": given.max_error, "unseen": errors}
        keep()
    for path in sorted(given.out.glob("budget-*.json")):
        plots.budget(Budget.load(path), path.with_suffix(".png"))
        plots.frontier(Budget.load(path), path.with_name(f"frontier-{path.stem}.png"))
    show(record)


def show(record: dict[str, Any]) -> None:
    """The tables that a person reads first."""
    table = Table(title="Tuned against one density, PSNR against dense on unseen seeds")
    for heading in (
        "density",
        "outcome",
        "uniform dB",
        "tuned dB",
        "gain",
        "ms uniform",
        "ms tuned",
    ):
        table.add_column(heading, justify="right")
    for point in record["points"]:
        uniform, tuned = (
            statistics.fmean(r[name] for r in point["rows"]) for name in ("uniform", "tuned")
        )
        table.add_row(
            f"{point['density']:g}", point["outcome"], f"{uniform:.2f}", f"{tuned:.2f}",
            f"{point['gain_db']:+.2f}", f"{point['uniform']['ms']:.1f}",
            f"{point['tuned']['ms']:.1f}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    if "speedup" in record:
        measured = record["speedup"]["measured"]["speedup"]
        off = measured / record["speedup"]["objective"] - 1
        console.print(
            f"target_speedup {record['speedup']['objective']:g}: {measured:.3f} ({off:+.1%})"
        )
    if "max_error" in record:
        found, bound = record["max_error"]["unseen"], record["max_error"]["objective"]
        kept = sum(error <= bound for error in found)
        console.print(
            f"max_error {bound:g}: kept on {kept} of {len(found)} unseen seeds, "
            f"worst {max(found):.3g}"
        )


if __name__ == "__main__":
    main()
