"""Text that came from files, keys and errors, on its way to a terminal."""

from __future__ import annotations

from rich.text import Text

from svg_ear_compile.kernels.checked import printable


def plain(*lines: str) -> Text:
    """Lines as they are: brackets are no markup, control characters are escaped."""
    return Text("\n".join(map(printable, lines)))
