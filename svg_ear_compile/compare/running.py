"""Runs the generations of a comparison, setting by setting, and writes what they show."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svg_ear_compile.compare.comparison import FORMAT, Clip, Comparison, Key
from svg_ear_compile.compare.figures import figures_of, psnr
from svg_ear_compile.compare.folder import Folder, make_folder
from svg_ear_compile.compare.identity import identity_of
from svg_ear_compile.compare.page import page_of
from svg_ear_compile.compare.pipeline import Generated, Pipeline, check_make
from svg_ear_compile.compare.setting import DENSE, Setting
from svg_ear_compile.compare.switching import compiled_for
from svg_ear_compile.cost_model.device import describe

Progress = Callable[[str, int, int], None]

PAGE, FIGURES = "index.html", "figures.json"


def run(
    make: Callable[[], Any],
    prompts: Sequence[str],
    out: Path,
    settings: tuple[Setting, ...],
    *,
    seeds: tuple[int, ...],
    floor_db: float,
    fps: float,
    on_progress: Progress,
) -> Comparison:
    """See `compare`, whose arguments these are, checked and completed here."""
    _check(prompts, seeds, floor_db, fps)
    check_make(make)
    make_folder(out)  # before weights are loaded
    pipeline = Pipeline(make())
    conditions = _conditions(pipeline)
    folder = Folder(
        out,
        {
            "format": FORMAT,
            "prompts": list(prompts),
            "seeds": list(seeds),
            "settings": [setting.to_json() for setting in settings],
            **dict(conditions),
            **identity_of(pipeline, settings),
        },
    )
    keys = [(prompt, seed) for seed in seeds for prompt in range(len(prompts))]
    clips = _Generations(pipeline, folder, tuple(prompts), keys, settings, on_progress).all()
    found = Comparison(
        tuple(prompts), seeds, settings, clips, conditions, floor_db, fps, out / PAGE
    )  # fmt: skip
    folder.write(FIGURES, json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n")
    folder.write(PAGE, page_of(found))
    return found


@dataclass
class _Generations:
    """The generations of one comparison; `done` counts the clips that are there."""

    pipeline: Pipeline
    folder: Folder
    prompts: tuple[str, ...]
    keys: list[Key]
    settings: tuple[Setting, ...]
    on_progress: Progress
    done: int = 0

    def all(self) -> dict[str, dict[Key, Clip]]:
        """Clips by setting and key: those that are kept, and new ones for those that are not."""
        found: dict[str, dict[Key, Clip]] = {}
        remade: set[Key] = (
            set()
        )  # whose dense clip is new: what was compared with an old one is not
        for index, setting in enumerate((DENSE, *self.settings)):
            kept = {key: self.folder.load(index, key) for key in self.keys if key not in remade}
            there = {key: clip for key, clip in kept.items() if clip is not None}
            self.done += len(there)
            self._say(f"{setting.name}: {len(there)} kept")
            if len(there) < len(self.keys):
                there |= self._missing(index, setting, there, found.get(DENSE.name, {}))
            if setting is DENSE:
                remade = {key for key in self.keys if kept[key] is None}
            found[setting.name] = {key: there[key] for key in self.keys}
        return found

    def _missing(
        self, index: int, setting: Setting, there: dict[Key, Clip], dense: dict[Key, Clip]
    ) -> dict[Key, Clip]:
        """Generate and keep the clips of a setting that are not `there`."""
        missing = [key for key in self.keys if key not in there]
        found = {}
        with compiled_for(self.pipeline, setting) as handle:
            # Not counted: it compiles, fills caches, and shows whether the picture repeats.
            repeat = self._generate(setting, missing[0], "compiling")
            self._check_room(repeat, len(missing))
            for key in missing:
                made = self._generate(setting, key, f"seed {key[1]}")
                self._say(f"{setting.name}, comparing frames")
                clip = Clip(
                    made.frames,
                    made.seconds,
                    made.compiled,
                    made.peak_bytes,
                    None if handle is None else handle.report().density,
                    figures_of(made.frames, dense[key].frames) if dense else None,
                    psnr(made.frames, repeat.frames) if key == missing[0] else None,
                )
                found[key] = self.folder.keep(index, key, clip)
                self.done += 1
                self._say(setting.name)
        return found

    def _generate(self, setting: Setting, key: Key, what: str) -> Generated:
        self._say(f"{setting.name}, {what}")

        def on_step(step: int) -> None:
            self._say(f"{setting.name}, {what}, step {step}")

        try:
            return self.pipeline.generate(self.prompts[key[0]], key[1], on_step)
        except (TypeError, ValueError) as error:
            where = f"{setting.name}, prompt {key[0] + 1}, seed {key[1]}"
            raise type(error)(f"{error} ({where})") from error

    def _check_room(self, made: Generated, clips: int) -> None:
        needed, free = made.frames.nbytes * clips, shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise ValueError(
                f"{self.folder.path} has {free / 2**30:.1f} GiB of room, but the next {clips} "
                f"clips take {needed / 2**30:.1f} GiB"
            )

    def _say(self, what: str) -> None:
        self.on_progress(what, self.done, len(self.keys) * (1 + len(self.settings)))


def _check(prompts: Sequence[str], seeds: tuple[int, ...], floor_db: float, fps: float) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of one text or more, got {prompts!r:.80}")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"a prompt must be text that is not empty, got {prompt!r:.80}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {seeds}")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"a seed must be a whole number from 0, got {seed!r}")
    for name, value in (("floor_db", floor_db), ("fps", fps)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _conditions(pipeline: Pipeline) -> tuple[tuple[str, str], ...]:
    """What the page says of how the figures were made, as (name, value)."""
    models = {
        name: f"{type(module).__name__}, {_dtypes(module)}"
        for name, module in pipeline.modules.items()
    }
    ours = describe("cuda" if torch.cuda.is_available() else "cpu")
    given = ", ".join(
        f"{name}={value!r}"
        for name, value in sorted(pipeline.given.items())
        if isinstance(value, (int, float, str, type(None)))
    )
    return (
        *models.items(),
        ("call", given or "the pipeline's defaults"),
        ("device", ours.name),
        ("torch", ours.torch),
        ("kernels", ours.kernels),
    )


def _dtypes(module: nn.Module) -> str:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    return " and ".join(dtypes)
