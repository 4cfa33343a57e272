"""A finished comparison: its clips, what they say of each setting, and which one is recommended."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svg_ear_compile.compare.figures import Figures, finite
from svg_ear_compile.compare.frames import Frames
from svg_ear_compile.compare.setting import DENSE, Setting

FORMAT = 1
"""Version of ``figures.json``."""

LEAST_NOISE = 0.02

Key = tuple[int, int]
"""Index of the prompt and the seed of a clip."""


@dataclass(frozen=True)
class Clip:
    """One generated clip.

    Attributes:
        frames: raw, see `Frames`.
        seconds: of the whole generation.
        compiled: a graph was compiled meanwhile, so `seconds` counts only where none else do.
        peak_bytes: most device memory, None without a GPU.
        density: mean over the layers that ran sparse, None if none did.
        figures: against the dense clip; None for the dense one itself.
        repeat_psnr: dB between this clip and the uncounted generation of the same prompt and seed
            (infinite: it repeats bit for bit); None where there was none.
    """

    frames: Frames = field(repr=False)
    seconds: float
    compiled: bool = False
    peak_bytes: int | None = None
    density: float | None = None
    figures: Figures | None = None
    repeat_psnr: float | None = None


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some figures; infinite ones are of equal clips."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """Of one value or more; None of none."""
        if not values:
            return None
        return cls(statistics.median_low(values), min(values), max(values))

    def to_json(self) -> dict[str, float | None]:
        """Plain JSON values, null for infinite ones."""
        return {
            "median": finite(self.median),
            "least": finite(self.least),
            "greatest": finite(self.greatest),
        }


@dataclass(frozen=True)
class Summary:
    """What the clips of one setting say of it; `Spread` is over the clips.

    Attributes:
        seconds: of one generation, without those that compiled.
        speedup: dense seconds over this setting's, clip by clip; None for dense.
        psnr, ssim, flicker: see `Figures`; flicker is the ratio to dense. None for dense.
        peak_bytes: the greatest, None without a GPU.
        density: mean over the clips, None if no layer ran sparse.
    """

    seconds: Spread
    speedup: Spread | None
    psnr: Spread | None
    ssim: Spread | None
    flicker: Spread | None
    peak_bytes: int | None
    density: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("seconds", "speedup", "psnr", "ssim", "flicker")
        spreads = {name: getattr(self, name) for name in names}
        return {
            **{name: None if s is None else s.to_json() for name, s in spreads.items()},
            "peak_bytes": self.peak_bytes,
            "density": self.density,
        }


@dataclass(frozen=True)
class Recommendation:
    """The setting to use and one sentence that says why."""

    setting: Setting
    why: str


@dataclass(frozen=True)
class Comparison:
    """Every clip of a comparison and how it was made.

    Attributes:
        prompts: texts.
        seeds: whole numbers.
        settings: the sparse ones; `DENSE` is what they are compared with.
        clips: by setting name, then by (index of the prompt, seed).
        conditions: what the figures were measured with, as (name, value) for the page.
        floor_db: see `compare`.
        fps: frames per second of the players.
        page: where the page was written.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]
    clips: Mapping[str, Mapping[Key, Clip]] = field(repr=False)
    conditions: tuple[tuple[str, str], ...]
    floor_db: float = 30.0
    fps: float = 16.0
    page: Path = field(default_factory=lambda: Path("index.html"))

    @property
    def all_settings(self) -> tuple[Setting, ...]:
        """The dense reference and then the settings."""
        return (DENSE, *self.settings)

    @property
    def pairs(self) -> list[Key]:
        """Of all clips of a setting: one seed of every prompt first."""
        return [(prompt, seed) for seed in self.seeds for prompt in range(len(self.prompts))]

    def timed(self, setting: Setting) -> dict[Key, float]:
        """Seconds of the clips that count: of all where every one compiled something."""
        clips = self.clips[setting.name]
        steady = {key: clip.seconds for key, clip in clips.items() if not clip.compiled}
        return steady or {key: clip.seconds for key, clip in clips.items()}

    @property
    def time_noise(self) -> float:
        """Range of the dense seconds over their median: differences below it mean nothing.

        At least `LEAST_NOISE`, which two generations alone may miss.
        """
        seconds = list(self.timed(DENSE).values())
        return max((max(seconds) - min(seconds)) / statistics.median(seconds), LEAST_NOISE)

    def summary(self, setting: Setting) -> Summary:
        """What the clips of a setting say of it."""
        clips = list(self.clips[setting.name].values())
        seconds, dense = self.timed(setting), self.timed(DENSE)
        figures = [clip.figures for clip in clips if clip.figures is not None]
        ratios = [f.flicker_ratio for f in figures]
        peaks = [clip.peak_bytes for clip in clips if clip.peak_bytes is not None]
        densities = [clip.density for clip in clips if clip.density is not None]
        spread_of_seconds = Spread.of(list(seconds.values()))
        assert spread_of_seconds is not None, "a comparison has clips of every setting"
        paired = [dense[key] / seconds[key] for key in seconds if key in dense]
        return Summary(
            spread_of_seconds,
            None if setting is DENSE else Spread.of(paired),
            Spread.of([f.psnr for f in figures]),
            Spread.of([f.ssim for f in figures]),
            Spread.of([ratio for ratio in ratios if ratio is not None]),
            max(peaks, default=None),
            sum(densities) / len(densities) if densities else None,
        )

    def paired(
        self, setting: Setting, other: Setting, figure: Callable[[Figures], float]
    ) -> Spread | None:
        """Differences of a figure between two settings, clip by clip; None against dense."""
        differences = []
        for key, clip in self.clips[setting.name].items():
            beside = self.clips[other.name][key]
            if clip.figures is None or beside.figures is None:
                return None
            a, b = figure(clip.figures), figure(beside.figures)
            differences.append(0.0 if a == b else a - b)  # two infinite ones are equal
        return Spread.of(differences)

    @property
    def recommended(self) -> Recommendation:
        """The fastest setting whose every clip keeps `floor_db`, if that is faster than dense.

        Faster: the median of the paired speed-ups lies above 1 by more than `time_noise`.
        """
        summaries = {setting.name: self.summary(setting) for setting in self.settings}

        def floor(setting: Setting) -> float:
            psnr = summaries[setting.name].psnr
            assert psnr is not None, "only the dense setting has none"
            return psnr.least

        def speedup(setting: Setting) -> float:
            found = summaries[setting.name].speedup
            return 1.0 if found is None else found.median

        # Under a setting that ran nothing sparse, a shorter time is chance.
        sparse = [s for s in self.settings if summaries[s.name].density is not None]
        faster = [s for s in sparse if speedup(s) > 1 + self.time_noise]
        good = [s for s in faster if floor(s) >= self.floor_db]
        if good:
            best = max(good, key=speedup)
            return Recommendation(
                best,
                f"the fastest of those whose every clip keeps {self.floor_db:g} dB",
            )
        if faster:
            nearest = max(faster, key=floor)
            return Recommendation(
                DENSE,
                f"no faster setting keeps {self.floor_db:g} dB in every clip; "
                f"{nearest.name} comes nearest with {floor(nearest):.1f} dB in its worst",
            )
        return Recommendation(
            DENSE,
            "no setting was faster than dense by more than the noise of "
            f"{100 * self.time_noise:.1f} %",
        )

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain JSON values; an infinite PSNR is null, equal frames."""
        recommended = self.recommended
        return {
            "format": FORMAT,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "conditions": dict(self.conditions),
            "floor_db": self.floor_db,
            "time_noise": self.time_noise,
            "recommended": {"name": recommended.setting.name, "why": recommended.why},
            "settings": [
                {
                    **setting.to_json(),
                    "summary": self.summary(setting).to_json(),
                    "clips": [
                        self._clip_json(setting, key)
                        for key in self.pairs
                        if key in self.clips[setting.name]
                    ],
                }
                for setting in self.all_settings
            ],
        }

    def _clip_json(self, setting: Setting, key: Key) -> dict[str, Any]:
        clip = self.clips[setting.name][key]
        return {
            "prompt": key[0],
            "seed": key[1],
            "seconds": clip.seconds,
            "compiled": clip.compiled,
            "peak_bytes": clip.peak_bytes,
            "density": clip.density,
            "repeats": None if clip.repeat_psnr is None else clip.repeat_psnr == float("inf"),
            "figures": None if clip.figures is None else clip.figures.to_json(),
        }
