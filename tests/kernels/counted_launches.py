"""What a call of the GPU path launches, counted on a CPU in Triton's interpreter.

Every operation of PyTorch that would start a kernel or a copy on a GPU counts, and every launch of
a Triton kernel. PyTorch's sort counts once and starts several kernels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import svg_ear_compile.kernels

_ROOM = Path(svg_ear_compile.kernels.__path__[0]).resolve()
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counter of launches, by the function of the room that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, str]] = Counter()
        self.inside_kernel = False

    def note(self, name: str) -> None:
        """Count one launch for the innermost function of `kernels` on the stack."""
        frame = sys._getframe(1)
        while frame is not None and _ROOM not in Path(frame.f_code.co_filename).resolve().parents:
            if frame.f_code.co_name == "poison":  # the tests fill what the call leaves empty
                return
            frame = frame.f_back
        place = Path(frame.f_code.co_filename).stem + "." + frame.f_code.co_name if frame else ""
        self.counted[place, name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.inside_kernel and starts_a_kernel(func):
            self.note(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counted.total()

    def __str__(self) -> str:
        """One line for each function, those of most launches first."""
        of_place: dict[str, list[str]] = {}
        for (place, name), count in self.counted.items():
            of_place.setdefault(place, []).append(name if count == 1 else f"{name} x{count}")
        lines = (f"{place}: {', '.join(names)}" for place, names in of_place.items())
        return "\n".join([f"{self.total} launches", *lines])


def starts_a_kernel(func: Any) -> bool:
    """False for views and allocations."""
    is_view = any(a.alias_info is not None and not a.alias_info.is_write
                  for a in func._schema.returns)  # fmt: skip
    return not is_view and func.overloadpacket.__name__ not in _ALLOCATES


@contextmanager
def counted_launches() -> Iterator[Launches]:
    """Count everything that is launched inside the with block."""
    from triton.runtime.interpreter import GridExecutor

    launches, launch = Launches(), GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.note(self.fn.__name__)
        launches.inside_kernel = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            launches.inside_kernel = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        with launches:
            yield launches
