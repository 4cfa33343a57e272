"""Text from files, keys and errors, made safe for a terminal."""

from __future__ import annotations

from rich.text import Text

from svg_ear_compile.kernels.checked import printable


def plain(*lines: str) -> Text:
    """Lines as literal text: brackets are no markup, control characters are escaped."""
    return Text("\n".join(map(printable, lines)))
