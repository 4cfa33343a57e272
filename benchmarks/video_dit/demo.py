"""One clip, generated dense and through ``backend="svg_ear"``: ``make demo``.

The same noise goes through the same model under Inductor, under ``svg_ear`` with the paper's
compensation and under ``svg_ear`` with its own. Writes an animation and a contact sheet of all
three, every number as JSON, and the page of ``svg-ear compare``. What it shows is fidelity and what
was rewritten: at the 2,304 tokens that suit a CPU, sparse attention is not meant to be faster, and
the seconds are printed as measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.video_dit.compare import (
    FrameScores,
    ShownClip,
    score_frames,
    write_animation,
    write_contact_sheet,
)
from benchmarks.video_dit.data import DEMO_SHAPE, LABELS, TRAIN_SHAPE
from benchmarks.video_dit.demo_runs import (
    CAMERA,
    TITLES,
    DemoSettings,
    Run,
    explain_rewrite,
    generate_run,
    sparse_options,
)
from benchmarks.video_dit.model import VideoDiT
from svg_ear_compile.compare.comparison import Clip, Comparison
from svg_ear_compile.compare.figures import figures_of
from svg_ear_compile.compare.frames import frames_of
from svg_ear_compile.compare.page import page_of
from svg_ear_compile.compare.setting import DENSE, Setting

WEIGHTS = Path(__file__).with_name("weights")
SHAPES = {"short": DEMO_SHAPE, "long": TRAIN_SHAPE}


def run_demo(settings: DemoSettings, weights: Path, out: Path, console: Console) -> dict[str, Any]:
    """Generate, compare, print and write everything; returns what ``demo.json`` holds."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def load() -> VideoDiT:
        return VideoDiT.from_pretrained(weights, dtype=settings.dtype, device=settings.device)

    console.rule("What the backend rewrites")
    explained = explain_rewrite(settings, load())
    # Wider than most terminals: better wrapped by the terminal than cut here.
    console.print(explained, markup=False, highlight=False, soft_wrap=True)

    console.rule("Generating")
    runs = []
    columns = (
        TextColumn("{task.description:<13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console) as progress:
        for compensation in (None, *settings.compensations):
            title = "dense" if compensation is None else TITLES[compensation]
            task = progress.add_task(title, total=settings.steps, last="compiling")

            def show(step: int, seconds: float, task: Any = task) -> None:
                progress.update(task, completed=step + 1, last=f"{seconds:.2f} s/step")

            # A model of its own for each run: a session stays on the model that it was bound to.
            runs.append(generate_run(settings, load(), compensation, show))

    dense, *sparse = runs
    scores = [score_frames(run.frames, dense.frames) for run in sparse]
    total = time.perf_counter() - started
    record = make_record(settings, runs, scores, total, explained)
    (out / "demo.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_pictures(settings, runs, scores, out)
    page = out / "index.html"
    page.write_text(page_of(comparison_of(settings, runs, load().config.patch, page)))
    print_results(settings, runs, scores, console)
    names = ("side_by_side.gif", "contact_sheet.jpg", "demo.json")
    console.print(f"{total:.0f} s in all. Wrote " + ", ".join(str(out / name) for name in names))
    console.print(f"Open {page} in a browser", soft_wrap=True)
    return record


def make_record(
    settings: DemoSettings,
    runs: list[Run],
    scores: list[FrameScores],
    total_seconds: float,
    explained: str,
) -> dict[str, Any]:
    """Every number of the demo as plain JSON values; the PSNR of equal frames is null.

    ``runs`` is the dense run and then the sparse ones, ``scores`` one entry per sparse run.
    """
    frames, height, width = settings.shape
    return {
        "settings": {**asdict(settings), "label": LABELS[settings.label], "camera": CAMERA},
        "device": device_name(settings.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "svg-ear-compile": version("svg-ear-compile"),
        },
        "clip": {"frames": frames, "height": height, "width": width},
        "total_seconds": total_seconds,
        "explain": explained.splitlines(),
        "runs": [
            {
                "title": run.title,
                "compensation": run.compensation,
                "finite": bool(run.frames.isfinite().all()),
                "seconds": {
                    "first_step": run.step_seconds[0],
                    "median_step": run.median_seconds(settings.dense_steps),
                    "steps": list(run.step_seconds),
                },
                "density_mean": run.mean_density(),
                "layers": [asdict(layer) for layer in run.layers],
                "scores": None if score is None else _json_scores(score),
            }
            for run, score in zip(runs, [None, *scores], strict=True)
        ],
    }


def comparison_of(settings: DemoSettings, runs: list[Run], patch: int, page: Path) -> Comparison:
    """The runs, the dense one first, as what ``svg-ear compare`` shows on its page."""
    key = (0, settings.seed)
    dense = frames_of(runs[0].frames)
    clips: dict[str, dict[tuple[int, int], Clip]] = {}
    sparse = []
    for run in runs:
        frames = frames_of(run.frames)
        seconds = settings.steps * run.median_seconds(settings.dense_steps)
        if run.compensation is None:
            clips[DENSE.name] = {key: Clip(frames, seconds)}
            continue
        options = sparse_options(settings, patch, run.compensation)
        sparse.append(Setting(run.title, options, settings.dense_steps))
        figures = figures_of(frames, dense)
        clips[run.title] = {key: Clip(frames, seconds, density=run.mean_density(), figures=figures)}
    conditions = (
        ("device", device_name(settings.device)),
        ("torch", torch.__version__),
        ("seconds", f"{settings.steps} × the median step after the {settings.dense_steps} dense"),
    )
    return Comparison(
        (LABELS[settings.label],), (settings.seed,), tuple(sparse), clips, conditions, fps=9.0,
        page=page,
    )  # fmt: skip


def write_pictures(
    settings: DemoSettings, runs: list[Run], scores: list[FrameScores], out: Path
) -> None:
    """Write ``side_by_side.gif`` and ``contact_sheet.jpg`` into ``out``."""
    dense, *sparse = runs
    reference = ShownClip(dense.title, f"{settings.steps} steps", dense.frames)
    others = [
        ShownClip(run.title, _caption(run, score), run.frames, score)
        for run, score in zip(sparse, scores, strict=True)
    ]
    write_animation(out / "side_by_side.gif", [reference, *others])
    write_contact_sheet(out / "contact_sheet.jpg", reference, others)


def print_results(
    settings: DemoSettings, runs: list[Run], scores: list[FrameScores], console: Console
) -> None:
    """Print densities per layer, scores per frame and mean, and the seconds of every run."""
    sparse = runs[1:]
    densities = Table(title="Density reached by the last step, per layer")
    densities.add_column("layer")
    densities.add_column("told apart by")
    for run in sparse:
        densities.add_column(run.title, justify="right")
    for layers in zip(*(run.layers for run in sparse), strict=True):
        reached = ["-" if x.density is None else f"{x.density:.3f}" for x in layers]
        densities.add_row(layers[0].path, layers[0].identity, *reached)
    console.print(densities)

    fidelity = Table(title="Against the dense clip, raw frames")
    fidelity.add_column("frame")
    for run in sparse:
        fidelity.add_column(f"{run.title}\nPSNR dB", justify="right")
        fidelity.add_column(f"{run.title}\nSSIM", justify="right")
    for frame in range(len(runs[0].frames)):
        cells = [(score.psnr[frame], score.ssim[frame]) for score in scores]
        fidelity.add_row(str(frame), *_score_cells(cells))
    fidelity.add_section()
    for name in ("mean", "min"):
        summaries = [score.summary() for score in scores]
        cells = [(s[f"psnr_{name}"], s[f"ssim_{name}"]) for s in summaries]
        fidelity.add_row(name, *_score_cells(cells), style="bold")
    console.print(fidelity)

    timing = Table(title=f"Seconds per step on {device_name(settings.device)}")
    for heading in ("run", "density", "first, with compilation", "median of the others"):
        timing.add_column(heading, justify="left" if heading == "run" else "right")
    for run in runs:
        density = run.mean_density()
        timing.add_row(
            run.title,
            "1" if density is None else f"{density:.3f}",
            f"{run.step_seconds[0]:.2f}",
            f"{run.median_seconds(settings.dense_steps):.3f}",
        )
    console.print(timing)
    console.print(
        f"The first {settings.dense_steps} steps are dense in every run and not in the median. "
        "Clips this short are here to compare pictures: sparse attention pays at tens of thousands "
        "of tokens. First steps do not compare: later runs find earlier kernels on disk."
    )


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's architecture and the number of threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _caption(run: Run, score: FrameScores) -> str:
    density = run.mean_density()
    kept = "dense" if density is None else f"{density:.0%} exact"
    return f"{kept}, {_number(score.summary()['psnr_mean'], '.1f')} dB"


def _json_scores(score: FrameScores) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "psnr": [finite(value) for value in score.psnr],
        "ssim": list(score.ssim),
        **{name: finite(value) for name, value in score.summary().items()},
    }


def _score_cells(cells: list[tuple[float, float]]) -> list[str]:
    return [text for psnr, ssim in cells for text in (_number(psnr, ".2f"), f"{ssim:.4f}")]


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "∞"


def settings_from(arguments: argparse.Namespace) -> DemoSettings:
    """The device's defaults with what the command line says in their place."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("steps", "dense_steps", "density", "seed", "guidance")
        if getattr(arguments, name) is not None
    }
    if arguments.shape is not None:
        given["shape"] = SHAPES[arguments.shape]
    if arguments.label is not None:
        given["label"] = LABELS.index(arguments.label)
    if arguments.compensation is not None:
        given["compensations"] = (arguments.compensation,)
    return replace(DemoSettings.for_device(device), **given)


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Defaults depend on the device."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and JSON")
    parser.add_argument("--device", help="cuda where there is a GPU, else cpu")
    parser.add_argument("--shape", choices=SHAPES, help="9 or 27 frames: 2,304 or 6,912 tokens")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--dense-steps", type=int, help="leading steps that stay dense")
    parser.add_argument("--density", type=float, help="fraction of attention computed exactly")
    parser.add_argument("--seed", type=int, help="seed of the noise")
    parser.add_argument("--label", choices=LABELS, help="what the clip shows")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none")
    parser.add_argument("--compensation", choices=TITLES, help="only this one instead of both")
    arguments = parser.parse_args()
    run_demo(settings_from(arguments), WEIGHTS, arguments.out, Console())


if __name__ == "__main__":
    main()
