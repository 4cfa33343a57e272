"""Finished measurements on disk, so that an interrupted tuning loses none of them.

One JSON line each, flushed as it is made, one file for each rank; every rank reads all files, so
that a tuning may go on with another number of ranks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO


class Journal:
    """Finished measurements by key.

    Args:
        path: of the journal; None keeps nothing.
        facts: what the measurements are of, plain data. Lines under other facts are not read.
        rank: of this process; ranks above 0 append to ``path`` with their number behind it.
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
            for path in sorted(self.path.parent.glob(f"{self.path.name}*")):
                self._read(path)
            name = self.path.name + (f".{self.rank}" if self.rank else "")
            self._file = self.path.with_name(name).open("a")
            # A line that was cut off by the interruption must not swallow the next one.
            self._file.write("\n" + json.dumps({"facts": json.loads(self.facts)}) + "\n")
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
            self._file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._file.flush()

    def _read(self, path: Path) -> None:
        mine = False
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off, or not ours
                continue
            if not isinstance(entry, dict):
                continue
            if "facts" in entry:
                mine = json.dumps(entry["facts"]) == self.facts
            elif mine:
                key, value = entry.get("key"), entry.get("value")
                if isinstance(key, str) and isinstance(value, float) and math.isfinite(value):
                    self.finished[key] = value
