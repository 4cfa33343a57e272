"""The command `svg-ear compare`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from svg_ear_compile.compare import compare
from svg_ear_compile.cost_model import json_record
from svg_ear_compile.digits import three_digits
from svg_ear_compile.kernels.checked import shown
from svg_ear_compile.made_models import callable_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from svg_ear_compile.compare.comparison import Comparison, Spread

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_MOST_SEEDS = 10_000


def add(commands: Any) -> None:
    """Add the command to the sub-parsers."""
    about = "generate clips dense and sparse, and write a page that shows what changed"
    command = commands.add_parser("compare", help=about, description=about)
    command.add_argument(
        "--pipeline",
        required=True,
        metavar="MODULE:CALLABLE",
        help="a callable without arguments that returns a pipeline, such as diffusers' ones, or "
        "(pipeline, keyword arguments of every call)",
    )
    command.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="a text file, one prompt a line"
    )
    command.add_argument("--densities", default="", help="settings, e.g. 0.1,0.2,0.3")
    command.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="more settings: a JSON list of option objects, with name and dense_steps if wanted",
    )
    command.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … (default: 3)")
    command.add_argument(
        "--dense-steps", type=int, default=0, help="leading dense denoising steps (default: 0)"
    )
    command.add_argument(
        "--floor", type=float, default=30.0, metavar="DB",
        help="least PSNR of a clip of the recommended setting (default: 30)",
    )  # fmt: skip
    command.add_argument("--fps", type=float, default=16.0, help="of the players (default: 16)")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder; a second run goes on there"
    )
    command.set_defaults(run=_compare)


class _Counted(TypedDict):
    done: int
    total: int


def _compare(given: argparse.Namespace) -> None:
    make = callable_of(given.pipeline, "--pipeline")
    if not 1 <= given.seeds <= _MOST_SEEDS:
        raise ValueError(f"--seeds must be from 1 to {_MOST_SEEDS:,}, got {given.seeds}")
    prompts, densities = _prompts(given.prompts), _densities(given.densities)
    settings = [] if given.settings is None else _settings(given.settings)
    console = Console()
    counted: _Counted = {"done": 0, "total": 0}
    try:
        with _progress(console, counted) as on_progress:
            found = compare(
                make,
                prompts,
                given.out,
                densities=densities,
                settings=settings,
                seeds=given.seeds,
                dense_steps=given.dense_steps,
                floor_db=given.floor,
                fps=given.fps,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        console.print(
            f"svg-ear: stopped; {counted['done']} of {counted['total']} clips are kept in "
            f"{given.out}: run the same command again to go on",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise SystemExit(INTERRUPTED) from None
    report(found, console)


@contextmanager
def _progress(console: Console, counted: _Counted) -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def show(what: str, done: int, total: int) -> None:
            counted["done"], counted["total"] = done, total
            progress.update(task, description=escape(what), completed=done, total=total)

        yield show


def report(found: Comparison, console: Console) -> None:
    """Print the figures of a comparison, the recommended setting and the path of the page."""
    table = Table(caption="medians over the clips; PSNR: worst clip in brackets")
    table.add_column("setting")
    has_peaks = any(found.summary(setting).peak_bytes is not None for setting in found.all_settings)
    headings = ["density", "seconds", "speed-up", "PSNR dB", "SSIM", "flicker"]
    for heading in headings + ["peak GiB"] * has_peaks:
        # A heading may be cut between its words, and never inside of one.
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    recommended = found.recommended
    for setting in found.all_settings:
        summary = found.summary(setting)
        star = " ★" if setting is recommended.setting else ""
        dense = setting.options is None
        psnr = summary.psnr
        table.add_row(
            escape(setting.name) + star,
            _density(summary.density, dense),
            three_digits(summary.seconds.median),
            _median(summary.speedup, ".2f"),
            "-" if psnr is None else f"{_number(psnr.median)} ({_number(psnr.least)})",
            _median(summary.ssim, ".4f"),
            _median(summary.flicker, ".2f"),
            *[_peak(summary.peak_bytes)] * has_peaks,
        )  # fmt: skip
    console.print(table)
    for setting in found.settings:
        if found.summary(setting).density is None:
            console.print(
                f"Nothing ran sparse under {setting.name}: svg-ear explain says why",
                style="bold", markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
    for line in (
        f"Recommended: {recommended.setting.name}, {recommended.why}.",
        recommended.setting.code(),
        str(found.page),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _density(reached: float | None, dense: bool) -> str:
    if dense:
        return "1"
    return "none sparse" if reached is None else f"{reached:.3f}"


def _peak(peak_bytes: float | None) -> str:
    return "-" if peak_bytes is None else f"{peak_bytes / 2**30:.2f}"


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal"


def _median(spread: Spread | None, form: str) -> str:
    return "-" if spread is None else format(spread.median, form)


def _prompts(path: Path) -> list[str]:
    with json_record.naming(path):
        lines = json_record.read_bytes(path).decode("utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt")
    return prompts


def _densities(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--densities must be numbers such as 0.1,0.2, got {text!r}") from None


def _settings(path: Path) -> list[dict[str, Any]]:
    with json_record.naming(path):
        found = json_record.parse(json_record.read_bytes(path))
    if not isinstance(found, list):
        raise ValueError(f"{path} must be a list of option objects, got {shown(found)}")
    return found
