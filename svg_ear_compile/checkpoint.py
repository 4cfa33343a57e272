"""Checkpoint of a tuning run: finished measurements on disk, so that an interruption loses none.

Each rank appends to a file of its own, one JSON line for each measurement, flushed at once. Every
rank reads the files of all ranks, so a run may be resumed with another number of ranks. The
checksum of a line covers the measured value, its key, and the facts that it depends on (the model
and its inputs). A line whose checksum does not match is damaged, or belongs to another run, and is
ignored.
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
"""Largest file that is read: room for over a hundred thousand measurements."""
_LONGEST_LINE = 4096


class Checkpoint:
    """Finished measurements by key; a context manager, which opens and closes the file.

    Args:
        path: checkpoint file; None keeps the measurements in memory only.
        facts: plain data that the measurements depend on. Lines written under other facts are
            ignored.
        rank: rank of this process. Rank r > 0 appends to the file ``path`` + ``.r``.

    Attributes:
        finished: key to value of every finished measurement.

    Raises:
        OSError, ValueError: on entry, if this rank cannot append to its file. A file of another
            rank that cannot be read is skipped with a warning.
    """

    def __init__(self, path: Path | None, facts: Any, rank: int = 0) -> None:
        self.path = path
        self.facts = json.dumps(facts)
        self.rank = rank
        self.finished: dict[str, float] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Checkpoint:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._files(self.path):
                self._read(path)
            name = self.path.name + (f".{self.rank}" if self.rank else "")
            self._file = _open_to_append(self.path.with_name(name))
            # The last line may have been cut off: the next one must not continue it.
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
        """Record a finished measurement and write it to disk."""
        self.finished[key] = value
        if self._file is not None:
            line = {"key": key, "value": value, "checksum": self._checksum(key, value)}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @staticmethod
    def _files(path: Path) -> list[Path]:
        """The files of all ranks: ``path`` itself, and ``path`` followed by a rank's number."""
        ours = re.compile(re.escape(path.name) + r"(\.[1-9][0-9]{0,5})?")
        return sorted(found for found in path.parent.iterdir() if ours.fullmatch(found.name))

    def _read(self, path: Path) -> None:
        try:
            with json_record.naming(path):
                lines = json_record.read_bytes(path, MOST_BYTES).split(b"\n")
        except (OSError, ValueError) as error:
            log.warning("measurements skipped: %s", printable(str(error)))
            return
        for line in lines:
            if not line.startswith(b'{"key": ') or len(line) > _LONGEST_LINE:
                continue
            try:
                entry = json_record.parse(line)
            except ValueError:  # a line that was cut off, or is no measurement
                continue
            key, value = entry.get("key"), entry.get("value")
            sound = isinstance(key, str) and isinstance(value, float) and math.isfinite(value)
            if sound and entry.get("checksum") == self._checksum(key, value):
                self.finished[key] = value

    def _checksum(self, key: str, value: float) -> str:
        covered = json.dumps([self.facts, key, value])
        return hashlib.sha256(covered.encode()).hexdigest()[:16]


def _open_to_append(path: Path) -> TextIO:
    """Open a regular file to append text; never waits for the reader of a pipe."""
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
