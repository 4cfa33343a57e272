"""The folder of a comparison: what is compared and every finished clip, so that a run can go on."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from svg_ear_compile.compare.comparison import Clip, Key
from svg_ear_compile.compare.figures import Figures, finite
from svg_ear_compile.compare.frames import Frames
from svg_ear_compile.cost_model import json_record
from svg_ear_compile.kernels.checked import (
    Fraction,
    InvalidValueError,
    NotNegative,
    Range,
    checked,
)

log = logging.getLogger(__name__)

_IDENTITY = "comparison.json"
_Bytes = Annotated[int, Range(0, 2**53)]


def make_folder(path: Path) -> None:
    """Make the folder of a comparison.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        (path / "clips").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be used as a folder of clips: {error}") from error


class Folder:
    """Clips under ``clips/``: frames as ``.npy``, everything else of a clip as ``.json``."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open the folder for a comparison, or make it.

        `identity` says what is compared, in plain JSON values.

        Raises:
            ValueError: the folder holds another comparison, or cannot be written.
        """
        self.path = path
        wanted = json.loads(json.dumps(identity))
        make_folder(path)
        try:
            if (path / _IDENTITY).exists():
                self._check(wanted)
            else:
                _write(path / _IDENTITY, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise ValueError(f"{path} cannot be used as a folder of clips: {error}") from error

    def _check(self, wanted: dict[str, Any]) -> None:
        try:
            kept = json_record.parse(json_record.read_bytes(self.path / _IDENTITY))
        except ValueError as error:
            raise ValueError(
                f"{self.path / _IDENTITY} is damaged, give another folder: {error}"
            ) from error
        kept = kept if isinstance(kept, dict) else {}
        different = [key for key in wanted if kept.get(key) != wanted[key]]
        if different:
            raise ValueError(
                f"{self.path} holds a comparison with other {' and other '.join(different)}: give "
                "another folder, or the same arguments to go on with that one"
            )

    def load(self, setting: int, key: Key) -> Clip | None:
        """The clip of the setting at this index (0 is dense), None if there is none to read."""
        name = self._name(setting, key)
        if not name.with_suffix(".json").exists():
            return None
        try:
            data = json_record.parse(json_record.read_bytes(name.with_suffix(".json")))
            figures, repeat = data["figures"], data["repeat_psnr"]
            return Clip(
                _frames(name.with_suffix(".npy")),
                checked("seconds", data["seconds"], NotNegative),
                checked("compiled", data["compiled"], bool),
                checked("peak_bytes", data["peak_bytes"], _Bytes | None),
                checked("density", data["density"], Fraction | None),
                None if figures is None else Figures.from_json(figures),
                None if not data["repeated"] else math.inf if repeat is None else float(repeat),
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            log.warning("the clip %s is damaged and is generated again: %s", name, error)
            return None

    def keep(self, setting: int, key: Key, clip: Clip) -> Clip:
        """Write a clip; returns it as `load` would."""
        name = self._name(setting, key)
        unfinished = name.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.save(file, clip.frames, allow_pickle=False)
        os.replace(unfinished, name.with_suffix(".npy"))
        record = {
            "seconds": clip.seconds,
            "compiled": clip.compiled,
            "peak_bytes": clip.peak_bytes,
            "density": clip.density,
            "figures": None if clip.figures is None else clip.figures.to_json(),
            "repeated": clip.repeat_psnr is not None,
            "repeat_psnr": None if clip.repeat_psnr is None else finite(clip.repeat_psnr),
        }
        # The record comes last: a clip without one is none.
        _write(name.with_suffix(".json"), json.dumps(record, allow_nan=False).encode())
        kept = self.load(setting, key)
        assert kept is not None, "what was just written can be read"
        return kept

    def write(self, name: str, content: str) -> Path:
        """Write a text file at once; returns its path."""
        _write(self.path / name, content.encode())
        return self.path / name

    def _name(self, setting: int, key: Key) -> Path:
        return self.path / "clips" / f"setting{setting}-prompt{key[0]}-seed{key[1]}"


def _frames(path: Path) -> Frames:
    """Frames of a file, mapped: a comparison's clips may be larger than the memory."""
    if not path.is_file():  # a pipe would be waited for
        raise InvalidValueError(f"{path.name} is missing, or is no file")
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.dtype != np.uint16 or found.ndim != 4 or found.shape[3] != 3:
        raise InvalidValueError(f"{path.name} holds {found.dtype} {found.shape}, not frames")
    return found


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
