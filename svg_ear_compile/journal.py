"""Finished measurements on disk, so that an interrupted tuning loses none of them.

One JSON line each, flushed as it is made, one file for each rank; every rank reads all files, so
that a tuning may go on with another number of ranks. A line bears a seal of what was measured, of
what, and of the result: a line that was damaged, or that is of something else, is not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from svg_ear_compile.cost_model import json_record
from svg_ear_compile.kernels.checked import printable

log = logging.getLogger(__name__)

MOST_BYTES = 16 << 20
"""Of one file: above a hundred thousand measurements."""
_LONGEST_LINE = 4096


class Journal:
    """Finished measurements by key.

    Args:
        path: of the journal; None keeps nothing.
        facts: what the measurements are of, plain data. Lines under other facts are not read.
        rank: of this process; ranks above 0 append to ``path`` with their number behind it.

    Raises:
        OSError, ValueError: on entry, if nothing can be appended to the file of this rank. Files
            that cannot be read are passed over, with a warning.
    """

    def __init__(self, path: Path | None, facts: Any, rank: int = 0) -> None:
        self.path = path
        self.facts = json.dumps(facts)
        self.rank = rank
        self.finished: dict[str, float] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Journal:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._files(self.path):
                self._read(path)
            name = self.path.name + (f".{self.rank}" if self.rank else "")
            self._file = _appended(self.path.with_name(name))
            # A line that was cut off by the interruption must not swallow the next one.
            self._file.write("\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, key: str, value: float) -> None:
        """Keep a finished measurement."""
        self.finished[key] = value
        if self._file is not None:
            line = {"key": key, "value": value, "seal": self._seal(key, value)}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @staticmethod
    def _files(path: Path) -> list[Path]:
        """The files of all ranks; what else has such a name is somebody else's."""
        ours = re.compile(re.escape(path.name) + r"(\.[1-9][0-9]{0,5})?")
        return sorted(found for found in path.parent.iterdir() if ours.fullmatch(found.name))

    def _read(self, path: Path) -> None:
        try:
            with json_record.naming(path):
                lines = json_record.read_bytes(path, MOST_BYTES).split(b"\n")
        except (OSError, ValueError) as error:
            log.warning("measurements passed over: %s", printable(str(error)))
            return
        for line in lines:
            if not line.startswith(b'{"key": ') or len(line) > _LONGEST_LINE:
                continue
            try:
                entry = json_record.parse(line)
            except ValueError:  # cut off, or not ours
                continue
            key, value = entry.get("key"), entry.get("value")
            sound = isinstance(key, str) and isinstance(value, float) and math.isfinite(value)
            if sound and entry.get("seal") == self._seal(key, value):
                self.finished[key] = value

    def _seal(self, key: str, value: float) -> str:
        sealed = json.dumps([self.facts, key, value])
        return hashlib.sha256(sealed.encode()).hexdigest()[:16]


def _appended(path: Path) -> TextIO:
    """A file opened to append text; never waits for the reader of a pipe."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(path, flags, 0o666)
    file = os.fdopen(handle, "a", encoding="ascii")
    try:
        with json_record.naming(path):
            json_record.check_regular(handle)
    except BaseException:
        file.close()
        raise
    return file
