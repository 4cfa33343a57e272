"""The commands `svg-ear calibrate`, `svg-ear tune` and `svg-ear plot`."""

from __future__ import annotations

import argparse
import os
import re
import statistics
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from svg_ear_compile.calibrating import calibrate
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import calibration as calibrations
from svg_ear_compile.cost_model import device_profile, json_record
from svg_ear_compile.cost_model.allocation import Objective
from svg_ear_compile.cost_model.budget import Budget, Performance
from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.fit import compare
from svg_ear_compile.digits import three_digits
from svg_ear_compile.kernels.checked import (
    LARGEST,
    InvalidValueError,
    Range,
    checked,
    printable,
    shown,
)
from svg_ear_compile.kernels.plan import AttentionPlan, Compensation
from svg_ear_compile.made_models import model_and_calls, model_and_inputs
from svg_ear_compile.terminal import plain
from svg_ear_compile.tuning import Cost, TuningSettings, tune

Read = TypeVar("Read")

PLOT_FORMATS = ("png", "svg", "pdf", "jpg", "webp")
_READABLE = 72  # characters of a line of text
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def add(commands: Any) -> None:
    """Add the commands to the sub-parsers."""
    about = "measure this device once, in half a minute, so that predicted times are its own"
    command = commands.add_parser("calibrate", help=about, description=about)
    command.add_argument(
        "--quick",
        action="store_true",
        help="in 8 seconds, less exact: scales the times that are there",
    )
    command.add_argument("--device", default=_DEVICE, help=f"default: {_DEVICE}")
    command.set_defaults(run=_calibrate)

    about = "measure a model and write its best budget for one objective"
    command = commands.add_parser("tune", help=about, description=about)
    command.add_argument(
        "--model",
        required=True,
        metavar="MODULE:CALLABLE",
        help="a callable without arguments that returns (model, calls): a list of ModelCall, of "
        "argument tuples, or of (args, kwargs) pairs",
    )
    objective = command.add_mutually_exclusive_group(required=True)
    objective.add_argument(
        "--target-speedup",
        type=_finite,
        help="speed-up of one sparse forward over a forward compiled by Inductor",
    )
    objective.add_argument(
        "--max-error", type=_finite, help="relative RMS error of the model's output"
    )
    objective.add_argument(
        "--density", type=_finite, help="mean fraction of the query-key area computed exactly"
    )
    command.add_argument("--out", type=Path, required=True, help="budget file to write")
    command.add_argument(
        "--densities",
        type=_densities,
        default="0.05,0.1,0.2,0.4",
        help="densities tried in each layer (default: %(default)s)",
    )
    command.add_argument(
        "--clusters",
        type=_cluster_sizes,
        default="default",
        help="mean cluster sizes that are tried: QUERIESxKEYS or default, e.g. default,256x64",
    )
    command.add_argument(
        "--forms",
        type=_forms,
        default=AttentionPlan.compensation,
        help="compensations that are tried: gaussian, centroid or both (default: %(default)s)",
    )
    command.add_argument(
        "--phases",
        type=_number(1, 1000),
        default=1,
        help="parts of the denoising with densities of their own (default: 1)",
    )
    command.add_argument(
        "--dense-steps",
        type=_number(0),
        default=0,
        help="leading dense denoising steps (default: 0)",
    )
    command.add_argument(
        "--dense-from", type=_finite, help="timestep from which on the last steps are dense"
    )
    command.add_argument(
        "--thresholds", action="store_true", help="route by an error threshold, not by density"
    )
    command.add_argument("--timestep", help="name of the model's timestep argument")
    command.add_argument(
        "--ascending", action="store_true", help="timesteps rise from noise to video"
    )
    command.add_argument(
        "--eager", action="store_true", help="without Inductor: quick, no real times"
    )
    command.set_defaults(run=_tune)

    about = "plot a budget, its frontier, predicted against measured times, or a block mask"
    command = commands.add_parser("plot", help=about, description=about)
    command.add_argument("what", choices=("budget", "frontier", "times", "blocks"))
    command.add_argument("--budget", type=Path, metavar="FILE", help="for budget and frontier")
    command.add_argument("--device", default=_DEVICE, help="calibrated device, for times")
    command.add_argument("--model", metavar="MODULE:CALLABLE", help="as for explain, for blocks")
    command.add_argument("--layer", help="layer path, for blocks (default: the first)")
    command.add_argument("--head", type=_number(0), default=0, help="head, for blocks")
    command.add_argument("--density", type=_finite, default=0.2, help="density, for blocks")
    command.add_argument("--out", type=Path, required=True, help="image file to write, e.g. a .png")
    command.set_defaults(run=_plot)


