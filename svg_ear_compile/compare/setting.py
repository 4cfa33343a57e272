"""One setting of a comparison: the backend's options, and how many leading steps stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from svg_ear_compile.kernels.checked import InvalidTypeError, shown
from svg_ear_compile.settings import Settings

DENSE_NAME = "dense"

OBJECTIVES = ("density", "target_speedup", "budget")
"""Options that are arguments of `accelerate`."""


@dataclass(frozen=True)
class Setting:
    """What one series of generations runs with.

    Attributes:
        name: unique within a comparison.
        options: of ``torch.compile(..., backend="svg_ear", options=...)``; None for the dense
            reference, which Inductor compiles.
        dense_steps: leading denoising steps with dense attention.
    """

    name: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    dense_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """The setting as plain JSON values.

        Raises:
            TypeError: the value of an option is none; the message names the option.
        """
        options = None if self.options is None else _plain("options", self.options)
        return {"name": self.name, "options": options, "dense_steps": self.dense_steps}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `accelerate` that select this setting, which is not dense."""
        options = dict(self.options or {})
        given = {name: options.pop(name) for name in OBJECTIVES if name in options}
        if options:
            given["options"] = options
        if self.dense_steps:
            given["dense_steps"] = self.dense_steps
        return given

    def code(self) -> str:
        """The lines that select this setting for a pipeline called ``pipe``."""
        if self.options is None:
            return "# Dense attention: leave the pipeline as it is."
        given = "".join(f", {name}={value!r}" for name, value in self.arguments().items())
        return f"import svg_ear_compile\nsvg_ear_compile.accelerate(pipe{given})"


DENSE = Setting(DENSE_NAME, None)


def settings_of(
    densities: Sequence[float], settings: Sequence[Mapping[str, Any]], dense_steps: int
) -> tuple[Setting, ...]:
    """The settings of a comparison, checked before anything is generated.

    Raises:
        ValueError, TypeError: no setting, two of one name, or what the backend would refuse.
    """
    for name, value in (("densities", densities), ("settings", settings)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a list, got {shown(value)}")
    given: list[Mapping[str, Any]] = [{"density": density} for density in densities]
    given += settings
    if not given:
        raise ValueError("nothing to compare: give densities or settings")
    for each in given:
        if not isinstance(each, Mapping) or not all(isinstance(key, str) for key in each):
            raise TypeError(f"a setting must map names of options to values, got {each!r:.80}")
    # What all settings share tells none from another.
    shared = [key for key in given[0] if all(key in s and s[key] == given[0][key] for s in given)]
    found = [_setting(each, dense_steps, shared if len(given) > 1 else []) for each in given]
    names = [DENSE_NAME, *(setting.name for setting in found)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two settings are called {name!r}: give them names of their own")
    return tuple(found)


def _setting(given: Mapping[str, Any], dense_steps: int, shared: Sequence[str]) -> Setting:
    options = dict(given)
    steps = options.pop("dense_steps", dense_steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"dense_steps must be a whole number from 0, got {steps!r}")
    name = options.pop("name", None)
    if name is None:
        told = {key: value for key, value in given.items() if key not in shared}
        name = ", ".join(f"{key} {value}" for key, value in told.items()) or "defaults"
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"the name of a setting must be text, got {name!r:.80}")
    Settings.parse(options)
    setting = Setting(name.strip(), options, steps)
    setting.to_json()  # raises for what no folder of clips can tell from another value
    return setting


def _plain(name: str, value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(str(key), each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    if isinstance(value, (Path, slice)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InvalidTypeError(f"compare cannot write down the option {name}, got {shown(value)}")
