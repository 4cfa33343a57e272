"""Where in the user's code a warning points to."""

from __future__ import annotations

import sys
from types import FrameType

_BETWEEN = ("svg_ear_compile", "contextlib")


def level_of_user() -> int:
    """The `stacklevel` of a warning of the calling function that points outside of this package."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    return level