def _finite(text: str) -> float:
    return _as_type(lambda: float(checked("a number", float(text), float)), "a finite number")


def _number(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Parser of an argument that is a whole number from `least` to `most`."""

    def read(text: str) -> int:
        kind = Annotated[int, Range(least, most)]
        words = f"a whole number from {least} to {most}"
        return _as_type(lambda: int(checked("a number", int(text), kind)), words)

    return read


def _densities(text: str) -> tuple[float, ...]:
    return tuple(_finite(part) for part in text.split(","))


def _forms(text: str) -> tuple[Compensation, ...]:
    return _as_type(
        lambda: tuple(checked("", part, Compensation) for part in text.split(",")),
        f"some of {', '.join(get_args(Compensation))}",
    )


def _cluster_sizes(text: str) -> tuple[tuple[int, int] | None, ...]:
    """Mean queries and keys per cluster, None for the default."""
    found: list[tuple[int, int] | None] = []
    for part in text.split(","):
        pair = re.fullmatch("([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", part)
        if pair is None and part != "default":
            raise argparse.ArgumentTypeError(
                f"takes default or QUERIESxKEYS, each at least 1, got {shown(part)}"
            )
        found.append(None if pair is None else (int(pair[1]), int(pair[2])))
    return tuple(found)


def _as_type(read: Callable[[], Read], words: str) -> Read:
    try:
        return read()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes {words}") from error


def _calibrate(given: argparse.Namespace) -> None:
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("roofs", total=1.0)

        def show(what: str, fraction: float) -> None:
            progress.update(task, description=what, completed=fraction)

        found = calibrate(given.device, quick=given.quick, on_sample=show)
    console.print(_calibration_table(found))
    console.print(plain(f"saved in {calibrations.cache_folder()}"), soft_wrap=True)


def _calibration_table(found: Calibration) -> Table:
    tested = [c for c in compare(found, found.samples) if not c.sample.fitted]
    table = Table(
        title=plain(found.device.name), caption=f"{found.seconds:.0f} s", show_header=False
    )
    for dtype, rate in found.roofs.flops.items():
        table.add_row(plain(f"matrix product, {dtype}"), f"{three_digits(rate)} TFLOP/s")
    table.add_row("copy", f"{three_digits(found.roofs.bandwidth)} GB/s")
    table.add_row("small operator", f"{1e3 * found.roofs.launch_ms:.2g} µs")
    classes = dict.fromkeys(f"{s.dtype}, head dim {s.head_dim}" for s in found.samples)
    table.add_row("calls measured", plain(f"{len(found.samples)}: {'; '.join(classes)}"))
    if found.uncertainty:
        table.add_row("uncertainty", f"{found.uncertainty:.0%}")
    if tested:
        off = [abs(c.op_error) for c in tested]
        table.add_row(
            f"sparse calls predicted, {len(off)} not fitted",
            f"off by {statistics.median(off):.0%} (median), {max(off):.0%} (worst)",
        )
    return table


def _tune(given: argparse.Namespace) -> None:
    if given.out.suffix == ".checkpoint":
        raise InvalidValueError(
            "--out must not end in .checkpoint: the checkpoint of the tuning has that name"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    json_record.check_writable(given.out)
    ranks, rank = (_environment(name) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    if ranks > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        # Ranks exchange single numbers, and rank 0 may measure for hours while the others wait.
        dist.init_process_group("gloo", timeout=timedelta(days=2))
    try:
        found = _tuned(given)
        if not dist.is_initialized() or dist.get_rank() == 0:
            found.save(given.out)
            Console().print(budget_table(found))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _environment(name: str) -> int:
    """A number that torchrun sets, 0 if it is not set."""
    text = os.environ.get(name, "0")
    if not re.fullmatch("[0-9]{1,6}", text):
        raise InvalidValueError(f"{name} must be a number, got {shown(text)}")
    return int(text)


def _tuned(given: argparse.Namespace) -> Budget:
    # Mistakes are answered before a model is loaded.
    Objective.of(given.target_speedup, given.max_error, given.density)
    settings = _settings(given)
    model, calls = model_and_calls(given.model)
    console = Console(quiet=dist.is_initialized() and dist.get_rank() > 0)
    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        def say(cost: Cost) -> None:
            each = f" on each of {cost.ranks} ranks" if cost.ranks > 1 else ""
            console.print(
                f"{cost.forwards} forwards to measure ({cost.finished} are in the checkpoint): "
                f"about {_duration(cost.seconds)}{each}; then whole budgets are run and compared, "
                f"in at most {_duration(cost.settling)}"
            )

        return tune(
            model,
            calls,
            target_speedup=given.target_speedup,
            max_error=given.max_error,
            density=given.density,
            settings=settings,
            checkpoint=given.out.with_suffix(".checkpoint"),
            on_cost=say,
            on_progress=show,
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _settings(given: argparse.Namespace) -> TuningSettings:
    return TuningSettings(
        densities=given.densities,
        cluster_sizes=given.clusters,
        forms=given.forms,
        phases=given.phases,
        dense_steps=given.dense_steps,
        dense_from=given.dense_from,
        thresholds=given.thresholds,
        timestep=given.timestep,
        ascending=given.ascending,
        compiler="eager" if given.eager else "inductor",
    )


def budget_table(found: Budget) -> Table:
    """Table of the choices by layer and phase, with predicted and measured performance."""
    known = {"predicted": found.predicted, "measured": found.measured, "uniform": found.uniform}
    lines = [f"{name}: {_figures(performance)}" for name, performance in known.items()]
    table = Table(
        title=plain(f"{found.objective}: {found.outcome}"),
        caption=plain(*lines, *found.note.split("; ")),
        caption_justify="left",
        min_width=_READABLE,  # of the caption, too
    )
    table.add_column("layer")
    for phase in range(found.schedule.phases):
        table.add_column(f"phase {phase + 1}" if found.schedule.phases > 1 else "choice")
    for layer, choices in found.layers.items():
        table.add_row(plain(layer), *(_words(choice) for choice in choices))
    return table


def _words(choice: budgets.Choice) -> str:
    if choice.density >= 1.0:
        return "dense"
    words = [f"{choice.density:.3g}"]
    if choice.q_clusters is not None:
        words.append(f"{choice.q_clusters} × {choice.k_clusters}")
    if choice.compensation != AttentionPlan.compensation:
        words.append(choice.compensation)
    if choice.threshold is not None:
        words.append(f"rho ≥ {choice.threshold:.2g}")
    return ", ".join(words)


def _figures(found: Performance) -> str:
    known = {
        "error": found.error, "ms": found.ms, "speed-up": found.speedup, "density": found.density,
    }  # fmt: skip
    return ", ".join(f"{name} {value:.4g}" for name, value in known.items() if value is not None)


def _plot(given: argparse.Namespace) -> None:
    from svg_ear_compile import plots

    if given.out.suffix[1:] not in PLOT_FORMATS:
        raise InvalidValueError(f"--out must end in one of {', '.join(PLOT_FORMATS)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.what in ("budget", "frontier"):
        if given.budget is None:
            raise InvalidValueError(f"plot {given.what} needs --budget FILE")
        draw = plots.budget if given.what == "budget" else plots.frontier
        draw(Budget.load(given.budget), given.out)
    elif given.what == "times":
        found = device_profile.load(describe(given.device))
        if not found.samples:
            raise InvalidValueError(f"{given.device} was not measured: run svg-ear calibrate first")
        plots.times(compare(found, found.samples), found.device.name, given.out)
    else:
        if given.model is None:
            raise InvalidValueError("plot blocks needs --model MODULE:CALLABLE")
        model, args, kwargs = model_and_inputs(given.model)
        plots.blocks(model, args, kwargs, given.layer, given.head, given.density, given.out)
    print(printable(str(given.out)))
